"""What the runs of a grid left: read, matched with the paper's values, and summed up over seeds."""

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.run_folder import RESULT, read_json
from common.run_log import LOG, read_log
from common.study.evaluate import intervals, load_scores
from common.study.grid import GridRun, state, training_subset

PAPER = Path(__file__).with_name("paper_values.csv")
# Of the t distribution with 1, 2, ... degrees of freedom, 97.5 %; the normal's from 10 on.
T_VALUES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, eq=False)  # each its own: results are found by identity
class Finished:
    """A finished run with what it left."""

    run: GridRun
    result: dict
    probe: str  # online | offline: whose validation scores these are

    @property
    def val(self):
        """Validation scores of the chosen probe."""
        return self.result["val" if self.probe == "online" else "val_offline"]

    @property
    def method(self):
        """As in its result: `random` for a frozen encoder."""
        return self.result["method"]

    @property
    def backbone(self):
        return self.result["backbone"]

    @property
    def proportion(self):
        return self.result["train_defect_proportion"]

    @functools.cached_property
    def scores(self):
        """StoredScores of the chosen probe."""
        return load_scores(self.run.folder, self.probe)

    @functools.lru_cache(maxsize=16)  # noqa: B019 (as many as there are prevalences, a run)
    def intervals(self, prevalence=None):
        """95 % intervals of the validation scores, over images."""
        return intervals(self.scores, prevalence, draws=100)

    def epochs(self):
        """Records of its log, one an epoch, that have a validation."""
        log = read_log(self.run.folder / LOG)
        return [r for r in log if r["kind"] == "epoch" and "label_free_n" in r]

    def class_counts(self):
        """{class: images in its training subset}, or {} where the annotations are not there."""
        try:
            train, rows = training_subset(self.run)
        except UserError:
            return {}
        return dict(zip(train.class_names, train.classes[rows].sum(axis=0).tolist(), strict=True))


def collect(runs, probe="online"):
    """GridRuns -> (list of Finished, {name: why it is not there}). probe: online | offline."""
    finished, missing = [], {}
    for run in runs:
        result, (at, why) = read_json(run.folder / RESULT), state(run)
        if at == "finished" and result and "val" in result:
            try:
                entry = Finished(run, result, probe)
                _ = entry.scores
                finished.append(entry)
            except UserError as error:
                missing[run.name] = str(error)
        elif at == "finished":
            missing[run.name] = f"{run.folder / RESULT} is damaged"
        else:
            missing[run.name] = at + (f": {why}" if why else "")
    return finished, missing


@functools.cache
def paper_values():
    """{(table, backbone, method, split, metric, proportion, at): value}; see paper_values.csv."""
    names = ("table", "backbone", "method", "split", "metric")
    numbers = ("train_defect_proportion", "at")
    with open(PAPER, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (*(r[k] for k in names), *(float(r[k]) if r[k] else None for k in numbers)): float(
            r["value"]
        )
        for r in rows
    }


@dataclass(frozen=True)
class Estimate:
    """A score over the seeds of one setting."""

    mean: float | None
    low: float | None
    high: float | None
    seeds: int

    def __str__(self):
        if self.mean is None:
            return ""
        if self.low is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(entries, metric, split="val"):
    """Mean over seeds with a 95 % interval: over seeds by t, or, with one seed, over images.

    entries: Finished runs that differ in the seed only. split: train | val (the chosen probe's).
    """
    values = [(e.val if split == "val" else e.result[split])[metric] for e in entries]
    values = [v for v in values if v is not None]
    if not values:
        return Estimate(None, None, None, 0)
    mean, n = float(np.mean(values)), len(values)
    if n > 1:
        t = T_VALUES[n - 2] if n - 2 < len(T_VALUES) else 1.96
        half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
        return Estimate(mean, mean - half, mean + half, n)
    found = entries[0].intervals().get(metric) if split == "val" else None
    return Estimate(mean, *(found or (None, None)), n)


def settings(finished, key):
    """{key(entry): [entries]} in the order in which they came; None keys are left out."""
    groups = {}
    for entry in finished:
        at = key(entry)
        if at is not None:
            groups.setdefault(at, []).append(entry)
    return groups


def ranks(values):
    """(N,) -> ranks from 1, ties share the mean."""
    values = np.asarray(values, float)
    below = (values[:, None] > values).sum(axis=1)
    return below + ((values[:, None] == values).sum(axis=1) + 1) / 2


def spearman(x, y):
    """Correlation of ranks; None where it is undefined."""
    x, y = ranks(x), ranks(y)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def kendall(x, y):
    """Tau-b; None where it is undefined."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    dx, dy = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    norm = math.sqrt(float((dx**2).sum()) * float((dy**2).sum()))
    return float((dx * dy).sum()) / norm if len(x) > 2 and norm else None


def regret(measure, score):
    """How much score is lost by picking the run with the highest measure; None without runs."""
    if not len(score):
        return None
    return float(np.max(score) - np.asarray(score)[int(np.argmax(measure))])
