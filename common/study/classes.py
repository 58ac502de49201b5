"""Defect classes: how many of each are found, and what they look like."""

import contextlib

import numpy as np

from common.annotations import DEFECT, NORMAL
from common.metrics import THRESHOLD
from common.running.errors import ImageError, UserError
from common.store import open_images
from common.study.figures import panels
from common.study.grid import annotations
from common.study.table import Table
from common.study.tables import SETTING, in_print, setting


def samples(data, rng_of):
    """Table 5: an image a class from training (above) and from validation (below).

    data: the data section of a config. rng_of: class number -> generator that chooses. A split
    without an image of the class, or an image that cannot be read, leaves a gap.
    """
    splits = [annotations(data.train_csv), annotations(data.val_csv)]
    names, images = ("normal", *splits[1].class_names), open_images(data.image_root, data.packed)
    names = [name for name in names if any(map(len, _of_class(splits, name)))]
    if not names:
        raise UserError(f"{data.val_csv}: nothing to show: no image is a normal or of a class")
    across = min(6, len(names))
    figure, axes = panels(-(-len(names) // across) * 2, across, height=1.9)
    for axis in axes.flat:
        axis.set_axis_off()
    for c, name in enumerate(names):
        rng = rng_of(c)
        for below, (split, rows) in enumerate(zip(splits, _of_class(splits, name), strict=True)):
            axis = axes[c // across * 2 + below, c % across]
            axis.set_title(f"{name}, {('training', 'validation')[below]}", fontsize=9)
            with contextlib.suppress(ImageError):
                if len(rows):
                    axis.imshow(images.read(split.name(rng.choice(rows))))
    return figure


def _of_class(splits, name):
    """The rows of each split that show a class, or nothing."""
    for split in splits:
        of = split.defect == NORMAL
        if name != "normal":
            known = name in split.class_names
            of = split.classes[:, split.class_names.index(name)] if known else np.zeros(0)
        yield np.flatnonzero(of)


def class_recall(finished):
    """Recall of each defect class beside its images in training; a row a run and class."""
    rows = []
    for entry in finished:
        scores, counts = entry.scores, entry.class_counts()
        called, is_defect = scores.logit >= THRESHOLD, scores.label == DEFECT
        for c, name in enumerate(scores.class_names):
            of = scores.classes[:, c] & is_defect
            recall = float(called[of].mean()) if of.any() else None
            where = [*in_print(*setting(entry)), entry.result["seed"], name]
            rows.append([*where, counts.get(name), int(of.sum()), recall])
    return Table(
        "class_recall",
        "Recall by defect class, in numbers",
        f"The {finished[0].probe} probe on clean validation images.",
        (*SETTING, "seed", "class", "in training", "in validation", "recall"),
        rows,
    )
