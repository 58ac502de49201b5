import numpy as np
import pytest

from common.metrics import all_scores
from common.running.errors import UserError
from common.running.keyed import BOOTSTRAP, DRAWN_SUBSET, keyed_rng
from common.study.evaluate import StoredScores, draw_subsets, interval, load_scores, resample

NAMES = ("RB", "FS", "OS")  # the last one is rare


def some(n=6000, seed=0):
    """Scores of a middling probe on n images, 40 % of them defects."""
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % 5 < 2).astype(int)
    logit = rng.normal(label * 1.2 - 0.5, 1).round(2)  # with ties
    classes = rng.random((n, 3)) < np.array([0.6, 0.4, 0.004])
    classes &= (label == 1)[:, None]
    return StoredScores(logit, label, classes, NAMES)


def intervals(*args, **options):
    """{prevalence: {score: (low, high)}}."""
    found = resample(*args, **options)
    return {p: {name: interval(drawn) for name, drawn in of.items()} for p, of in found.items()}


@pytest.mark.parametrize("prevalence", [0.02, 0.15, 0.6])
def test_the_closed_form_is_the_mean_of_drawn_subsets(prevalence):
    scores = some()
    drawn, closed = draw_subsets(scores, prevalence, draws=300), scores.at(prevalence)
    for name in ("precision", "recall", "f1", "f2", "f1_normal", "auroc"):
        values = drawn[name]
        error = values.std(ddof=1) / len(values) ** 0.5
        # A ratio of small counts is biased in the second order; recall and auroc are not.
        slack = 0 if name in ("recall", "auroc") else 0.3 * values.std()
        assert abs(values.mean() - closed[name]) < 4 * error + slack + 1e-6, name
    total = 3600 / (1 - prevalence) if prevalence < 0.4 else 2400 / prevalence
    assert drawn["n"][0] == pytest.approx(total, abs=1)


@pytest.mark.parametrize("prevalence", [0.02, 0.15, 0.4, 0.6])
def test_a_drawn_subsets_scores_are_those_of_its_rows(prevalence):
    scores = some(900)
    drawn = draw_subsets(scores, prevalence, draws=4, seed=3)
    defects, normals = np.flatnonzero(scores.label == 1), np.flatnonzero(scores.label == 0)
    n_defect = min(round(540 * prevalence / (1 - prevalence)), 360)
    n_normal = min(round(360 * (1 - prevalence) / prevalence), 540)
    for draw in range(4):
        rng = keyed_rng(DRAWN_SUBSET, 3, draw)
        rows = [rng.permutation(defects)[:n_defect], rng.permutation(normals)[:n_normal]]
        rows = np.concatenate(rows)
        expected = all_scores(scores.logit[rows], scores.label[rows], scores.classes[rows], NAMES)
        assert set(drawn) == set(expected) - {"undefined"}
        for name, values in drawn.items():
            assert values[draw] == pytest.approx(expected[name], abs=1e-12), name


@pytest.mark.parametrize("prevalence", [None, 0.05])
def test_intervals_are_percentiles_of_scores_of_rows_drawn_again_and_again(prevalence):
    scores, found = some(700), []
    rng = keyed_rng(BOOTSTRAP, 5)
    for _ in range(8):
        groups = (np.flatnonzero(scores.label == label) for label in (1, 0))
        rows = np.concatenate([of[rng.integers(0, len(of), len(of))] for of in groups])
        how = scores.classes[rows], NAMES, prevalence
        found.append(all_scores(scores.logit[rows], scores.label[rows], *how))
    for name, (low, high) in intervals(scores, [prevalence], 8, seed=5)[prevalence].items():
        expected = np.percentile([f[name] for f in found], (2.5, 97.5))
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-12), name


def test_f2_ciw_of_small_subsets_is_biased_by_rare_classes():
    """A class without an image in the subset scores 0, as the study defines it."""
    scores = some()
    closed = scores.at(0.01)["f2_ciw"]
    few, many = (draw_subsets(scores, p, draws=200)["f2_ciw"] for p in (0.01, 0.39))
    assert few.mean() < closed - 5 * few.std() / 200**0.5
    assert abs(many.mean() - closed) < 0.01


def test_intervals_cover_and_shrink_with_the_number_of_images():
    """Of 40 data sets, the 95 % interval of most contains what a very large one has."""
    truth = some(100_000, seed=99).at(0.1)
    covered = {"f1": 0, "auroc": 0, "average_precision": 0, "f2_ciw_strict": 0}
    for seed in range(40):
        found = intervals(some(1500, seed), [0.1], draws=60)[0.1]
        for name in covered:
            low, high = found[name]
            covered[name] += low <= truth[name] <= high
    assert all(31 <= n for n in covered.values()), covered  # 38 expected; by chance 34 to 40
    wide, narrow = (
        np.diff(intervals(some(n), [0.1], draws=200)[0.1]["f1"])[0] for n in (1500, 24000)
    )
    assert wide / narrow == pytest.approx(4, rel=0.35)
    scores = some()  # a known width: recall is a share of 2,400 independent images
    recall = scores.at(None)["recall"]
    expected = 2 * 1.96 * (recall * (1 - recall) / 2400) ** 0.5
    assert np.diff(intervals(scores, [None], draws=200)[None]["recall"])[0] == pytest.approx(
        expected, rel=0.15
    )


@pytest.mark.parametrize("prevalence", [None, 0.01, 0.45])
def test_intervals_are_around_the_scores(prevalence):
    scores = some()
    at, found = scores.at(prevalence), intervals(scores, [prevalence], 99)[prevalence]
    names = ("precision", "recall", "f1", "f1_normal", "f2_ciw", "f2_ciw_strict", "auroc")
    assert set(found) == {*names, "average_precision"}
    for name, (low, high) in found.items():
        assert low < at[name] < high, name
    assert found == intervals(scores, [0.3, prevalence], 99)[prevalence]  # the draws are keyed


def test_the_same_images_are_drawn_for_every_run():
    """So a run that ranks like another has no interval of their difference, and another has."""
    scores, rng = some(), np.random.default_rng(3)
    how = scores.label, scores.classes, NAMES
    alike = StoredScores(scores.logit**3 - 7, *how)
    other = StoredScores(scores.logit + rng.normal(0, 0.3, 6000), *how)
    first, same, near = (resample(s, [None], 99)[None]["auroc"] for s in (scores, alike, other))
    assert np.array_equal(first, same)
    apart = np.diff(interval(first)) + np.diff(interval(near))
    assert 0 < np.diff(interval(first - near)) < apart / 3


def test_a_draw_in_which_a_score_is_undefined_does_not_count():
    """Of one image called a defect, rightly, the precision is 1 wherever it is drawn at all."""
    label, logit = np.array([1] * 9 + [0] * 9), np.full(18, -1.0)
    logit[0] = 1
    scores = StoredScores(logit, label, np.zeros((18, 0), bool), ())
    assert intervals(scores, [None], 50)[None]["precision"] == (1, 1)


def test_without_classes_or_without_a_group_there_is_less():
    scores = some()
    plain = StoredScores(scores.logit, scores.label, np.zeros((6000, 0), bool), ())
    found = intervals(plain, [0.1], 9)[0.1]
    assert "f2_ciw" not in found and "f1" in found
    normal = scores.label == 0
    only = StoredScores(scores.logit[normal], scores.label[normal], scores.classes[normal], NAMES)
    assert intervals(only, [0.1], 9) == {0.1: {}} and only.at(0.1)["f1"] is None


def test_stored_scores_are_read_back(tmp_path):
    scores = some(50)
    label = scores.label.copy()
    label[3] = -1
    stored = {"logit": scores.logit, "logit_offline": np.full(50, np.nan), "label": label}
    np.savez(tmp_path / "val_scores.npz", **stored, classes=scores.classes, class_names=NAMES)
    back = load_scores(tmp_path)
    expected = all_scores(scores.logit, label, scores.classes, NAMES)
    assert back.at(None) == expected and len(back.label) == 49 and back.class_names == NAMES
    with pytest.raises(UserError, match="val_scores.npz: the offline probe"):
        load_scores(tmp_path, "offline")
    whole = (tmp_path / "val_scores.npz").read_bytes()
    for damaged in (
        b"",
        b"junk",
        whole[: len(whole) // 2],
        whole.replace(scores.classes.tobytes(), b""),
    ):
        (tmp_path / "val_scores.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="val_scores.npz: cannot be read"):
            load_scores(tmp_path)
