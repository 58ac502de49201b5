"""What holds for every input: subsets, batches, scores, schedules, losses, configs."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import barlow
import byol
import dino
import simclr
from common.metrics import binary_scores
from common.running.config import read_config
from common.running.errors import UserError
from common.running.folder import write_config
from common.sampler import EpochSampler, imbalanced_indices
from common.schedules import cosine, linear, warmup_cosine

often = settings(derandomize=True, deadline=None, max_examples=200, database=None)
labels = st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=300).map(np.array)
shares = st.floats(0.01, 0.9)
seeds = st.integers(0, 2**63 - 1)


@often
@given(labels, st.none() | shares, seeds, st.floats(0.1, 1), st.none() | st.integers(1, 200))
def test_a_subset_is_what_was_asked_for_or_a_sentence(defect, p, seed, fraction, size):
    try:
        rows = imbalanced_indices(defect, p, seed, fraction, size)
    except UserError as error:
        assert str(error)
        return
    assert (np.diff(rows) > 0).all() and set(rows) <= set(range(len(defect)))
    n0, n1 = (defect[rows] == 0).sum(), (defect[rows] == 1).sum()
    assert p is None or abs(n1 - p * (n0 + n1)) <= 1
    assert size is None or n0 + n1 == size
    again = imbalanced_indices(defect, p, seed, fraction, size)
    assert np.array_equal(rows, again)


@often
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 4), seeds, st.data())
def test_batches_of_ranks_and_of_a_resume_are_those_of_one(n, share, ranks, seed, data):
    batch = share * ranks
    rows = np.arange(1000, 1000 + n)
    if n < batch:
        with pytest.raises(UserError):
            EpochSampler(rows, batch, seed)
        return
    epoch = data.draw(st.integers(0, 50))

    def of(rank, world, first=0):
        sampler = EpochSampler(rows, batch, seed, rank, world)
        sampler.start(epoch, first)
        return [[row for _, row in keys] for keys in sampler]

    whole = of(0, 1)
    flat = [row for step in whole for row in step]
    assert len(set(flat)) == len(flat) == len(whole) * batch and len(whole) == n // batch
    parts = [of(rank, ranks) for rank in range(ranks)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole
    first = data.draw(st.integers(0, len(whole)))
    assert of(0, 1, first) == whole[first:]


@often
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=80), st.data())
def test_scores_are_scikit_learns_whatever_the_order_and_the_ties(pairs, data):
    logits = np.array([a for a, _ in pairs], float) / 2
    truth = np.array([b for _, b in pairs], int)
    ours = binary_scores(logits, truth)
    order = data.draw(st.permutations(range(len(pairs))))
    assert binary_scores(logits[order], truth[order]) == ours
    if len(set(truth)) < 2:
        assert ours["auroc"] is None and ours["undefined"]["auroc"]
        return
    predicted = logits >= 0
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(truth, logits), abs=1e-12)
    found = sk.average_precision_score(truth, logits)
    assert ours["average_precision"] == pytest.approx(found, abs=1e-12)
    for name, beta, positive in (("f1", 1, 1), ("f2", 2, 1), ("f1_normal", 1, 0)):
        wanted = sk.fbeta_score(truth, predicted, beta=beta, pos_label=positive, zero_division=0)
        if ours[name] is not None:
            assert ours[name] == pytest.approx(wanted, abs=1e-12)


@often
@given(st.integers(1, 500), st.integers(0, 500), *(st.floats(1e-6, 1) for _ in range(3)))
def test_rates_stay_in_range_and_meet(total, warmup, lr, start, least):
    warmup = min(warmup, total - 1)
    rates = [warmup_cosine(step, total, warmup, lr, start, least) for step in range(total)]
    low, high = min(lr, start, least), max(lr, start, least)
    assert all(low - 1e-12 <= rate <= high + 1e-12 for rate in rates)
    assert rates[warmup] == pytest.approx(lr)
    if total - warmup > 1:
        assert rates[-1] == pytest.approx(least)
    assert linear(0, 5, start, lr) == start and linear(9, 5, start, lr) == lr
    assert cosine(10**9, 7, lr, least) == pytest.approx(least)


def views(data, scale):
    rng = np.random.default_rng(data.draw(seeds))
    n, d = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 12))
    kind = data.draw(st.sampled_from(["noise", "constant", "zero"]))
    x = torch.from_numpy(rng.normal(size=(2, n, d))).float() * scale
    return x if kind == "noise" else x * 0 + (1.0 if kind == "constant" else 0.0)


LOSSES = {
    "simclr": lambda z: simclr.nt_xent_loss(z[0], z[1], 0.2),
    "byol": lambda z: byol.byol_loss(z[0], z[1], z[1] * 2, z[0] + 1),
    "barlow": lambda z: barlow.barlow_twins_loss(z[0], z[1], 0.005, 0.024),
    "dino": lambda z: dino.dino_loss(z, z.flip(0) / 2, torch.zeros(z.shape[-1]), 0.1, 0.04),
}


@pytest.mark.parametrize("method", LOSSES)
@often
@given(data=st.data(), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_losses_are_finite_and_blind_to_the_order_of_the_batch(method, data, scale):
    z = views(data, scale)
    loss = LOSSES[method](z)
    assert torch.isfinite(torch.as_tensor(loss).sum())
    order = torch.from_numpy(np.random.default_rng(0).permutation(z.shape[1]))
    if scale == 1.0:  # in float32 sums of other orders differ with their size
        mixed = LOSSES[method](z[:, order])
        torch.testing.assert_close(
            torch.as_tensor(mixed).sum(), torch.as_tensor(loss).sum(), rtol=1e-3, atol=1e-4
        )


texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1
)
values = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | texts
values |= st.floats(allow_nan=False, allow_infinity=False)


@often
@given(st.sampled_from(["optimization.lr", "data.image_root", "run.name", "seed", "x.y"]), values)
def test_any_value_of_a_key_is_taken_or_refused_and_comes_back(tmp_path_factory, key, value):
    config = ROOT / "configs/simclr_r18.yaml"
    text = yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()
    try:
        cfg = read_config(simclr.Config, config, [f"{key}={text}"])
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
        return
    folder = tmp_path_factory.mktemp("c")
    write_config(folder, dataclasses.asdict(cfg))
    assert read_config(simclr.Config, folder / "config.yaml") == cfg


@often
@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=4, max_size=60), shares)
def test_a_prevalence_moves_precision_as_bayes_says(pairs, p):
    logits, truth = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs], int)
    ours = binary_scores(logits, truth, p)
    if ours["precision"] is None or len(set(truth)) < 2:
        return
    recall = (logits[truth == 1] >= 0).mean()
    alarms = (logits[truth == 0] >= 0).mean()
    flagged = p * recall + (1 - p) * alarms
    if flagged:
        assert ours["precision"] == pytest.approx(p * recall / flagged, abs=1e-9)
    assert ours["recall"] == pytest.approx(recall, abs=1e-12)
