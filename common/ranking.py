"""Labelled images sorted by their logit: what all scores are counted from.

A defect is the positive (1), a normal the negative (0); rows labelled -1 are left out. D defects,
N normals, C classes, T distinct logits of defects. Counts are exact.
"""

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
        self._called = [int(np.searchsorted(x, -threshold, "right")) for x in (defects, normals)]
        classes = np.asarray(classes)[rows[self.order[0]]].astype(bool)
        # float32 sums of whole numbers are exact below 2^24, and a matrix product of them is fast.
        self._classes = np.ascontiguousarray(classes.T, np.float32)
        is_new = np.append(len(defects) > 0, defects[1:] != defects[:-1])[: len(defects)]
        self._step, self._logit = np.cumsum(is_new) - 1, -defects[is_new]  # (D,), (T,)
        sides = ("right", "left")
        self._at, self._above = (np.searchsorted(normals, -self._logit, side) for side in sides)

    def count(self, of_defect=None, of_normal=None):
        """Counts in which each defect (D,) and each normal (N,) counts that often; None: once.

        Whole numbers, by rank.
        """
        if of_defect is None:
            of_defect = np.ones(len(self.order[0]), bool)
        called, missed = np.split(of_defect.astype(np.float32), self._called[:1])
        hits = (self._classes[:, : len(called)] @ called).astype(np.float64)
        images = hits + self._classes[:, len(called) :] @ missed
        drawn = np.flatnonzero(of_defect)
        step = self._step[drawn]
        last = np.flatnonzero(np.append(step[1:] != step[:-1], True)[: len(step)])
        fp = np.arange(len(self.order[1]) + 1)  # of the first 0, 1, ... normals
        if of_normal is not None:
            np.cumsum(of_normal, out=fp[1:])
        step, tps = step[last], np.cumsum(of_defect[drawn], dtype=np.int64)[last]
        steps, fps = np.diff(tps, prepend=0), fp[self._at[step]]
        return Counts(
            n_defect=int(steps.sum()),
            n_normal=int(fp[-1]),
            tp=int(of_defect[: len(called)].sum(dtype=np.int64)),
            fp=int(fp[self._called[1]]),
            images=images,
            hits=hits,
            threshold=self._logit[step],
            steps=steps.astype(np.float64),
            tps=tps.astype(np.float64),
            fps=fps.astype(np.float64),
            pairs=int((steps * (2 * fp[-1] - fps - fp[self._above[step]])).sum()),
        )
