"""The runs of a study: a grid file names base configs, axes and overrides; here they become runs.

    overrides: {optimization.epochs: 2}           of every run; may be left out
    groups:
      NAME:                                       of a set of runs, for the report
        configs: [configs/simclr_r18.yaml, ...]   or each with overrides of its own: {FILE: {...}}
        axes: {data.train_defect_proportion: [0.01, 0.45], seed: [42]}
        overrides: {data.fraction: 0.5}

A group's runs are every config with every combination of its axes. Of two overrides of one key the
nearer wins: an axis, a config's own, its group's, the grid's; the command line's beats all. A run's
folder carries a hash of its resolved config, so two different runs never share one, and a run of
two groups is one run.
"""

import dataclasses
import fcntl
import importlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from common.annotations import read_annotations
from common.config import read_config, run_name
from common.errors import ConfigError
from common.run_folder import LOCK, RESULT, STATUS, read_json
from common.sampler import imbalanced_indices
from common.schema import build, parse_yaml, read_yaml

CALIBRATION = "calibration.json"  # in the output folder: seconds an image, by what costs time


@dataclass(frozen=True)
class Group:
    configs: list | dict
    axes: dict
    overrides: dict


@dataclass(frozen=True)
class Grid:
    groups: dict
    overrides: dict | None = None


@dataclass(frozen=True)
class GridRun:
    """One run: what is started, and where it leaves its results."""

    name: str
    groups: tuple  # names of the groups that it belongs to
    config: str  # path of the base config
    overrides: tuple  # section.key=value
    cfg: object  # the resolved config

    @property
    def folder(self):
        return Path(self.cfg.run.output_dir) / self.name

    def command(self, python="python", nproc=1):
        """What to start as a list of words; nproc: processes (GPUs) of this run."""
        launch = (
            [python] if nproc == 1 else ["torchrun", "--standalone", f"--nproc_per_node={nproc}"]
        )
        return [*launch, f"{self.cfg.method}.py", "--config", self.config, *self.overrides]


def read_grid(path, overrides=()):
    """A grid file -> list of GridRun in the file's order, each run once.

    overrides: `section.key=value` for every run, as on a script's command line. One that names an
    axis replaces its values; a list gives several, where a group has that axis. Raises ConfigError
    with every problem.
    """
    problems, runs, groups = [], {}, {}
    grid = build(Grid, read_yaml(path), problems)
    for name, content in grid.groups.items() if grid else ():
        group = build(Group, content, problems, f"groups.{name}")
        if group:
            merged = (grid.overrides or {}) | group.overrides
            groups[name] = dataclasses.replace(group, overrides=merged)
    problems += _problems_of(overrides, groups.values())
    for name, group in groups.items():
        try:
            for config, chosen in _combinations(group, overrides):
                cfg = _resolve(config, chosen)
                run = GridRun(run_name(cfg), (name,), config, chosen, cfg)
                if run.name in runs:
                    run = dataclasses.replace(run, groups=(*runs[run.name].groups, name))
                runs[run.name] = run
        except ConfigError as error:  # the group's other runs have the same mistake
            problems.append(f"groups.{name}: {error}")
    if problems:
        raise ConfigError("\n  ".join([f"{path}:", *problems]))
    return list(runs.values())


def _problems_of(overrides, groups):
    """Sentences about overrides that no group can use."""
    axes = {key for group in groups for key in group.axes}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            yield f"override '{override}': expected section.key=value"
        elif isinstance(parse_yaml(text, override), list) and key not in axes:
            yield f"override '{override}': several values, but {key} is no axis of this grid"


def _combinations(group, overrides):
    """(config, overrides) of every run of a group."""
    axes, given = dict(group.axes), {}
    for override in overrides:
        key, _, text = override.partition("=")
        value = parse_yaml(text, f"override '{override}'")
        if key in axes:
            axes[key] = value if isinstance(value, list) else [value]
        elif not isinstance(value, list):
            given[key] = text
    for config in group.configs:
        own = group.configs[config] if isinstance(group.configs, dict) else {}
        if not isinstance(own, dict):
            raise ConfigError(f"configs.{config}: expected overrides, got {own!r}")
        fixed = {key: json.dumps(value) for key, value in (group.overrides | own).items()} | given
        for values in itertools.product(*axes.values()):
            at = dict(zip(axes, map(json.dumps, values), strict=True))
            chosen = at | fixed | at  # the axes first, and stronger
            yield config, tuple(f"{key}={value}" for key, value in chosen.items())


def _resolve(config, overrides):
    """The config of a run by the rules of its own script."""
    values = read_yaml(config)
    method = values.get("method") if isinstance(values, dict) else None
    if not isinstance(method, str) or not Path(f"{method}.py").is_file():
        raise ConfigError(f"{config}: method: there is no script {method}.py")
    return read_config(importlib.import_module(method).Config, config, overrides)


def state(run):
    """finished, running, preempted, failed or queued; and why, where status.json says so."""
    if (run.folder / RESULT).exists():
        return "finished", None
    status = read_json(run.folder / STATUS) or {}
    if is_held(run.folder / LOCK):
        return "running", None
    at, why = status.get("state", "queued"), status.get("why")
    if at == "running":  # nobody holds it: it was killed
        return "preempted", "killed"
    return at, why


def is_held(path):
    """Whether another process holds the lock file."""
    try:
        with open(path, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


# What a run will take: seconds an image, measured on what costs as much, times its images.


def cost_key(run):
    """Runs of one key take the same time an image."""
    cfg = run.cfg
    frozen = "random " if cfg.run.frozen_encoder else ""
    return f"{frozen}{cfg.method} {cfg.backbone} {cfg.patch_size or ''} {cfg.data.image_size} px"


def seconds_per_image(runs):
    """{cost_key: seconds}, from finished runs, else from what was calibrated."""
    known = {}
    for folder in {run.folder.parent for run in runs}:
        known |= read_json(folder / CALIBRATION) or {}
    measured = {}
    for run in runs:
        result = read_json(run.folder / RESULT)
        if result:
            images = sum(result["train_rows"].values()) * result["epochs"]
            measured.setdefault(cost_key(run), []).append(result["seconds"] / max(images, 1))
    return known | {key: sum(times) / len(times) for key, times in measured.items()}


class ImageCount:
    """Training images of a run over its epochs; None while its train_csv is not there."""

    def __init__(self):
        self._annotations = {}

    def __call__(self, run):
        data = run.cfg.data
        if data.train_csv not in self._annotations:
            there = os.path.exists(data.train_csv)
            self._annotations[data.train_csv] = read_annotations(data.train_csv) if there else None
        train = self._annotations[data.train_csv]
        if train is None:
            return None
        p, size = data.train_defect_proportion, data.subset_size
        rows = imbalanced_indices(train.defect, p, run.cfg.seed, data.fraction, size)
        return len(rows) * run.cfg.optimization.epochs


def seconds_left(runs, all_runs):
    """Estimated seconds of `runs`, and of how many of them nothing is known."""
    rates, count = seconds_per_image(all_runs), ImageCount()
    total, unknown = 0.0, 0
    for run in runs:
        rate = rates.get(cost_key(run))
        images = count(run) if rate is not None else None
        if images is None:
            unknown += 1
        else:
            total += rate * images
    return total, unknown
