import numpy as np
import pytest
import torch

from simclr import nt_xent_loss


def embeddings(seed=0, n=6, dim=5):
    g = torch.manual_seed(seed)
    return torch.randn(n, dim, generator=g), torch.randn(n, dim, generator=g)


def slow_nt_xent(z0, z1, temperature):
    """Eq. 1 written out: a loop over anchors and negatives, in float64."""
    z = torch.cat([z0, z1]).double()
    n, total = len(z0), 0.0
    for i in range(2 * n):

        def sim(j, i=i):
            return torch.dot(z[i], z[j]) / (z[i].norm() * z[j].norm()) / temperature

        others = sum(torch.exp(sim(j)) for j in range(2 * n) if j != i)
        total = total - torch.log(torch.exp(sim((i + n) % (2 * n))) / others)
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_loss_is_the_papers_equation(temperature):
    z0, z1 = embeddings()
    ours, slow = nt_xent_loss(z0, z1, temperature), slow_nt_xent(z0, z1, temperature)
    assert float(ours) == pytest.approx(float(slow), rel=1e-5)


def test_gradient_is_that_of_the_papers_equation():
    grads = []
    for loss in (nt_xent_loss, slow_nt_xent):
        z0, z1 = (z.double().requires_grad_() for z in embeddings())
        loss(z0, z1, 0.2).backward()
        grads.append(torch.cat([z0.grad, z1.grad]))
    torch.testing.assert_close(*grads)


def test_loss_known_values_and_invariances():
    same = torch.ones(8, 4).double()
    assert float(nt_xent_loss(same, same, 0.2)) == pytest.approx(np.log(15))  # ln(2B - 1)
    apart = torch.eye(4).double()
    expected = -np.log(np.e**5 / (np.e**5 + 6))
    assert float(nt_xent_loss(apart, apart, 0.2)) == pytest.approx(expected)
    z0, z1 = embeddings()
    base = nt_xent_loss(z0, z1, 0.2)
    order = torch.randperm(6)
    torch.testing.assert_close(nt_xent_loss(z0[order], z1[order], 0.2), base)
    torch.testing.assert_close(nt_xent_loss(z1, 7 * z0, 0.2), base)
    assert nt_xent_loss(z0, z1.flip(0), 0.2) != base
