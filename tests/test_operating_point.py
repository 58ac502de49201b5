"""Probabilities and thresholds from a validation set, and what they promise."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from common.inspection.operating_point import Calibration, Expected, Held, held_out_rank
from common.running.errors import UserError


def drawn(n=4000, share=0.3, seed=0):
    """Scores and labels whose log odds are 2 s - 1."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < share).astype(int)
    scores = rng.normal(0.5 * labels + 0.25 * (1 - labels), 0.5)
    return scores.astype(np.float32), labels


def test_platt_is_a_regression_with_soft_targets():
    scores, labels = drawn(300)
    found = Calibration.fit(scores, labels)
    n1 = labels.sum()
    targets = np.where(labels == 1, (n1 + 1) / (n1 + 2), 1 / (300 - n1 + 2))
    x, y = np.tile(scores, 2)[:, None].astype(float), np.repeat((1, 0), 300)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    theirs.fit(x, y, sample_weight=np.concatenate([targets, 1 - targets]))
    assert found.slope == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert found.intercept == pytest.approx(theirs.intercept_[0], rel=1e-4)
    odds = found.probability(scores, labels.mean())
    np.testing.assert_allclose(odds, theirs.predict_proba(scores[:, None])[:, 1], rtol=1e-3)


def test_unweighted_fit_takes_a_pos_weight_back():
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 2, 40_000)
    labels = (rng.random(40_000) < p).astype(int)
    weighted = np.log(p / (1 - p)) + np.log((labels == 0).sum() / labels.sum())
    found = Calibration.fit(weighted, labels)
    assert np.abs(found.probability(weighted, labels.mean()) - p).mean() < 0.01


def test_prior_shift():
    half = Calibration(1.0, 0.0, 0.254)
    assert half.probability(0.0, 0.254) == pytest.approx(0.5)
    assert half.probability(0.0, 0.02) == pytest.approx(0.057, abs=5e-4)
    for p in (0.01, 0.5, 0.99):
        assert half.probability(half.score(p, 0.02), 0.02) == pytest.approx(p)
    scores = np.linspace(-9, 9, 50)
    assert (np.diff(half.probability(scores, 0.001)) > 0).all()
    assert half.probability(1e6, 0.5) == 1 and half.probability(-1e6, 0.5) < 1e-300


def test_separated_scores_stay_finite():
    found = Calibration.fit([-5.0, -4.0, 4.0, 5.0], [0, 0, 1, 1])
    assert np.isfinite(found.slope) and found.probability(5.0, 0.5) < 0.99


@pytest.mark.parametrize(
    "n, share, expected",
    [
        (1000, 0.01, (5, True)),
        (299, 0.01, (1, True)),
        (298, 0.01, (2, False)),
        (99, 0.01, (1, False)),
        (59, 0.05, (1, True)),
        (58, 0.05, (2, False)),
    ],
)
def test_rank_of_held_out_scores(n, share, expected):
    k, sure = held_out_rank(n, share)
    assert (k, sure) == expected
    if sure:  # the share beyond the k-th is Beta(k, n - k + 1), by an independent form
        assert stats.beta.cdf(share, k, n - k + 1) >= 0.95 > stats.beta.cdf(share, k + 1, n - k)
    else:
        assert k / (n + 1) <= share < (k + 1) / (n + 1)


def test_too_few_held_out_scores():
    with pytest.raises(ValueError, match="99"):
        held_out_rank(98, 0.01)
    with pytest.raises(UserError, match="needs 99 labelled normals in validation, which has 20"):
        Held(np.arange(20.0), np.zeros(20)).at_false_alarms(0.01)
    with pytest.raises(UserError, match="needs 19 labelled defects in validation, which has 0"):
        Held(np.arange(20.0), np.zeros(20)).at_recall(0.95)


def test_promised_shares_hold_on_new_images():
    kept, rng = {"recall": 0, "false alarms": 0}, np.random.default_rng(1)
    for _ in range(400):
        held = Held(rng.normal(np.repeat((0, 1), 400)), np.repeat((0, 1), 400))
        at = held.at_false_alarms(0.02).threshold
        kept["false alarms"] += stats.norm.sf(at) <= 0.02
        kept["recall"] += stats.norm.sf(held.at_recall(0.95).threshold, loc=1) >= 0.95
    assert all(0.93 <= times / 400 <= 1 for times in kept.values())


def test_a_rank_is_not_flagged_itself_but_what_is_above():
    scores, labels = np.arange(2000.0), np.repeat((0, 1), (1000, 1000))
    held = Held(scores, labels)
    alarms = held.at_false_alarms(0.01)
    assert (held.normals >= alarms.threshold).sum() == 4 and "95 %" in alarms.how
    recall = held.at_recall(0.99)
    assert (held.defects < recall.threshold).sum() == 4
    few = Held(scores[:200], labels[:200]).at_false_alarms(0.01)
    assert "on average (for 95 % confidence: 299)" in few.how and few.recall is None
    assert few.outlook(0.02, 50) == dict.fromkeys(("recall", "false_alarms", "precision", "images"))


def test_outlook():
    at = Held(np.repeat((0.0, 1, 0, 1), (990, 10, 10, 90)), np.repeat((0, 1), (1000, 100)))
    found = at.at(0.5, "").outlook(0.02, 10_000)
    assert found["recall"][0] == 0.9 and found["false_alarms"][0] == 0.01
    assert found["precision"] == pytest.approx((0.647, 0.497, 0.773), abs=0.02)
    value, low, high = found["images"]
    assert value == pytest.approx(10_000 * (0.02 * 0.9 + 0.98 * 0.01))
    assert low < value < high and high - low > 2 * 1.96 * np.sqrt(value) * 0.9
    none = Expected(0.0, (0.5, 10.5, 0.0), (0.5, 10.5, 0.0), "").outlook(0.02, 100)
    assert none["precision"][0] == 0 and none["images"][0] == 0
    assert at.at(0.5, "").outlook(0.02, 10_000) == found


def test_no_probability_without_both_or_upside_down():
    for scores, labels, why in (
        ([1.0, 2, 3], [0, 0, -1], "2 normal and 0 defect"),
        ([1.0, 2, 3, 4], [1, 1, 0, 0], "do not score higher"),
    ):
        found, told = Held(scores, labels).calibration()
        assert found is None and why in told


def test_curve():
    scores, labels = drawn(3000)
    held = Held(scores, labels)
    curve = np.array(held.curve())
    assert 300 < len(curve) <= 400 and (np.diff(curve[:, 0]) < 0).all()
    assert (curve[:20, 0] == np.sort(np.unique(scores))[::-1][:20]).all()  # all of the highest
    assert Held([], []).curve(1.0) == [] == Held([1.0], [-1]).curve()
    assert 0.123 in [row[0] for row in held.curve(0.123)]
    for t, recall, alarms in curve[::37]:
        assert recall == pytest.approx((scores[labels == 1] >= t).mean())
        assert alarms == pytest.approx((scores[labels == 0] >= t).mean())
    assert curve[-1, 1] == curve[-1, 2] == 1
    assert Held([1.0, 2], [0, 0]).curve() == [[2.0, None, 0.5], [1.0, None, 1.0]]
