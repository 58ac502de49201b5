"""All scores from logits, labels and classes, as they are or at any other prevalence.

A defect is the positive (1), a normal the negative (0); rows labelled -1 are left out. Arrays are
numpy or CPU tensors. Counts are exact, everything is float64. A score that the data cannot give
is None, and `undefined` of the result says why: never 0.0, which would look like a bad score.

Deviation: F2_CIW: the study's cannot see a false alarm; f2_ciw_strict, which can, stands beside it.
"""

import numpy as np

from common.annotations import CLASS_IMPORTANCE
from common.ranking import Ranking
from common.running.errors import UserError

THRESHOLD = 0.0  # on the logit, as the study; `logit >= THRESHOLD` is called a defect
METRICS = {  # scores that are shown, key: name in print; first what needs no threshold
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "f2_ciw": "F2_CIW",
    "f2_ciw_strict": "F2_CIW strict",
    "f1_normal": "F1_normal",
    "precision": "precision",
    "recall": "recall",
}


def _ratio(numerator, denominator):
    return float(numerator / denominator) if denominator > 0 else None


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
    no_classes = np.zeros((np.asarray(labels).size, 0))
    return _binary_scores(Ranking(logits, labels, no_classes, THRESHOLD).count(), prevalence)


def _weights(counts, prevalence):
    """What a defect and a normal count at a prevalence."""
    if prevalence is None:
        return 1.0, 1.0
    if not 0 < prevalence < 1:
        raise UserError(f"a prevalence lies between 0 and 1, got {prevalence}")
    return prevalence / max(counts.n_defect, 1), (1 - prevalence) / max(counts.n_normal, 1)


def _binary_scores(counts, prevalence):
    n_defect, n_normal, tp, fp = counts.n_defect, counts.n_normal, counts.tp, counts.fp
    w_defect, w_normal = _weights(counts, prevalence)
    scores = count_scores(
        tp * w_defect, (n_defect - tp) * w_defect, fp * w_normal, (n_normal - fp) * w_normal
    )
    scores |= dict.fromkeys(("auroc", "average_precision", "threshold", "f1_best"))
    undefined = {} if scores["precision"] is not None else {"precision": "nothing called a defect"}
    if n_defect:
        if prevalence is None or n_normal:
            called = counts.fps * (w_normal / w_defect) + counts.tps  # in units of a defect
            # The sum of precision times the step in recall, as scikit-learn.
            of_steps = (counts.tps * counts.steps / called).sum()
            scores["average_precision"] = float(of_steps / n_defect)
            f1 = 2 * counts.tps / (called + n_defect)
            best = int(f1.argmax())
            scores["threshold"], scores["f1_best"] = float(counts.threshold[best]), float(f1[best])
        if n_normal:
            scores["auroc"] = counts.pairs / (2 * n_defect * n_normal)
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
    return scores | {"n": n_defect + n_normal, "n_defect": n_defect, "undefined": undefined}


def f2_ciw(predicted, classes, class_names):
    """The study's class-importance-weighted F2 of a binary classifier. It cannot see false alarms.

    predicted: (N,) 1 where called a defect; classes: (N, C) 0/1; class_names: C names. An image
    called a defect is a hit for each class it carries; F2_c = 5 R_c / (4 + R_c), R_c the recall of
    class c; the mean over classes is weighted by CIW. A class without images scores 0 and stays in
    the mean. Returns a float, or None without class columns.
    """
    how = np.ones(len(classes)), np.asarray(classes), class_names
    return all_scores(np.asarray(predicted) - 0.5, *how)["f2_ciw"]


def f2_ciw_strict(predicted, classes, class_names, labels=None, prevalence=None):
    """f2_ciw in which a false alarm on a normal image costs precision in every class.

    F2_c = 5 TP_c / (5 TP_c + 4 FN_c + FP), FP the normal images called a defect. labels: (N,) 1, 0
    or -1; None: an image without a class is normal. prevalence: as in binary_scores. Returns a
    float, or None without class columns or defects, or, at a given prevalence, without normals.
    """
    classes = np.asarray(classes).astype(bool)
    labels = classes.any(axis=1).astype(int) if labels is None else labels
    how = labels, classes, class_names, prevalence
    return all_scores(np.asarray(predicted) - 0.5, *how)["f2_ciw_strict"]


def all_scores(logits, labels, classes, class_names, prevalence=None):
    """binary_scores, f2_ciw and f2_ciw_strict in one dict. classes: (N, C)."""
    counts = Ranking(logits, labels, classes, THRESHOLD).count()
    return scores_of(counts, class_names, prevalence)


def scores_of(counts, class_names, prevalence=None):
    """The same of Counts."""
    scores = _binary_scores(counts, prevalence)
    undefined = scores.pop("undefined")
    w_defect, w_normal = _weights(counts, prevalence)
    tp, fn = counts.hits * w_defect, (counts.images - counts.hits) * w_defect
    for name, fp in (("f2_ciw", 0), ("f2_ciw_strict", counts.fp * w_normal)):
        needs_normals = name == "f2_ciw_strict" and prevalence is not None
        if not len(class_names):
            scores[name], undefined[name] = None, "no class columns"
        elif not counts.n_defect or needs_normals and not counts.n_normal:
            scores[name], undefined[name] = None, undefined["auroc"]
        else:
            scores[name] = ciw_f2(tp, fn, fp, class_names)
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
