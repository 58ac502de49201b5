"""Subsets with a given defect proportion, and the batch sampler that resumes and distributes.

Both are functions of seed, epoch and step: no state has to be restored.

Deviation: train set size: it shrinks with the proportion, as the study's; subset_size fixes it.
"""

from dataclasses import replace

import numpy as np

from common.annotations import DEFECT, NORMAL, UNLABELLED
from common.running.errors import UserError
from common.running.keyed import LABEL_BUDGET, ORDER, SUBSET, keyed_rng


def imbalanced_indices(defect, proportion, seed, fraction=1.0, subset_size=None):
    """Rows of a subset in which `proportion` of the labelled rows are defects.

    defect: (N,) 1 defect, 0 normal, -1 not labelled. proportion: between 0 and 1, or None: as they
    are. fraction: share of each group that is used at all, before the proportion. subset_size:
    number of labelled rows, or None: the largest subset with all normals, or, where defects are too
    few for that, with all defects. Rows without a label are always added.

    A group's rows come in one order a seed and a subset takes the first of them, so the defects of
    1 % are among those of 2 %. Returns sorted int64 rows. Raises UserError with what there is.
    """
    defect = np.asarray(defect)
    groups = {}
    for group in (NORMAL, DEFECT, UNLABELLED):
        rows = np.flatnonzero(defect == group)
        order = keyed_rng(SUBSET, seed, group + 1).permutation(len(rows))
        groups[group] = rows[order][: round(fraction * len(rows))]
    n_normal, n_defect = len(groups[NORMAL]), len(groups[DEFECT])
    have = f"there are {n_normal} normal and {n_defect} defect rows"
    if fraction < 1:
        have += f" in data.fraction {fraction:g} of the set"

    take_normal, take_defect = n_normal, n_defect
    if proportion is not None:
        if not 0 < proportion < 1:
            raise UserError(
                f"data.train_defect_proportion: {proportion:g} is not inside 0 to 1 (15 % is 0.15)"
            )
        if not n_normal or not n_defect:
            raise UserError(f"data.train_defect_proportion: {proportion:g} asked for, but {have}")
        take_defect = round(n_normal * proportion / (1 - proportion))
        if take_defect > n_defect:
            take_defect = n_defect
            take_normal = round(n_defect * (1 - proportion) / proportion)
        if not take_normal or not take_defect:
            raise UserError(
                f"data.train_defect_proportion: {proportion:g} leaves {take_normal} normal and "
                f"{take_defect} defect rows; {have}"
            )
    if subset_size is not None:
        largest = take_normal + take_defect
        if subset_size > largest:
            raise UserError(
                f"data.subset_size: {subset_size} labelled rows asked for, but at this proportion "
                f"at most {largest} can be had; {have}"
            )
        share = take_defect / largest if proportion is None else proportion
        take_defect = round(subset_size * share)
        take_normal = subset_size - take_defect
        if proportion is not None and not (take_normal and take_defect):
            raise UserError(
                f"data.subset_size: {subset_size} rows at a proportion of {proportion:g} leave "
                f"{take_normal} normal and {take_defect} defect rows"
            )
    chosen = [groups[NORMAL][:take_normal], groups[DEFECT][:take_defect], groups[UNLABELLED]]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def stratified_sample(defect, most, seed, purpose):
    """At most `most` labelled rows with the defect share of all labelled ones, sorted.

    A larger sample of the same seed and purpose (see `keyed_rng`) holds the smaller one.
    """
    groups = [np.flatnonzero(defect == group) for group in (NORMAL, DEFECT)]
    n, n_defect = len(groups[0]) + len(groups[1]), len(groups[1])
    if n > most:
        n, n_defect = most, max(round(most * n_defect / n), min(n_defect, 1))
    chosen = []
    for group, (rows, take) in enumerate(zip(groups, (n - n_defect, n_defect), strict=True)):
        order = keyed_rng(purpose, seed, group).permutation(len(rows))
        chosen.append(rows[order[:take]])
    return np.sort(np.concatenate(chosen))


def keep_labels(train, rows, budget, seed):
    """Annotations in which only `budget` labels are left, of the given rows, at their mix.

    None leaves all of them. A larger budget holds a smaller one's labels. The rows stay: who needs
    no label trains on the same images. Raises UserError where the rows have fewer labels.
    """
    if budget is None:
        return train
    defect = train.defect[rows]
    known = int((defect != UNLABELLED).sum())
    if budget > known:
        raise UserError(f"data.labels: {budget} asked for, but {known} of the rows have a label")
    kept = np.zeros(len(train), bool)
    kept[rows[stratified_sample(defect, budget, seed, LABEL_BUDGET)]] = True
    defect = np.where(kept, train.defect, UNLABELLED).astype(train.defect.dtype)
    return replace(train, defect=defect, classes=train.classes & kept[:, None])


class EpochSampler:
    """Batches of (epoch, row) keys for one rank: a function of (seed, epoch, step, rank).

    Step s of an epoch takes positions s * batch_size to (s + 1) * batch_size of one permutation;
    rank r takes its r-th part. The incomplete last batch is dropped: no row is twice in a batch.
    Use it as a DataLoader's batch_sampler; call `start` before iterating over that.
    """

    def __init__(self, rows, batch_size, seed, rank=0, world_size=1):
        """rows: row numbers of the annotations. batch_size: over all ranks."""
        if batch_size % world_size:
            raise UserError(
                f"optimization.batch_size: {batch_size} cannot be split over {world_size} ranks"
            )
        if len(rows) < batch_size:
            raise UserError(
                f"optimization.batch_size: {batch_size} is more than the {len(rows)} training rows"
            )
        self.rows = np.asarray(rows, np.int64)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.steps_per_epoch = len(self.rows) // batch_size
        self.start(0)

    def start(self, epoch, first_step=0, end=None):
        """Let the next iteration be that of `epoch`, from its step `first_step` on.

        end: the epoch before which to stop; None: after this one.
        """
        self.epoch, self.first_step = epoch, first_step
        self.end = epoch + 1 if end is None else end

    def __len__(self):
        return self.steps_per_epoch * (self.end - self.epoch) - self.first_step

    def __iter__(self):
        share, first_step = self.batch_size // self.world_size, self.first_step
        for epoch in range(self.epoch, self.end):
            order = keyed_rng(ORDER, self.seed, epoch).permutation(len(self.rows))
            for step in range(first_step, self.steps_per_epoch):
                first = step * self.batch_size + self.rank * share
                yield [(epoch, row) for row in self.rows[order[first : first + share]].tolist()]
            first_step = 0
