"""What can be told of a defect without looking for it: cues of the file, cues of the picture.

A cue of the file (its size, its name) tells nothing about a defect: where it does, the images were
collected so that a network learns the collection, and every score is too good. A cue of the
picture may be a real trace; what it reaches is a floor, which a method has to beat.
"""

import os
import re
from datetime import date

import numpy as np
import torch

from common.annotations import UNLABELLED, read_annotations
from common.augmentations import resize_squash
from common.images import ImageFolder, identify, read_image
from common.metrics import binary_scores
from common.offline_probe import apply_probe, offline_probe
from common.running.errors import ImageError
from common.running.keyed import CUE_SAMPLE
from common.running.progress import Progress, say
from common.sampler import stratified_sample

MOST_IMAGES = 4000  # of a CSV, labelled: enough for an AUROC to two digits
THUMBNAIL = 16  # pixels
SUSPICIOUS = 0.75  # AUROC of a cue of the file
LOOKS_SPLIT = 0.9  # AUROC of thumbnails from which on near-duplicates are asked about
BINS = 16  # of a cue, whose relation to defects may go up and down
EDGE = 48  # grey levels between neighbours
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_.]?(0[1-9]|1[0-2])[-_.]?(0[1-9]|[12]\d|3[01])(?!\d)")
OF_FILE = {
    "bytes": "the size of its file",
    "width": "its width",
    "height": "its height",
    "name order": "its place in the order of names",
    "date": "the date in its name",
}
OF_PICTURE = ("mean grey", "mid-grey share", "edge length")


def date_of(name):
    """Days since the year 1 of the first date in a name, or NaN."""
    for found in DATE.finditer(name):
        try:
            return float(date(*map(int, found.groups())).toordinal())
        except ValueError:  # the 31st of February
            continue
    return float("nan")


def thumbnail(image):
    """(H, W, 3) uint8 -> (768,) float32, 16 x 16 pixels of it in 0 to 1."""
    return resize_squash(image, THUMBNAIL).flatten() / 255


def cues_of_picture(image):
    """(H, W, 3) uint8 -> {cue: number}."""
    grey = image.astype(np.float32).mean(axis=2)
    edges = [np.abs(np.diff(grey, axis=axis)) > EDGE for axis in (0, 1)]
    return {
        "mean grey": grey.mean(),
        "mid-grey share": ((grey > 64) & (grey < 192)).mean(),
        "edge length": sum(e.sum() for e in edges) / np.sqrt(grey.size),
    }


def _of_file(root, name):
    """{cue: number} of one file; raises OSError or ImageError where it cannot be read."""
    width, height = read_image(root, name, "", lambda content: identify(content).size)
    size = os.path.getsize(os.path.join(root, name))
    return {"bytes": size, "width": width, "height": height, "date": date_of(name)}


def cue_auroc(fit, fit_defect, on, on_defect):
    """AUROC of one number, whatever its relation to defects: by its share of defects in each of 16
    quantiles of the fitting rows, smoothed towards the whole share. NaN is a bin of its own.

    fit, on: (n,), (m,) numbers; None without both kinds on either side, or of one value.
    """
    known = fit[np.isfinite(fit)]
    if len(np.unique(known)) < 2 or min(len(set(fit_defect)), len(set(on_defect))) < 2:
        return None
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]))

    def place(x):
        return np.where(np.isfinite(x), np.searchsorted(edges, x, "right"), BINS)

    n = np.bincount(place(fit), minlength=BINS + 1)
    n_defect = np.bincount(place(fit), fit_defect, minlength=BINS + 1)
    share = (n_defect + fit_defect.mean()) / (n + 1)
    return binary_scores(share[place(on)], on_defect)["auroc"]


def check(folder, csvs, half):
    """Print the AUROC of every cue, fitted on one part of the images and seen on another.

    csvs: train.csv and val.csv, or one CSV of labelled images below `folder`, which is halved:
    half(names, labels) -> (n,) bool, groups whole. Returns {cue: AUROC or None}.
    """
    images, root = ImageFolder(folder), os.path.realpath(folder)
    tables = [read_annotations(path) for path in csvs]
    known = [(table, np.flatnonzero(table.defect != UNLABELLED)) for table in tables]
    if len(known) == 1:
        ((table, rows),) = known
        other = half([table.name(row) for row in rows], table.defect[rows])
        known = [(table, rows[~other]), (table, rows[other])]
    # Without folders: they may be named after the class, and so be no cue but the label itself.
    everyone = {os.path.basename(table.name(row)) for table, rows in known for row in rows}
    order, sides = {name: float(i) for i, name in enumerate(sorted(everyone))}, []
    for table, rows in known:
        rows = rows[stratified_sample(table.defect[rows], MOST_IMAGES, 0, CUE_SAMPLE)]
        progress, cues, pixels, used = Progress(len(rows), "looking for cues", "images"), [], [], []
        for row in rows:
            name = table.name(row)
            progress.update()
            try:
                found = _of_file(root, name) | {"name order": order[os.path.basename(name)]}
                image = images.read(name)
            except (ImageError, OSError):
                continue  # training names it
            cues.append(found | cues_of_picture(image))
            pixels.append(thumbnail(image))
            used.append(row)
        progress.close()
        pixels = torch.stack(pixels) if pixels else torch.zeros(0, 3 * THUMBNAIL**2)
        sides.append((cues, pixels, table.defect[used].astype(np.int64)))
    return report(*sides)


def report(fit, on):
    """Print and judge. fit, on: (cues as dicts, thumbnails, 0/1 labels)."""
    (fit_cues, fit_pixels, y), (on_cues, on_pixels, t) = fit, on
    if min(len(set(y)), len(set(t))) < 2:
        say("no check for shortcuts: it needs labelled defects and normals on both sides")
        return {}
    found = {}
    for name in (*OF_FILE, *OF_PICTURE):
        values = [np.array([c[name] for c in cues], float) for cues in (fit_cues, on_cues)]
        found[name] = cue_auroc(values[0], y, values[1], t)
    weight, _ = offline_probe(fit_pixels, y, float((y == 0).sum() / (y == 1).sum()), 0)
    logits = None if weight is None else apply_probe(weight, on_pixels).numpy()
    found["16x16 thumbnails"] = None if weight is None else binary_scores(logits, t)["auroc"]
    text = {k: "-" if v is None else f"{v:.2f}" for k, v in found.items()}
    print(f"how well defects are told on {len(t)} images ({(t == 1).sum()} defects), AUROC:")
    print("  by the file: " + ", ".join(f"{k} {text[k]}" for k in OF_FILE))
    floors = [k for k in found if k not in OF_FILE]
    print("  by simple looks, a floor to beat: " + ", ".join(f"{k} {text[k]}" for k in floors))
    if (found["16x16 thumbnails"] or 0) > LOOKS_SPLIT:
        print(
            "note: thumbnails alone tell nearly all. Where several images show one part or place, "
            "some are in training and some in validation: keep them together by --group"
        )
    for name, words in OF_FILE.items():
        if found[name] is not None and found[name] > SUSPICIOUS:
            print(
                f"warning: {words} tells defects from normals (AUROC {found[name]:.2f}). It is a "
                "cue of how images were collected or saved, not of a defect: a network may learn "
                "it, and every score here may be too good. Collect, crop and save both alike"
            )
    return found
