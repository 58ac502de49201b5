"""A run's encoder for other programs."""

import functools
import json
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import ROOT, exit_code
from safetensors import safe_open
from small import run

from common.annotations import read_annotations
from common.augmentations import resize_squash
from common.export import main
from common.images import open_image

call = functools.partial(exit_code, main)


def first_images(run_folder, tiny_set, size, n=4):
    """(n, 3, size, size) uint8 validation images, their features and logits as the run had them."""
    data = {word.split("=")[0]: word.split("=")[1] for word in tiny_set}
    names = read_annotations(data["data.val_csv"])
    images = [open_image(data["data.image_root"], names.name(i)) for i in range(n)]
    with (
        np.load(run_folder / "features_val.npz") as kept,
        np.load(run_folder / "val_scores.npz") as scores,
    ):
        assert kept["filename"][:n].tolist() == names.filename[:n].tolist()
        features, logits = kept["features"][:n].astype(np.float32), scores["logit_offline"][:n]
    return torch.stack([resize_squash(image, size) for image in images]), features, logits


KINDS = {
    "resnet": ("simclr", "resnet18", []),
    "vit": ("simclr", "vit_tiny", ["patch_size=8", "num_heads=6"]),
    "mae": ("mae", "vit_tiny", ["ssl_settings.features=mean_of_patches"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_cards_code_gives_the_runs_features(kind, tiny_set, tmp_path, monkeypatch):
    method, backbone, words = KINDS[kind]
    quick = ["optimization.epochs=1", *words]
    trained = run(method, tmp_path, tiny_set, "run", *quick, backbone=backbone)
    assert call("--run", trained, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    images, features, logits = first_images(trained, tiny_set, 32)
    monkeypatch.chdir(tmp_path / "out")
    for image, wanted, logit in zip(images, features, logits, strict=True):
        with torch.no_grad():
            exec(code, found := {"image": image})
        got = found["features"][0].numpy()
        np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())  # float16
        assert found["logit"].item() == pytest.approx(float(logit), abs=1e-2)


def test_metadata_say_what_it_is_and_not_where(finished, tmp_path):
    assert call("--run", finished, "--out", tmp_path / "out") == 0
    result = json.loads((finished / "result.json").read_text())
    with safe_open(tmp_path / "out" / "encoder.safetensors", "pt") as file:
        about = file.metadata()
        assert len(list(file.keys())) == 120
    assert json.loads(about["method"]) == "simclr" and json.loads(about["epochs"]) == 2
    assert json.loads(about["scores"])["val_offline"] == result["val_offline"]
    assert json.loads(about["data"])["train_defect_proportion"] == 0.25
    assert json.loads(about["timm"]) == {"model_name": "resnet18", "num_classes": 0}
    card = (tmp_path / "out" / "README.md").read_text()
    for secret in (str(tmp_path), str(finished), str(ROOT), socket.gethostname(), "/images"):
        assert not re.search(rf"\b{re.escape(secret)}\b", f"{about} {card}"), secret
    assert f"| offline | {result['val_offline']['auroc']:.3f} |" in card


def test_onnx_is_checked_against_onnxruntime(finished, tiny_set, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert call("--run", finished, "--out", tmp_path / "out", "--onnx") == 0
    images, features, logits = first_images(finished, tiny_set, 32)
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    text = (tmp_path / "out" / "model.onnx").read_bytes()
    assert str(ROOT).encode() not in text and b"site-packages" not in text
    for n in (1, 4):
        got = session.run(None, {"pixels": images[:n].numpy()})
        np.testing.assert_allclose(got[0], features[:n], atol=2e-3 * np.abs(features).max())
        np.testing.assert_allclose(got[1], logits[:n], atol=1e-2)

    class Wrong:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            n = len(inputs["pixels"])
            return np.zeros((n, 512), np.float32), np.zeros(n, np.float32)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    assert call("--run", finished, "--out", tmp_path / "wrong", "--onnx") == 2
    assert "differ from torch's" in capsys.readouterr().err
    assert not list((tmp_path / "wrong").glob("model*"))


def test_a_run_without_labels_is_exported_too(finished, tmp_path):
    """Its encoder is all that is wanted; and a probe is kept whatever validation has."""
    for name, features in (("few", 3), ("none", 0)):
        kept = shutil.copytree(finished, tmp_path / name)
        with np.load(kept / "normal_features.npz") as stored:
            arrays = {key: stored[key][:features] for key in stored.files}
        np.savez(kept / "normal_features.npz", **arrays)
        with np.load(kept / "val_scores.npz") as stored:
            arrays = dict(stored)
        np.savez(kept / "val_scores.npz", **arrays | {"label": np.full_like(arrays["label"], -1)})
        if not features:
            np.savez(kept / "offline_probe.npz")
        assert call("--run", kept, "--out", tmp_path / f"{name}_out") == 0
        assert (tmp_path / f"{name}_out" / "probe.safetensors").exists() == bool(features)


def test_nothing_is_overwritten_and_a_run_without_a_probe_has_none(finished, tmp_path, capsys):
    kept = shutil.copytree(finished, tmp_path / "run")
    np.savez(kept / "offline_probe.npz")
    assert call("--run", kept, "--out", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"encoder.safetensors", "README.md"}
    assert "probe.safetensors" not in (tmp_path / "out" / "README.md").read_text()
    assert call("--run", kept, "--out", tmp_path / "out") == 2
    assert "--force overwrites" in capsys.readouterr().err
    assert call("--run", kept, "--out", tmp_path / "out", "--force") == 0
    assert call("--run", kept, "--out", tmp_path / "onnx", "--onnx") == 2
    assert "has none" in capsys.readouterr().err
    assert call("--run", tmp_path, "--out", tmp_path / "no") == 2
