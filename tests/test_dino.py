import math

import pytest
import torch
from small import run
from test_methods import watch_updates
from torch import nn

import dino
from common.backbones import build_backbone
from common.running.checkpoint import read_checkpoint
from dino import DINO, Head, dino_loss, teacher_statistics

pytestmark = pytest.mark.usefixtures("narrow")


def logits(seed=0, n=8, k=6):
    generator = torch.manual_seed(seed)
    return [torch.randn(n, k, generator=generator).double() for _ in range(2)] + [
        torch.randn(k, generator=generator).double()
    ]


def slow_dino(student, teacher, center, student_t, teacher_t):
    """Eq. 3 and algorithm 1 written out: image by image, H(teacher of a view, student of other)."""

    def softmax(x):
        return torch.exp(x) / torch.exp(x).sum()

    b, total = len(student) // 2, 0.0
    for i in range(b):
        for mine, other in ((i, i + b), (i + b, i)):
            q = softmax((teacher[mine] - center) / teacher_t)
            p = softmax(student[other] / student_t)
            total = total - (q * torch.log(p)).sum()
    return total / (2 * b)


def test_loss_and_gradient_are_the_papers_equation():
    student, teacher, center = logits()
    found = []
    for loss in (dino_loss, slow_dino):
        s = student.clone().requires_grad_()
        value = loss(s, teacher, center, 0.1, 0.04)
        value.backward()
        found.append((value.detach(), s.grad))
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours, slow)


def test_known_values_and_invariances():
    student, teacher, center = logits()
    flat = torch.zeros(8, 6).double()
    assert float(dino_loss(flat, flat, center * 0, 0.1, 0.04)) == pytest.approx(math.log(6))
    sure = 100 * torch.eye(4, 6).double()  # each image its own prototype, the same for both views
    assert float(dino_loss(sure.repeat(2, 1), sure.repeat(2, 1), center * 0, 0.1, 0.04)) < 1e-6
    base = dino_loss(student, teacher, center, 0.1, 0.04)
    swapped = student.roll(4, 0), teacher.roll(4, 0)
    torch.testing.assert_close(dino_loss(*swapped, center, 0.1, 0.04), base)
    torch.testing.assert_close(dino_loss(student + 5, teacher, center, 0.1, 0.04), base)
    torch.testing.assert_close(dino_loss(student, teacher + 1, center + 1, 0.1, 0.04), base)
    assert dino_loss(student, teacher.roll(4, 0), center, 0.1, 0.04) != base


def test_no_gradient_reaches_the_teacher():
    student, teacher, center = (x.requires_grad_() for x in logits())
    dino_loss(student, teacher, center, 0.1, 0.04).backward()
    assert student.grad is not None and teacher.grad is None and center.grad is None


def test_statistics_are_entropy_kl_and_information():
    student, teacher, center = logits()
    loss = dino_loss(student, teacher, center, 0.1, 0.04)
    notes = teacher_statistics(teacher, center, 0.04, loss)
    q = ((teacher - center) / 0.04).softmax(dim=1)
    p = (student / 0.1).softmax(dim=1).roll(4, 0)
    assert float(notes["teacher_entropy"]) == pytest.approx(
        float(torch.distributions.Categorical(q).entropy().mean())
    )
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(q), torch.distributions.Categorical(p)
    )
    assert float(notes["teacher_student_kl"]) == pytest.approx(float(kl.mean()))
    mutual = (q * (q / q.mean(dim=0)).log()).sum(dim=1).mean()
    assert float(notes["teacher_information"]) == pytest.approx(float(mutual))
    assert notes["log_num_prototypes"] == pytest.approx(math.log(6)) and not notes["collapsed"]


@pytest.mark.parametrize(("one", "entropy"), [(0.0, math.log(6)), (50.0, 0.0)])
def test_either_collapse_is_seen_and_they_are_told_apart(one, entropy):
    teacher = torch.zeros(8, 6).double()
    teacher[:, 2] = one  # every image alike: uniform, or one prototype
    notes = teacher_statistics(teacher, torch.zeros(6), 0.04, torch.tensor(1.0))
    assert notes["collapsed"] and float(notes["teacher_entropy"]) == pytest.approx(
        entropy, abs=1e-9
    )


def small(norm_fixed=False):
    backbone, dim = build_backbone("resnet18", 32)
    return DINO(backbone, Head(dim, 16, 8, 24, norm_fixed), 24)


@pytest.mark.usefixtures("full_size")
def test_the_head_is_as_the_papers():
    model = small()
    z, scores = model.head(torch.randn(5, 512))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    direction = model.head.prototypes.parametrizations.weight.original1
    weight = direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scores, z @ weight.T)  # prototypes of norm 1 at the start
    assert model.head.prototypes.bias is None
    assert sum(isinstance(m, nn.GELU) for m in model.head.projector) == 2


def test_the_prototypes_norms_are_trained_unless_fixed():
    for fixed in (False, True):
        norm = small(fixed).head.prototypes.parametrizations.weight.original0
        assert norm.requires_grad is not fixed and torch.equal(norm, torch.ones(24, 1))


def test_the_teacher_is_a_copy_without_gradient_and_the_centre_is_saved():
    model = small()
    student, teacher = model.student().state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(v, teacher[k]) for k, v in student.items())
    mine = {id(p) for p in model.student().parameters()}
    assert not any(id(p) in mine or p.requires_grad for p in model.teacher.parameters())
    assert "center" in model.state_dict()


PROTOTYPES = [f"head.prototypes.parametrizations.weight.original{i}" for i in (0, 1)]


def test_the_prototypes_stay_as_they_are_in_the_first_epochs(tmp_path, tiny_set):
    def prototypes(name, *overrides):
        folder = run("dino", tmp_path, tiny_set, name, "optimization.epochs=1", *overrides)
        model = read_checkpoint(folder / "last.pt")["model"]
        return [model[name] for name in PROTOTYPES]

    start = prototypes("start", "run.frozen_encoder=true")
    for ours, first in zip(prototypes("frozen"), start, strict=True):
        assert torch.equal(ours, first)
    for ours, first in zip(
        prototypes("free", "ssl_settings.freeze_prototyper=0"), start, strict=True
    ):
        assert not torch.equal(ours, first)


@pytest.mark.parametrize("clip", [True, False])
def test_each_parameter_of_the_backbone_is_clipped_alone(clip, tmp_path, tiny_set, monkeypatch):
    """With a loss 10,000 times as large, and under a gradient scaler, which must not count."""
    norms = {}

    def seen(event, *what):
        if event == "gradients":
            for name, p in what[0].named_parameters():
                if p.grad is not None:
                    norms.setdefault(name.split(".")[0], []).append(float(p.grad.norm()))

    loss, scaler = dino.dino_loss, torch.amp.GradScaler("cpu", init_scale=1024.0)
    autocast = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(dino, "dino_loss", lambda *args: 1e4 * loss(*args))
    monkeypatch.setattr(dino, "mixed_precision", lambda *_: (autocast, scaler))
    watch_updates(dino, monkeypatch, seen)
    quick = ["optimization.epochs=1", f"ssl_settings.clip_grad={str(clip).lower()}"]
    run("dino", tmp_path, tiny_set, "clip", *quick)
    assert max(norms["head"]) > 10
    if clip:
        assert max(norms["backbone"]) == pytest.approx(1, rel=1e-5)
    else:
        assert max(norms["backbone"]) > 10


def test_the_centre_is_the_moving_average_of_teacher_logits(tmp_path, tiny_set, monkeypatch):
    loss, means, centers = dino.dino_loss, [], []

    def watching(student, teacher, center, *temperatures):
        if torch.is_grad_enabled():  # a step's, not that of held-out views
            means.append(teacher.mean(dim=0).clone())
            centers.append(center.clone())
        return loss(student, teacher, center, *temperatures)

    monkeypatch.setattr(dino, "dino_loss", watching)
    folder = run("dino", tmp_path, tiny_set, "center")
    expected = torch.zeros(64)
    for mean, used in zip(means, centers, strict=True):
        torch.testing.assert_close(used, expected)  # this step's own logits are not in it yet
        expected = 0.9 * expected + 0.1 * mean
    saved = read_checkpoint(folder / "last.pt")["model"]["center"]
    torch.testing.assert_close(saved, expected)
    assert saved.abs().sum() > 0
