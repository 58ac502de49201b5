"""Each script's forward, loss and probe step on fake CUDA tensors: no tensor on a wrong device."""

import pytest
import torch
from small import PAIRS, build, step
from torch._subclasses import FakeTensorMode

from common.augmentations import ColorJitterNormalize
from common.ema import ema_update
from common.optim import LARS
from common.probe import LinearProbe
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
