"""What holds for each method, and what makes their runs comparable."""

import importlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import on_ranks
from small import METHODS, PAIRS, arguments, build, read_log, run, step, stop_at
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import mae
from common.annotations import read_annotations
from common.augmentations import ColorJitterNormalize, CropViews
from common.backbones import build_backbone
from common.data import TrainImages
from common.probe import RunningScores
from common.running.checkpoint import read_checkpoint
from common.running.folder import read_json

pytestmark = pytest.mark.usefixtures("narrow")


def inputs(n=8, size=32, seed=3):
    """views (2, n, 3, size, size), noise (2, n, L), labels (n,), some of them unknown."""
    generator = torch.manual_seed(seed)
    views = torch.randn(2, n, 3, size, size, generator=generator).double()
    noise = torch.rand(2, n, (size // 8) ** 2, generator=generator)
    return views, noise, torch.tensor([1, 0, 1, 0, 0, -1, -1, -1][:n], dtype=torch.int8)


def without_batchnorm(model):
    """gloo on CPU has no SyncBatchNorm: what a BatchNorm sees depends on the number of ranks."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, nn.Identity())
    return model


def loss_and_gradients(method, ranks=1, rank=0):
    model = without_batchnorm(build(method, "none")[0]).double()
    ddp = DistributedDataParallel(model) if ranks > 1 else model
    views, noise, labels = inputs()
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    loss, _, _ = step(method, ddp, model, views[:, share], noise[:, share], labels[share])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def on_one_of_two(method):
    return loss_and_gradients(method, 2, torch.distributed.get_rank())


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_through_ddp_have_the_gradient_of_one(method, tmp_path):
    loss, *whole = loss_and_gradients(method)
    first, second = on_ranks(2, tmp_path / "r", on_one_of_two, method)
    torch.testing.assert_close((first[0] + second[0]) / 2, loss)
    assert len(whole) > 3
    for a, b, expected in zip(first[1:], second[1:], whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, atol=1e-12, rtol=1e-8)


# A shift in front of Linear and BatchNorm changes nothing: there the last norm's bias of a ViT gets
# rounding noise, by design of the methods.
FIXED = {"byol": ("target.",), "dino": ("teacher.",), "mae": ("pos_embed", "decoder_pos_embed")}


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_gradient_reaches_every_tensor_it_should_and_no_other(method, backbone):
    model, _ = build(method, backbone)
    model.double()
    loss, h, z = step(method, model, model, *inputs())
    assert h.shape[1:] == (8, 192 if backbone == "vit_tiny" else 512) and z.shape[1] == 8
    loss.backward()
    norms = {n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    layers = Counter()
    for name, norm in norms.items():
        layers[name.rpartition(".")[0]] = max(layers[name.rpartition(".")[0]], float(norm))
    for name, p in model.named_parameters():
        if any(part in name for part in FIXED.get(method, ())):
            assert not p.requires_grad and name not in norms, name
        else:
            layer = layers[name.rpartition(".")[0]]
            dead = name == "backbone.norm.bias" and method in ("byol", "barlow", "lejepa")
            assert (norms[name] > 1e-8 * layer) is not dead, name
            assert layer > 1e-9 * max(layers.values()), name


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("mae", "supervised")])
def test_batchnorm_sees_one_view_at_a_time(method):
    model, _ = build(method, "resnet18")
    views = inputs()[0].float()
    h, *_ = model(views)
    torch.testing.assert_close(h[1], model.backbone(views[1]))
    assert not torch.allclose(h[1], model.backbone(views.flatten(0, 1))[8:])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set):
    """method -> (run folder, rows in the order they came, forward passes a step)."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def get(method):
        if method not in done:
            rows, calls = [], Counter()
            with pytest.MonkeyPatch.context() as patch:
                watch(method, patch, rows, calls)
                done[method] = run(method, folder, tiny_set, method), rows, calls
        return done[method]

    return get


def watch(method, patch, rows, calls):
    """Record the rows of every batch, and the images through the first layer in training."""
    add = RunningScores.add

    def adding(self, batch_rows, logits):
        rows.extend(batch_rows.tolist())
        add(self, batch_rows, logits)

    def building(*how):
        backbone, dim = build_backbone(*how)
        first = backbone.conv1 if hasattr(backbone, "conv1") else backbone.patch_embed
        first.register_forward_hook(count)
        return backbone, dim

    def count(module, args, _):
        if module.training:
            calls["images"] += len(args[0])

    patch.setattr(RunningScores, "add", adding)
    patch.setattr(importlib.import_module(method), "build_backbone", building)


PASSES = {  # an image through an encoder a step: views, and the teacher's or the unmasked pass
    "simclr": 2,
    "barlow": 2,
    "lejepa": 2,
    "byol": 2 + 2,
    "dino": 2 + 2,
    "mae": 2 + 2,
    "supervised": 1,
}


@pytest.mark.parametrize("method", METHODS)
def test_each_step_does_each_forward_pass_once(method, finished):
    _, rows, calls = finished(method)
    assert len(rows) == 6 * 16  # 2 epochs of 3 steps
    assert calls["images"] == PASSES[method] * len(rows)


def test_all_methods_see_the_same_images_in_the_same_order(finished):
    """The supervised baseline leaves out those without a label."""
    folders, rows, _ = zip(*(finished(method) for method in METHODS), strict=True)
    *subsets, of_supervised = (
        (folder / "train_subset.csv").read_text().splitlines() for folder in folders
    )
    assert METHODS[-1] == "supervised"
    assert len(set(map(tuple, rows[:-1]))) == 1 and len(set(rows[0])) > 40
    assert all(subset == subsets[0] for subset in subsets)
    labelled = [line for line in subsets[0] if not line.endswith(",")]
    assert of_supervised == labelled and len(labelled) == len(subsets[0]) - 8


def test_all_methods_leave_the_same_files_and_keys(finished):
    def shape(value):
        if not isinstance(value, dict):
            return None
        return {k: shape(v) for k, v in value.items() if k not in ("diagnostics", "undefined")}

    folders = [finished(method)[0] for method in METHODS]
    results = [read_json(folder / "result.json") for folder in folders]
    assert [result["method"] for result in results] == METHODS
    assert all(shape(result) == shape(results[0]) for result in results)
    logs = [[shape(record) for record in read_log(folder)] for folder in folders]
    assert all(log == logs[0] for log in logs)
    assert {"loss", "lr", "probe_lr", "probe_loss", "embedding_std"} <= set(logs[0][0])
    names = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert all(n == names[0] for n in names)
    for folder in folders:
        with np.load(folder / "val_scores.npz") as stored:
            assert np.isfinite(stored["logit"]).all() and np.isfinite(stored["logit_offline"]).all()


def test_the_teachers_numbers_are_in_the_log(finished):
    for record in read_log(finished("dino")[0], "step"):
        notes = record["diagnostics"]
        entropy, kl = notes["teacher_entropy"], notes["teacher_student_kl"]
        assert 0 < entropy < notes["log_num_prototypes"] == pytest.approx(np.log(64))
        assert kl > 0 and record["loss"] == pytest.approx(entropy + kl, rel=1e-5)
    assert read_log(finished("simclr")[0], "step")[0]["diagnostics"] == {}


def watch_updates(script, patch, seen):
    """Call seen("gradients", model) before a step of the optimiser, seen("step") after it, and
    seen("ema", teacher, student, tau) after the teacher's update."""
    build, ema = script.build_optimizer, getattr(script, "ema_update", None)

    def building(model, *how):
        optimizer = build(model, *how)
        optimizer.register_step_pre_hook(lambda *_: seen("gradients", model))
        optimizer.register_step_post_hook(lambda *_: seen("step"))
        return optimizer

    def averaging(teacher, student, tau):
        ema(teacher, student, tau)
        seen("ema", teacher, student, tau)

    patch.setattr(script, "build_optimizer", building)
    if ema is not None:
        patch.setattr(script, "ema_update", averaging)


@pytest.mark.parametrize("method", ["byol", "dino"])
def test_the_teacher_follows_the_student_after_each_step(method, tmp_path, tiny_set, monkeypatch):
    events, students, taus = [], [], []

    def seen(event, *what):
        events.append(event)
        if event == "ema":
            teacher, student, tau = what
            students.append([p.detach().clone() for p in student.parameters()])
            taus.append(tau)
            assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}

    script = importlib.import_module(method)
    watch_updates(script, monkeypatch, seen)
    folder = run(method, tmp_path, tiny_set, "ema")
    assert events == ["gradients", "step", "ema"] * 6
    assert taus == pytest.approx(
        [0.999 - 0.003 * (1 + np.cos(np.pi * k / 5)) / 2 for k in range(6)]
    )
    model = read_checkpoint(folder / "last.pt")["model"]
    monkeypatch.undo()
    # The recursion from the first weights on, over the teacher's parameters in their order.
    first = run(method, tmp_path, tiny_set, "first", "run.frozen_encoder=true")
    start = read_checkpoint(first / "last.pt")["model"]
    names = [k for k in start if k.startswith(("target.", "teacher.")) and "running" not in k]
    names = [k for k in names if "num_batches" not in k]
    for i, name in enumerate(names):
        expected = start[name].double()
        for student, tau in zip(students, taus, strict=True):
            expected = tau * expected + (1 - tau) * student[i].double()
        torch.testing.assert_close(model[name].double(), expected, rtol=1e-5, atol=3e-7)
    assert any(not torch.equal(model[name], start[name]) for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_scaler_changes_nothing(method, finished, tmp_path, tiny_set, monkeypatch):
    """On CUDA fp16 scales the loss by 65536; here the same on fp32, a power of two: exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    autocast = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(
        importlib.import_module(method), "mixed_precision", lambda *_: (autocast, scaler)
    )
    folder = run(method, tmp_path, tiny_set, "scaled")
    losses = [
        [record["loss"] for record in read_log(f, "step")] for f in (folder, finished(method)[0])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert scaler.get_scale() == 65536


@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains(method, tmp_path, tiny_set, monkeypatch, request):
    """As fp32 does on the same machine: apart by rounding (8 bits) and its growth.

    A ViT: a CPU without instructions for bf16 needs a minute for a few of a ResNet's convolutions.
    """
    if method == "barlow":  # of few features its correlations are coarse in bf16
        request.getfixturevalue("full_size")
    stop_at(monkeypatch, 3)
    losses = []
    for precision in ("bf16", "fp32"):
        how = [f"optimization.precision={precision}", "patch_size=8"]
        with pytest.raises(SystemExit):
            run(method, tmp_path, tiny_set, precision, *how, backbone="vit_tiny")
        losses.append([record["loss"] for record in read_log(tmp_path / precision, "step")])
    half, single = losses
    assert half[0] == pytest.approx(single[0], rel=0.02) and half[0] != single[0]
    assert half == pytest.approx(single, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_pass_compiles_into_one_graph(method):
    model, _ = build(method, "vit_tiny" if method == "mae" else "resnet18")
    views, noise, _ = inputs()
    views = views.float()
    arguments = {"mae": (views.flatten(0, 1), noise.flatten(0, 1)), "supervised": (views[:1],)}
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(*arguments.get(method, (views,)))
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_a_random_encoder_stays_random(method, backbone, tmp_path, tiny_set):
    quick = ["optimization.epochs=1", "run.frozen_encoder=true"]
    if backbone == "vit_tiny":
        quick.append("patch_size=8")
    folder = run(method, tmp_path, tiny_set, "frozen", *quick, backbone=backbone)
    result = read_json(folder / "result.json")
    assert result["method"] == "random" and result["backbone"] == backbone
    assert result["val_offline"]["auroc"] is not None
    saved = read_checkpoint(folder / "last.pt")
    assert saved["state"]["optimizer"]["state"] == {}
    assert saved["state"]["probe"]["weight"].abs().sum() > 0
    torch.manual_seed(42)
    fresh, _ = build_backbone(backbone, 32, 8 if backbone == "vit_tiny" else None)
    if method == "mae":  # draws first weights of its own
        fresh = mae.MAE(fresh, 0.75, 32, 1, 4, "class_token").backbone
    for name, tensor in fresh.named_parameters():
        assert torch.equal(tensor, saved["model"][f"backbone.{name}"]), name
    # Only its BatchNorm statistics have moved, and far enough: 50 batches of one view or two.
    views = 1 if method == "supervised" else 2
    for name, tensor in fresh.named_buffers():
        now = saved["model"][f"backbone.{name}"]
        if name.endswith("num_batches_tracked"):
            assert now == views * 53
        assert not torch.equal(tensor, now), name


def test_a_random_encoders_statistics_are_those_of_the_data(tmp_path, tiny_set):
    """Untouched (mean 0, variance 1) they would make it a network without normalisation."""
    quick = ["optimization.epochs=1", "run.frozen_encoder=true", "data.image_size=48"]
    folder = run("simclr", tmp_path, tiny_set, "frozen", *quick)
    backbone, _ = build_backbone("resnet18", 48)
    saved = read_checkpoint(folder / "last.pt")["model"]
    own = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
    backbone.load_state_dict(own)
    overrides = dict(text.partition("=")[::2] for text in tiny_set)
    train = read_annotations(overrides["data.train_csv"])
    crops = CropViews(48, 0.395, 0.275, 0.5, 2, 42)
    images = TrainImages(overrides["data.image_root"], train, crops)
    batch = default_collate([images[7, row] for row in range(64)])
    with torch.no_grad():
        view = ColorJitterNormalize(42)(batch.views, batch.factors, 0)[0]
        evaluated = backbone.eval()(view)
        normalised = backbone.train()(view)
    ratio = float(evaluated.std(dim=0).mean() / normalised.std(dim=0).mean())
    assert 0.7 < ratio < 1.4  # .2 with untouched statistics


def whole_run(method, argv):
    importlib.import_module(method).main(argv)
    return []


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_score_every_image_once(method, finished, tmp_path, tiny_set):
    on_ranks(2, tmp_path / "r", whole_run, method, arguments(method, tiny_set, tmp_path, "two"))
    result = read_json(tmp_path / "two/result.json")
    assert result["val"]["n"] == 24 and result["val"]["n_defect"] == 8
    alone = read_json(finished(method)[0] / "result.json")
    for count in ("n", "n_defect"):  # of the same batches, whoever saw which part
        assert result["train"][count] == alone["train"][count]
    with np.load(tmp_path / "two/val_scores.npz") as stored:
        assert len(set(stored["filename"])) == 24 and np.isfinite(stored["logit"]).all()
    said = [(tmp_path / f"r/{rank}.err").read_text().count("epoch 2/2") for rank in (0, 1)]
    assert said == [1, 0]  # rank 0 speaks, the other is silent


@pytest.mark.parametrize("method", METHODS)
def test_the_other_backbone_runs(method, tmp_path, tiny_set):
    quick = ["optimization.epochs=1", "patch_size=8", "num_heads=6"]
    folder = run(method, tmp_path, tiny_set, "vit", *quick, backbone="vit_tiny")
    assert read_json(folder / "result.json")["backbone"] == "vit_tiny"


def test_a_collapse_is_told(tmp_path, tiny_set, monkeypatch, capsys):
    import dino

    finite = dino.DINO.forward

    def constant(self, views):  # what a collapsed teacher returns
        h, z, student, teacher = finite(self, views)
        return h, z, student, torch.zeros_like(teacher)

    run("dino", tmp_path, tiny_set, "healthy", "optimization.epochs=1")
    assert "collapsed" not in capsys.readouterr().err
    monkeypatch.setattr(dino.DINO, "forward", constant)
    folder = run("dino", tmp_path, tiny_set, "constant", "optimization.epochs=1")
    said = capsys.readouterr().err
    assert said.count("warning: collapsed") == 1 and "teacher_entropy" in said
    assert read_log(folder, "step")[-1]["diagnostics"]["collapsed"] == 1
