import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.optim import LARS, build_optimizer, set_lr


def reference_lars(params, grads, lr, momentum, decay, trust, steps):
    """Eq. 6 of arXiv:1708.03888 in plain floats; grads is a list over steps of lists."""
    params = [p.clone().double() for p in params]
    velocity = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        for p, v, g in zip(params, velocity, grads[step], strict=True):
            g = g.double()
            if p.ndim > 1:
                w, gn = (p**2).sum().sqrt(), (g**2).sum().sqrt()
                local = trust * w / (gn + decay * w) if w > 0 and gn > 0 else 1.0
                g = local * (g + decay * p)
            v.mul_(momentum).add_(g)
            p.sub_(lr * v)
    return params


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_lars_is_the_papers(dtype, tolerance):
    torch.manual_seed(0)
    shapes = ((4, 3), (5,), (2, 3, 3, 3), (6, 2))
    params = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    params[3].data.zero_()  # a norm of zero
    grads = [[torch.randn_like(p) for p in params] for _ in range(5)]
    grads[1][0].zero_()
    expected = reference_lars(params, grads, 0.3, 0.9, 1e-2, 0.001, 5)
    optimizer = LARS(params, lr=0.3, momentum=0.9, weight_decay=1e-2, trust_coefficient=0.001)
    for step in range(5):
        for p, g in zip(params, grads[step], strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), e, atol=tolerance / 10, rtol=tolerance)


class Calls(TorchDispatchMode):
    """Counts kernels; a list that no single kernel takes counts by its length."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # Scalars of one tensor each: torch falls back to a kernel a tensor.
        self.count += len(args[0]) if op is torch.ops.aten._foreach_mul_.List else 1
        return op(*args, **(kwargs or {}))


def test_the_number_of_kernels_grows_by_one_a_weight():
    def kernels(count):
        params = [nn.Parameter(torch.ones(s)) for s in [(3, 2)] * count + [(3,)] * 2 * count]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = LARS(params, lr=0.1, weight_decay=0.1)
        optimizer.step()  # makes the buffers
        with Calls() as calls:
            optimizer.step()
        return calls.count

    assert kernels(20) - kernels(10) == 10 and kernels(24) < 48


def test_lars_keeps_a_momentum_buffer_a_parameter_and_goes_on_from_it():
    def stepped(optimizer, params, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()

    def fresh():
        torch.manual_seed(9)
        params = [nn.Parameter(torch.randn(s)) for s in ((4, 3), (5,))]
        return params, LARS(params, lr=0.3, weight_decay=1e-2)

    whole, optimizer = fresh()
    stepped(optimizer, whole, range(4))
    first, optimizer = fresh()
    stepped(optimizer, first, range(2))
    saved = optimizer.state_dict()
    assert {k: list(v) for k, v in saved["state"].items()} == {
        0: ["momentum_buffer"],
        1: ["momentum_buffer"],
    }
    resumed, optimizer = fresh()
    for p, value in zip(resumed, first, strict=True):
        p.data.copy_(value.data)
    optimizer.load_state_dict(saved)
    stepped(optimizer, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(resumed, whole, strict=True))


def test_lars_ignores_the_scale_of_the_loss_for_weights_only():
    def after(scale):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        (scale * layer(torch.ones(2, 4)).pow(2).mean()).backward()
        LARS(layer.parameters(), lr=1.0, momentum=0.0).step()
        return layer.weight.detach(), layer.bias.detach()

    (w1, b1), (w2, b2) = after(1.0), after(100.0)
    torch.testing.assert_close(w1, w2)
    assert not torch.allclose(b1, b2)


def test_lars_on_request_adapts_everything_and_skips_what_has_no_gradient():
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 2.0)
    LARS([p, q], lr=1.0, momentum=0.0, trust_coefficient=0.1, exclude_bias_and_norm=False).step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))  # 0.1 |w| / |g| g = 0.1
    assert torch.equal(q.detach(), torch.ones(4))


@pytest.mark.parametrize("exclude", [True, False])
def test_adamw_groups(exclude):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, "adamw", 0.1, 0.8, 0.05, exclude, None)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for p in model.parameters():
        assert decay[id(p)] == (0.0 if exclude and p.ndim == 1 else 0.05)
    assert all(g["betas"] == (0.8, 0.999) for g in optimizer.param_groups)
    set_lr(optimizer, 0.7)
    assert all(g["lr"] == 0.7 for g in optimizer.param_groups)


def test_build_lars_takes_every_setting():
    model = nn.Linear(3, 4)
    group = build_optimizer(model, "lars", 0.1, 0.8, 0.05, True, 0.002).param_groups[0]
    found = [group[k] for k in ("lr", "momentum", "weight_decay", "trust_coefficient")]
    assert found == [0.1, 0.8, 0.05, 0.002] and group["exclude_bias_and_norm"] is True
