"""Stored validation scores at every prevalence: in closed form, with intervals, and by drawing.

With all normals kept, the rates of hits and of false alarms do not move with the prevalence, so one
pass over the validation set gives the scores at all of them: the expectation over subsets. Frames
of one video are not independent, so the intervals here, of single images, are too narrow.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.annotations import CLASS_IMPORTANCE
from common.errors import UserError
from common.keyed import BOOTSTRAP, DRAWN_SUBSET, keyed_rng
from common.metrics import THRESHOLD, all_scores, at_prevalence

FILE = "val_scores.npz"
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
OF_RATES = ("precision", "recall", "f1", "f2", "f1_normal", "f2_ciw", "f2_ciw_strict")


@dataclass(frozen=True)
class StoredScores:
    """Validation scores of a run: N labelled images, C classes."""

    logit: np.ndarray  # (N,) of one probe
    label: np.ndarray  # (N,) 1 defect, 0 normal
    classes: np.ndarray  # (N, C) 0/1
    class_names: tuple

    def at(self, prevalence):
        """All scores at a prevalence, in closed form; None: that of the data."""
        how = self.classes, self.class_names
        if prevalence is None:
            return all_scores(self.logit, self.label, *how)
        return at_prevalence(self.logit, self.label, prevalence, *how)


def load_scores(folder, probe="online"):
    """val_scores.npz of a run folder -> StoredScores. probe: online | offline.

    Raises UserError naming the file where it is damaged, not there or without that probe's scores.
    """
    path = Path(folder) / FILE
    try:
        with np.load(path) as stored:
            logit = stored["logit" if probe == "online" else "logit_offline"].astype(np.float64)
            label, classes = stored["label"], stored["classes"]
            names = tuple(str(name) for name in stored["class_names"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    known = label >= 0
    if not np.isfinite(logit[known]).all():
        raise UserError(f"{path}: the {probe} probe has no scores")
    return StoredScores(logit[known], label[known], classes[known].astype(bool), names)


def intervals(scores, prevalence, seed=0, draws=200):
    """95 % intervals {score: (low, high)} by bootstrap over images, within normals and defects.

    prevalence: to score at, None: that of the data. The same draws serve every prevalence.
    """
    is_defect = scores.label == 1
    defects, normals = np.flatnonzero(is_defect), np.flatnonzero(~is_defect)
    if not len(defects) or not len(normals):
        return {}
    p = len(defects) / len(is_defect) if prevalence is None else prevalence
    called = scores.logit >= THRESHOLD
    rng = keyed_rng(BOOTSTRAP, seed)
    found = {name: [] for name in (*OF_RATES, "auroc")}
    order = np.argsort(scores.logit, kind="stable")
    ties = np.unique(scores.logit[order], return_inverse=True)[1]
    for _ in range(draws):
        weight = np.bincount(rng.choice(defects, len(defects)), minlength=len(is_defect))
        weight += np.bincount(rng.choice(normals, len(normals)), minlength=len(is_defect))
        for name, value in _from_rates(scores, is_defect, called, weight, p).items():
            found[name].append(value)
        positive = np.bincount(ties, (weight * is_defect)[order])
        negative = np.bincount(ties, (weight * ~is_defect)[order])
        below = np.cumsum(negative) - negative / 2  # ties count half
        found["auroc"].append((positive * below).sum() / len(defects) / len(normals))
    return {
        name: tuple(float(x) for x in np.percentile(values, INTERVAL))
        for name, values in found.items()
        if len(scores.class_names) or "ciw" not in name
    }


def _from_rates(scores, is_defect, called, weight, p):
    """OF_RATES at prevalence p, image i counted weight[i] times."""
    tpr = (weight * (is_defect & called)).sum() / (weight * is_defect).sum()
    fpr = (weight * (~is_defect & called)).sum() / (weight * ~is_defect).sum()
    tp, fn, fp, tn = p * tpr, p * (1 - tpr), (1 - p) * fpr, (1 - p) * (1 - fpr)
    values = {
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tpr,
        "f1": 2 * tp / (2 * tp + fn + fp),
        "f2": 5 * tp / (5 * tp + 4 * fn + fp),
        "f1_normal": 2 * tn / (2 * tn + fp + fn) if tn + fp + fn else 0.0,
    }
    if len(scores.class_names):
        ciw = np.array([CLASS_IMPORTANCE.get(name, 1.0) for name in scores.class_names])
        of_defects = weight * is_defect
        images = of_defects @ scores.classes
        hits = (of_defects * called) @ scores.classes
        recall = hits / np.maximum(images, 1)
        values["f2_ciw"] = (ciw * 5 * recall / (4 + recall)).sum() / ciw.sum()
        share = p / of_defects.sum()
        strict = 5 * hits * share / np.maximum(share * (hits + 4 * images) + fp, 1e-300)
        values["f2_ciw_strict"] = (ciw * strict).sum() / ciw.sum()
    return values


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
