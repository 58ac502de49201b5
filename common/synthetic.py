"""Draw a sewer-like data set in the Sewer-ML layout, to try the code without the real images.

    python -m common.synthetic --out DIR --train N --val N --size PX --seed S

writes DIR/images/00000001.png ..., DIR/SewerML_Train.csv and DIR/SewerML_Val.csv. PX is the
image height in pixels; the width follows the 352 x 288 frames of Sewer-ML.

A frame is a ray cast along the axis of a pipe: lamp fall-off, joints, water that mirrors the wall,
dirt, stains, overlay text, camera noise. The frames of a video share pipe and camera; train and
val share no video. Realistic: layout, shares and co-occurrence of the classes, perspective, and
that colour and brightness tell little. Not realistic: defects look more alike and are easier to
see than real ones, no label is wrong, and PF, OS and OP never occur. Scores on this set say
nothing about scores on Sewer-ML.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.data import cores
from common.running.arguments import path_argument
from common.running.folder import write_atomically
from common.running.progress import Progress
from common.sets.sewer_frame import CLASSES, render

VERSION = 1  # raise it when the same arguments would give other images
HEADER = ["Filename", "WaterLevel", "VA", *CLASSES, "ND", "Defect"]
DEFECT_SHARE = {"Train": 0.4685, "Val": 0.4719}  # as in Sewer-ML
CLASS_WEIGHTS = dict(
    FS=0.25, OB=0.17, OK=0.13, AF=0.08, BE=0.08, GR=0.06, RB=0.05, RO=0.035, IN=0.035, PH=0.03,
    DE=0.025, PB=0.02, FO=0.02, IS=0.02,
)  # fmt: skip


class Row(NamedTuple):
    """One image: number, split, video, water level in percent, water flag, classes."""

    index: int
    split: str
    video: int
    water: int
    va: int
    classes: tuple


def draw_rows(train, val, seed):
    """List of train + val rows in videos of 6 to 12 frames; the defect share is exact."""
    rows, video, names = [], 0, list(CLASS_WEIGHTS)
    for key, (split, count) in enumerate({"Train": train, "Val": val}.items()):
        rng, frames = np.random.default_rng([seed, 0, key]), []
        while len(frames) < count:
            # Some videos hold more defects, and some kinds of defect, than others.
            habit = np.array(list(CLASS_WEIGHTS.values())) * rng.gamma(1.5, size=len(names))
            level = rng.choice(6, p=[0.3, 0.25, 0.25, 0.12, 0.06, 0.02])
            trouble = rng.normal(0, 0.5)
            for _ in range(min(rng.integers(6, 13), count - len(frames))):
                step = np.clip(level + rng.choice(3, p=[0.2, 0.6, 0.2]) - 1, 0, 5)
                score = trouble + rng.normal()
                frames.append((score, video, (0, 5, 10, 20, 30, 40)[step], habit / habit.sum()))
            video += 1
        ranks = np.argsort(np.argsort([-frame[0] for frame in frames]))
        for rank, (_, number, water, habit) in zip(ranks, frames, strict=True):
            kinds = rng.choice(4, p=[0.58, 0.28, 0.11, 0.03]) + 1
            chosen = rng.choice(names, kinds, replace=False, p=habit)
            defect = rank < round(DEFECT_SHARE[split] * count)
            classes = tuple(c for c in CLASSES if defect and c in chosen)
            va = int(water >= 10 and rng.random() < 0.2)
            rows.append(Row(len(rows) + 1, split, number, water, va, classes))
    return rows


def write_image(row, folder, size, seed):
    """Render a row into folder as an 8-digit PNG."""
    Image.fromarray(render(row, size, seed)).save(folder / f"{row.index:08d}.png")


def csv_line(row):
    """The cells of a row in the order of HEADER; ND is 1 if there is neither defect nor VA."""
    flags, defect = [int(c in row.classes) for c in CLASSES], int(bool(row.classes))
    cells = [f"{row.index:08d}.png", row.water, row.va, *flags, int(not defect and not row.va)]
    return ",".join(map(str, [*cells, defect])) + "\n"


def generate(out, train, val, size, seed):
    """Write the data set to folder out; return False if exactly this set was already there."""
    if min(train, val, size) <= 0 or seed < 0:
        raise ValueError("train, val and size must be positive and seed must not be negative.")
    out, rows = Path(out), draw_rows(train, val, seed)
    made = dict(train=train, val=val, size=size, seed=seed, version=VERSION)
    files = {}
    for split in DEFECT_SHARE:
        lines = [",".join(HEADER) + "\n", *(csv_line(row) for row in rows if row.split == split)]
        files[out / f"SewerML_{split}.csv"] = "".join(lines)
    files[out / "synthetic.json"] = json.dumps(made) + "\n"  # last: it says that all is written
    same = [path.read_text("utf-8") == text for path, text in files.items() if path.exists()]
    if same == [True] * len(files):
        return False
    if not all(same):
        raise ValueError(f"{out} already holds another data set; choose another directory.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    job = partial(write_image, folder=out / "images", size=size, seed=seed)
    with ProcessPoolExecutor(cores()) as pool:
        progress = Progress(len(rows), "drawing", "images")
        for _ in pool.map(job, rows, chunksize=16):
            progress.update()
        progress.close()
    for path, text in files.items():
        write_atomically(path, text)
    return True


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw a sewer-like data set (Sewer-ML layout).")
    parser.add_argument("--out", type=path_argument, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--val", type=int, default=600, help="validation images")
    parser.add_argument("--size", type=int, default=64, help="image height in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print("done" if generate(**vars(args)) else "already there")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
