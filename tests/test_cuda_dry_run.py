"""Each script's forward, loss and probe step on fake CUDA tensors: no tensor on a wrong device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from common.augmentations import ColorJitterNormalize
from common.backbones import build_backbone
from common.optim import LARS
from common.probe import LinearProbe
from simclr import SimCLR, nt_xent_loss


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


@pytest.mark.parametrize(("backbone", "patch"), [("resnet18", None), ("vit_tiny", 16)])
def test_simclr(backbone, patch):
    module, dim = build_backbone(backbone, 32, patch)
    model, probe = SimCLR(module, dim, 16, 8), LinearProbe(dim, 0.9, 0.0, 2.0)
    with FakeTensorMode(), torch.device("cuda"):
        model, probe, views = on_cuda(model), on_cuda(probe), views_on_cuda()
        h, z = model(views)
        loss = nt_xent_loss(*z.float(), 0.2)
        labels = torch.zeros(4, dtype=torch.int8, device="cuda")
        logits = probe.step(h.detach().float(), labels, 0.1)
        assert views.device.type == loss.device.type == logits.device.type == "cuda"
        assert h.shape == (2, 4, dim) and z.shape == (2, 4, 8)
        assert loss.shape == () and logits.shape == (2, 4)
        with pytest.raises(RuntimeError, match="device"):  # the test can fail
            probe.step(h.detach().float(), torch.zeros(4, device="cpu"), 0.1)


def test_lars_takes_a_step_without_leaving_the_device():
    with FakeTensorMode(), torch.device("cuda"):
        layer = torch.nn.Linear(3, 4)
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer = LARS(layer.parameters(), 0.1)
        optimizer.step()  # a transfer to the host would raise: fake tensors have no values
        buffers = [s["momentum_buffer"] for s in optimizer.state.values()]
        assert len(buffers) == 2 and all(b.device.type == "cuda" for b in buffers)
