import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from common.annotations import CLASS_IMPORTANCE, read_annotations
from common.metrics import all_scores, at_prevalence, binary_scores, f2_ciw, f2_ciw_strict
from common.running.errors import UserError

NAMES = tuple(CLASS_IMPORTANCE)


def cases():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(5, 400))
        labels = (rng.random(n) < rng.uniform(0.1, 0.9)).astype(int)
        labels[:2] = 0, 1
        logits = rng.normal(size=n) + labels * rng.uniform(0, 2)
        if seed % 3 == 0:
            logits = np.round(logits)  # ties
        logits[:2] = 1.0, 2.0  # something is called a defect
        yield logits, labels


def sklearn_scores(logits, labels, weight=None):
    predicted = logits >= 0
    how = {"sample_weight": weight, "zero_division": 0}
    return {
        "precision": sk.precision_score(labels, predicted, **how),
        "recall": sk.recall_score(labels, predicted, **how),
        "f1": sk.f1_score(labels, predicted, **how),
        "f2": sk.fbeta_score(labels, predicted, beta=2, **how),
        "f1_normal": sk.f1_score(labels, predicted, pos_label=0, **how),
        "auroc": sk.roc_auc_score(labels, logits, sample_weight=weight),
        "average_precision": sk.average_precision_score(labels, logits, sample_weight=weight),
    }


@pytest.mark.parametrize("prevalence", [None, 0.01, 0.15, 0.45, 0.9])
def test_scores_are_scikit_learns_at_any_prevalence(prevalence):
    for logits, labels in cases():
        weight = None
        if prevalence is not None:
            n1, n0 = labels.sum(), (1 - labels).sum()
            weight = np.where(labels == 1, prevalence / n1, (1 - prevalence) / n0)
        ours = binary_scores(logits, labels, prevalence)
        for name, value in sklearn_scores(logits, labels, weight).items():
            assert ours[name] == pytest.approx(value, abs=1e-9), name
        p, r, _ = sk.precision_recall_curve(labels, logits, sample_weight=weight)
        best = (2 * p * r / np.maximum(p + r, 1e-12)).max()
        assert ours["f1_best"] == pytest.approx(best)
        at_best = sk.f1_score(labels, logits >= ours["threshold"], sample_weight=weight)
        assert at_best == pytest.approx(best)
        assert ours["n"] == len(labels) and ours["n_defect"] == labels.sum()
        assert ours["undefined"] == {}


def test_unlabelled_rows_change_nothing_and_tensors_will_do():
    logits, labels = next(cases())
    more_logits = np.concatenate([[9.0, -9.0], logits])
    more_labels = np.concatenate([[-1, -1], labels])
    expected = binary_scores(logits, labels)
    assert binary_scores(more_logits, more_labels) == expected
    assert binary_scores(torch.tensor(more_logits), torch.tensor(more_labels)) == expected


def test_order_does_not_matter():
    for logits, labels in cases():
        order = np.random.default_rng(0).permutation(len(labels))
        assert binary_scores(logits[order], labels[order]) == binary_scores(logits, labels)


def test_what_the_data_cannot_give_is_none_with_a_reason():
    no_defects = binary_scores([1.0, -1.0], [0, 0])
    for name in ("recall", "f1", "auroc", "average_precision", "threshold"):
        assert no_defects[name] is None and no_defects["undefined"][name] == "0 defects"
    assert no_defects["f1_normal"] == pytest.approx(2 / 3)
    no_normals = binary_scores([1.0, -1.0], [1, 1])
    assert no_normals["auroc"] is None and no_normals["undefined"]["auroc"] == "0 normals"
    assert no_normals["f1"] == pytest.approx(2 / 3) and no_normals["f1_normal"] is None
    assert binary_scores([1.0], [1], prevalence=0.5)["f1"] is None
    nothing_called = binary_scores([-1.0, -2.0], [1, 0])
    assert nothing_called["precision"] is None and nothing_called["f1"] == 0.0
    assert nothing_called["undefined"] == {"precision": "nothing called a defect"}
    assert binary_scores([], [])["auroc"] is None


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="1 logits are not finite"):
        binary_scores([1.0, float("nan")], [0, 1])
    binary_scores([1.0, float("nan"), 0.0], [0, -1, 1])
    with pytest.raises(ValueError, match="labels"):
        binary_scores([1.0], [2])


def test_counts_do_not_overflow():
    labels = np.repeat([0, 1], [552_820, 487_309])
    scores = binary_scores(np.where(labels == 1, 1.0, -1.0), labels.astype(np.int8))
    assert scores["auroc"] == 1.0 and scores["f1"] == 1.0 and scores["n_defect"] == 487_309


def check_case():
    classes = np.zeros((4, 17), bool)
    for image, codes in enumerate((("RB", "FS"), ("FS",), ("OS",))):
        for code in codes:
            classes[image, NAMES.index(code)] = True
    return np.array([1, 0, 1, 1]), classes


def test_the_known_value_of_both_weighted_scores():
    predicted, classes = check_case()
    assert f2_ciw(predicted, classes, NAMES) == pytest.approx(0.3368, abs=5e-5)
    assert f2_ciw_strict(predicted, classes, NAMES) == pytest.approx(0.2842, abs=5e-5)
    labels = np.array([1, 1, 1, 0])
    scores = all_scores(predicted - 0.5, labels, classes, NAMES)
    assert scores["f2_ciw"] == pytest.approx(0.3368, abs=5e-5)
    assert scores["f2_ciw_strict"] == pytest.approx(0.2842, abs=5e-5)


def test_calling_everything_a_defect_fools_only_the_lenient_one():
    rng = np.random.default_rng(0)
    classes = np.concatenate([np.eye(17, dtype=bool), np.zeros((100, 17), bool)])
    classes[:17] |= rng.random((17, 17)) < 0.1
    everything = np.ones(117, int)
    assert f2_ciw(everything, classes, NAMES) == pytest.approx(1.0)
    assert f2_ciw_strict(everything, classes, NAMES) < 0.3


def slow_weighted(predicted, labels, classes, names, strict, w_defect=1.0, w_normal=1.0):
    """Both scores by loops over classes and images."""
    total = weights = 0.0
    for c, name in enumerate(names):
        tp = fn = fp = 0.0
        for p, y, row in zip(predicted, labels, classes, strict=True):
            if y == 1 and row[c]:
                tp, fn = tp + w_defect * p, fn + w_defect * (1 - p)
            if y == 0 and strict:
                fp += w_normal * p
        f2 = 5 * tp / (5 * tp + 4 * fn + fp) if tp else 0.0
        total += CLASS_IMPORTANCE.get(name, 1.0) * f2
        weights += CLASS_IMPORTANCE.get(name, 1.0)
    return total / weights


def test_weighted_scores_on_real_label_rows(sewer_ml):
    a = read_annotations(sewer_ml / "annotations/SewerML_Val_sub_0.0625.csv")
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(a))[:700]
    labels, classes = a.defect[rows], a.classes[rows]
    logits = rng.normal(size=700) + labels
    predicted = (logits >= 0).astype(int)
    scores = all_scores(logits, labels, classes, a.class_names)
    slow = [slow_weighted(predicted, labels, classes, a.class_names, s) for s in (False, True)]
    assert [scores["f2_ciw"], scores["f2_ciw_strict"]] == pytest.approx(slow)
    recall = sk.recall_score(
        classes[labels == 1],
        np.repeat(predicted[labels == 1, None], classes.shape[1], axis=1),
        average=None,
        zero_division=0,
    )
    weights = np.array([CLASS_IMPORTANCE[n] for n in a.class_names])
    assert scores["f2_ciw"] == pytest.approx((weights * 5 * recall / (4 + recall)).sum() / 6.7024)
    binary = sklearn_scores(logits, labels)
    assert [scores[k] for k in binary] == pytest.approx(list(binary.values()))


def test_strict_at_another_prevalence_is_that_of_weighted_images():
    rng = np.random.default_rng(1)
    classes = rng.random((300, 4)) < 0.3
    classes[:120] = False
    labels = classes.any(axis=1).astype(int)
    logits = rng.normal(size=300) + labels
    w_defect, w_normal = 0.05 / labels.sum(), 0.95 / (1 - labels).sum()
    names = ("RB", "FS", "mine", "OB")
    at = at_prevalence(logits, labels, 0.05, classes, names)
    slow = slow_weighted(logits >= 0, labels, classes, names, True, w_defect, w_normal)
    assert at["f2_ciw_strict"] == pytest.approx(slow)
    assert at["f2_ciw"] == all_scores(logits, labels, classes, names)["f2_ciw"]
    assert at["auroc"] == binary_scores(logits, labels)["auroc"]


def test_the_own_prevalence_changes_nothing():
    logits, labels = next(cases())
    same, plain = at_prevalence(logits, labels, labels.mean()), binary_scores(logits, labels)
    for name in ("precision", "f1", "f2", "f1_normal", "average_precision", "auroc", "f1_best"):
        assert same[name] == pytest.approx(plain[name])


def test_without_class_columns_or_defects_the_weighted_scores_are_none():
    scores = all_scores([1.0, -1.0], [1, 0], np.zeros((2, 0)), ())
    assert scores["f2_ciw"] is None and scores["undefined"]["f2_ciw"] == "no class columns"
    scores = all_scores([1.0, -1.0], [0, 0], np.zeros((2, 1)), ("RB",))
    assert scores["f2_ciw_strict"] is None and scores["undefined"]["f2_ciw_strict"] == "0 defects"


def test_a_class_outside_the_17_weighs_one():
    classes = np.array([[1, 0], [0, 1], [0, 1]])
    value = f2_ciw([1, 0, 0], classes, ("mine", "GR"))
    assert value == pytest.approx(1.0 / (1.0 + 0.0901))
