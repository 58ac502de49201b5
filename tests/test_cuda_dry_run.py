"""A step on fake CUDA tensors: no tensor on a wrong device, nothing that waits for the device."""

import types

import pytest
import torch
from small import PAIRS, build, step
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from common.augmentations import ColorJitterNormalize
from common.ema import ema_update
from common.optim import LARS
from common.probe import LinearProbe
from common.running.checkpoint import TrainState
from common.running.overflow import OverflowGuard
from common.running.process import StopSignal
from common.running.progress import Progress, Stopwatch
from common.running.run import Run
from dino import teacher_statistics


def on_cuda(module):
    """The module with fake CUDA tensors for all its own (its draw of weights needs real ones)."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake) if is_parameter else fake
    return module


def views_on_cuda():
    batch = torch.zeros(4, 2, 3, 32, 32, dtype=torch.uint8, device="cuda")
    factors = torch.ones(4, 2, 5, device="cuda")
    return ColorJitterNormalize(0)(batch, factors, step=3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_a_step(method, backbone, half, monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", bool)
    model, dim = build(method, backbone)
    probe = LinearProbe(dim, 0.9, 0.0, 2.0)
    with FakeTensorMode(), torch.device("cuda"):
        model, probe, views = on_cuda(model), on_cuda(probe), views_on_cuda()
        labels = torch.zeros(4, dtype=torch.int8, device="cuda")
        noise = torch.zeros(2, 4, 16, device="cuda")
        autocast = torch.autocast("cuda", torch.float16, enabled=half)
        loss, h, z = step(method, model, model, views, noise, labels, autocast)
        logits = probe.step(h.detach().float(), labels, 0.1)
        assert {x.device.type for x in (views, loss, h, z, logits)} == {"cuda"}
        count = 1 if method == "supervised" else 2
        assert loss.dtype == torch.float32
        assert (h.dtype == torch.float16) == (half and backbone == "resnet18")
        if method == "supervised":
            probe.follow(model.head)
        assert h.shape == (count, 4, dim) and logits.shape == (count, 4) and loss.shape == ()
        with pytest.raises(RuntimeError, match="device"):  # the test can fail
            probe.step(h.detach().float(), torch.zeros(4, device="cpu"), 0.1)


def test_the_teachers_update_stays_on_the_device():
    model, _ = build("dino", "resnet18")
    with FakeTensorMode(), torch.device("cuda"):
        model = on_cuda(model)
        ema_update(model.teacher, model.student(), 0.99)
        notes = teacher_statistics(torch.ones(8, 24), model.center, 0.04, torch.ones(()))
        model.center.lerp_(torch.ones(8, 24).mean(dim=0), 0.1)
        assert {n.device.type for n in notes.values() if torch.is_tensor(n)} == {"cuda"}


def test_lars_takes_a_step_without_leaving_the_device():
    with FakeTensorMode(), torch.device("cuda"):
        layer = torch.nn.Linear(3, 4)
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer = LARS(layer.parameters(), 0.1)
        optimizer.step()  # a transfer to the host would raise: fake tensors have no values
        buffers = [s["momentum_buffer"] for s in optimizer.state.values()]
        assert len(buffers) == 2 and all(b.device.type == "cuda" for b in buffers)


class Waits(TorchDispatchMode):
    """Lists the operations for which the host has to wait for the device.

    Copies to or from it, which only pinned memory would spare (a batch's is: see `Batch.to`), and
    what reads a value.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        try:
            out = op(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self.found.append(f"{error} is read")
            raise
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != out.device.type:
                self.found.append(f"{name} {tuple(source.shape)} {source.device} to {out.device}")
        return out


def test_what_waits_is_seen():
    """The control of the tests below."""
    with FakeTensorMode(), torch.device("cuda"), Waits() as waits:
        x = torch.ones(3)
        for wait in (x.tolist, x.sum().item, lambda: bool(x.sum() > 0), lambda: x[x > 0]):
            with pytest.raises(RuntimeError):
                wait()
            assert " is read" in waits.found.pop()
        for copy in (
            lambda: torch.tensor([1.0]),
            lambda: x.new_tensor([1.0, 2.0]),
            lambda: torch.zeros(3, device="cpu").to("cuda", non_blocking=True),
            lambda: x.copy_(torch.zeros(3, device="cpu")),
            lambda: x[[0, 1]],
            x.cpu,
        ):
            copy()
            assert " to " in waits.found.pop()
    assert not waits.found


def test_augmentation_waits_for_nothing():
    with FakeTensorMode(), torch.device("cuda"):
        augment = ColorJitterNormalize(0)
        views = torch.zeros(4, 2, 3, 32, 32, dtype=torch.uint8)
        factors = torch.ones(4, 2, 5)
        with Waits() as waits:
            augment(views, factors, step=3)
    assert not waits.found


def bare_run(state):
    """A Run in mid-epoch as far as `end_step` needs it, neither logging nor saving."""
    run = Run()
    options = types.SimpleNamespace(log_every=50, checkpoint_every_steps=1000)
    optimization = types.SimpleNamespace(batch_size=4)
    run.cfg = types.SimpleNamespace(run=options, optimization=optimization)
    run.step, run.steps_per_epoch, run.log = 3, 100, None
    run.world_size, run.is_first = 1, True
    run._guard, run._watch, run._note = OverflowGuard(state), Stopwatch(), ""
    run._watch.start_step()
    run._progress, run.stop = Progress(400, "training", "images"), object.__new__(StopSignal)
    run.stop.received = None
    return run


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_a_step_waits_for_nothing(method, backbone, half, monkeypatch):
    """All of a step but backward, which fake tensors have none of, and the scaler's own check."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", bool)
    model, dim = build(method, backbone)
    probe = LinearProbe(dim, 0.9, 0.0, 2.0)
    with FakeTensorMode(), torch.device("cuda"):
        model, probe = on_cuda(model), on_cuda(probe)
        views = torch.zeros(2, 4, 3, 32, 32)
        labels, rows = torch.zeros(4, dtype=torch.int8), torch.zeros(4, dtype=torch.int64)
        noise = torch.zeros(2, 4, 16)
        optimizer = LARS([p for p in model.parameters() if p.requires_grad], 0.1)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        optimizer.step()  # makes its buffers
        scaler = torch.amp.GradScaler("cuda", enabled=half)
        state = TrainState(model, optimizer, probe, scaler)
        run = bare_run(state)
        autocast = torch.autocast("cuda", torch.float16, enabled=half)
        with Waits() as waits:
            run._guard.before_step()
            loss, h, z = step(method, model, model, views, noise, labels, autocast)
            scaler.scale(loss)
            if method == "dino":
                logits = torch.ones(8, 24)
                run.note(**teacher_statistics(logits, model.center, 0.04, loss.detach()))
                model.center.lerp_(logits.mean(dim=0), 0.1)
                for p in model.backbone.parameters():
                    nn.utils.clip_grad_norm_(p, max_norm=1.0)
            optimizer.step()
            if method == "byol":
                ema_update(model.target, model.online(), 0.99)
            if method == "dino":
                ema_update(model.teacher, model.student(), 0.99)
            logits = probe.step(h.detach().float(), labels, 0.1)
            if method == "supervised":
                probe.follow(model.head)
            state.scores.add(rows, logits)
            run.end_step(state, loss, probe.loss, {}, views, z.detach())
        assert not waits.found and run.step == 4
        run.step = 49
        with pytest.raises(DataDependentOutputException):  # where it logs: the test can fail
            run.end_step(state, loss, probe.loss, {}, views, z.detach())
