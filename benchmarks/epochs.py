"""How long does an epoch's first batch take, from the second epoch on?

One pass of the loader serves all epochs, so that the batch is there when it is asked for. The peer
starts the same loader, with its workers kept, anew for every epoch. Two workers; a step is waited
for, as for a GPU, for as long as the workers need for a batch. The limit is one step's time.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.pipeline import FRAMES, SMALLEST, draw_frames
from benchmarks.timing import emit
from common.augmentations import CropViews
from common.data import batches, build_loaders
from common.sampler import EpochSampler

BATCH, EPOCHS = 8, 6


def first_waits(next_batch, steps, step):
    """Seconds for the first batch of each epoch but the first one."""
    waits = []
    for _ in range(EPOCHS):
        for i in range(steps):
            start = time.perf_counter()
            next_batch(i)
            if i == 0:
                waits.append(time.perf_counter() - start)
            time.sleep(step)
    return statistics.median(waits[1:])


def main():
    with tempfile.TemporaryDirectory() as folder:
        train = draw_frames(Path(folder), 352, 288)
        crops = CropViews(224, SMALLEST, 0.275, 0.5, 2, seed=0)
        rows, device = np.arange(FRAMES), torch.device("cpu")
        sampler = EpochSampler(rows, BATCH, seed=0)
        loader, _ = build_loaders(folder, train, sampler, crops, train, 2, device)
        start = time.perf_counter()
        for images in itertools.islice(batches(loader), sampler.steps_per_epoch):
            del images
        step = (time.perf_counter() - start) / sampler.steps_per_epoch
        sampler.start(0, 0, EPOCHS)
        one = batches(loader)
        ours = first_waits(lambda i: next(one), sampler.steps_per_epoch, step)
        current = [None]

        def anew(i):
            if i == 0:
                sampler.start(0)
                current[0] = batches(loader)
            next(current[0])

        peer = first_waits(anew, sampler.steps_per_epoch, step)
    emit("an epoch's first batch", ours, peer, peer / step, "s", step=step)


if __name__ == "__main__":
    main()
