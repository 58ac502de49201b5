"""Runs side by side with the floors they have to beat: a table and a picture.

    python -m common.compare RUN_FOLDER [RUN_FOLDER ...] --out compare.png

All scores are of the same validation set: those of runs by the offline probe, those of the
thumbnails by the same regression on 16 x 16 pixels, trained on the same rows.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

from common.annotations import read_annotations
from common.augmentations import resize_squash
from common.data import open_image
from common.metrics import METRICS, all_scores
from common.offline_probe import MOST_ROWS, offline_probe, stratified_sample
from common.probe import pos_weight
from common.running.errors import UserError
from common.running.process import entry_point
from common.running.progress import Progress
from common.running.schema import read_yaml
from common.running.standing import read_result

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (the backend has to be chosen first)

THUMBNAIL = 16  # pixels
SHOWN = ("f1", "auroc", "average_precision")
LABELS = tuple(map(METRICS.get, SHOWN))
DEFECT_COLOUR, NORMAL_COLOUR = "#D55E00", "#0072B2"  # told apart by the colour-blind too
BAR_COLOURS = ("#0072B2", "#E69F00", "#009E73")


class Entry(NamedTuple):
    """One line of the table."""

    name: str
    scores: dict
    logits: np.ndarray  # (N,) of the validation set


def read_run(folder):
    """(config, result, validation arrays) of a finished run."""
    folder = Path(folder)
    result = read_result(folder)
    with np.load(folder / "val_scores.npz") as stored:
        return read_yaml(folder / "config.yaml"), result, dict(stored)


def thumbnails(image_root, annotations, rows, label):
    """(n, 3 x 16 x 16) float32 pixels in 0 to 1 of the given rows."""
    root, progress = Path(image_root).resolve(), Progress(len(rows), label, "images")
    pixels = torch.empty(len(rows), 3 * THUMBNAIL**2)
    for i, row in enumerate(rows):
        image = open_image(str(root), annotations.name(row))
        pixels[i] = resize_squash(image, THUMBNAIL).flatten() / 255
        progress.update()
    progress.close()
    return pixels


def floors(config, folder, val):
    """What must be beaten: calling everything a defect, and regression on thumbnails."""
    data, seed = config["data"], config["seed"]
    classes, names = val["classes"], tuple(val["class_names"])
    everything = np.ones(len(val["label"]))
    subset = read_annotations(Path(folder) / "train_subset.csv")
    rows = stratified_sample(subset.defect, MOST_ROWS, seed)
    weight = pos_weight(config["probe"]["pos_weight"], subset.defect)
    train_pixels = thumbnails(data["image_root"], subset, rows, "training thumbnails")
    annotations = read_annotations(data["val_csv"])
    if not np.array_equal(annotations.filename, val["filename"]):
        raise UserError(f"{data['val_csv']}: no longer what {folder} was scored on")
    val_pixels = thumbnails(
        data["image_root"], annotations, range(len(annotations)), "validation thumbnails"
    )
    logits, why = offline_probe(train_pixels, subset.defect[rows], val_pixels, weight, seed)
    if logits is None:
        raise UserError(f"thumbnails: {why}")
    return [
        Entry("all-defect", all_scores(everything, val["label"], classes, names), everything),
        Entry(
            "16x16 thumbnails",
            all_scores(logits.numpy(), val["label"], classes, names),
            logits.numpy(),
        ),
    ]


def collect(folders):
    """Entries of the floors and of all runs, and the first run's config and validation arrays."""
    runs = [(folder, *read_run(folder)) for folder in folders]
    first, config, _, val = runs[0]
    entries = floors(config, first, val)
    for folder, _, result, arrays in runs:
        if not np.array_equal(arrays["filename"], val["filename"]):
            raise UserError(f"{folder} and {first} were scored on different validation sets")
        scores = result["val_offline"]
        if scores["auroc"] is None:
            raise UserError(f"{folder}: no offline probe ({scores['undefined']['auroc']})")
        name = {"random": "random encoder"}.get(result["method"], result["method"])
        entries.append(Entry(f"{name}, {result['backbone']}", scores, arrays["logit_offline"]))
    return entries, config, val


def table(entries, val):
    """The entries as text, a line each."""
    n, n_defect = (val["label"] >= 0).sum(), (val["label"] == 1).sum()
    lines = [f"validation: {n} labelled images, {n_defect} defects ({n_defect / max(n, 1):.1%})"]
    lines.append(f"{'':28}" + "".join(f"{label:>19}" for label in LABELS))
    for entry in entries:
        values = (entry.scores[key] for key in SHOWN)
        cells = "".join(f"{'-':>19}" if v is None else f"{v:19.3f}" for v in values)
        lines.append(f"{entry.name:28}{cells}")
    return "\n".join(lines)


def _show_images(axes, title, rows, logits, config, val):
    """One strip of images; the frame says what each is: a defect or normal."""
    root, names = Path(config["data"]["image_root"]).resolve(), val["class_names"]
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, rows, strict=False):
        axis.axis("on")
        axis.imshow(open_image(str(root), val["filename"][row].decode()))
        defect = val["label"][row] == 1
        classes = " ".join(names[val["classes"][row]][:4])
        axis.set_xlabel(f"{logits[row]:+.1f}  {classes if defect else 'normal'}", fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
        for side in axis.spines.values():
            side.set(color=DEFECT_COLOUR if defect else NORMAL_COLOUR, linewidth=3)
    axes[0].set_title(title, loc="left", fontsize=11)


def picture(entries, config, val, path, columns=8):
    """Bars of the three scores, then images that the last run ranks well and badly."""
    last, label = entries[-1], val["label"]
    order = np.argsort(-last.logits)
    defects, normals = order[label[order] == 1], order[label[order] == 0]
    figure = plt.figure(figsize=(13, 9.5))
    grid = figure.add_gridspec(
        *(4, columns), height_ratios=(1.9, 1, 1, 1), hspace=0.35, wspace=0.06
    )
    grid.update(left=0.05, right=0.99, top=0.97, bottom=0.04)
    bars = figure.add_subplot(grid[0, :])
    width = 0.8 / len(SHOWN)
    for k, (key, name, colour) in enumerate(zip(SHOWN, LABELS, BAR_COLOURS, strict=True)):
        values = [entry.scores[key] or 0.0 for entry in entries]
        places = np.arange(len(entries)) + (k - 1) * width
        drawn = bars.bar(places, values, width * 0.95, label=name, color=colour)
        bars.bar_label(drawn, fmt="%.2f", fontsize=9)
    bars.set_xticks(range(len(entries)), [entry.name for entry in entries])
    bars.set_ylim(0, 1.1)
    bars.set_ylabel("score on validation")
    bars.legend(ncols=3, loc="upper left", frameon=False)
    bars.spines[["top", "right"]].set_visible(False)
    strips = (
        (f"Most likely defects, says {last.name} (logit, true classes)", order[:columns]),
        ("Defects it would miss first", defects[::-1][:columns]),
        ("Normal images it would raise a false alarm for first", normals[:columns]),
    )
    for i, (title, rows) in enumerate(strips):
        axes = [figure.add_subplot(grid[i + 1, c]) for c in range(columns)]
        _show_images(axes, title, rows, last.logits, config, val)
    figure.text(0.99, 0.617, "frame: orange = defect, blue = normal", fontsize=10, ha="right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="the last one is pictured")
    parser.add_argument("--out", default="compare.png", metavar="FILE.png")
    args = parser.parse_args(argv)
    entries, config, val = collect(args.runs)
    picture(entries, config, val, args.out)
    print(table(entries, val))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
