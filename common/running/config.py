"""The config sections that all methods share, and how a config is loaded, named and compared."""

import argparse
import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.running.arguments import path_argument
from common.running.errors import ConfigError, listed
from common.running.schema import (
    Count,
    FilePath,
    InnerProportion,
    Momentum,
    NonNegative,
    NonNegativeInt,
    Positive,
    Proportion,
    Share,
    build,
    parse_override,
    read_yaml,
)


@dataclass(frozen=True)
class Data:
    image_root: FilePath
    train_csv: FilePath
    val_csv: FilePath
    image_size: Count  # pixels, square
    train_defect_proportion: InnerProportion | None
    fraction: Share
    subset_size: Count | None
    packed: FilePath | None  # a store of `python -m common.pack`
    labels: Count | None  # that count, of the rows that are trained on; the others are as if empty
    max_bad_images: NonNegativeInt  # that a store may list as unreadable: they are left out
    num_workers: NonNegativeInt  # a rank


@dataclass(frozen=True)
class Augmentation:
    min_scale: Share  # of the image's area: the smallest crop
    t_val: Proportion
    flip_prob: Proportion


@dataclass(frozen=True)
class Optimization:
    optimizer: Literal["lars", "adamw"]
    batch_size: Count  # over all ranks
    lr: NonNegative
    momentum: Momentum  # AdamW: the first beta
    weight_decay: NonNegative
    warmup_start_lr: NonNegative
    exclude_bias_and_norm: bool
    trust_coefficient: Positive | None  # LARS only
    epochs: Count
    warmup_epochs: NonNegativeInt
    min_lr: NonNegative
    precision: Literal["fp16", "bf16", "fp32"]


@dataclass(frozen=True)
class Probe:
    lr: Positive
    momentum: Momentum
    weight_decay: NonNegative
    pos_weight: Literal["balanced", "inverse_proportion"] | Positive


@dataclass(frozen=True)
class RunOptions:
    output_dir: FilePath
    name: str | None
    compile: Literal["auto"] | bool
    val_every_epochs: Count
    init_from: FilePath | None  # a run's folder or a file of weights: where the encoder starts
    frozen_encoder: bool
    log_every: Count  # steps
    checkpoint_every_steps: Count
    deterministic: bool


# Keys that change no number: a run may be continued with another value.
NOT_IDENTITY = {
    "run": ("output_dir", "name", "log_every", "checkpoint_every_steps"),
    "data": ("num_workers",),
}
VIT_PATCH, VIT_WIDTH = 16, 192  # of vit_tiny_patch16_224
PATHS = ("image_root", "train_csv", "val_csv")  # of `data`; rows and labels are compared by hash


def _cross_checks(cfg):
    """Sentences about problems that need more than one key; cfg: a whole config."""
    opt = cfg.optimization
    if opt.warmup_epochs > opt.epochs:
        yield f"optimization.warmup_epochs: {opt.warmup_epochs} is more than epochs, {opt.epochs}"
    if (opt.optimizer == "lars") != (opt.trust_coefficient is not None):
        yield "optimization.trust_coefficient: a number with lars, null with adamw"
    if cfg.backbone != "vit_tiny":
        for key in ("patch_size", "num_heads"):
            if getattr(cfg, key):
                yield f"{key}: null with backbone {cfg.backbone}, which has none"
    elif cfg.data.image_size % (cfg.patch_size or VIT_PATCH):
        size, patch = cfg.data.image_size, cfg.patch_size or VIT_PATCH
        yield f"data.image_size: {size} is no multiple of patch_size, {patch}"
    if cfg.data.max_bad_images and cfg.data.packed is None:
        yield "data.max_bad_images: 0 without data.packed, whose list of unreadable images it is of"
    if cfg.num_heads and VIT_WIDTH % cfg.num_heads:
        yield f"num_heads: {cfg.num_heads} does not divide the width, {VIT_WIDTH}"
    if cfg.run.name and (Path(cfg.run.name).name != cfg.run.name or cfg.run.name == ".."):
        yield f"run.name: expected the name of one folder, got '{cfg.run.name}'"


def _apply_override(values, override):
    """`section.key=value` into the nested dict `values`."""
    dotted, value = parse_override(override)
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {}) if isinstance(values, dict) else None
    if not key or not isinstance(values, dict):
        raise ConfigError(f"override '{override}': expected section.key=value")
    values[key] = value


def read_config(config_class, path, overrides=()):
    """A YAML file with overrides -> a frozen config_class.

    Raises ConfigError with every problem, one a line, each naming its key.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values")
    for override in overrides:
        _apply_override(values, override)
    (method,) = typing.get_args(typing.get_type_hints(config_class)["method"])
    if "method" in values and values["method"] != method:
        got = json.dumps(values["method"], default=str)[:60]
        raise ConfigError(f"{path}: method: this script is for {method}, the config for {got}")
    problems = []
    cfg = build(config_class, values, problems)
    problems = problems or [*_cross_checks(cfg), *getattr(cfg, "problems", list)()]
    if problems:
        raise ConfigError(listed(path, problems), values)
    return cfg


def _refuse_arguments(message):
    raise ConfigError(f"command line: {message}")


def load_config(config_class, argv=None):
    """Command line `--config FILE.yaml [section.key=value ...]` -> a frozen config_class."""
    parser = argparse.ArgumentParser(description="Of two overrides of one key the last wins.")
    path = {"type": path_argument, "metavar": "FILE.yaml"}
    parser.add_argument("--config", required=True, action="append", **path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.error = _refuse_arguments
    args = parser.parse_intermixed_args(argv)
    if len(args.config) > 1:
        raise ConfigError(f"command line: --config stands twice: {', '.join(args.config)}")
    return read_config(config_class, args.config[0], args.overrides)


def identity(cfg, with_paths):
    """The config as nested dicts, less the keys that change no number; data paths if asked for."""
    return identity_of(dataclasses.asdict(cfg), with_paths)


def identity_of(values, with_paths):
    """The same of a config that was read back: nested dicts, maybe of another release."""
    left_out = NOT_IDENTITY if with_paths else NOT_IDENTITY | {"data": NOT_IDENTITY["data"] + PATHS}
    if isinstance(values.get("data"), dict) and values["data"].get("packed") is not None:
        # Where a store lies is no identity, nor how many bad images it may have. What it holds is:
        # checkpoint and provenance keep the hash of its index and of the rows that are left.
        values = values | {"data": values["data"] | {"packed": "a store", "max_bad_images": 0}}
    return {
        section: {k: v for k, v in content.items() if k not in left_out.get(section, ())}
        if isinstance(content, dict)
        else content
        for section, content in values.items()
    }


def without_nulls(values):
    """Nested dicts less the keys that are null and the sections that hold no other."""
    if not isinstance(values, dict):
        return values
    kept = {key: without_nulls(value) for key, value in values.items()}
    return {key: value for key, value in kept.items() if value not in (None, {})}


def differences(old, new, path=""):
    """Lines `section.key: old -> new` for two nested dicts. A missing key is a null one."""
    kinds = {type(old), type(new)}
    if dict not in kinds or not kinds <= {dict, type(None)}:
        return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
    old, new, lines = old or {}, new or {}, []
    for key in dict.fromkeys([*old, *new]):
        lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return lines


def method_name(cfg):
    """What a result is of: a frozen encoder is none of its script's method."""
    if not cfg.run.frozen_encoder:
        return cfg.method
    return "random" if cfg.run.init_from is None else "pretrained"


def run_name(cfg):
    """Folder name of a run: method_backbone_p45_s42_<hash of the resolved config>.

    Keys that are null do not count: one that a later release adds leaves a study's names alone.
    """
    if cfg.run.name is not None:
        return cfg.run.name
    proportion = cfg.data.train_defect_proportion
    p = "all" if proportion is None else f"{100 * proportion:g}"
    text = json.dumps(without_nulls(identity(cfg, with_paths=True)), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{method_name(cfg)}_{cfg.backbone}_p{p}_s{cfg.seed}_{digest}"
