"""Labelled images sorted by their logit: what all scores are counted from.

A defect is the positive (1), a normal the negative (0); rows labelled -1 are left out. D defects,
N normals, C classes, T distinct logits of defects. Counts are exact.
"""

import functools
from dataclasses import dataclass

import numpy as np

from common.running.errors import UserError


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


@dataclass(frozen=True)
class Counts:
    """What the scores of a set of images are made of, at any prevalence."""

    n_defect: int
    n_normal: int
    tp: int  # defects called a defect
    fp: int  # normals called a defect
    images: np.ndarray  # (C,) of each class
    hits: np.ndarray  # (C,) those of them that are called a defect
    threshold: np.ndarray  # (T,) distinct logits of defects, the highest first
    steps: np.ndarray  # (T,) defects at it
    tps: np.ndarray  # (T,) defects at or above it
    fps: np.ndarray  # (T,) normals at or above it
    pairs: int  # of a defect and a normal: 2 where the defect's logit is higher, 1 where they tie


class Ranking:
    """Images sorted by their logit, once; to be counted with any weights.

    order: of the defects and of the normals, which one (in the order given) has rank 0, 1, ...
    """

    def __init__(self, logits, labels, classes, threshold):
        """logits, labels, classes: as in all_scores; called a defect is logit >= threshold."""
        rows = np.flatnonzero(np.asarray(labels).reshape(-1) == 1)
        logits, is_defect = _labelled(logits, labels)
        groups = -logits[is_defect], -logits[~is_defect]
        self.order = tuple(np.argsort(x, kind="stable") for x in groups)
        defects, normals = (x[order] for x, order in zip(groups, self.order, strict=True))
        called = [int(np.searchsorted(x, -threshold, "right")) for x in (defects, normals)]
        self._called, self._normals = called[0], (called[1], len(normals))
        self._classes = np.asarray(classes)[rows[self.order[0]]].astype(bool)  # (D, C)
        is_new = np.append(len(defects) > 0, defects[1:] != defects[:-1])[: len(defects)]
        self._step, self._logit = np.cumsum(is_new) - 1, -defects[is_new]  # (D,), (T,)
        sides = ("right", "left")
        self._at, self._above = (np.searchsorted(normals, -self._logit, side) for side in sides)

    @functools.cached_property
    def _kinds(self):
        """Which combination of classes each defect has, and (K, C) what those K are."""
        bits = np.packbits(np.pad(self._classes, ((0, 0), (1, 0))), axis=1)
        texts = bits.view(f"S{bits.shape[1]}").ravel()
        _, first, kind = np.unique(texts, return_index=True, return_inverse=True)
        return kind, self._classes[first].astype(np.float64)

    def _of_classes(self, ranks, weights):
        """(C,) weighted images of each class among the defects of these ranks."""
        if weights is None:
            return self._classes[ranks].sum(axis=0, dtype=np.float64)
        kind, kinds = self._kinds
        return np.bincount(kind[ranks], weights[ranks], minlength=len(kinds)) @ kinds

    def count(self, of_defect=None, of_normal=None):
        """Counts in which each defect (D,) and each normal (N,) counts that often; None: once.

        Whole numbers, by rank.
        """
        weights = np.ones(len(self.order[0]), bool) if of_defect is None else of_defect
        drawn = np.flatnonzero(weights)
        called, missed = np.split(drawn, [np.searchsorted(drawn, self._called)])
        hits, misses = (self._of_classes(ranks, of_defect) for ranks in (called, missed))
        defects = np.cumsum(weights[drawn], dtype=np.int64)
        step = self._step[drawn]
        last = np.flatnonzero(np.append(step[1:] != step[:-1], True)[: len(step)])
        step, tps = step[last], defects[last]
        fps, above, fp, n_normal = self._at[step], self._above[step], *self._normals
        if of_normal is not None:
            down = np.append(0, np.cumsum(of_normal, dtype=np.int64))  # of the first 0, 1, ...
            fps, above, fp, n_normal = down[fps], down[above], down[fp], down[-1]
        steps = np.diff(tps, prepend=0)
        return Counts(
            n_defect=int(steps.sum()),
            n_normal=int(n_normal),
            tp=int(defects[len(called) - 1]) if len(called) else 0,
            fp=int(fp),
            images=hits + misses,
            hits=hits,
            threshold=self._logit[step],
            steps=steps.astype(np.float64),
            tps=tps.astype(np.float64),
            fps=fps.astype(np.float64),
            pairs=int((steps * (2 * n_normal - fps - above)).sum()),
        )
