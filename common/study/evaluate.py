"""Stored validation scores at every prevalence: in closed form, with intervals, and by drawing.

With all normals kept, the rates of hits and of false alarms do not move with the prevalence, so one
pass over the validation set gives the scores at all of them: what subsets of that prevalence tend
to as they grow. Recall and AUROC are the expectation over subsets of any size; ratios differ from
it in the second order, and F2_CIW of small subsets lies lower, as a class without an image in the
draw counts as one of which nothing is found. Frames of one video are not independent, so the
intervals here, of single images, are too narrow.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.metrics import (
    THRESHOLD,
    all_scores,
    area_under_roc,
    average_precision,
    ciw_f2,
    count_scores,
)
from common.running.errors import UserError
from common.running.keyed import BOOTSTRAP, DRAWN_SUBSET, keyed_rng

FILE = "val_scores.npz"
LOGITS = {  # of each probe, in that file
    "online": "logit",
    "offline": "logit_offline",
    "offline_fixed": "logit_offline_fixed",
}
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


@dataclass(frozen=True)
class StoredScores:
    """Validation scores of a run: N labelled images, C classes."""

    logit: np.ndarray  # (N,) of one probe
    label: np.ndarray  # (N,) 1 defect, 0 normal
    classes: np.ndarray  # (N, C) 0/1
    class_names: tuple

    def at(self, prevalence):
        """All scores at a prevalence, in closed form; None: that of the data."""
        how = self.classes, self.class_names, prevalence
        return all_scores(self.logit, self.label, *how)


def load_scores(folder, probe="online"):
    """val_scores.npz of a run folder -> StoredScores. probe: a key of LOGITS.

    Raises UserError naming the file where it is damaged, not there or without that probe's scores.
    """
    path = Path(folder) / FILE
    try:
        with np.load(path) as stored:
            logit = stored[LOGITS[probe]].astype(np.float64)
            label, classes = stored["label"], stored["classes"]
            names = tuple(str(name) for name in stored["class_names"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    known = label >= 0
    if not np.isfinite(logit[known]).all():
        raise UserError(f"{path}: the {probe} probe has no scores")
    return StoredScores(logit[known], label[known], classes[known].astype(bool), names)


def intervals(scores, prevalences, draws, seed=0):
    """95 % intervals by bootstrap over images, within normals and defects.

    prevalences: to score at, None for that of the data; the same draws serve all. Returns
    {prevalence: {score: (low, high)}}, without what the data cannot give; a draw in which a score
    is undefined does not count for it.
    """
    order = np.argsort(-scores.logit, kind="stable")
    logit, is_defect = scores.logit[order], scores.label[order] == 1
    defects, normals = np.flatnonzero(is_defect), np.flatnonzero(~is_defect)
    if not len(defects) or not len(normals):
        return {p: {} for p in prevalences}
    last = np.flatnonzero(np.append(logit[1:] != logit[:-1], True))  # of each distinct logit
    called = logit >= THRESHOLD
    # float32 sums of whole numbers are exact below 2^24, and a matrix product of them is fast.
    classes = scores.classes[order][defects].astype(np.float32)
    rng = keyed_rng(BOOTSTRAP, seed)
    found = {p: {} for p in prevalences}
    for _ in range(draws):
        w_defect, w_normal = (
            np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows))
            for rows in (defects, normals)
        )
        weight = np.zeros((2, len(logit)), np.int64)
        weight[0, defects], weight[1, normals] = w_defect, w_normal
        tps, fps = np.cumsum(weight, axis=1)[:, last]
        tp, fp = weight[:, called].sum(axis=1)
        images = (w_defect.astype(np.float32) @ classes).astype(np.float64)
        hits = ((w_defect * called[defects]).astype(np.float32) @ classes).astype(np.float64)
        for p, values in found.items():
            w = (1, 1) if p is None else (p / len(defects), (1 - p) / len(normals))
            drawn = count_scores(
                tp * w[0], (len(defects) - tp) * w[0], fp * w[1], (len(normals) - fp) * w[1]
            )
            drawn["auroc"] = area_under_roc(tps, fps)
            drawn["average_precision"] = average_precision(tps, fps, *w)
            if len(scores.class_names):
                of_classes = hits * w[0], (images - hits) * w[0]
                drawn["f2_ciw"] = ciw_f2(*of_classes, 0, scores.class_names)
                drawn["f2_ciw_strict"] = ciw_f2(*of_classes, fp * w[1], scores.class_names)
            for name, value in drawn.items():
                if value is not None:
                    values.setdefault(name, []).append(value)
    return {
        p: {name: tuple(map(float, np.percentile(v, INTERVAL))) for name, v in values.items()}
        for p, values in found.items()
    }


def draw_subsets(scores, prevalence, draws, seed=0):
    """Scores of real subsets with that prevalence, as the study drew one: {score: (draws,)}.

    All normals and as many defects as make the prevalence; where those are too few, all defects and
    fewer normals.
    """
    defects, normals = np.flatnonzero(scores.label == 1), np.flatnonzero(scores.label == 0)
    n_defect = round(len(normals) * prevalence / (1 - prevalence))
    n_normal = len(normals)
    if n_defect > len(defects):
        n_defect = len(defects)
        n_normal = round(n_defect * (1 - prevalence) / prevalence)
    found = []
    for draw in range(draws):
        rng = keyed_rng(DRAWN_SUBSET, seed, draw)
        rows = [rng.permutation(defects)[:n_defect], rng.permutation(normals)[:n_normal]]
        rows = np.concatenate(rows)
        logit, label, classes = scores.logit[rows], scores.label[rows], scores.classes[rows]
        found.append(all_scores(logit, label, classes, scores.class_names))
    return {
        name: np.array([np.nan if f[name] is None else f[name] for f in found])
        for name in found[0]
        if name != "undefined"
    }
