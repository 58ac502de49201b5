import pytest
import torch
from conftest import on_ranks

from barlow import BarlowTwins, barlow_twins_loss


def two(seed=0, n=12, dim=5):
    generator = torch.manual_seed(seed)
    return [torch.randn(n, dim, generator=generator).double() for _ in range(2)]


def slow_barlow(z0, z1, lambda_, scale_loss):
    """Eq. 1 and 2 written out: a loop over pairs of dimensions."""
    (n, dim), total = z0.shape, 0.0
    for i in range(dim):
        for j in range(dim):
            a, b = z0[:, i], z1[:, j]
            a, b = a - a.sum() / n, b - b.sum() / n
            deviations = ((a**2).sum() / n + 1e-5).sqrt() * ((b**2).sum() / n + 1e-5).sqrt()
            c = (a * b).sum() / n / deviations
            total = total + ((1 - c) ** 2 if i == j else lambda_ * c**2)
    return scale_loss * total


def test_loss_and_gradient_are_the_papers_equation():
    found = []
    for loss in (barlow_twins_loss, slow_barlow):
        z0, z1 = (z.requires_grad_() for z in two())
        value = loss(z0, z1, 0.0051, 0.024)
        value.backward()
        found.append((value.detach(), z0.grad, z1.grad))
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours, slow)


def test_normalisation_is_a_batchnorm_without_weight_and_bias():
    z0, z1 = two(n=40)
    norm = torch.nn.BatchNorm1d(5, affine=False).double()
    c = norm(z0).T @ norm(z1) / 40
    expected = ((1 - c.diagonal()) ** 2).sum() + 0.1 * (c**2).sum()
    expected = expected - 0.1 * (c.diagonal() ** 2).sum()
    torch.testing.assert_close(barlow_twins_loss(z0, z1, 0.1, 1.0), expected)


def test_known_values_and_invariances():
    patterns = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).T  # uncorrelated
    assert float(barlow_twins_loss(patterns, patterns, 0.5, 1.0)) == pytest.approx(0, abs=1e-6)
    rolled = patterns.roll(1, dims=1)  # every C_ii is 0, one C_ij a row is 1
    assert float(barlow_twins_loss(patterns, rolled, 0.5, 0.1)) == pytest.approx(0.45, rel=1e-4)
    same = patterns[:, :1].repeat(1, 3)  # all dimensions alike: every C_ij is 1
    assert float(barlow_twins_loss(same, same, 0.5, 1.0)) == pytest.approx(3, rel=1e-4)
    z0, z1 = two()
    base = barlow_twins_loss(z0, z1, 0.0051, 0.024)
    order = torch.randperm(12)
    torch.testing.assert_close(barlow_twins_loss(z0[order], z1[order], 0.0051, 0.024), base)
    torch.testing.assert_close(barlow_twins_loss(z1, z0, 0.0051, 0.024), base)
    moved = barlow_twins_loss(z0 + 3, 100 * z1, 0.0051, 0.024)
    torch.testing.assert_close(moved, base, rtol=1e-4, atol=0)


def loss_of_a_share():
    z0, z1 = two()
    rank = torch.distributed.get_rank()
    share = [z[6 * rank : 6 * rank + 6].clone().requires_grad_() for z in (z0, z1)]
    loss = barlow_twins_loss(*share, 0.0051, 0.024)
    loss.backward()
    return [loss.detach(), share[0].grad, share[1].grad]


def test_on_two_ranks_statistics_are_those_of_the_global_batch(tmp_path):
    z0, z1 = (z.requires_grad_() for z in two())
    loss = barlow_twins_loss(z0, z1, 0.0051, 0.024)
    loss.backward()
    for rank, (value, *grads) in enumerate(on_ranks(2, tmp_path / "r", loss_of_a_share)):
        torch.testing.assert_close(value, loss.detach())
        for ours, whole in zip(grads, (z0.grad, z1.grad), strict=True):
            # of the sum of both ranks' equal losses: twice the gradient of one
            torch.testing.assert_close(ours, 2 * whole[6 * rank : 6 * rank + 6])


def test_no_bias_before_a_batchnorm():
    layers = BarlowTwins(torch.nn.Identity(), 6, 16, 8).projector
    assert [m.bias for m in layers if isinstance(m, torch.nn.Linear)] == [None] * 3
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in layers) == 2
