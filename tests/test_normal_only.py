"""Scores that need normals only, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from common.annotations import NORMAL
from common.normal_only import (
    MOST_NORMALS,
    NAMES,
    NormalReference,
    ledoit_wolf,
    normal_only_scores,
    reference_rows,
)
from common.running.errors import UserError


def correlated(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(dim, dim))
    return (rng.normal(size=(n, dim)) @ mix + 3).astype(np.float32)


def names(n):
    return np.array([f"{i}.png".encode() for i in range(n)])


@pytest.mark.parametrize("n, dim", [(200, 8), (40, 8), (20, 50)])
def test_both_scores_are_scikit_learns(n, dim):
    normal, new = correlated(n, dim), correlated(33, dim, seed=1)
    scores = NormalReference(normal, names(n)).scores(torch.from_numpy(new))
    near = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(normal)
    np.testing.assert_allclose(scores["knn"], near.kneighbors(new)[0].mean(axis=1), atol=2e-6)
    theirs = LedoitWolf().fit(normal.astype(np.float64)).mahalanobis(new.astype(np.float64))
    np.testing.assert_allclose(scores["mahalanobis"], np.sqrt(theirs), rtol=1e-5)


@pytest.mark.parametrize("n, dim", [(200, 8), (20, 50), (7, 300)])
def test_shrinkage_is_scikit_learns(n, dim):
    x = torch.from_numpy(correlated(n, dim)).double()
    covariance, share = ledoit_wolf(x - x.mean(dim=0))
    theirs = LedoitWolf().fit(x.numpy())
    np.testing.assert_allclose(covariance, theirs.covariance_, rtol=1e-9, atol=1e-9)
    assert share == pytest.approx(theirs.shrinkage_, rel=1e-9) and 0 < share < 1


def test_an_image_is_no_neighbour_of_its_own():
    normal = correlated(50, 8)
    reference = NormalReference(normal, names(50))
    x = torch.from_numpy(normal)
    left_out = reference.scores(x, np.arange(50))["knn"]
    near = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(normal)
    np.testing.assert_allclose(left_out, near.kneighbors(normal)[0][:, 1:].mean(axis=1), atol=2e-6)
    assert (reference.scores(x)["knn"] < left_out).all()
    some = reference.scores(x, np.where(np.arange(50) == 7, 7, -1))["knn"]
    assert some[7] == left_out[7] and some[8] < left_out[8]


def test_blocks_do_not_matter(monkeypatch):
    reference, new = NormalReference(correlated(60, 8), names(60)), torch.randn(25, 8)
    whole = reference.scores(new, np.arange(25))
    monkeypatch.setattr("common.normal_only.AT_ONCE", 4)
    for name, values in reference.scores(new, np.arange(25)).items():
        np.testing.assert_allclose(values, whole[name], atol=1e-6)
    assert reference.scores(new[:0]).keys() == set(NAMES)


def test_what_cannot_be_compared_says_why():
    for features in (correlated(5, 8), np.zeros((0, 8)), np.ones((20, 8))):
        reference = NormalReference(features, names(len(features)))
        scores = reference.scores(torch.randn(4, 8))
        assert reference.why and all(np.isnan(scores[name]).all() for name in NAMES)
        found = normal_only_scores(reference, scores, np.array([0, 1, 0, 1]), (0.1,))
        for name in NAMES:
            for at in (found[name], found[name]["at"]["0.1"]):
                assert at["auroc"] is None and at["undefined"]["auroc"] == reference.why
                assert (at["n"], at["n_defect"]) == (4, 2)


def test_reference_is_of_labelled_normals_and_the_same_again():
    defect = np.random.default_rng(0).integers(-1, 2, 30_000)
    rows = np.arange(0, 30_000, 2)
    chosen = reference_rows(defect, rows, 3)
    assert (defect[chosen] == NORMAL).all() and np.isin(chosen, rows).all()
    assert len(chosen) == (defect[rows] == NORMAL).sum() < MOST_NORMALS
    defect[:] = NORMAL
    chosen = reference_rows(defect, np.random.default_rng(1).permutation(rows), 3)
    assert len(chosen) == MOST_NORMALS and (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, reference_rows(defect, rows, 3))
    assert (chosen != reference_rows(defect, rows, 4)).any()


def test_kept_reference_gives_the_same_scores(tmp_path):
    reference, new = NormalReference(correlated(60, 8), names(60)), torch.randn(9, 8)
    reference.save(tmp_path / "kept.npz")
    again = NormalReference.load(tmp_path / "kept.npz")
    for name, values in reference.scores(new).items():
        np.testing.assert_array_equal(values, again.scores(new)[name])
    np.testing.assert_array_equal(again.filename, names(60))
    (tmp_path / "kept.npz").write_bytes(b"PK")
    for path in ("kept.npz", "none.npz"):
        with pytest.raises(UserError, match=path):
            NormalReference.load(tmp_path / path)


def test_scores_at_a_prevalence():
    rng, labels = np.random.default_rng(0), np.repeat((0, 1), (400, 100))
    reference = NormalReference(correlated(60, 8), names(60))
    values = {name: rng.normal(labels).astype(np.float32) for name in NAMES}
    found = normal_only_scores(reference, values, labels, (0.02, 0.2))
    for name in NAMES:
        at = found[name]["at"]
        assert at["0.02"]["auroc"] == pytest.approx(found[name]["auroc"])
        assert at["0.02"]["average_precision"] < at["0.2"]["average_precision"]
        assert at["0.2"]["average_precision"] == pytest.approx(found[name]["average_precision"])
        assert "undefined" in at["0.2"] and not found[name]["undefined"]
