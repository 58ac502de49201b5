import numpy as np
import pytest

from common.running.errors import UserError
from common.sampler import EpochSampler, imbalanced_indices


def labels(n_normal, n_defect, n_unlabelled=0):
    values = [0] * n_normal + [1] * n_defect + [-1] * n_unlabelled
    return np.random.default_rng(9).permutation(values)


@pytest.mark.parametrize("p", [0.01, 0.02, 0.05, 0.15, 0.45])
def test_all_normals_stay_and_the_proportion_is_exact(p):
    defect = labels(5528, 4873)
    rows = imbalanced_indices(defect, p, seed=42)
    n0, n1 = (defect[rows] == 0).sum(), (defect[rows] == 1).sum()
    assert n0 == 5528 and n1 == round(5528 * p / (1 - p))
    assert len(np.unique(rows)) == len(rows) and (np.diff(rows) > 0).all()


def test_too_few_defects_are_all_kept_and_normals_dropped():
    defect = labels(952, 274)
    rows = imbalanced_indices(defect, 0.45, seed=1)
    n0, n1 = (defect[rows] == 0).sum(), (defect[rows] == 1).sum()
    assert n1 == 274 and n0 == round(274 * 0.55 / 0.45)


def test_subsets_are_nested_and_follow_the_seed():
    defect = labels(3000, 2500)
    chosen = [set(imbalanced_indices(defect, p, seed=3)) for p in (0.01, 0.02, 0.05, 0.15, 0.45)]
    for small, large in zip(chosen, chosen[1:], strict=False):
        assert small < large
    again = set(imbalanced_indices(defect, 0.05, seed=3))
    other = set(imbalanced_indices(defect, 0.05, seed=4))
    assert again == chosen[2] != other


def test_fixed_size_keeps_the_proportion_and_the_nesting():
    defect = labels(3000, 2500)
    small = imbalanced_indices(defect, 0.05, seed=3, subset_size=1000)
    large = imbalanced_indices(defect, 0.15, seed=3, subset_size=1000)
    assert len(small) == len(large) == 1000
    assert (defect[small] == 1).sum() == 50 and (defect[large] == 1).sum() == 150
    assert set(small[defect[small] == 1]) < set(large[defect[large] == 1])
    as_they_are = imbalanced_indices(defect, None, seed=3, subset_size=1100)
    assert (defect[as_they_are] == 1).sum() == 500


def test_unlabelled_rows_are_added_and_not_counted():
    defect = labels(300, 200, 400)
    rows = imbalanced_indices(defect, 0.1, seed=0)
    assert (defect[rows] == -1).sum() == 400
    assert (defect[rows] == 0).sum() == 300 and (defect[rows] == 1).sum() == 33


def test_fraction_is_stratified_and_comes_first():
    defect = labels(1000, 900, 100)
    rows = imbalanced_indices(defect, None, seed=0, fraction=0.5)
    assert [(defect[rows] == g).sum() for g in (0, 1, -1)] == [500, 450, 50]
    fewer = imbalanced_indices(defect, 0.05, seed=0, fraction=0.5)
    assert set(fewer) < set(rows) and (defect[fewer] == 0).sum() == 500


def test_none_takes_everything():
    defect = labels(10, 20, 5)
    assert imbalanced_indices(defect, None, seed=0).tolist() == list(range(35))


@pytest.mark.parametrize(
    ("counts", "how", "words"),
    [
        ((100, 0), {"proportion": 0.1}, ["100 normal and 0 defect"]),
        ((0, 100), {"proportion": 0.1}, ["0 normal and 100 defect"]),
        ((10, 10), {"proportion": 0.01}, ["0 defect", "10 normal and 10 defect"]),
        ((10, 10), {"proportion": 15}, ["15", "0 to 1"]),
        ((10, 10), {"proportion": 0.0}, ["0 to 1"]),
        ((100, 50), {"proportion": 0.1, "subset_size": 200}, ["subset_size", "200", "at most 111"]),
        ((100, 50), {"proportion": 0.01, "subset_size": 10}, ["subset_size", "0 defect"]),
    ],
)
def test_an_impossible_request_says_what_there_is(counts, how, words):
    with pytest.raises(UserError) as error:
        imbalanced_indices(labels(*counts), seed=0, **how)
    assert all(word in str(error.value) for word in words), str(error.value)


def epoch_of(sampler, epoch, first_step=0):
    sampler.start(epoch, first_step)
    return list(sampler)


def test_ranks_split_each_batch_and_no_row_is_twice_in_an_epoch():
    rows = np.arange(100, 203)
    (whole,) = [epoch_of(EpochSampler(rows, 12, 7), 3)]
    ranks = [epoch_of(EpochSampler(rows, 12, 7, r, 3), 3) for r in range(3)]
    assert len(whole) == 103 // 12
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole
    seen = [row for batch in whole for _, row in batch]
    assert len(set(seen)) == len(seen) == 96 and set(seen) <= set(rows)
    assert all(epoch == 3 for batch in whole for epoch, _ in batch)


def test_an_epoch_goes_on_from_any_step():
    sampler = EpochSampler(np.arange(50), 8, seed=1)
    whole = epoch_of(sampler, 2)
    for first in range(len(whole) + 1):
        assert epoch_of(sampler, 2, first) == whole[first:]
        assert len(sampler) == len(whole) - first


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return epoch_of(EpochSampler(np.arange(50), 10, seed), epoch)

    def rows(batches):
        return [row for batch in batches for _, row in batch]

    assert rows(order(1, 0)) != rows(order(1, 1)) and rows(order(1, 0)) != rows(order(2, 0))
    assert order(1, 0) == order(1, 0)


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match="3 ranks"):
        EpochSampler(np.arange(50), 8, 0, 0, 3)
    with pytest.raises(UserError, match="more than the 5"):
        EpochSampler(np.arange(5), 8, 0)


@pytest.mark.parametrize("first_step", [0, 2])
def test_one_iteration_may_serve_several_epochs(first_step):
    sampler, alone = (
        EpochSampler(np.arange(22), 4, 9, 1, 2),
        EpochSampler(np.arange(22), 4, 9, 1, 2),
    )
    sampler.start(3, first_step, end=6)
    expected = []
    for epoch in (3, 4, 5):
        alone.start(epoch, first_step if epoch == 3 else 0)
        expected += list(alone)
    assert list(sampler) == expected and len(sampler) == len(expected) == 15 - first_step
