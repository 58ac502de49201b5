import math

import numpy as np
import pytest
import torch
from conftest import on_ranks

from common.label_free import label_free
from common.rankme import embedding_std, is_collapsed, rankme


def test_is_the_papers_formula_by_another_library():
    z = torch.randn(200, 32, generator=torch.manual_seed(0)) @ torch.diag(torch.logspace(0, -3, 32))
    for centre in (False, True):
        x = z.double().numpy()
        x = x - x.mean(axis=0) if centre else x
        s = np.sqrt(np.linalg.eigvalsh(x.T @ x))
        p = s / s.sum() + 1e-7
        assert rankme(z, centre=centre) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (40, 40), (1, 7)])
@pytest.mark.parametrize("smallest", [1, 1e-3, 2e-6, 5e-7, 1e-12, 0])
@pytest.mark.parametrize("offset", [0, 300])
def test_is_that_of_the_singular_values_themselves(shape, smallest, offset):
    z = torch.randn(shape, generator=torch.manual_seed(0)).double()
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    s[len(s) // 2 :] = smallest
    z = (u * s) @ v + offset
    s = torch.linalg.svdvals(z)
    p = s / max(float(s.sum()), 1e-300) + 1e-7
    assert rankme(z) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-7)


def test_known_ranks():
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(50, 8)) < 1.001  # collapsed: not NaN
    two = torch.zeros(50, 8)
    two[:25, 0], two[25:, 1] = 3.0, 3.0
    assert rankme(two) == pytest.approx(2, rel=1e-4)
    assert rankme(two, centre=True) == pytest.approx(1, rel=1e-4)
    assert rankme(7 * torch.eye(16)) == pytest.approx(rankme(torch.eye(16)))  # no scale


def test_statistics_tell_health_from_collapse():
    generator = torch.manual_seed(0)
    healthy = torch.randn(2000, 64, generator=generator)
    collapsed = torch.randn(1, 64, generator=generator).repeat(2000, 1)
    features = 3 + 2 * torch.randn(2000, 16, generator=generator)
    good, bad = label_free(features, 5 * healthy), label_free(features, collapsed)
    assert good["std_embeddings"] == pytest.approx(1, abs=0.02)
    assert bad["std_embeddings"] == pytest.approx(0, abs=1e-6)
    assert good["mean_features"] == pytest.approx(3, abs=0.05)
    assert good["std_features"] == pytest.approx(2, abs=0.05)
    assert good["rankme"] == rankme(5 * healthy) and good["n"] == 2000
    assert good["rankme_features_largest"] == 16


def test_embedding_std_is_1_where_directions_are_spread_and_0_where_they_are_not():
    spread = torch.randn(2, 3000, 32, generator=torch.manual_seed(0))
    assert embedding_std(7 * spread) == pytest.approx(1, abs=0.02)
    views = torch.randn(2, 1, 32).expand(-1, 50, -1)  # two views, each the same for all images
    assert embedding_std(views) == pytest.approx(0, abs=1e-6)
    own = torch.nn.functional.normalize(spread[0].double(), dim=1).std(dim=0, correction=0).mean()
    assert embedding_std(spread[:1]) == pytest.approx(float(own) * 32**0.5)


def std_of_a_share():
    rank = torch.distributed.get_rank()
    z = torch.randn(2, 40, 8, generator=torch.manual_seed(1)) + 3 * torch.arange(40)[None, :, None]
    return [torch.tensor(embedding_std(z[:, 20 * rank : 20 * rank + 20]))]


def test_embedding_std_is_over_all_ranks(tmp_path):
    z = torch.randn(2, 40, 8, generator=torch.manual_seed(1)) + 3 * torch.arange(40)[None, :, None]
    first, second = on_ranks(2, tmp_path / "r", std_of_a_share)
    assert float(first[0]) == float(second[0]) == pytest.approx(embedding_std(z), rel=1e-6)


def test_a_collapse_is_a_small_std_or_what_the_method_says():
    assert is_collapsed(0.005, {}) and not is_collapsed(0.3, {"other": 1.0})
    assert is_collapsed(0.3, {"collapsed": 1.0}) and not is_collapsed(0.3, {"collapsed": 0.0})
