"""Where an encoder starts from: our runs, and files in the layouts of other projects."""

import argparse
import json
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import small
import timm
import torch
import torchvision
from safetensors.torch import save_file
from small import METHODS, PAIRS, run

from common.running.checkpoint import read_checkpoint
from common.running.errors import UserError
from common.running.folder import read_json
from common.running.weights import init_encoder

TIMM = {"resnet18": "resnet18", "vit_tiny": "vit_tiny_patch16_224"}
BACKBONES = list(TIMM)


def encoder(name, seed=7, **how):
    """As a file's author has it: with statistics of its own, 32 px and patches of 8."""
    torch.manual_seed(seed)
    if name == "vit_tiny":
        how = {"img_size": 32, "patch_size": 8} | how
    module = timm.create_model(TIMM[name], **how)
    for key, buffer in module.named_buffers():
        if "running" in key:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module.eval()


@torch.no_grad()
def features(module, images):
    """Of a timm model, whatever its head."""
    module.eval()
    return module.forward_head(module.forward_features(images), pre_logits=True)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def body(module, *heads):
    """The encoder's weights alone."""
    return {k: v for k, v in module.state_dict().items() if k.split(".")[0] not in heads}


def noise(*names):
    return {name: torch.randn(3, 2) for name in names}


def layouts(module):
    """{name: what torch.save gets} of the projects."""
    whole, own = module.state_dict(), body(module, "fc", "head")
    heads = noise("projector.0.weight", "predictor.weight", "queue", "classifier.weight")
    options = argparse.Namespace(arch="x", lr=0.1)
    yield "timm, torchvision", whole
    yield "a bare encoder", own
    yield "from several GPUs", prefixed(whole, "module.")
    teacher = prefixed(own, "backbone.") | noise("head.mlp.0.weight", "head.last_layer.weight_v")
    student = prefixed(noise(*own), "module.backbone.")
    yield "DINO", {"student": student, "teacher": teacher, "epoch": 3, "args": options}
    yield "DINO, BatchNorm", {"teacher": prefixed(teacher, "module."), "args": options}
    yield "DINO's student", {"student": prefixed(own, "module.backbone.")}
    decoder = noise("mask_token", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
    yield "MAE", {"model": OrderedDict(own | decoder), "args": options, "epoch": 1}
    moco = prefixed(own | noise("head.0.weight", "fc.0.weight"), "module.base_encoder.")
    moco |= prefixed(noise(*own), "module.momentum_encoder.") | noise("module.predictor.0.weight")
    yield "MoCo-v3", {"epoch": 1, "arch": "x", "state_dict": moco, "optimizer": {}}
    momentum = prefixed(noise(*own), "momentum_backbone.")
    yield "solo-learn", {"state_dict": prefixed(own, "backbone.") | heads | momentum}
    yield "solo-learn of old", {"state_dict": prefixed(own, "encoder.") | heads}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layouts_of_other_projects(backbone, tmp_path, capsys):
    theirs, images = encoder(backbone), torch.randn(3, 3, 32, 32)
    wanted = features(theirs, images)
    for name, content in layouts(theirs):
        torch.save(content, tmp_path / "file.pth")
        model, _ = small.build("supervised", backbone)
        init_encoder(model, str(tmp_path / "file.pth"))
        torch.testing.assert_close(features(model.backbone, images), wanted, msg=name)
        said = capsys.readouterr().err
        assert ("dropped" in said) == (name not in ("a bare encoder", "DINO's student")), said
    save_file(theirs.state_dict(), tmp_path / "file.safetensors")
    model, _ = small.build("supervised", backbone)
    init_encoder(model, str(tmp_path / "file.safetensors"))
    torch.testing.assert_close(features(model.backbone, images), wanted)
    assert f"dropped: {'fc' if backbone == 'resnet18' else 'head'}" in capsys.readouterr().err


def test_a_torchvision_resnet_and_one_of_before_the_counters(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    images = torch.randn(2, 3, 64, 64)
    for drop in ((), ("num_batches_tracked",)):
        state = {k: v for k, v in theirs.state_dict().items() if not k.endswith(drop or "\0")}
        torch.save(state, tmp_path / "file.pth")
        model, _ = small.build("simclr", "resnet18")
        init_encoder(model, str(tmp_path / "file.pth"))
        theirs.fc = torch.nn.Identity()
        with torch.no_grad():
            torch.testing.assert_close(features(model.backbone, images), theirs(images))
        theirs.fc = torch.nn.Linear(512, 1000)


def test_half_precision_becomes_float32(tmp_path):
    torch.save(encoder("resnet18").half().state_dict(), tmp_path / "file.pt")
    model, _ = small.build("simclr", "resnet18")
    init_encoder(model, str(tmp_path / "file.pt"))
    assert {v.dtype for v in model.backbone.state_dict().values()} == {torch.float32, torch.int64}


def test_positions_of_another_image_size_are_resampled(tmp_path, capsys):
    theirs = encoder("vit_tiny", img_size=64)
    torch.save(theirs.state_dict(), tmp_path / "file.pt")
    model, _ = small.build("simclr", "vit_tiny")
    init_encoder(model, str(tmp_path / "file.pt"))
    assert "8 x 8 patches resampled to [4, 4]" in capsys.readouterr().err
    theirs.set_input_size(32)  # timm's own
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(features(model.backbone, images), features(theirs, images))


@pytest.mark.parametrize("method, backbone", PAIRS)
def test_every_copy_of_the_encoder_starts_there(method, backbone, tmp_path):
    """MAE initialises in its constructor, and BYOL and DINO copy there."""
    theirs, images = encoder(backbone), torch.randn(3, 3, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / "file.pt")
    model, _ = small.build(method, backbone)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    init_encoder(model, str(tmp_path / "file.pt"))
    wanted = features(theirs, images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images)[0], wanted)
    copies = [m for m in model.modules() if type(m) is type(theirs)]
    assert len(copies) == (2 if method in ("byol", "dino") else 1)
    for module in copies:
        torch.testing.assert_close(features(module, images), wanted)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_encoder_with_weights_is_a_row_of_its_own(method, tiny_set, tmp_path):
    """Method `pretrained`: its features and statistics are the file's, in eval mode."""
    backbone = "vit_tiny" if method == "mae" else "resnet18"
    theirs = encoder(backbone)
    torch.save(theirs.state_dict(), tmp_path / "file.pt")
    words = ["run.frozen_encoder=true", f"run.init_from={tmp_path / 'file.pt'}"]
    folder = run(method, tmp_path, tiny_set, "given", *words, "optimization.epochs=1")
    result, saved = read_json(folder / "result.json"), read_checkpoint(folder / "last.pt")
    assert result["method"] == "pretrained"
    for key, value in body(theirs, "fc", "head").items():
        torch.testing.assert_close(saved["model"][f"backbone.{key}"], value, rtol=0, atol=0)
    provenance = read_json(folder / "provenance.json")
    assert provenance["init_from"] == str(tmp_path / "file.pt")
    assert len(provenance["init_from_sha256"]) == 64


def test_a_run_starts_from_another(finished, tiny_set, tmp_path, capsys):
    nothing = ["optimization.lr=0", "optimization.warmup_start_lr=0", "optimization.epochs=1"]
    words = [f"run.init_from={finished}", *nothing, "optimization.min_lr=0"]
    folder = run("supervised", tmp_path, tiny_set, "tuned", *words)
    mine, theirs = (read_checkpoint(f / "last.pt")["model"] for f in (folder, finished))
    assert all(torch.equal(mine[k], v) for k, v in theirs.items() if "backbone.conv1" in k)
    said = capsys.readouterr().err
    assert f"starts from {finished}/last.pt, 120 tensors" in said
    assert read_json(folder / "result.json")["method"] == "supervised"
    # Finished it is compared with what it started from; a checkpoint needs it no more.
    other = shutil.copytree(finished, tmp_path / "other")
    words[0] = f"run.init_from={other}"
    folder = run("supervised", tmp_path, tiny_set, "again", *words)
    with open(other / "last.pt", "ab") as file:
        file.write(b"more")
    with pytest.raises(SystemExit):
        run("supervised", tmp_path, tiny_set, "again", *words)
    assert "(run.init_from) has changed since" in capsys.readouterr().err


@pytest.mark.usefixtures("narrow_here")
def test_a_resume_does_not_start_there_again(tiny_set, tmp_path, monkeypatch, capsys):
    theirs = encoder("resnet18")
    torch.save(theirs.state_dict(), tmp_path / "file.pt")
    words = [f"run.init_from={tmp_path / 'file.pt'}"]
    whole = run("byol", tmp_path, tiny_set, "whole", *words)
    with monkeypatch.context() as patched:
        small.stop_at(patched, 3)
        with pytest.raises(SystemExit) as stop:
            run("byol", tmp_path, tiny_set, "stopped", *words)
    assert stop.value.code == 75
    (tmp_path / "file.pt").unlink()
    stopped = run("byol", tmp_path, tiny_set, "stopped", *words)
    assert small.outcome(whole) == small.outcome(stopped)


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def refused():
    """(content, what is said)."""
    resnet, vit = encoder("resnet18").state_dict(), encoder("vit_tiny").state_dict()
    yield resnet | noise("extra.weight"), "has too extra.weight"
    yield {k: v for k, v in resnet.items() if k != "layer1.0.conv1.weight"}, "lacks layer1.0.conv1"
    yield resnet | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, "conv1.weight has the shape"
    yield resnet | {"bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias is not finite"
    yield vit, "none of the encoder's names"
    yield {f"{i}.weight": torch.zeros(2) for i in range(3)}, "it has 0.weight, 1.weight"
    yield {"model": Evil()}, "could run code"
    yield [1, 2], "no state dict, list"
    yield {}, "none of the encoder's names"


def test_other_files_are_refused(tmp_path, capsys):
    model, _ = small.build("simclr", "resnet18")
    for content, why in refused():
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(UserError, match=why) as error:
            init_encoder(model, str(tmp_path / "file.pt"))
        assert "file.pt" in str(error.value)
    assert "this ran" not in capsys.readouterr().out
    vit, _ = small.build("simclr", "vit_tiny")
    later = encoder("vit_tiny").state_dict() | noise("blocks.0.ls1.gamma", "register_tokens")
    others = (
        (torchvision.models.VisionTransformer(32, 8, 2, 3, 192, 768).state_dict(), "none of"),
        (later, "has too blocks.0.ls1.gamma, register_tokens"),
        (encoder("vit_tiny", patch_size=16).state_dict(), "patch_embed.proj.weight has the shape"),
        (encoder("resnet18").state_dict(), "none of the encoder's names"),
    )
    for content, why in others:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(UserError, match=why):
            init_encoder(vit, str(tmp_path / "file.pt"))
    texts = {"text.pth": b"hello", "error.pth": b"error: no such model\n", "empty.pt": b""}
    for name, content in (texts | {"cut.pt": b"PK\3\4", "x.safetensors": b"no"}).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            init_encoder(vit, str(tmp_path / name))
    for path in ("none.pt", "none.safetensors", "none"):
        with pytest.raises(UserError, match="none.*No such file"):
            init_encoder(vit, str(tmp_path / path))
    with pytest.raises(UserError):
        init_encoder(vit, str(tmp_path))  # a folder that is no run's


def test_a_wrong_file_ends_a_run_with_a_sentence(tiny_set, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("simclr", tmp_path, tiny_set, "no", f"run.init_from={tmp_path / 'none.pt'}")
    assert stop.value.code == 2
    assert "run.init_from" in capsys.readouterr().err
    status = json.loads((tmp_path / "no" / "status.json").read_text())
    assert status["state"] == "failed" and not status["retryable"]


@pytest.mark.usefixtures("narrow_here")
def test_settled_statistics_are_for_random_encoders_only(tiny_set, tmp_path):
    folder = run("simclr", tmp_path, tiny_set, "random", "run.frozen_encoder=true")
    saved = read_checkpoint(folder / "last.pt")["model"]
    assert not np.allclose(saved["backbone.bn1.running_mean"].numpy(), 0)


def test_the_heads_of_a_run_are_known(tiny_set, tmp_path):
    words = ["optimization.epochs=1", "num_heads=6", "patch_size=8", "run.frozen_encoder=true"]
    other = run("simclr", tmp_path, tiny_set, "six", *words, backbone="vit_tiny")
    model, _ = small.build("simclr", "vit_tiny")
    with pytest.raises(UserError, match="num_heads 6, this run 3"):
        init_encoder(model, str(other))


@pytest.mark.usefixtures("narrow_here")
def test_a_resume_keeps_the_hash_of_what_it_started_from(tiny_set, tmp_path, monkeypatch):
    torch.save(encoder("resnet18").state_dict(), tmp_path / "file.pt")
    words = [f"run.init_from={tmp_path / 'file.pt'}"]
    with monkeypatch.context() as patched:
        small.stop_at(patched, 3)
        with pytest.raises(SystemExit):
            run("simclr", tmp_path, tiny_set, "run", *words)
    first = read_json(tmp_path / "run" / "provenance.json")["init_from_sha256"]
    torch.save(encoder("resnet18", seed=8).state_dict(), tmp_path / "file.pt")
    folder = run("simclr", tmp_path, tiny_set, "run", *words)
    assert read_json(folder / "provenance.json")["init_from_sha256"] == first
