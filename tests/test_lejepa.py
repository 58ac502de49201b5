import numpy as np
import pytest
import torch
from conftest import on_ranks

from common import label_free
from lejepa import draw_slices, lejepa_loss, sigreg


def two(seed=0, n=12, dim=5):
    generator = torch.manual_seed(seed)
    return torch.randn(2, n, dim, generator=generator).double()


def directions(dim=5, many=7, step=3):
    return draw_slices(dim, many, 42, step, torch.device("cpu")).double()


def slow_lejepa(z, slices, lambda_):
    """Written out by slice, knot and image, the characteristic function as a complex number."""
    views, n, _ = z.shape
    knots, total = torch.linspace(0, 3, 17).double(), 0.0
    for view in range(views):
        for a in slices.T:
            x, integral = z[view] @ a, 0.0
            for i, t in enumerate(knots):
                found = sum(torch.exp(1j * t * x[k]) for k in range(n)) / n
                gauss = torch.exp(-(t**2) / 2)
                width = 3 / 16 * (0.5 if i in (0, 16) else 1)
                integral = integral + 2 * width * gauss * (found - gauss).abs() ** 2
            total = total + n * integral / slices.shape[1] / views
    centre, distance = z.sum(dim=0) / views, 0.0
    for view in range(views):
        distance = distance + ((centre - z[view]) ** 2).sum() / z.numel()
    return (1 - lambda_) * distance + lambda_ * total


def test_loss_and_gradient_are_the_slow_form():
    found = []
    for loss in (lambda *how: lejepa_loss(*how)[0], slow_lejepa):
        z = two().requires_grad_()
        value = loss(z, directions(), 0.3)
        value.backward()
        found.append((value.detach(), z.grad))
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-9)


def test_of_two_views_the_prediction_is_a_quarter_of_their_squared_distance():
    z = two()
    _, prediction, gaussian = lejepa_loss(z, directions(), 0.01)
    torch.testing.assert_close(prediction, (z[0] - z[1]).square().mean() / 4)
    torch.testing.assert_close(
        gaussian, (sigreg(z[0], directions()) + sigreg(z[1], directions())) / 2
    )


@pytest.mark.parametrize("n", [64, 512])
def test_a_gaussian_has_1_05_whatever_the_batch(n):
    generator = torch.manual_seed(n)
    found = [
        float(sigreg(torch.randn(n, 8, generator=generator).double(), directions(8, 64, k)))
        for k in range(100)
    ]
    assert np.mean(found) == pytest.approx(1.052, abs=4 * np.std(found) / 10)
    assert np.std(found) / 10 < 0.05


def test_a_collapse_at_0_has_no_gradient_and_elsewhere_one_for_all():
    z = torch.zeros(32, 5).double().requires_grad_()
    value = sigreg(z, directions())
    value.backward()
    assert float(value.detach()) == pytest.approx(0.402 * 32, rel=2e-3)
    assert not z.grad.any()
    z = torch.full((32, 5), 0.3).double().requires_grad_()
    sigreg(z, directions()).backward()
    assert z.grad.any()
    torch.testing.assert_close(z.grad, z.grad[:1].expand_as(z))


def test_the_order_of_images_does_not_matter_but_scale_does():
    z = two()
    base = lejepa_loss(z, directions(), 0.1)[0]
    torch.testing.assert_close(lejepa_loss(z[:, torch.randperm(12)], directions(), 0.1)[0], base)
    torch.testing.assert_close(lejepa_loss(z.flip(0), directions(), 0.1)[0], base)
    assert float(lejepa_loss(2 * z, directions(), 0.1)[0]) != pytest.approx(float(base), rel=0.01)


def test_slices_are_of_the_step_and_of_length_1():
    torch.testing.assert_close(directions().norm(dim=0), torch.ones(7).double(), rtol=1e-6, atol=0)
    torch.manual_seed(0)
    first = directions()
    torch.rand(3)  # they do not come from the global generator
    assert torch.equal(first, directions()) and not torch.equal(first, directions(step=4))


def test_the_measure_of_a_run_is_the_same_statistic_of_standardised_embeddings(monkeypatch):
    z = 3 + 2 * two(n=200)[0]
    standardised = (z - z.mean(dim=0)) / z.std(dim=0, correction=0)
    rng = np.random.default_rng(5)
    monkeypatch.setattr(label_free, "keyed_rng", lambda *_: np.random.default_rng(5))
    slices = torch.from_numpy(rng.standard_normal((1024, 5))).T
    slices = slices / slices.norm(dim=0)
    expected = float(sigreg(standardised, slices))
    assert label_free.sigreg(z) == pytest.approx(expected, rel=1e-6)


def loss_of_a_share():
    rank = torch.distributed.get_rank()
    share = two()[:, 6 * rank : 6 * rank + 6].clone().requires_grad_()
    loss = lejepa_loss(share, directions(), 0.3)[0]
    loss.backward()
    return [loss.detach(), share.grad]


def test_on_two_ranks_the_characteristic_function_is_of_the_global_batch(tmp_path):
    z = two().requires_grad_()
    loss = lejepa_loss(z, directions(), 0.3)[0]
    loss.backward()
    shares = on_ranks(2, tmp_path / "r", loss_of_a_share)
    mean = sum(value for value, _ in shares) / 2
    torch.testing.assert_close(mean, loss.detach())
    whole = torch.cat([grad for _, grad in shares], dim=1) / 2  # of the mean over ranks
    torch.testing.assert_close(whole, z.grad)
