"""All scores from logits, labels and classes, as they are or at any other prevalence.

A defect is the positive (1), a normal the negative (0); rows labelled -1 are left out. Arrays are
numpy or CPU tensors. Counts are int64, everything else float64. A score that the data cannot give
is None, and `undefined` of the result says why: never 0.0, which would look like a bad score.

Deviation: F2_CIW: the study's cannot see a false alarm; f2_ciw_strict, which can, stands beside it.
"""

import numpy as np

from common.annotations import CLASS_IMPORTANCE
from common.running.errors import UserError

THRESHOLD = 0.0  # on the logit, as the study; `logit >= THRESHOLD` is called a defect
METRICS = {  # scores that are shown, key: name in print
    "f1": "F1",
    "f2_ciw": "F2_CIW",
    "f2_ciw_strict": "F2_CIW strict",
    "f1_normal": "F1_normal",
    "precision": "precision",
    "recall": "recall",
    "auroc": "AUROC",
    "average_precision": "average precision",
}


def _ratio(numerator, denominator):
    return float(numerator / denominator) if denominator > 0 else None


def _labelled(logits, labels):
    """Logits and 0/1 labels of the labelled rows, as float64 and bool arrays."""
    logits, labels = np.asarray(logits, np.float64).reshape(-1), np.asarray(labels).reshape(-1)
    if logits.shape != labels.shape:
        raise ValueError(f"{len(logits)} logits, but {len(labels)} labels")
    keep = labels != -1
    logits, labels = logits[keep], labels[keep]
    if not np.isfinite(logits).all():
        raise UserError(f"{(~np.isfinite(logits)).sum()} logits are not finite: nothing is scored")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 1, 0 or -1")
    return logits, labels == 1


def _curve(logits, is_defect):
    """Counts (tp, fp) of calling `logit >= t` a defect, for each distinct t, the highest first."""
    order = np.argsort(-logits, kind="stable")
    thresholds, hits = logits[order], is_defect[order]
    last = np.flatnonzero(np.append(thresholds[1:] != thresholds[:-1], True))
    tp = np.cumsum(hits, dtype=np.int64)[last]
    return tp, last + 1 - tp, thresholds[last]


def average_precision(tp, fp, w_defect, w_normal):
    """Sum of precision times the step in recall (as scikit-learn), with a weight a class.

    tp, fp: (T,) counts down to each threshold, the highest first.
    """
    called = tp * w_defect + fp * w_normal
    precision = tp * w_defect / np.maximum(called, np.finfo(float).tiny)
    steps = np.diff(tp, prepend=0) / tp[-1]
    return float((precision * steps).sum())


def area_under_roc(tp, fp):
    """Area under the steps of (fp, tp), ties counted half: exact in int64. tp, fp: (T,) counts."""
    area2 = (np.diff(fp, prepend=0) * (tp + np.append(0, tp[:-1]))).sum()
    return float(area2 / (2 * tp[-1] * fp[-1]))


def count_scores(tp, fn, fp, tn):
    """precision, recall, f1, f2 and f1_normal of counts or shares; None where undefined."""
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _f_beta(1, tp, fn, fp),
        "f2": _f_beta(4, tp, fn, fp),
        "f1_normal": _f_beta(1, tn, fp, fn),
    }


def _f_beta(beta2, tp, fn, fp):
    return _ratio((1 + beta2) * tp, (1 + beta2) * tp + beta2 * fn + fp)


def ciw_f2(tp, fn, fp, class_names):
    """Mean over classes, weighted by importance (a class outside Sewer-ML's 17: 1), of
    F2_c = 5 TP_c / (5 TP_c + 4 FN_c + FP).

    tp, fn: (C,) hits and misses of each class, fp: false alarms, 0 for the study's F2_CIW. A class
    without images has TP = 0, scores 0 and stays in the mean.
    """
    weights = np.array([CLASS_IMPORTANCE.get(name, 1.0) for name in class_names])
    f2 = 5 * tp / np.maximum(5 * tp + 4 * fn + fp, np.finfo(float).tiny)
    return float((weights * f2).sum() / weights.sum())


def binary_scores(logits, labels, prevalence=None):
    """Scores of one defect-or-normal classifier.

    logits: (N,) higher means defect; labels: (N,) 1, 0 or -1. prevalence: the share of defects to
    score at, or None for that of the data: both rates stay as they are, only their mix changes.

    Returns a dict: precision, recall, f1, f2 and f1_normal at logit >= 0; auroc;
    average_precision; threshold, the logit at which F1 is highest, and f1_best, that F1; n and
    n_defect, the rows behind it; undefined, {score: reason} for those that are None.
    """
    logits, is_defect = _labelled(logits, labels)
    n, n_defect = len(logits), int(is_defect.sum())
    n_normal = n - n_defect
    called = logits >= THRESHOLD
    tp, fp = int((called & is_defect).sum()), int((called & ~is_defect).sum())
    w_defect = w_normal = 1.0
    if prevalence is not None:
        if not 0 < prevalence < 1:
            raise UserError(f"a prevalence lies between 0 and 1, got {prevalence}")
        w_defect = prevalence / max(n_defect, 1)
        w_normal = (1 - prevalence) / max(n_normal, 1)
    counts = np.array([tp, n_defect - tp]) * w_defect, np.array([fp, n_normal - fp]) * w_normal
    scores = count_scores(*counts[0], *counts[1])
    scores |= dict.fromkeys(("auroc", "average_precision", "threshold", "f1_best"))
    undefined = {} if scores["precision"] is not None else {"precision": "nothing called a defect"}
    if n_defect:
        tps, fps, thresholds = _curve(logits, is_defect)
        if prevalence is None or n_normal:
            f1 = 2 * tps * w_defect / ((tps + n_defect) * w_defect + fps * w_normal)
            best = int(f1.argmax())
            scores["average_precision"] = average_precision(tps, fps, w_defect, w_normal)
            scores["threshold"], scores["f1_best"] = float(thresholds[best]), float(f1[best])
        if n_normal:
            scores["auroc"] = area_under_roc(tps, fps)
    needs_defects = ("recall", "f1", "f2", "average_precision", "threshold", "f1_best", "auroc")
    needs_normals = ("f1_normal", "auroc")
    if prevalence is not None:  # a missing group has no rate that could be mixed in
        needs_defects = needs_normals = tuple(scores)
    for group, count, names in (
        ("defects", n_defect, needs_defects),
        ("normals", n_normal, needs_normals),
    ):
        if not count:
            for name in names:
                scores[name], undefined[name] = None, f"0 {group}"
    return scores | {"n": n, "n_defect": n_defect, "undefined": undefined}


def f2_ciw(predicted, classes, class_names):
    """The study's class-importance-weighted F2 of a binary classifier. It cannot see false alarms.

    predicted: (N,) 1 where called a defect; classes: (N, C) 0/1; class_names: C names. An image
    called a defect is a hit for each class it carries; F2_c = 5 R_c / (4 + R_c), R_c the recall of
    class c; the mean over classes is weighted by CIW. A class without images scores 0 and stays in
    the mean. Returns a float, or None without class columns.
    """
    if not len(class_names):
        return None
    predicted, classes = np.asarray(predicted).astype(bool), np.asarray(classes).astype(bool)
    hits = classes[predicted].sum(axis=0, dtype=np.int64)
    return ciw_f2(hits, classes[~predicted].sum(axis=0, dtype=np.int64), 0, class_names)


def f2_ciw_strict(predicted, classes, class_names, labels=None, prevalence=None):
    """f2_ciw in which a false alarm on a normal image costs precision in every class.

    F2_c = 5 TP_c / (5 TP_c + 4 FN_c + FP), FP the normal images called a defect. labels: (N,) 1, 0
    or -1; None: an image without a class is normal. prevalence: as in binary_scores. Returns a
    float, or None without class columns, or, at a given prevalence, without defects or normals.
    """
    if not len(class_names):
        return None
    predicted, classes = np.asarray(predicted).astype(bool), np.asarray(classes).astype(bool)
    labels = classes.any(axis=1).astype(int) if labels is None else np.asarray(labels)
    is_normal, is_defect = labels == 0, labels == 1
    w_defect = w_normal = 1.0
    if prevalence is not None:
        if not is_normal.any() or not is_defect.any():
            return None
        w_defect, w_normal = prevalence / is_defect.sum(), (1 - prevalence) / is_normal.sum()
    tp = w_defect * classes[is_defect & predicted].sum(axis=0, dtype=np.int64)
    fn = w_defect * classes[is_defect & ~predicted].sum(axis=0, dtype=np.int64)
    fp = w_normal * int((is_normal & predicted).sum())
    return ciw_f2(tp, fn, fp, class_names)


def all_scores(logits, labels, classes, class_names, prevalence=None):
    """binary_scores, f2_ciw and f2_ciw_strict in one dict. classes: (N, C)."""
    scores = binary_scores(logits, labels, prevalence)
    labels = np.asarray(labels).reshape(-1)
    predicted, classes = np.asarray(logits).reshape(-1) >= THRESHOLD, np.asarray(classes)
    scores["f2_ciw"] = f2_ciw(predicted[labels == 1], classes[labels == 1], class_names)
    scores["f2_ciw_strict"] = f2_ciw_strict(predicted, classes, class_names, labels, prevalence)
    undefined = scores.pop("undefined")
    if scores["n_defect"] == 0:
        scores["f2_ciw"] = scores["f2_ciw_strict"] = None
    for name in ("f2_ciw", "f2_ciw_strict"):
        if scores[name] is None:
            undefined[name] = "no class columns" if not len(class_names) else undefined["auroc"]
    return scores | {"undefined": undefined}


def without_values(scores, why):
    """The same with every score None, for the reason why; n and n_defect stay."""
    counts = {name: scores[name] for name in ("n", "n_defect")}
    names = [name for name in scores if name not in (*counts, "undefined")]
    return dict.fromkeys(names) | counts | {"undefined": dict.fromkeys(names, why)}


def at_prevalence(logits, labels, prevalence, classes=None, class_names=()):
    """all_scores at another prevalence, without a new pass: the rates stay, their mix changes."""
    if classes is None:
        classes = np.zeros((len(labels), 0))
    return all_scores(logits, labels, classes, class_names, prevalence)
