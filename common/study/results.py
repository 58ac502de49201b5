"""What the runs of a grid left: read, matched with the paper's values, and summed up over seeds."""

import csv
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.annotations import DEFECT
from common.running.config import identity
from common.running.errors import UserError
from common.running.log import LOG, read_log
from common.running.standing import read_result
from common.scoring import PREVALENCES
from common.study.evaluate import interval, load_scores, resample
from common.study.grid import GridRun, others_there, state, training_subset

PAPER = Path(__file__).with_name("paper_values.csv")
DRAWS = 100  # of the bootstrap
# Of the t distribution with 1, 2, ... degrees of freedom, 97.5 %.
T_VALUES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, eq=False)  # each its own: results are found by identity
class Finished:
    """A finished run with what it left."""

    run: GridRun
    result: dict
    probe: str  # a key of LOGITS: whose validation scores these are
    variant: str = ""  # what sets it apart from others of its method, backbone and proportion
    note: str = ""  # what it could not be compared with

    @property
    def method(self):
        """As in its result (`random` for a frozen encoder), with what sets it apart."""
        return ", ".join(filter(None, (self.result["method"], self.variant)))

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

    @functools.cached_property
    def _resampled(self):
        return resample(self.scores, (None, *PREVALENCES), draws=DRAWS)

    @functools.cached_property
    def _at(self):
        return {p: self.scores.at(p) for p in (None, *PREVALENCES)}

    def at(self, prevalence=None):
        """Validation scores of the chosen probe at one of PREVALENCES, or as the data are."""
        return self._at[prevalence]

    def interval(self, metric, prevalence=None):
        """95 % interval over images of such a score, or (None, None)."""
        drawn = self.resampled(metric, prevalence)
        return (None, None) if drawn is None else interval(drawn)

    def resampled(self, metric, prevalence=None):
        """(DRAWS,) of such a score, of the same images for every run; None: it has none."""
        return self._resampled[prevalence].get(metric)

    @functools.cached_property
    def _log(self):
        return read_log(self.run.folder / LOG)

    def epochs(self):
        """Records of its log, one an epoch, that have a validation."""
        return [r for r in self._log if r["kind"] == "epoch" and "label_free_n" in r]

    def diagnostics(self):
        """A method's own numbers, means over the last epoch's log, {} where it has none.

        What was not finite, as under a gradient scaler, does not count; None where nothing was.
        """
        steps = [r for r in self._log if r["kind"] == "step"]
        last = [r.get("diagnostics", {}) for r in steps if r["epoch"] == steps[-1]["epoch"]]
        found = {k: [d[k] for d in last if d[k] is not None] for k in (last[-1] if last else {})}
        return {k: float(np.mean(of)) if of else None for k, of in found.items()}

    def class_counts(self):
        """{class: defects of it in its training subset}, {} where its images are not known."""
        try:
            train, rows = training_subset(self.run)
        except UserError:
            return {}
        counts = train.classes[rows[train.defect[rows] == DEFECT]].sum(axis=0)
        return dict(zip(train.class_names, counts.tolist(), strict=True))


def collect(runs, probe="online"):
    """GridRuns -> (list of Finished, {name: why it is not there}). probe: a key of LOGITS."""
    finished, missing = [], {}
    for run in runs:
        try:
            at, why = state(run)
            if at != "finished":
                missing[run.name] = at + (f": {why}" if why else "")
                continue
            entry = Finished(run, read_result(run.folder), probe, note=why or "")
            _ = entry.scores, entry.epochs(), entry.method, entry.backbone, entry.proportion
            _ = [entry.result[key]["f1"] for key in ("train", "val", "val_offline")]
            _ = entry.result["label_free"], entry.result["seconds"], entry.result["epochs"]
            finished.append(entry)
        except UserError as error:
            missing[run.name] = str(error)
        except (OSError, ValueError, KeyError, TypeError) as error:
            missing[run.name] = f"{run.folder} is damaged ({type(error).__name__}: {error})"
    return finished, missing if finished else missing | others_there(runs)


def with_variants(finished, but=()):
    """The same, told apart where runs of one method, backbone and proportion differ in more than
    the seed: by their group where each has one of its own (the first's go without), else by what
    differs. but: keys (`section.key`) that may differ."""
    told = []
    for entries in settings(finished, lambda e: (e.method, e.backbone, e.proportion)).values():
        all_values = [flat(identity(e.run.cfg, with_paths=True)) for e in entries]
        keys = [key for key in all_values[0] if key not in ("seed", *but)]
        keys = [key for key in keys if len({values.get(key) for values in all_values}) > 1]
        names = [", ".join(f"{key}={values.get(key)}" for key in keys) for values in all_values]
        groups = [entry.run.groups for entry in entries]
        pairs = set(zip(names, groups, strict=True))
        if len(pairs) == len(set(names)) == len(set(groups)):
            names = ["" if of == groups[0] else of[-1] for of in groups]
        for entry, name in zip(entries, names, strict=True):
            told.append(dataclasses.replace(entry, variant=name))
    return told


def flat(values, path=""):
    """Nested dicts -> {section.key: value}."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


@functools.cache
def paper_values():
    """{(table, backbone, method, split, metric, proportion, at): value}; see paper_values.csv.

    The study's MAE never got a gradient: its values of Tables 3 and 4 stand there as `random`, too.
    """
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


def estimate(entries, metric, prevalence=None, split="val"):
    """Mean over seeds with a 95 % interval: over seeds by t, or, with one seed, over images.

    entries: Finished runs that differ in the seed only. split: val (the chosen probe, at a
    prevalence or as the data are) | train (which has an interval over seeds only).
    """
    scores = [e.at(prevalence) if split == "val" else e.result[split] for e in entries]
    known = [(e, s[metric]) for e, s in zip(entries, scores, strict=True) if s[metric] is not None]
    if not known:
        return Estimate(None, None, None, 0)
    if len(known) > 1:
        return _over_seeds([value for _, value in known])
    [(entry, value)] = known
    low, high = entry.interval(metric, prevalence) if split == "val" else (None, None)
    return Estimate(float(value), low, high, 1)


def difference(entries, others, metric):
    """Estimate of how much higher a validation score of some runs is than of others, by seed.

    Its interval is over the seeds that both have, by t, or of one over images, paired (bootstrap);
    None where no seed is in both, or they were scored on other images.
    """
    by_seed = {e.result["seed"]: e for e in others}
    pairs = [(e, by_seed[e.result["seed"]]) for e in entries if e.result["seed"] in by_seed]
    if any(not np.array_equal(a.scores.label, b.scores.label) for a, b in pairs):
        return None
    both = [(a, b) for a, b in pairs if None not in (a.at()[metric], b.at()[metric])]
    values = [a.at()[metric] - b.at()[metric] for a, b in both]
    if len(values) == 1:
        a, b = (e.resampled(metric) for e in both[0])
        unknown = a is None or b is None  # without normals, or defects, to draw
        return Estimate(values[0], *((None, None) if unknown else interval(a - b)), 1)
    return _over_seeds(values) if values else None


def _over_seeds(values):
    """Mean of several with its 95 % interval, by t."""
    n, mean = len(values), float(np.mean(values))
    df = n - 1  # of more, the expansion of Abramowitz and Stegun, 26.7.5
    t = T_VALUES[df - 1] if df <= len(T_VALUES) else 1.96 + 2.372 / df + 2.823 / df**2
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def beside(ours, theirs):
    """[ours, the paper's value, the difference]. ours: an Estimate; theirs: a number or None."""
    known = ours.mean is not None and theirs is not None
    return [ours, theirs, ours.mean - theirs if known else None]


def settings(finished, key):
    """{key(entry): [entries]} in the order in which they came; None keys are left out."""
    groups = {}
    for entry in finished:
        at = key(entry)
        if at is not None:
            groups.setdefault(at, []).append(entry)
    return groups
