import numpy as np
import pytest
from small import METHODS, run

from common.annotations import Annotations
from common.running.checkpoint import read_checkpoint
from common.running.errors import UserError
from common.running.folder import read_json
from common.running.keyed import FIT_SAMPLE
from common.sampler import EpochSampler, imbalanced_indices, keep_labels, stratified_sample

pytestmark = pytest.mark.usefixtures("narrow")


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


def test_a_stratified_sample_is_of_labelled_rows():
    defect = np.repeat([0, 1, -1], [900, 100, 500])
    rows = stratified_sample(defect, 200, 0, FIT_SAMPLE)
    assert (defect[rows] == 0).sum() == 180 and (defect[rows] == 1).sum() == 20
    assert len(stratified_sample(defect, 10**6, 0, FIT_SAMPLE)) == 1000
    assert len(stratified_sample(np.repeat([0, 1], [501, 500]), 400, 0, FIT_SAMPLE)) == 400
    assert len(stratified_sample(np.full(5, -1), 400, 0, FIT_SAMPLE)) == 0


def table(defect):
    n = len(defect)
    classes = (defect == 1)[:, None] & np.array([True, False])
    names = np.array([b"%d.png" % i for i in range(n)])
    return Annotations(
        "x.csv", names, defect.astype(np.int8), classes, ("a", "b"), np.arange(n), ()
    )


def test_a_budget_of_labels_is_stratified_and_nested():
    train, rows = table(labels(700, 300, 50)), np.arange(0, 1050, 2)
    known, before = (train.defect[rows] >= 0).sum(), set()
    for budget in (1, 2, 3, 10, 11, 100, known):
        found = keep_labels(train, rows, budget, seed=3)
        kept = np.flatnonzero(found.defect >= 0)
        assert len(kept) == budget and before <= set(kept) <= set(rows)
        assert (found.defect[kept] == train.defect[kept]).all()
        assert (found.defect == 1).sum() == max(
            round(budget * (train.defect[rows] == 1).sum() / known), 1
        )
        assert (found.classes == (train.classes & (found.defect >= 0)[:, None])).all()
        before = set(kept)
    assert keep_labels(train, rows, None, 3) is train
    assert set(kept) == set(np.flatnonzero(keep_labels(train, rows, known, 9).defect >= 0))
    other = np.flatnonzero(keep_labels(train, rows, 100, 4).defect >= 0)
    assert set(other) != set(np.flatnonzero(keep_labels(train, rows, 100, 3).defect >= 0))
    with pytest.raises(UserError, match=f"data.labels: {known + 1} asked for, but {known} of"):
        keep_labels(train, rows, known + 1, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_only_the_labels_of_its_budget(method, tiny_set, tmp_path):
    quick = ["optimization.epochs=1", "optimization.batch_size=8"]
    folders = [
        run(method, tmp_path, tiny_set, f"labels{budget}", *quick, f"data.labels={budget}")
        for budget in ("null", 24)
    ]
    results = [read_json(folder / "result.json") for folder in folders]
    offline = results[1]["val_offline"], results[1]["val_offline_fixed"]
    assert [scores["fit_rows"] for scores in offline] == [24, 24]
    assert results[1]["val_normal_only"]["reference"] == 24 - offline[0]["fit_defects"]
    rows = results[1]["train_rows"]
    if method == "supervised":  # the others have nothing to teach
        assert rows == {"normal": 18, "defect": 6, "unlabelled": 0}
        assert results[0]["train_rows"]["unlabelled"] == 0
        with pytest.raises(SystemExit) as stop:
            run(method, tmp_path, tiny_set, "few", "data.labels=7", *quick)
        assert stop.value.code == 2
        return
    assert rows == {"normal": 18, "defect": 6, "unlabelled": 49 + 8 - 24}
    models = [read_checkpoint(folder / "last.pt")["model"] for folder in folders]
    assert all(np.array_equal(models[0][k], v) for k, v in models[1].items()), (
        "labels are no matter"
    )
