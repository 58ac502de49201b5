import importlib
from dataclasses import replace

import pytest
from conftest import ROOT, read_yaml
from small import METHODS, PAIRS

from common.running.config import read_config, run_name
from common.running.schema import read_yaml as read_strictly

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml"))

# Appendix B of the paper, as printed.
APPENDIX_B = {
    "byol": {
        "optimization": {
            "optimizer": "lars",
            "batch_size": 256,
            "lr": 0.2,
            "momentum": 0.9,
            "weight_decay": 1.5e-6,
            "exclude_bias_and_norm": True,
            "warmup_start_lr": 0.1,
        },
        "ssl_settings": {
            "proj_hidden_dim": 2048,
            "pred_hidden_dim": 2048,
            "proj_output_dim": 256,
            "normalize_projector": False,
            "base_tau": 0.996,  # in the text, with final_tau
            "final_tau": 0.999,
        },
    },
    "dino": {
        "optimization": {
            "optimizer": "adamw",
            "batch_size": 128,
            "lr": 0.0005,
            "momentum": 0.9,
            "weight_decay": 0.0001,
            "warmup_start_lr": 3e-5,
            "precision": "fp32",  # in the text
        },
        "ssl_settings": {
            "proj_hidden_dim": 2048,
            "proj_output_dim": 256,
            "num_prototypes": 8192,
            "clip_grad": True,
            "freeze_prototyper": 1,
            "use_bn_in_head": False,
            "norm_prototyper": False,
            "student_temperature": 0.1,
            "warmup_teacher_temperature": 0.04,
            "teacher_temperature": 0.07,
            "warmup_temperature_epochs": 15,
            "base_tau": 0.996,
            "final_tau": 0.999,
        },
    },
    "mae": {
        "optimization": {
            "optimizer": "adamw",
            "batch_size": 256,
            "lr": 0.001,
            "momentum": 0.9,
            "weight_decay": 0.05,
            "warmup_start_lr": 0.0005,
        },
        "ssl_settings": {
            "mask_ratio": 0.75,
            "norm_pix_loss": True,
            "decoder_embed_dim": 192,
            "decoder_depth": 12,
            "decoder_num_heads": 12,
        },
        "probe": {"lr": 0.0001},  # in the text
    },
    "simclr": {
        "optimization": {
            "optimizer": "lars",
            "batch_size": 256,
            "lr": 0.3,
            "momentum": 0.9,
            "weight_decay": 1e-6,
            "warmup_start_lr": 0.15,
        },
        "ssl_settings": {"proj_hidden_dim": 2048, "proj_output_dim": 256, "temperature": 0.2},
    },
    "barlow": {
        "optimization": {
            "optimizer": "lars",
            "batch_size": 256,
            "lr": 0.2,
            "momentum": 0.9,
            "weight_decay": 1.5e-6,
            "warmup_start_lr": 0.1,
        },
        "ssl_settings": {
            "proj_hidden_dim": 2048,
            "proj_output_dim": 256,
            "lambda_": 0.0051,
            "scale_loss": 0.024,
        },
    },
    "supervised": {
        "optimization": {
            "optimizer": "adamw",
            "batch_size": 256,
            "lr": 0.0005,
            "momentum": 0.9,
            "weight_decay": 0.0001,
            "warmup_start_lr": 3e-5,
        },
    },
}
ALL_METHODS = {  # Appendix A and the text of Appendix B
    "data": {"image_size": 224},
    "augmentation": {"min_scale": 0.395, "t_val": 0.275},
    "optimization": {"epochs": 45, "warmup_epochs": 10, "min_lr": 1e-6},
    "probe": {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.0},
}


def load(path):
    return read_config(importlib.import_module(read_yaml(path)["method"]).Config, path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_reads_the_same_as_with_plain_yaml(path):
    cfg = load(path)
    assert read_strictly(path) == read_yaml(path)
    launch = path.read_text().split("\n")[1]
    assert f"{cfg.method}.py --config configs/{path.name}" in launch, "line 2 tells how to run it"
    assert run_name(cfg).startswith(f"{cfg.method}_{cfg.backbone}_p")


def test_run_names_are_unique():
    configs = [load(path) for path in CONFIGS]
    configs += [replace(c, seed=c.seed + 1) for c in configs]
    assert len({run_name(c) for c in configs}) == len(configs)


ALL = [p for p in CONFIGS if p.stem in {f"{m}_{b}" for m in METHODS for b in ("r18", "vit_tiny")}]
PAPER = [p for p in ALL if not p.stem.startswith("lejepa_")]


def test_there_is_one_config_a_method_and_backbone():
    found = {(load(path).method, load(path).backbone) for path in ALL}
    assert len(ALL) == 13 and found == set(PAIRS) and len(PAPER) == 11


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_values_are_the_papers(path):
    cfg = load(path)
    expected = {s: dict(values) for s, values in ALL_METHODS.items()}
    for section, values in APPENDIX_B[cfg.method].items():
        expected[section] = expected.get(section, {}) | values
    for section, values in expected.items():
        for key, value in values.items():
            assert getattr(getattr(cfg, section), key) == value, f"{section}.{key}"
    if cfg.method != "dino":
        assert cfg.optimization.precision == "fp16"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_what_the_methods_share_is_the_same(path):
    cfg, simclr = load(path), load(ROOT / "configs/simclr_r18.yaml")
    for section in ("data", "augmentation", "run", "seed"):
        assert getattr(cfg, section) == getattr(simclr, section), section
    if cfg.backbone == "vit_tiny":
        assert (cfg.patch_size, cfg.num_heads) == (16, 3)


@pytest.mark.parametrize("path", [p for p in ALL if p.stem.endswith("_r18")], ids=lambda p: p.stem)
def test_the_two_backbones_differ_in_nothing_else(path):
    other = load(path.with_name(path.name.replace("_r18", "_vit_tiny")))
    if path not in PAPER:  # LeJEPA's authors: 5e-4 for a ResNet, 5e-2 for a ViT
        assert other.optimization.weight_decay == 0.05
        other = replace(other, optimization=replace(other.optimization, weight_decay=0.0005))
    assert load(path) == replace(other, backbone="resnet18", patch_size=None, num_heads=None)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_every_value_that_changes_a_number_has_its_source(path):
    section = ""
    for line in path.read_text().splitlines()[2:]:
        if not line.startswith(" "):
            section = line
        elif "App." not in section and not section.startswith(("run:", "data:")):
            assert "App." in line or "not in the paper" in line, line
