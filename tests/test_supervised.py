import pytest
import torch
from conftest import on_ranks, write_set
from small import read_log, run

from common.running.checkpoint import read_checkpoint
from supervised import supervised_loss

pytestmark = pytest.mark.usefixtures("narrow")

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, -0.5, 4.0]).double()
LABELS = torch.tensor([1, 0, 1, -1, 0, -1], dtype=torch.int8)


def slow_loss(logits, labels, pos_weight):
    """Binary cross-entropy written out, over labelled images only."""
    total, n = 0.0, 0
    for x, y in zip(logits, labels.tolist(), strict=True):
        if y >= 0:
            p = 1 / (1 + torch.exp(-x))
            total = total - (pos_weight * torch.log(p) if y else torch.log(1 - p))
            n += 1
    return total / n


def test_loss_and_gradient_are_the_formula():
    found = []
    for loss in (supervised_loss, slow_loss):
        logits = LOGITS.clone().requires_grad_()
        value = loss(logits, LABELS, 2.5)
        value.backward()
        found.append((value.detach(), logits.grad))
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours, slow)


def test_is_the_librarys_where_all_are_labelled():
    labels = LABELS.clamp_min(0)
    library = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.5))
    torch.testing.assert_close(
        supervised_loss(LOGITS, labels, 2.5), library(LOGITS, labels.double())
    )


def test_without_a_label_there_is_no_loss_and_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    loss = supervised_loss(logits, torch.full((6,), -1), 2.5)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(6).double())


@pytest.mark.parametrize("scale", [1, 65536])
def test_a_batch_without_labels_is_harmless_under_a_gradient_scaler(scale):
    logits = LOGITS.float().requires_grad_()
    (supervised_loss(logits, torch.full((6,), -1), 2.5) * scale).backward()
    assert torch.equal(logits.grad, torch.zeros(6))


def test_without_any_label_there_is_nothing_to_learn(tmp_path, capsys):
    unknown = [*write_set(tmp_path / "set", unlabelled=64), "data.train_defect_proportion=null"]
    with pytest.raises(SystemExit) as stop:
        run("supervised", tmp_path, unknown, "blind", "data.train_defect_proportion=null")
    assert stop.value.code == 2 and "0 normal and 0 defect images" in capsys.readouterr().err


def loss_of_a_share():
    rank = torch.distributed.get_rank()  # three labelled images here, one there
    return [supervised_loss(LOGITS[3 * rank : 3 * rank + 3], LABELS[3 * rank : 3 * rank + 3], 2.5)]


def test_ranks_with_unequal_numbers_of_labels_count_by_image(tmp_path):
    first, second = on_ranks(2, tmp_path / "r", loss_of_a_share)
    whole = supervised_loss(LOGITS, LABELS, 2.5)
    torch.testing.assert_close((first[0] + second[0]) / 2, whole)
    assert first[0] != pytest.approx(float(whole), rel=0.01)


def test_its_probe_is_its_head(tmp_path, tiny_set):
    folder = run("supervised", tmp_path, tiny_set, "head")
    saved = read_checkpoint(folder / "last.pt")
    head = [saved["model"]["head.weight"][0], saved["model"]["head.bias"]]
    assert torch.equal(saved["state"]["probe"]["weight"], torch.cat(head))
    for record in read_log(folder, "step"):  # the same loss, from the same weights
        assert record["loss"] == pytest.approx(record["probe_loss"], rel=1e-4)
