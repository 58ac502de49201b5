"""Does the memory of a loader's worker grow with the rows of the table? 8 workers, tiny images.

Private memory of a worker, 1.3 million rows against 13,000, by how the workers are started: under
`fork` they share the arrays, otherwise each holds a copy of the columns.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import emit
from common.annotations import CLASS_IMPORTANCE, Annotations
from common.augmentations import CropViews
from common.data import batches, build_loaders
from common.sampler import EpochSampler

MANY, FEW, WORKERS, FILES = 1_300_000, 13_000, 8, 64


def table(rows):
    """Annotations of Sewer-ML's size a row; the same few files over and over."""
    names = np.array([f"{i:08d}.png".encode() for i in range(FILES)])
    defect = np.zeros(rows, np.int8)
    classes = np.zeros((rows, len(CLASS_IMPORTANCE)), bool)
    line = np.arange(rows, dtype=np.int32)
    names = names[np.arange(rows) % FILES]
    return Annotations("a.csv", names, defect, classes, tuple(CLASS_IMPORTANCE), line, ())


def private_megabytes(pid):
    """Memory that a process shares with no other, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def worker_megabytes(rows, how):
    """Of the largest worker after some batches; to be called in a process of its own."""
    multiprocessing.set_start_method(how, force=True)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(FILES):
            Image.new("RGB", (32, 32), (4 * i, 0, 0)).save(Path(folder, f"{i:08d}.png"))
        train, val = table(rows), table(FILES)
        sampler = EpochSampler(np.arange(rows), 64, seed=0)
        crops = CropViews(16, 0.4, 0.275, 0.5, 2, seed=0, noise_size=4)
        loader, _ = build_loaders(folder, train, sampler, crops, val, WORKERS, torch.device("cpu"))
        steps = batches(loader)
        for _ in islice(steps, 6 * WORKERS):
            pass
        return max(private_megabytes(p.pid) for p in multiprocessing.active_children())


def main():
    for how, target in (("fork", 0.9), ("spawn", 0.6)):
        found = []
        for rows in (MANY, FEW):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(worker_megabytes, rows, how).result())
        emit(f"a worker by {how}, {MANY:,} rows against {FEW:,}", *found, target, "MB")


if __name__ == "__main__":
    main()
