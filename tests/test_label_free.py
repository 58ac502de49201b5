"""Each measure against a plain numpy form, and where its value is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from common import label_free
from common.label_free import (
    alignment,
    given_labels,
    lidar,
    of_clean,
    of_views,
    power_law,
    purity,
    sigreg,
    spectrum,
    uniformity,
)

RNG = np.random.default_rng(0)


def with_spectrum(eigenvalues, n=400, seed=0):
    """(n, D) whose covariance has exactly these eigenvalues, shifted, in a turned basis."""
    rng, dim = np.random.default_rng(seed), len(eigenvalues)
    x = rng.normal(size=(n, dim))
    u, _, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return torch.from_numpy(u * np.sqrt(n * np.asarray(eigenvalues)) @ turn + 7)


def test_measures_of_the_spectrum_are_their_formulas():
    z = torch.from_numpy(RNG.normal(size=(60, 9)) @ RNG.normal(size=(9, 9)) + 3)
    x = z.numpy() - z.numpy().mean(axis=0)
    values = np.linalg.eigvalsh(x.T @ x / 60)
    found = spectrum(z.float())
    assert found["stable_rank"] == pytest.approx(
        np.linalg.norm(x) ** 2 / np.linalg.norm(x, 2) ** 2, rel=1e-5
    )
    assert found["participation_ratio"] == pytest.approx(
        values.sum() ** 2 / (values**2).sum(), rel=1e-5
    )


def test_known_spectra():
    flat = spectrum(with_spectrum(np.ones(16)))
    assert (flat["stable_rank"], flat["participation_ratio"]) == pytest.approx((16, 16))
    assert flat["alpha_req_full"] == pytest.approx(0, abs=1e-9)
    one = spectrum(with_spectrum([1, 1e-20, 1e-20, 1e-20]))
    assert one["stable_rank"] == pytest.approx(1) and one["alpha_req_full"] is None
    assert set(spectrum(torch.ones(40, 8)).values()) == {None}
    for alpha in (0.5, 1, 2):
        found = spectrum(with_spectrum(3 * np.arange(1, 121.0) ** -alpha))
        for name in ("alpha_req", "alpha_req_full"):
            assert found[name] == pytest.approx(alpha, rel=1e-6)
            assert found[f"{name}_fit"] == pytest.approx(1)


@pytest.mark.parametrize("by_rank", [False, True])
def test_alpha_is_a_weighted_regression_over_its_ranks(by_rank):
    values = np.sort(RNG.lognormal(size=50))[::-1].copy()
    ranks = np.arange(4, 31)
    weight = 1 / ranks if by_rank else np.ones(27)
    slope, _ = np.polyfit(np.log(ranks), np.log(values[3:30]), 1, w=np.sqrt(weight))
    found, fit = power_law(torch.from_numpy(values), 4, 30, by_rank)
    assert found == pytest.approx(-slope) and 0 < fit <= 1
    if not by_rank:
        assert fit == pytest.approx(
            stats.linregress(np.log(ranks), np.log(values[3:30])).rvalue ** 2
        )


def slow_lidar(views, delta):
    """From the paper's definition, by a symmetric square root."""
    q, n, dim = views.shape
    means, total = views.mean(axis=0), views.mean(axis=(0, 1))
    between = sum(np.outer(m - total, m - total) for m in means) / (n - 1)
    within = sum(
        np.outer(v - m, v - m) for k in range(q) for v, m in zip(views[k], means, strict=True)
    )
    within = within / (n * (q - 1))
    values, vectors = np.linalg.eigh(within + delta * np.trace(within) / dim * np.eye(dim))
    half = vectors / np.sqrt(values) @ vectors.T
    found = np.linalg.eigvalsh(half @ between @ half).clip(0)
    p = found / found.sum() + 1e-7
    return math.exp(-(p * np.log(p)).sum())


def test_lidar_is_the_papers_definition_and_has_no_scale():
    views = RNG.normal(size=(1, 50, 6)) * 3 + RNG.normal(size=(4, 50, 6)) @ RNG.normal(size=(6, 6))
    expected = slow_lidar(views, 1e-4)
    assert lidar(torch.from_numpy(views)) == pytest.approx(expected)
    assert lidar(torch.from_numpy(1e-3 * views + 5)) == pytest.approx(expected, rel=1e-6)


def test_lidar_is_the_number_of_directions_that_tell_images_apart():
    rng = np.random.default_rng(0)
    told = np.zeros((1, 3000, 8))
    told[..., :3] = 100 * rng.normal(size=(1, 3000, 3))
    views = torch.from_numpy(told + rng.normal(size=(10, 3000, 8)))
    assert lidar(views) == pytest.approx(3, abs=0.05)
    assert lidar(torch.ones(4, 30, 8)) is None  # nothing varies


def test_alignment_is_over_all_pairs_of_views():
    z = RNG.normal(size=(4, 7, 5))
    unit = z / np.linalg.norm(z, axis=2, keepdims=True)
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    expected = np.mean([((unit[a] - unit[b]) ** 2).sum(axis=1).mean() for a, b in pairs])
    assert alignment(torch.from_numpy(9 * z)) == pytest.approx(expected)
    one = torch.tensor([[1.0, 0], [0, 2]])
    assert alignment(torch.stack([one, 5 * one])) == pytest.approx(0, abs=1e-12)
    assert alignment(torch.stack([one, -one])) == pytest.approx(4)


def test_uniformity_is_over_all_pairs_of_images():
    z = RNG.normal(size=(12, 5))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [(a, b) for a in range(12) for b in range(a)]
    gauss = [math.exp(-2 * ((unit[a] - unit[b]) ** 2).sum()) for a, b in pairs]
    assert uniformity(torch.from_numpy(3 * z)) == pytest.approx(math.log(np.mean(gauss)))
    assert uniformity(torch.ones(6, 4)) == pytest.approx(0, abs=1e-12)


def test_sigreg_tells_a_gaussian_from_others_whatever_scale_and_offset():
    generator = torch.manual_seed(0)
    gauss = torch.randn(500, 16, generator=generator).double()
    coin = torch.randint(0, 2, (500, 1), generator=generator).double().expand(-1, 16)
    assert 0.3 < sigreg(gauss) < 1.5
    assert sigreg(5 * gauss + 9) == pytest.approx(sigreg(gauss), rel=1e-6)
    assert sigreg(coin + 0.01 * gauss) > 20 * sigreg(gauss)
    assert sigreg(torch.ones(500, 16)) == pytest.approx(0.402 * 500, rel=2e-3)
    assert sigreg(gauss) == sigreg(gauss)


def test_measures_of_views_and_of_clean_images_are_named_by_what_they_are_of():
    h, z = torch.randn(3, 40, 12), torch.randn(3, 40, 6)
    found, few = of_views(h, z), torch.tensor([1, 5, 8])
    assert (found["views"], found["view_images"]) == (3, 40)
    assert found["lidar_features"] == lidar(h) and found["lidar_embeddings"] == lidar(z)
    clean = of_clean(h[0], z[0], few)
    assert clean["uniformity_embeddings"] == uniformity(z[0, few])
    assert clean["sigreg_features"] == sigreg(h[0, few])
    assert clean["stable_rank_features"] == spectrum(h[0])["stable_rank"]
    assert clean["alpha_req_embeddings"] == spectrum(z[0])["alpha_req"]
    z[1, 3, 2] = math.inf  # what clean images give was looked at before
    assert of_views(h, z)["lidar_embeddings"] is None is of_views(h[:, :1], z)["lidar_features"]
    assert of_views(h[:, :0], z[:, :0])["view_images"] == 0


def test_neighbours_of_nearly_collapsed_features_are_found():
    """What is common to all images must not drown, in rounding, what tells them apart."""
    x = torch.randn(60, 64, dtype=torch.float64)
    x[1::2, :32] += 3
    near = torch.full((64,), 5.0, dtype=torch.float64) + 1e-5 * x
    assert purity(near, torch.arange(60) % 2) == 1


def test_purity_is_the_share_of_defects_next_to_a_defect(monkeypatch):
    z, label = RNG.normal(size=(60, 4)), RNG.integers(-1, 2, 60)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    known = np.flatnonzero(label >= 0)
    shares = []
    for i in known[label[known] == 1]:
        others = known[known != i]
        nearest = others[np.argsort(-unit[others] @ unit[i])[:5]]
        shares.append((label[nearest] == 1).mean())
    z, label = torch.from_numpy(z), torch.from_numpy(label)
    assert purity(z, label) == pytest.approx(np.mean(shares))
    monkeypatch.setattr(label_free, "AT_ONCE", 3)
    assert purity(z, label) == pytest.approx(np.mean(shares))
    monkeypatch.setattr(label_free, "FEW", 20)
    assert 0 <= purity(z, label) <= 1


def test_what_labels_add_is_of_the_defects_and_of_both():
    h, z = RNG.normal(size=(50, 6)), RNG.normal(size=(50, 3))
    label = np.array([1] * 15 + [0] * 30 + [-1] * 5)
    h[:15] += 4
    found = given_labels(torch.from_numpy(h), torch.from_numpy(z), label)
    assert (found["n_defect"], found["n_normal"], found["share"]) == (15, 30, pytest.approx(1 / 3))
    defects, normals = h[:15], h[15:45]
    inside = (defects.var(axis=0, ddof=1).sum() + normals.var(axis=0, ddof=1).sum()) / 2
    apart = np.linalg.norm(defects.mean(axis=0) - normals.mean(axis=0))
    assert found["margin_features"] == pytest.approx(apart / math.sqrt(inside))
    assert found["margin_features"] > 3 * found["margin_embeddings"]
    assert found["purity_features"] > 0.9 > 0.7 > found["purity_embeddings"]
    only = label_free.label_free(torch.from_numpy(defects), torch.from_numpy(z[:15]))
    for key in ("rankme_features", "rankme_features_centred", "rankme_features_largest"):
        assert found[key] == pytest.approx(only[key])
    assert found["stable_rank_features"] == spectrum(torch.from_numpy(defects))["stable_rank"]
    nothing = given_labels(torch.from_numpy(h), torch.from_numpy(z), np.where(label == 1, 0, label))
    assert nothing == {"n_normal": 45, "n_defect": 0, "undefined": nothing["undefined"]}
