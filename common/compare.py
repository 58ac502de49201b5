"""Runs side by side with the floors they have to beat: a table and a picture.

    python -m common.compare RUN_FOLDER [RUN_FOLDER ...] --out compare.png

All scores are of the same validation set: those of runs by the offline probe, those of the
thumbnails by the same regression on 16 x 16 pixels, trained on the same rows. "fixed labels": of a
regression on all labelled rows of the training CSV (of more than 50,000 a sample; with
`data.labels` those that it leaves), whatever the run trained on. "knn" and "Mahalanobis": of the
distance to normal training images, which needs no defect.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

from common.annotations import read_annotations
from common.inspection.shortcuts import THUMBNAIL, thumbnail
from common.inspection.trained import read_arrays
from common.metrics import METRICS, all_scores, without_values
from common.normal_only import NAMES, NormalReference, normal_only_scores, reference_rows
from common.offline_probe import apply_probe, fits, offline_probe
from common.probe import pos_weight
from common.running.arguments import path_argument
from common.running.errors import UserError
from common.running.folder import SCORES
from common.running.process import entry_point
from common.running.progress import Progress
from common.running.standing import read_result
from common.running.weights import trained_config
from common.sampler import keep_labels
from common.store import leave_out_unreadable, open_images

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a `$` of a name is a `$`
from matplotlib import pyplot as plt  # noqa: E402 (the backend has to be chosen first)

SHOWN = (
    *(("own", "f1"), ("own", "auroc"), ("own", "average_precision")),
    *((which, "auroc") for which in ("fixed", "knn", "mahalanobis")),
)
OF = {"own": "", "fixed": ", fixed labels", "knn": ", knn", "mahalanobis": ", Mahalanobis"}
LABELS = [METRICS[key] + OF[which] for which, key in SHOWN]
WIDTH = max(map(len, LABELS)) + 2  # of a column
FROZEN = {"random": "random encoder", "pretrained": "pretrained encoder"}  # methods in print
DEFECT_COLOUR, NORMAL_COLOUR = "#D55E00", "#0072B2"  # told apart by the colour-blind too
COLUMNS = 8  # images of a strip
BAR_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")


class Entry(NamedTuple):
    """One line of the table."""

    name: str
    own: dict  # scores of the probe that is fitted on the run's own rows
    fixed: dict  # of the one that is fitted on all labelled rows
    normal_only: dict  # {knn: scores, mahalanobis: scores}
    logits: np.ndarray  # (N,) of the validation set; NaN where no probe could be fitted

    def score(self, which, key):
        """which: own | fixed | knn | mahalanobis; None where there is none."""
        scores = self.normal_only.get(which) or getattr(self, which, {})
        return scores.get(key)


def read_run(folder):
    """(config, result, validation arrays) of a finished run."""
    folder = Path(folder)
    result = read_result(folder)
    return trained_config(folder), result, read_arrays(folder / SCORES)


def thumbnails(images, annotations, rows, label):
    """(n, 3 x 16 x 16) float32 pixels in 0 to 1 of the given rows. images: as of `open_images`."""
    progress = Progress(len(rows), label, "images")
    pixels = torch.empty(len(rows), 3 * THUMBNAIL**2)
    for i, row in enumerate(rows):
        image = images.read(annotations.name(row), f" ({annotations.place(row)})")
        pixels[i] = thumbnail(image)
        progress.update()
    progress.close()
    return pixels


def floors(config, folder, val, images):
    """What must be beaten: calling everything a defect, and regression on thumbnails."""
    data = config["data"]
    tables = read_annotations(data["train_csv"]), read_annotations(data["val_csv"])
    train, annotations = leave_out_unreadable(images, data.get("max_bad_images", 0), *tables)
    subset = read_annotations(Path(folder) / "train_subset.csv")
    rows = np.flatnonzero(np.isin(train.filename, subset.filename))
    if len(rows) != len(subset) or not np.array_equal(annotations.filename, val["filename"]):
        raise UserError(f"{data['train_csv']} and {data['val_csv']}: no longer those of {folder}")
    train = keep_labels(train, rows, data.get("labels"), config["seed"])
    how = val["label"], val["classes"], tuple(val["class_names"])
    on = fits(train.defect, rows, config["seed"])
    normals = reference_rows(train.defect, rows, config["seed"])
    union = np.unique(np.concatenate([normals, *(of for of, _ in on.values())]))
    pixels = thumbnails(images, train, union, "training thumbnails")
    val_pixels = thumbnails(images, annotations, range(len(val["label"])), "validation thumbnails")
    everything = np.ones(len(val["label"]))
    trivial = all_scores(everything, *how)
    scores, all_logits = [], []
    for of, seed in on.values():
        weight = pos_weight(config["probe"]["pos_weight"], train.defect[of])
        x = pixels[np.searchsorted(union, of)]
        probe, why = offline_probe(x, train.defect[of], weight, seed)
        logits = everything * np.nan if probe is None else apply_probe(probe, val_pixels).numpy()
        scores.append(without_values(trivial, why) if probe is None else all_scores(logits, *how))
        all_logits.append(logits)
    reference = NormalReference(pixels[np.searchsorted(union, normals)], train.filename[normals])
    distances = normal_only_scores(reference, reference.scores(val_pixels), val["label"], ())
    return [
        Entry("all-defect", trivial, trivial, dict.fromkeys(NAMES, trivial), everything),
        Entry("16x16 thumbnails", *scores, distances, all_logits[0]),
    ]


def collect(folders):
    """Entries of the floors and of all runs; the first run's validation arrays and its images."""
    runs = [(folder, *read_run(folder)) for folder in folders]
    first, config, _, val = runs[0]
    images = open_images(config["data"]["image_root"], config["data"].get("packed"))
    entries = floors(config, first, val, images)
    for folder, _, result, arrays in runs:
        if not np.array_equal(arrays["filename"], val["filename"]):
            raise UserError(f"{folder} and {first} were scored on different validation sets")
        name = FROZEN.get(result["method"], result["method"])
        scores = (
            result["val_offline"],
            *(result.get(f"val_{which}", {}) for which in ("offline_fixed", "normal_only")),
        )
        logits = arrays["logit_offline"]
        if np.isnan(logits).any():  # too few labels of its own
            logits = arrays.get("logit_offline_fixed", logits)
        entries.append(Entry(f"{name}, {result['backbone']}", *scores, logits))
    return entries, val, images


def table(entries, val):
    """The entries as text, a line each."""
    n, n_defect = (val["label"] >= 0).sum(), (val["label"] == 1).sum()
    lines = [f"validation: {n} labelled images, {n_defect} defects ({n_defect / max(n, 1):.1%})"]
    lines.append(f"{'':28}" + "".join(f"{label:>{WIDTH}}" for label in LABELS))
    for entry in entries:
        values = (entry.score(*shown) for shown in SHOWN)
        cells = "".join(f"{'-':>{WIDTH}}" if v is None else f"{v:{WIDTH}.3f}" for v in values)
        lines.append(f"{entry.name:28}{cells}")
    return "\n".join(lines)


def _show_images(axes, title, rows, logits, val, images):
    """One strip of images; the frame says what each is: a defect or normal."""
    names = val["class_names"]
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, rows, strict=False):
        axis.axis("on")
        axis.imshow(images.read(val["filename"][row].decode()))
        axis.set_anchor("N")  # whatever the shapes, below the title
        defect = val["label"][row] == 1
        classes = " ".join(names[val["classes"][row]][:4])
        axis.set_xlabel(f"{logits[row]:+.1f}  {classes if defect else 'normal'}", fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
        for side in axis.spines.values():
            side.set(color=DEFECT_COLOUR if defect else NORMAL_COLOUR, linewidth=3)
    axes[0].set_title(title, loc="left", fontsize=11)


def picture(entries, val, images, path):
    """Bars of the scores, then images that the last run with scores ranks well and badly."""
    known = [entry for entry in entries if np.isfinite(entry.logits).all()]
    last, label = known[-1], val["label"]  # there always is one: all-defect
    order = np.argsort(-last.logits)
    defects, normals = order[label[order] == 1], order[label[order] == 0]
    figure = plt.figure(figsize=(13, 9.5))
    grid = figure.add_gridspec(
        *(4, COLUMNS), height_ratios=(1.9, 1, 1, 1), hspace=0.35, wspace=0.06
    )
    grid.update(left=0.05, right=0.99, top=0.97, bottom=0.04)
    bars = figure.add_subplot(grid[0, :])
    width = 0.8 / len(SHOWN)
    for k, (shown, name, colour) in enumerate(zip(SHOWN, LABELS, BAR_COLOURS, strict=True)):
        values = [entry.score(*shown) or 0.0 for entry in entries]
        places = np.arange(len(entries)) + (k - (len(SHOWN) - 1) / 2) * width
        drawn = bars.bar(places, values, width * 0.95, label=name, color=colour)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.set_xticks(range(len(entries)), [entry.name for entry in entries])
    bars.set_ylim(0, 1.1)
    bars.set_ylabel("score on validation")
    bars.legend(ncols=len(SHOWN), loc="upper left", frameon=False)
    bars.spines[["top", "right"]].set_visible(False)
    legend = "logit, true classes; frame: orange = defect, blue = normal"
    strips = (
        (f"Most likely defects, says {last.name} ({legend})", order[:COLUMNS]),
        ("Defects it would miss first", defects[::-1][:COLUMNS]),
        ("Normal images it would raise a false alarm for first", normals[:COLUMNS]),
    )
    for i, (title, rows) in enumerate(strips):
        axes = [figure.add_subplot(grid[i + 1, c]) for c in range(COLUMNS)]
        _show_images(axes, title, rows, last.logits, val, images)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        *("runs",), nargs="+", type=path_argument, metavar="RUN_FOLDER", help="the last is pictured"
    )
    parser.add_argument("--out", type=path_argument, default="compare.png", metavar="FILE.png")
    args = parser.parse_args(argv)
    entries, val, images = collect(args.runs)
    picture(entries, val, images, args.out)
    print(table(entries, val))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
