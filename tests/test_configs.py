import importlib
from dataclasses import replace

import pytest
from conftest import ROOT, read_yaml

from common.config import read_config, run_name
from common.schema import read_yaml as read_strictly

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml"))

# Appendix B of the paper, as printed.
APPENDIX_B = {
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
    assert path.name in path.read_text().split("\n")[1] or path.stem == "demo"
    assert run_name(cfg).startswith(f"{cfg.method}_{cfg.backbone}_p")


def test_run_names_are_unique():
    configs = [load(path) for path in CONFIGS]
    configs += [replace(c, seed=c.seed + 1) for c in configs]
    assert len({run_name(c) for c in configs}) == len(configs)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem.endswith(("_r18", "_vit_tiny"))], ids=lambda p: p.stem
)
def test_values_are_the_papers(path):
    cfg = load(path)
    if cfg.method not in APPENDIX_B:
        pytest.skip("not a method of the paper")
    for table in (ALL_METHODS, APPENDIX_B[cfg.method]):
        for section, values in table.items():
            for key, value in values.items():
                assert getattr(getattr(cfg, section), key) == value, f"{section}.{key}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_two_backbones_differ_in_nothing_else(path):
    other = path.with_name(path.name.replace("_r18", "_vit_tiny"))
    if other == path or not other.exists():
        pytest.skip("no pair")
    assert load(path) == replace(load(other), backbone="resnet18", patch_size=None)
