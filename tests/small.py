"""Every method made small: overrides of its config, and one model and loss of it."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import barlow
import byol
import dino
import lejepa
import mae
import simclr
import supervised
from common.annotations import read_annotations
from common.backbones import build_backbone
from common.metrics import all_scores
from common.running.checkpoint import read_checkpoint
from common.running.folder import read_json, write_config, write_json
from common.running.provenance import csv_hashes
from common.running.run import Run

HEAD = ["ssl_settings.proj_hidden_dim=32", "ssl_settings.proj_output_dim=16"]
OVERRIDES = {
    "simclr": HEAD,
    "byol": [*HEAD, "ssl_settings.pred_hidden_dim=32"],
    "barlow": HEAD,
    "lejepa": [*HEAD, "ssl_settings.num_slices=32", "optimization.precision=fp32"],
    "dino": [*HEAD, "ssl_settings.num_prototypes=64", "ssl_settings.warmup_temperature_epochs=1"],
    "mae": [f"ssl_settings.decoder_{key}" for key in ("embed_dim=32", "depth=1", "num_heads=4")]
    + ["patch_size=8"],
    "supervised": [],
}
METHODS = list(OVERRIDES)
PAIRS = [(m, b) for m in METHODS for b in ("resnet18", "vit_tiny") if (m, b) != ("mae", "resnet18")]


def arguments(method, tiny_set, folder, name, *overrides, backbone=None):
    """Command line of a run of seconds. backbone: resnet18, but for the method that has none."""
    backbone = backbone or ("vit_tiny" if method == "mae" else "resnet18")
    config = ROOT / f"configs/{method}_{'r18' if backbone == 'resnet18' else 'vit_tiny'}.yaml"
    place = [f"run.output_dir={folder}", f"run.name={name}"]
    return ["--config", str(config), *tiny_set, *TINY, *OVERRIDES[method], *place, *overrides]


def run(method, folder, tiny_set, name, *overrides, backbone=None):
    """Run a method's main; returns the run folder."""
    argv = arguments(method, tiny_set, folder, name, *overrides, backbone=backbone)
    importlib.import_module(method).main(argv)
    return folder / name


def read_log(folder, kind=None):
    """Records of log.jsonl, all or of one kind."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in log if kind in (None, record["kind"])]


def stop_at(monkeypatch, at):
    """Let a SIGTERM arrive in that step."""
    original = Run.end_step

    def stopping(self, *args):
        if self.step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(Run, "end_step", stopping)


TIMES = ("seconds", "samples_per_second")  # all that may differ


def outcome(folder):
    """Everything of a run that must be the same however often it was stopped."""
    log, result = read_log(folder), read_json(folder / "result.json")
    for record in (*log, result):
        for key in TIMES:
            del record[key]
    saved = read_checkpoint(folder / "last.pt")
    tensors = {**saved["model"], **{f"probe.{k}": v for k, v in saved["state"]["probe"].items()}}
    for i, state in saved["state"]["optimizer"]["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    arrays = {}
    for name in ("val_scores", "features_val"):
        with np.load(folder / f"{name}.npz") as stored:
            arrays |= {f"{name}.{k}": stored[k].tobytes() for k in stored.files}
    return log, result, {k: v.numpy().tobytes() for k, v in tensors.items()}, arrays


_create_model = timm.create_model


def narrow_model(name, **how):
    """timm's create_model, of the same kinds of layers, but few and narrow: runs of a second."""
    if name == "resnet18":
        return ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 16, 24, 32), **how)
    return _create_model(name, **how | ({"depth": 2} if "vit" in name else {}))


def is_narrow():
    return timm.create_model is narrow_model


def make_narrow(yes=True):
    """From now on in this process."""
    timm.create_model = narrow_model if yes else _create_model


class Encoder(nn.Module):
    """A small encoder without BatchNorm, so that 2 ranks and 1 rank must agree exactly."""

    def __init__(self):
        super().__init__()
        self.conv, self.num_features = nn.Conv2d(3, 6, 3, stride=2), 6

    def forward(self, x):
        return F.relu(self.conv(x)).mean(dim=(2, 3))


def build(method, backbone_name):
    """(model, D), never narrow. backbone_name: resnet18, vit_tiny (32 px, patch 8) or none: an
    Encoder.
    """
    narrow = is_narrow()
    make_narrow(False)
    torch.manual_seed(0)
    if backbone_name == "none" and method != "mae":
        backbone, dim = Encoder(), 6
    elif backbone_name == "resnet18":
        backbone, dim = build_backbone("resnet18", 32)
    else:
        backbone, dim = build_backbone("vit_tiny", 32, 8)
    make = {
        "simclr": lambda: simclr.SimCLR(backbone, dim, 16, 8),
        "byol": lambda: byol.BYOL(backbone, dim, 16, 12, 8),
        "barlow": lambda: barlow.BarlowTwins(backbone, dim, 16, 8),
        "lejepa": lambda: lejepa.LeJEPA(backbone, dim, 16, 8),
        "dino": lambda: dino.DINO(backbone, dino.Head(dim, 16, 8, 24, False), 24),
        "mae": lambda: mae.MAE(backbone, 0.75, 32, 2, 4, "class_token"),
        "supervised": lambda: supervised.Supervised(backbone, dim),
    }
    model = make[method]()
    make_narrow(narrow)
    return model, dim


def full(x):
    """Half precision -> float32, as the scripts do in front of a loss; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step(method, model, bare, views, noise, labels, autocast=None):
    """(loss, features, embeddings) of a step. model: maybe distributed, bare: the same without.

    views: (2, B, 3, S, S); noise: (2, B, L); labels: (B,). autocast: of the forward pass.
    """
    images, count = views.flatten(0, 1), 1 if method == "supervised" else 2
    with autocast or contextlib.nullcontext():
        if method == "mae":
            pred, mask = model(images, noise.flatten(0, 1))
            with torch.no_grad():
                h, z = (x.unflatten(0, views.shape[:2]) for x in bare.encode(images))
        else:
            h, z, *rest = model(views[:count])
            rest = [full(x) for x in rest]
    if method == "mae":
        loss = mae.mae_loss(images, full(pred), mask, 8, True)
    elif method == "supervised":
        loss, z = supervised.supervised_loss(full(z)[0], labels, 2.5), h
    elif method == "simclr":
        loss = simclr.nt_xent_loss(*full(z), 0.2)
    elif method == "byol":
        p, t = rest
        loss = byol.byol_loss(*p, *t)
    elif method == "barlow":
        loss = barlow.barlow_twins_loss(*full(z), 0.0051, 0.024)
    elif method == "lejepa":
        slices = torch.eye(z.shape[2], dtype=full(z).dtype, device=z.device)
        loss = lejepa.lejepa_loss(full(z), slices, 0.05)[0]
    elif method == "dino":
        loss = dino.dino_loss(*rest, bare.center, 0.1, 0.04)
    return loss, h, z


ABOUT_SCORES = {  # scores.json, as far as a page needs it
    **{"run": "/runs/x", "root": "/images", "checkpoint_sha256": "0", "method": "simclr"},
    **{"backbone": "resnet18", "prevalence": 0.1, "threshold": {"score": 0.5, "how": "so"}},
    "calibration": {"slope": 1.0, "intercept": 0.0, "share": 0.3},
    "validation": {"score_recall_false_alarms": [[1.0, 0.5, 0.1], [0.0, 1.0, 0.9]]},
    "counts": {"images": 3, "unreadable": 1, "flagged": 1},
}
KINDS = ("features", "embeddings")


def make_up(run, rng):
    """What a finished run leaves, with scores drawn at random. run: a GridRun."""
    run.folder.mkdir(parents=True)
    val = read_annotations(run.cfg.data.val_csv)
    logit = rng.normal(val.defect * rng.uniform(0.3, 2), 1)
    how = val.classes, val.class_names
    scores = all_scores(logit, val.defect, *how)
    offline = logit + rng.normal(0, 5, len(logit))
    fixed = 3 * logit + offline
    np.savez(
        run.folder / "val_scores.npz",
        filename=val.filename,
        logit=logit,
        logit_offline=offline,
        logit_offline_fixed=fixed,
        label=val.defect,
        classes=val.classes,
        class_names=np.array(val.class_names),
    )
    measures = {f"rankme_{k}{c}": rng.uniform(1, 99) for k in KINDS for c in ("", "_centred")}
    measures |= {f"rankme_{k}_largest": 128 for k in KINDS}
    measures |= {f"{m}_{k}": rng.uniform(0, 1) for k in KINDS for m in ("mean", "std")}
    record = {f"label_free_{k}": v for k, v in measures.items()} | {"label_free_n": 24}
    with open(run.folder / "log.jsonl", "w") as log:
        for epoch in (4, 9):
            log.write(json.dumps({"kind": "epoch", "step": 1, "epoch": epoch, **record}) + "\n")
    result = {
        "method": "random" if run.cfg.run.frozen_encoder else run.cfg.method,
        "backbone": run.cfg.backbone,
        "seed": run.cfg.seed,
        "train_defect_proportion": run.cfg.data.train_defect_proportion,
        "epochs": 10,
        "train_rows": {"normal": 37, "defect": 12, "unlabelled": 8},
        "train": scores,
        "val": scores,
        "val_offline": all_scores(offline, val.defect, *how),
        "val_offline_fixed": all_scores(fixed, val.defect, *how),
        "val_normal_only": {
            name: {"auroc": float(logit[i] % 1), "average_precision": float(logit[-i] % 1)}
            for i, name in enumerate(("knn", "mahalanobis"))
        },
        "label_free": measures,
        "seconds": 60.0,
    }
    write_json(run.folder / "result.json", result)
    write_config(run.folder, dataclasses.asdict(run.cfg))
    write_json(run.folder / "provenance.json", {"csv_sha256": csv_hashes(run.cfg.data)})
