import math

import pytest
import torch

from byol import BYOL, byol_loss
from common.backbones import build_backbone


def four(seed=0, n=5, dim=7):
    generator = torch.manual_seed(seed)
    return [torch.randn(n, dim, generator=generator) for _ in range(4)]


def slow_byol(p0, p1, t0, t1):
    """Eq. 2 written out: squared distance of unit vectors, both directions, image by image."""
    total = 0.0
    for i in range(len(p0)):
        for p, t in ((p0[i], t1[i]), (p1[i], t0[i])):
            p, t = p.double() / p.double().norm(), t.double() / t.double().norm()
            total = total + ((p - t) ** 2).sum()
    return total / len(p0)


def test_loss_and_gradient_are_the_papers_equation():
    p0, p1, t0, t1 = (x.double() for x in four())
    grads = []
    for loss in (byol_loss, slow_byol):
        a, b = p0.clone().requires_grad_(), p1.clone().requires_grad_()
        value = loss(a, b, t0, t1)
        value.backward()
        grads.append((value.detach(), a.grad, b.grad))
    for ours, slow in zip(*grads, strict=True):
        torch.testing.assert_close(ours, slow)


def test_known_values_and_invariances():
    p0, p1, t0, t1 = (x.double() for x in four())
    assert float(byol_loss(t1, t0, t0, t1)) == pytest.approx(0, abs=1e-6)  # views are crossed
    assert float(byol_loss(-t1, -t0, t0, t1)) == pytest.approx(8)
    right = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert float(byol_loss(*right, right[0], right[1])) == pytest.approx(4)  # no agreement at all
    base = byol_loss(p0, p1, t0, t1)
    torch.testing.assert_close(byol_loss(3 * p0, p1, t0, 0.1 * t1), base)
    torch.testing.assert_close(byol_loss(p1, p0, t1, t0), base)
    assert not math.isclose(byol_loss(p0, p1, t1, t0), base, rel_tol=1e-3)


def test_no_gradient_reaches_the_targets():
    values = [x.requires_grad_() for x in four()]
    byol_loss(*values).backward()
    assert [v.grad is not None for v in values] == [True, True, False, False]


def test_the_target_is_a_copy_with_statistics_of_its_own():
    backbone, dim = build_backbone("resnet18", 32)
    model = BYOL(backbone, dim, 16, 12, 8)
    online, target = dict(model.online().named_parameters()), dict(model.target.named_parameters())
    assert online.keys() == target.keys()
    for name, p in target.items():
        assert torch.equal(p, online[name]) and p is not online[name] and not p.requires_grad
    views = torch.randn(2, 8, 3, 32, 32)
    *_, p, t = model(views)
    assert p.requires_grad and not t.requires_grad and p.shape == t.shape == (2, 8, 8)
    assert not torch.equal(model.target[0].bn1.running_mean, torch.zeros(64))  # it trains
    assert int(model.target[0].bn1.num_batches_tracked) == 2
    with torch.no_grad():
        model.backbone.conv1.weight.zero_()
    assert model.target[0].conv1.weight.abs().sum() > 0


def test_no_bias_before_a_batchnorm():
    model = BYOL(torch.nn.Identity(), 6, 16, 12, 8)
    for head in (model.projector, model.predictor):
        assert head[0].bias is None and isinstance(head[1], torch.nn.BatchNorm1d)
        assert head[3].bias is None
