"""Stored validation scores at every prevalence: in closed form, with intervals, and by drawing.

With all normals kept, the rates of hits and of false alarms do not move with the prevalence, so one
pass over the validation set gives the scores at all of them: what subsets of that prevalence tend
to as they grow. Recall and AUROC are the expectation over subsets of any size; ratios differ from
it in the second order, and F2_CIW of small subsets lies lower, as a class without an image in the
draw counts as one of which nothing is found. Frames of one video are not independent, so the
intervals here, of single images, are too narrow.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.metrics import METRICS, THRESHOLD, scores_of
from common.ranking import Ranking
from common.running.errors import UserError, regular
from common.running.folder import SCORES
from common.running.keyed import BOOTSTRAP, DRAWN_SUBSET, keyed_rng

# Of each probe, in val_scores.npz.
LOGITS = {"online": "logit", "offline": "logit_offline", "offline_fixed": "logit_offline_fixed"}
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


@dataclass(frozen=True)
class StoredScores:
    """Validation scores of a run: N labelled images, C classes."""

    logit: np.ndarray  # (N,) of one probe
    label: np.ndarray  # (N,) 1 defect, 0 normal
    classes: np.ndarray  # (N, C) 0/1
    class_names: tuple

    @functools.cached_property
    def ranking(self):
        """The images by their logits: sorted once, for every prevalence and every draw."""
        return Ranking(self.logit, self.label, self.classes, THRESHOLD)

    @functools.cached_property
    def _counts(self):
        return self.ranking.count()

    def at(self, prevalence):
        """All scores at a prevalence, in closed form; None: that of the data."""
        return scores_of(self._counts, self.class_names, prevalence)


def load_scores(folder, probe="online"):
    """val_scores.npz of a run folder -> StoredScores. probe: a key of LOGITS.

    Raises UserError naming the file where it is damaged, not there or without that probe's scores.
    """
    path = Path(folder) / SCORES
    try:
        with np.load(regular(path)) as stored:
            logit = stored[LOGITS[probe]].astype(np.float64)
            label, classes = stored["label"], stored["classes"]
            names = tuple(str(name) for name in stored["class_names"])
    except Exception as error:  # of damaged or forged bytes anything may be raised
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    n = len(np.atleast_1d(label))
    if logit.shape != (n,) or label.shape != (n,) or classes.shape != (n, len(names)):
        raise UserError(f"{path}: damaged: its arrays do not fit together")
    known = label >= 0
    if not np.isfinite(logit[known]).all():
        raise UserError(f"{path}: the {probe} probe has no scores")
    return StoredScores(logit[known], label[known], classes[known].astype(bool), names)


def resample(scores, prevalences, draws, seed=0):
    """Scores of bootstrap samples of the images, drawn within normals and defects.

    prevalences: to score at, None for that of the data. Returns {prevalence: {score: (draws,)}},
    NaN where a draw cannot give one. The same draws serve all prevalences and, of the same images,
    all runs, so that differences are paired.
    """
    orders = scores.ranking.order
    found = {p: {} for p in prevalences}
    if not all(map(len, orders)):
        return found
    for n, weights in enumerate(_resampled(*map(len, orders), draws, seed)):
        by_rank = (often[order] for often, order in zip(weights, orders, strict=True))
        counts = scores.ranking.count(*by_rank)
        for p, values in found.items():
            drawn = scores_of(counts, scores.class_names, p)
            for name in METRICS:
                if drawn[name] is not None:
                    values.setdefault(name, np.full(draws, np.nan))[n] = drawn[name]
    return found


def interval(drawn):
    """(low, high): 95 % of scores of `resample`; a draw without one does not count."""
    return tuple(map(float, np.nanpercentile(drawn, INTERVAL)))


def draw_subsets(scores, prevalence, draws, seed=0):
    """Scores of real subsets with that prevalence, as the study drew one: {score: (draws,)}.

    All normals and as many defects as make the prevalence; where those are too few, all defects and
    fewer normals.
    """
    of_defects, of_normals = orders = scores.ranking.order
    n_defect, n_normal = round(len(of_normals) * prevalence / (1 - prevalence)), len(of_normals)
    if n_defect > len(of_defects):
        n_defect = len(of_defects)
        n_normal = round(n_defect * (1 - prevalence) / prevalence)
    found = []
    for draw in range(draws):
        shuffled = _shuffled(*map(len, orders), seed, draw)
        drawn = map(_among_first, (n_defect, n_normal), shuffled, orders)
        found.append(scores_of(scores.ranking.count(*drawn), scores.class_names))
    return {
        name: np.array([np.nan if f[name] is None else f[name] for f in found])
        for name in found[0]
        if name != "undefined"
    }


def _among_first(n, shuffled, order):
    """Whether each image, by rank, is among the first n of those shuffled; None: all are."""
    if n == len(order):
        return None
    is_drawn = np.zeros(len(order), bool)
    is_drawn[shuffled[:n]] = True
    return is_drawn[order]


# Draws are kept: they are the same at all prevalences, and for all runs with that many images.
@functools.lru_cache(1)
def _resampled(n_defect, n_normal, draws, seed):
    """Draws with replacement: [how often each defect, and each normal, is in it]."""
    rng = keyed_rng(BOOTSTRAP, seed)
    sizes = [(n_defect, n_normal)] * draws
    return [
        [np.bincount(rng.integers(0, n, n), minlength=n).astype(np.int8) for n in both]
        for both in sizes
    ]


@functools.lru_cache(128)
def _shuffled(n_defect, n_normal, seed, draw):
    """The defects and the normals in an order that starts with the subset of any prevalence."""
    rng = keyed_rng(DRAWN_SUBSET, seed, draw)
    return [rng.permutation(n).astype(np.int32) for n in (n_defect, n_normal)]
