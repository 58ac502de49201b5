"""Weights of an encoder: of one of our runs, or of a file that another project wrote."""

import argparse
import hashlib
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from common.running.checkpoint import LAST, read_checkpoint
from common.running.errors import UserError, regular, some
from common.running.folder import CONFIG
from common.running.progress import say
from common.running.schema import read_yaml

BACKBONE = "backbone."  # in front of the names of its weights, in every script's model
# Where projects put the state dict in a file (DINO, whose teacher is what it evaluates; MAE; MoCo,
# solo-learn and Lightning), and the encoder in it (MoCo-v3; DINO; solo-learn, its older releases).
CONTAINERS = ("teacher", "student", "state_dict", "model")
PREFIXES = ("", "module.", "module.base_encoder.", "module.backbone.", BACKBONE, "encoder.")
# Beside the encoder under the same prefix: classifiers, projectors, MAE's decoder.
NO_ENCODER = re.compile(r"(fc|head|classifier|projector|decoder|decoder_\w+|mask_token)(\.|$)")
COUNTER = "num_batches_tracked"  # which older files lack


def trained_config(folder):
    """config.yaml of a run as nested dicts. Raises UserError where it is no run's."""
    config = read_yaml(Path(folder) / CONFIG)
    if not isinstance(config, dict) or not {"backbone", "data", "run"} <= config.keys():
        raise UserError(f"{Path(folder) / CONFIG}: no config of a run")
    return config


def trained_weights(folder):
    """(weights of a finished run's encoder by name, without `backbone.`; sha256 of the file)."""
    path = Path(folder) / LAST
    saved = read_checkpoint(path)
    if saved["epochs_done"] < saved["config"]["optimization"]["epochs"]:
        raise UserError(f"{path}: not of the run's end; give the run's command again")
    own = {k[len(BACKBONE) :]: v for k, v in saved["model"].items() if k.startswith(BACKBONE)}
    if not own:
        raise UserError(f"{path}: its model has no `{BACKBONE[:-1]}`")
    return own, hashlib.sha256(path.read_bytes()).hexdigest()


def weights_file(path):
    """The file of a `run.init_from`: of a run folder its last checkpoint."""
    return Path(path) / LAST if Path(path).is_dir() else Path(path)


def _read_file(path):
    """A file of weights -> state dict. Nothing in it can run code."""
    try:
        path = regular(path)
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of DINO and MAE
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"run.init_from: {path}: cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds a {found[1]}, which could run code" if found else "it is damaged"
        raise UserError(
            f"run.init_from: {path}: {what}; expected a state dict, or a run's folder"
        ) from None
    except Exception as error:  # of bytes that are no file of weights anything may be raised
        raise UserError(f"run.init_from: {path}: damaged ({type(error).__name__})") from None
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content


def _encoder_of(state, expected, path):
    """(weights by the names of `expected`, names of what else is there).

    Raises UserError naming what is missing, or is neither the encoder's nor a head's.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"run.init_from: {path}: no state dict, {type(state).__name__}")
    found = {p: {k[len(p) :]: v for k, v in state.items() if k.startswith(p)} for p in PREFIXES}
    prefix = max(PREFIXES, key=lambda p: len(expected & found[p].keys()))  # the first of equals
    inside = found[prefix]
    extra = {key for key in inside if key not in expected}
    dropped = {key for key in extra if NO_ENCODER.match(key)}
    missing = {k for k in expected - inside.keys() if not k.endswith(COUNTER)}
    if prefix == "" and len(missing) == len({k for k in expected if not k.endswith(COUNTER)}):
        names = some(state) or "none"
        raise UserError(
            f"run.init_from: {path}: none of the encoder's names, which are timm's, is in it; it "
            f"has {names}"
        )
    for kind, keys in (("lacks", missing), ("has too", extra - dropped)):
        if keys:
            names = some(prefix + key for key in sorted(keys))
            raise UserError(f"run.init_from: {path} {kind} {names}: another architecture")
    beside = [key for key in state if not key.startswith(prefix)] + sorted(dropped)
    return {key: inside[key] for key in inside if key in expected}, beside


def _fit(weights, encoder, path):
    """Weights in the shapes and types of the encoder's; position embeddings are resampled."""
    own, fitted = encoder.state_dict(), {}
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"run.init_from: {path}: {key} is no tensor")
        value = value.to(own[key].dtype)
        if key == "pos_embed" and value.ndim == 3 and value.shape != own[key].shape:
            side = (value.shape[1] - 1) ** 0.5
            if side.is_integer() and value.shape[2] == own[key].shape[2]:
                grid = list(encoder.patch_embed.grid_size)
                value = resample_abs_pos_embed(value, grid)  # bicubic, the class token's stays
                say(f"position embeddings of {side:.0f} x {side:.0f} patches resampled to {grid}")
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(own[key].shape)}"
            raise UserError(f"run.init_from: {path}: {key} has the shape {shapes}")
        if not torch.isfinite(value).all():
            raise UserError(f"run.init_from: {path}: {key} is not finite")
        fitted[key] = value
    return fitted


@torch.no_grad()
def init_encoder(model, path):
    """Start `model.backbone`, and every copy of it in the model (a teacher's), from weights.

    path: folder of a finished run, or a file: safetensors, or a state dict as of torch.save, in the
    layouts of timm, torchvision (ResNet), DINO, MAE, MoCo-v3 and solo-learn. Heads, projectors,
    decoders and classifiers are dropped and named. All ranks call it. Raises UserError.
    """
    encoder = model.backbone
    is_run = Path(path).is_dir()
    state = trained_weights(path)[0] if is_run else _read_file(path)
    blocks = getattr(encoder, "blocks", None)
    if is_run and blocks and trained_config(path)["backbone"] == "vit_tiny":
        theirs, ours = trained_config(path).get("num_heads") or 3, blocks[0].attn.num_heads
        if theirs != ours:  # no shape tells them apart
            raise UserError(f"run.init_from: {path} has num_heads {theirs}, this run {ours}")
    weights, dropped = _encoder_of(state, set(encoder.state_dict()), path)
    weights = _fit(weights, encoder, path)
    for module in model.modules():
        if type(module) is type(encoder):
            module.load_state_dict(weights, strict=False)  # but for counters, all are there
    groups = dict.fromkeys(re.match(r"(module\.)?[^.]*", key)[0] for key in dropped)
    left = f"; dropped: {', '.join(groups)}" if groups else ""
    say(f"the encoder starts from {weights_file(path)}, {len(weights)} tensors{left}")
