"""What does the report of a whole study take, from stored scores alone and on one core?

110 made-up runs of the paper's grid (130,046 validation images, 47 % of them defects, in 17
classes; a training CSV of 1,040,129 rows): every table and figure, with intervals and 100 drawn
subsets at each prevalence; and the 25 cells of five training by five validation proportions.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import emit, medians
from common.annotations import CLASS_IMPORTANCE
from common.metrics import all_scores
from common.running.folder import write_config, write_json
from common.running.provenance import csv_hashes
from common.scoring import PREVALENCES
from common.study.evaluate import load_scores
from common.study.grid import read_grid
from common.study.report import write_report

TRAIN, VAL, DEFECTS = 1_040_129, 130_046, 0.47
DRAWS, EPOCHS = 100, 45
REPORT, MATRIX = 300, 5  # seconds at most
KINDS = ("features", "embeddings")


def labels(n, rng):
    """(n,) 0/1 and (n, 17) bool: every defect has one class or more, from frequent to rare."""
    share = np.geomspace(0.3, 0.002, len(CLASS_IMPORTANCE))
    label = (rng.random(n) < DEFECTS).astype(np.int8)
    classes = (rng.random((n, len(share))) < share) & (label == 1)[:, None]
    without = np.flatnonzero((label == 1) & ~classes.any(axis=1))
    classes[without, rng.choice(len(share), len(without), p=share / share.sum())] = True
    return label, classes


def write_csv(path, label, classes):
    """A file in Sewer-ML's columns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"Filename,WaterLevel,VA,{','.join(CLASS_IMPORTANCE)},ND,Defect\n")
        for i, (defect, of) in enumerate(
            zip(label.tolist(), classes.astype(int).tolist(), strict=True)
        ):
            cells = ",".join(map(str, of))
            file.write(f"{path.stem}_{i:08d}.png,5,0,{cells},{1 - defect},{defect}\n")


def make_up(run, names, label, classes, hashes, rng):
    """What a finished run leaves, as far as a report reads it. run: a GridRun."""
    run.folder.mkdir(parents=True)
    strength = rng.uniform(0.5, 2)
    logits = [rng.normal(strength * label - 1, 1).astype(np.float32) for _ in range(3)]
    keys = ("logit", "logit_offline", "logit_offline_fixed")
    arrays = dict(zip(keys, logits, strict=True)) | {"filename": names, "label": label}
    class_names = np.array(list(CLASS_IMPORTANCE))
    np.savez(run.folder / "val_scores.npz", classes=classes, class_names=class_names, **arrays)
    scores = [all_scores(logit, label, classes, class_names) for logit in logits]
    measures = {f"rankme_{k}{c}": rng.uniform(1, 99) for k in KINDS for c in ("", "_centred")}
    measures |= {f"{m}_{k}": rng.uniform(0, 1) for k in KINDS for m in ("mean", "std")}
    measures |= {f"rankme_{k}_largest": 128 for k in KINDS}
    validated = {f"label_free_{key}": value for key, value in measures.items()}
    step = {"kind": "step", "loss": 1.0, "lr": 0.1, "samples_per_second": 900.0}
    with open(run.folder / "log.jsonl", "w") as log:
        for epoch in range(EPOCHS):
            for i in range(40):  # as many records of steps as a small subset has
                log.write(json.dumps(step | {"step": 40 * epoch + i, "epoch": epoch}) + "\n")
            of_epoch = {"kind": "epoch", "step": 40 * epoch + 40, "epoch": epoch}
            more = validated | {"label_free_n": VAL} if epoch % 5 == 4 else {}
            log.write(json.dumps(of_epoch | more) + "\n")
    result = {
        "method": "random" if run.cfg.run.frozen_encoder else run.cfg.method,
        "backbone": run.cfg.backbone,
        "seed": run.cfg.seed,
        "train_defect_proportion": run.cfg.data.train_defect_proportion,
        "epochs": EPOCHS,
        "train_rows": {"normal": 552_820, "defect": 487_309, "unlabelled": 0},
        "train": scores[0],
        **dict(zip(("val", "val_offline", "val_offline_fixed"), scores, strict=True)),
        "label_free": measures,
        "seconds": 3600.0,
    }
    write_json(run.folder / "result.json", result)
    write_config(run.folder, dataclasses.asdict(run.cfg))
    write_json(run.folder / "provenance.json", {"csv_sha256": hashes})


def make_grid(folder):
    """The runs of the paper's grid, all finished."""
    rng = np.random.default_rng(0)
    for name, n in (("train", TRAIN), ("val", VAL)):
        label, classes = labels(n, rng)
        write_csv(folder / f"{name}.csv", label, classes)
    csvs = [f"data.{name}_csv={folder / name}.csv" for name in ("train", "val")]
    place = [f"run.output_dir={folder / 'runs'}", f"data.image_root={folder / 'images'}"]
    runs = read_grid("configs/grid/paper.yaml", [*csvs, *place])
    names, hashes = np.array([f"val_{i:08d}.png".encode() for i in range(VAL)]), None
    for run in runs:
        hashes = hashes or csv_hashes(run.cfg.data)
        make_up(run, names, label, classes, hashes, rng)
    return runs


def matrix(runs):
    """The scores of five runs at five validation prevalences."""
    stored = [load_scores(run.folder) for run in runs]
    return [[scores.at(p)["f1"] for p in PREVALENCES] for scores in stored]


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        start, folder = time.monotonic(), Path(name)
        runs = make_grid(folder)
        print(f"{len(runs)} runs made up: {time.monotonic() - start:.0f} s", file=sys.stderr)
        five = [run for run in runs if run.cfg.method == "simclr" and "methods" in run.groups][:5]
        seconds = medians({"ours": lambda: matrix(five)}, repeats=5)["ours"]
        emit("25-cell validation matrix of 5 runs", seconds, None, MATRIX, "s")
        start = time.monotonic()
        write_report(runs, folder / "report", draws=DRAWS)
        seconds = time.monotonic() - start
        emit(f"report of {len(runs)} runs, {DRAWS} drawn subsets", seconds, None, REPORT, "s")


if __name__ == "__main__":
    main()
