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
two groups is one run. Some groups have places of their own in the report: `resolution` and
`augmentation`, the ablations, and those whose names begin with `label_free` (settings to choose
among) or `labels` (budgets of labels).
"""

import dataclasses
import functools
import importlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from common.annotations import read_annotations
from common.running.config import differences, read_config, run_name
from common.running.errors import ConfigError, listed, regular
from common.running.folder import LOCK, RESULT, STATUS, read_json
from common.running.schema import build, parse_override, read_yaml
from common.running.standing import standing, try_lock
from common.sampler import imbalanced_indices, keep_labels
from common.store import PackedStore, leave_out_unreadable


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
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        words = [f"{self.cfg.method}.py", "--config", self.config, *self.overrides]
        return [python, *(torchrun if nproc > 1 else []), *words]


def read_grid(path, overrides=()):
    """A grid file -> list of GridRun in the file's order, each run once.

    overrides: `section.key=value` for every run, as on a script's command line. One that names an
    axis replaces its values; a list gives several, where a group has that axis. Raises ConfigError
    with every problem.
    """
    problems, runs, groups = [], {}, {}
    given = dict(map(parse_override, overrides))
    grid = build(Grid, read_yaml(path), problems)
    for name, content in grid.groups.items() if grid else ():
        name = name if isinstance(name, str) else json.dumps(name)  # such as 2024, or null
        group = build(Group, content, problems, f"groups.{name}")
        if group:
            merged = (grid.overrides or {}) | group.overrides
            groups[name] = dataclasses.replace(group, overrides=merged)
    axes = {key for group in groups.values() for key in group.axes}
    for key, value in given.items():
        if isinstance(value, list) and key not in axes:
            problems.append(f"override {key}: several values, but {key} is no axis of this grid")
    for name, group in groups.items():
        try:
            for config, chosen in _combinations(group, given):
                cfg = _resolve(config, chosen)
                run = GridRun(run_name(cfg), (name,), config, chosen, cfg)
                same = runs.get(run.name, run)
                if cfg != same.cfg:
                    values = map(dataclasses.asdict, (same.cfg, cfg))
                    changed = "; ".join(differences(*values)[:3])
                    raise ConfigError(f"two different runs are named {run.name} ({changed})")
                groups_of = dict.fromkeys((*same.groups, name))
                runs[run.name] = dataclasses.replace(run, groups=tuple(groups_of))
        except ConfigError as error:  # the group's other runs have the same mistake
            problems.append(f"groups.{name}: {error}")
    if problems:
        raise ConfigError(listed(path, problems))
    return list(runs.values())


def _combinations(group, given):
    """(config, overrides) of every run of a group. given: {key: value} of the command line."""
    axes = dict(group.axes)
    for key, value in given.items():
        if key in axes:
            axes[key] = value if isinstance(value, list) else [value]
    given = {key: value for key, value in given.items() if not isinstance(value, list)}
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"axes.{key}: expected a list of values, got {values!r}")
    for config in group.configs:
        own = group.configs[config] if isinstance(group.configs, dict) else {}
        if not isinstance(config, str) or not isinstance(own, dict):
            raise ConfigError(f"configs: expected FILE or FILE: {{overrides}}, got {config}: {own}")
        fixed = group.overrides | own | given
        for values in itertools.product(*axes.values()):
            at = dict(zip(axes, values, strict=True))
            chosen = at | fixed | at  # the axes first, and stronger
            words = (f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in chosen.items())
            yield config, tuple(words)


def _resolve(config, overrides):
    """The config of a run by the rules of its own script."""
    values = read_yaml(config)
    method = values.get("method") if isinstance(values, dict) else None
    if not isinstance(method, str) or not Path(f"{method}.py").is_file():
        raise ConfigError(f"{config}: method: there is no script {method}.py")
    return read_config(importlib.import_module(method).Config, config, overrides)


def state(run):
    """finished, refused, running, preempted, failed or queued; and why, where that is known.

    refused: the folder holds another run, or a damaged one; see `standing`.
    """
    held = is_held(run.folder / LOCK)
    at, why = standing(run.folder, run.cfg, held)
    if at is not None:
        return at, why
    if held:
        return "running", None
    status = read_json(run.folder / STATUS) or {}
    at, why = status.get("state", "queued"), status.get("why")
    if at == "running":  # nobody holds it: it was killed
        return "preempted", "killed"
    if at == "finished":  # its result was taken away: to be made again
        return "preempted", f"no {RESULT}"
    return at, why


def others_there(runs):
    """{folder: how many finished runs of other settings it holds}: why those of a grid are not."""
    own, found = {run.folder for run in runs}, {}
    for folder in sorted({run.folder.parent for run in runs}):
        n = len({path.parent for path in folder.glob(f"*/{RESULT}")} - own)
        if n:
            found[f"{folder}"] = f"{n} finished runs of other settings (where data lie counts)"
    return found


def is_held(path):
    """Whether another process holds the lock file."""
    try:
        with open(regular(path)) as file:
            return not try_lock("lockf", file, shared=True)
    except FileNotFoundError:
        return False


annotations = functools.lru_cache(maxsize=2)(read_annotations)


def training_subset(run):
    """(Annotations, rows) that a run trains on. Raises UserError where its CSV is not there."""
    data, seed = run.cfg.data, run.cfg.seed
    table = data.train_csv, data.packed, data.max_bad_images
    how = data.train_defect_proportion, seed, data.fraction, data.subset_size
    rows = _subset(table, *how)
    return keep_labels(_readable(*table), rows, data.labels, seed), rows


@functools.lru_cache(maxsize=2)
def _readable(train_csv, packed, most):
    train = annotations(train_csv)
    return train if packed is None else leave_out_unreadable(PackedStore(packed), most, train)[0]


@functools.lru_cache(maxsize=8)  # of a million rows each: the proportions that all methods share
def _subset(table, *how):
    return imbalanced_indices(_readable(*table).defect, *how)
