import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import on_ranks
from sklearn.linear_model import LogisticRegression
from torch import nn

import common.offline_probe
from common.offline_probe import (
    L2_GRID,
    _choose_l2,
    _folds,
    apply_probe,
    fit_logistic,
    offline_probe,
)
from common.probe import LinearProbe, RunningScores, pos_weight


def batch(seed, n=24, dim=6):
    g = torch.manual_seed(seed)
    features = torch.randn(2, n, dim, generator=g)
    labels = torch.randint(-1, 2, (n,), generator=g).to(torch.int8)
    return features, labels


def test_is_torchs_sgd_on_torchs_loss_over_the_labelled():
    probe = LinearProbe(6, momentum=0.9, weight_decay=0.01, pos_weight=3.0)
    layer = nn.Linear(6, 1)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01)
    for step in range(6):
        features, labels = batch(step)
        lr = 0.1 / (step + 1)
        keep = labels >= 0
        before = layer(features)[..., 0].detach()
        loss = F.binary_cross_entropy_with_logits(
            layer(features[:, keep])[..., 0],
            labels[keep].float().expand(2, -1),
            pos_weight=torch.tensor(3.0),
        )
        sgd.param_groups[0]["lr"] = lr
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        torch.testing.assert_close(probe.step(features, labels, lr), before)
        torch.testing.assert_close(probe.loss, loss.detach())
        expected = torch.cat([layer.weight[0], layer.bias]).detach()
        torch.testing.assert_close(probe.weight, expected)


def test_without_a_label_nothing_happens():
    probe = LinearProbe(6, 0.9, 0.01, 1.0)
    probe.step(*batch(0), lr=0.1)
    before = {k: v.clone() for k, v in probe.state_dict().items()}
    features, labels = batch(1)
    logits = probe.step(features, torch.full_like(labels, -1), lr=0.1)
    assert torch.isfinite(logits).all() and probe.loss == 0
    features[0, 0, 0] = float("inf")  # an overflow of the encoder
    probe.step(features, labels, lr=0.1)
    for name, value in probe.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_knows_whether_it_has_seen_both_classes():
    probe = LinearProbe(6, 0.9, 0.0, 1.0)
    features, _ = batch(0)
    for labels, seen in (([-1] * 24, (0, 0)), ([0] * 20 + [-1] * 4, (40, 0))):
        probe.step(features, torch.tensor(labels, dtype=torch.int8), lr=0.1)
        assert tuple(probe.seen.tolist()) == seen
        assert f"{seen[0]} normal and 0 defect" in probe.unlearned()
    probe.step(features, torch.tensor([1] * 3 + [-1] * 21, dtype=torch.int8), lr=0.1)
    assert probe.seen.tolist() == [40, 6] and probe.unlearned() is None


def probe_on_a_rank():
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    probe = LinearProbe(6, 0.9, 0.0, 2.0)
    for step in range(4):
        features, labels = batch(step)
        share = len(labels) // ranks
        mine = slice(rank * share, (rank + 1) * share)
        if step == 2:
            labels[:12] = -1  # one rank has no label at all
        probe.step(features[:, mine], labels[mine], lr=0.1)
    return probe.weight


def test_all_ranks_hold_the_probe_of_one_rank_with_the_whole_batch(tmp_path):
    first, second = on_ranks(2, tmp_path / "r", probe_on_a_rank)
    assert torch.equal(first, second)
    probe = LinearProbe(6, 0.9, 0.0, 2.0)
    for step in range(4):
        features, labels = batch(step)
        if step == 2:
            labels[:12] = -1
        probe.step(features, labels, lr=0.1)
    torch.testing.assert_close(first, probe.weight)


def test_the_encoder_does_not_notice_the_probe():
    def gradient(with_probe):
        torch.manual_seed(0)
        encoder = nn.Linear(5, 6)
        features = encoder(torch.randn(2, 24, 5))
        features.square().mean().backward(retain_graph=True)
        if with_probe:
            probe = LinearProbe(6, 0.9, 0.0, 1.0)
            logits = probe.step(features, batch(0)[1], lr=0.1)  # not even detached by the caller
            assert probe.weight.abs().sum() > 0 and not logits.requires_grad
        return encoder.weight.grad

    assert torch.equal(gradient(True), gradient(False))


def test_pos_weight():
    defect = np.array([0] * 55 + [1] * 45 + [-1] * 30)
    assert pos_weight("balanced", defect) == pytest.approx(55 / 45)
    assert pos_weight("inverse_proportion", defect) == pytest.approx(1 / 0.45)
    assert pos_weight(2.5, defect) == 2.5
    assert pos_weight("balanced", np.array([0, 0, -1])) == 1.0
    large = np.repeat([0, 1], [552_820, 487_309]).astype(np.int8)
    assert pos_weight("balanced", large) == pytest.approx(552_820 / 487_309)


def test_running_scores_survive_a_resume_in_mid_epoch():
    def scores(cut):
        running = RunningScores()
        for i in range(4):
            if i == cut:
                saved = running.gather()
                running = RunningScores()
                running.restore(*saved, is_first_rank=True)
            features, _ = batch(i)
            running.add(torch.arange(24) + 24 * i, features[..., 0])
        return running.gather()

    rows, logits = scores(cut=None)
    assert len(rows) == 4 * 24 * 2
    for cut in range(4):
        assert all(torch.equal(a, b) for a, b in zip(scores(cut), (rows, logits), strict=True))


def test_running_scores_hold_no_file_descriptor_of_a_worker():
    running, shared = RunningScores(), torch.arange(24).share_memory_()
    running.add(shared, torch.zeros(2, 24))
    assert not any(rows.is_shared() for rows in running._rows)


def test_running_scores_leave_out_what_overflowed_only_where_a_scaler_does():
    for leave_out, n in ((True, 24), (False, 48)):
        running = RunningScores(leave_out)
        running.add(torch.arange(12), torch.ones(2, 12))
        running.keep_last_if(torch.tensor(True))
        running.add(torch.arange(12), torch.zeros(2, 12))
        running.keep_last_if(torch.tensor(False))
        rows, logits = running.gather()
        assert len(rows) == n and bool(logits.isfinite().all()) is leave_out


def regression_set(seed=0, n=300, dim=12):
    g = torch.manual_seed(seed)
    x = torch.randn(n, dim, generator=g).double()
    y = (x @ torch.randn(dim, generator=g).double() + torch.randn(n, generator=g) > 0.8).double()
    return x, y


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_the_offline_fit_is_scikit_learns(l2):
    x, y = regression_set()
    ours, converged = fit_logistic(x, y, l2, pos_weight=2.0)
    assert converged
    theirs = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-10, max_iter=10000)
    theirs.fit(x.numpy(), y.numpy(), sample_weight=np.where(y == 1, 2.0, 1.0))
    np.testing.assert_allclose(ours[:-1].numpy(), theirs.coef_[0], atol=1e-4)
    assert float(ours[-1]) == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_the_offline_probe_ranks_unseen_images_and_chooses_l2_on_train_alone():
    x, y = regression_set(n=600)
    raw = x.float() * 50 + 7
    weight, fit = offline_probe(raw[:300], y[:300], 2.0, 1)
    logits = apply_probe(weight, raw[300:])
    assert ((logits > 0) == (y[300:] == 1)).double().mean() > 0.85
    assert fit["fit_rows"] == 300 and fit["fit_defects"] == int(y[:300].sum())
    # Folded or not, it is the regression on standardised features.
    mean, std = raw[:300].double().mean(dim=0), raw[:300].double().std(dim=0, correction=0)
    w, _ = fit_logistic((raw[:300].double() - mean) / std, y[:300], fit["l2"], 2.0)
    expected = (raw[300:].double() - mean) / std @ w[:-1] + w[-1]
    torch.testing.assert_close(logits, expected)
    constant = torch.cat([x[:300], torch.ones(300, 1)], dim=1)
    assert torch.isfinite(offline_probe(constant, y[:300], 1.0, 1)[0]).all()


@pytest.mark.parametrize("signal", [0.0, 0.3, 3.0])
def test_l2_is_the_one_with_the_lowest_loss_on_rows_held_out(signal):
    """Of noise alone a strong one, which on the rows of the fit itself would be the worst."""
    g = torch.manual_seed(5)
    x = torch.randn(120, 40, generator=g).double()
    y = (signal * x[:, 0] + torch.randn(120, generator=g) > 0.5).double()
    _, fit = offline_probe(x, y, 2.0, 1)
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    fold, folds = _folds(y.numpy(), 1)
    weight, losses = np.where(y == 1, 2.0, 1.0), {}
    for l2 in (10.0**e for e in range(1, -7, -1)):
        losses[l2] = 0.0
        for k in range(folds):
            kept, out = (fold != k).numpy(), (fold == k).numpy()
            theirs = LogisticRegression(C=1 / (l2 * kept.sum()), tol=1e-6, max_iter=10000)
            theirs.fit(x.numpy()[kept], y.numpy()[kept], sample_weight=weight[kept])
            of = torch.from_numpy(theirs.decision_function(x.numpy()[out])), y[out]
            losses[l2] += float(
                F.binary_cross_entropy_with_logits(*of, weight=torch.from_numpy(weight[out]))
            )
    assert fit["l2"] == min(losses, key=losses.get)
    assert folds == 5 and (signal or fit["l2"] >= 1) and (signal < 3 or fit["l2"] < 1)


def test_the_search_for_l2_ends_where_two_in_a_row_were_no_better(monkeypatch):
    biases = dict(zip(L2_GRID, [3, 2, 2.5, 1, 1.2, 1.3, 0.5, 0], strict=True))
    tried = []

    def fit(x, y, l2, *_):
        tried.append(l2)
        return torch.tensor([0.0, biases[l2]], dtype=torch.float64), True

    monkeypatch.setattr(common.offline_probe, "fit_logistic", fit)
    x, y = torch.randn(20, 1).double(), torch.tensor([0.0, 1.0] * 10).double()
    assert _choose_l2(x, y, 1.0, 0) == L2_GRID[3]
    assert list(dict.fromkeys(tried)) == list(L2_GRID[:6])


def test_folds_part_the_rows_of_each_class():
    y = np.array([1] * 7 + [0] * 23)
    fold, folds = _folds(y, 3)
    assert folds == 5 and np.bincount(fold[y == 1]).tolist() == [2, 2, 1, 1, 1]
    assert sorted(np.bincount(fold[y == 0])) == [4, 4, 5, 5, 5]
    assert not torch.equal(fold, _folds(y, 4)[0])


def test_too_few_rows_for_a_fit_are_said():
    x, _ = regression_set(n=5)
    weight, why = offline_probe(x, np.array([0, 0, 0, 0, 1]), 1.0, 0)
    assert weight is None and "1 defect" in why
    x, y = regression_set(n=4)
    assert offline_probe(x, np.array([0, 0, 1, 1]), 1.0, 0)[1]["converged"]  # two folds
