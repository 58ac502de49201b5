import copy

import pytest
import torch
from torch import nn

from common.ema import ema_update


def test_the_teacher_is_the_average_of_all_students():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student)
    expected = [p.detach().double().clone() for p in student.parameters()]
    for step in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape, generator=torch.manual_seed(step)))
            student[1].running_mean.fill_(step)
        ema_update(teacher, student, 0.9)
        expected = [
            0.9 * e + 0.1 * p.detach().double()
            for e, p in zip(expected, student.parameters(), strict=True)
        ]
    for p, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-6)
    assert torch.equal(teacher[1].running_mean, torch.zeros(4))  # buffers are its own


@pytest.mark.parametrize(("tau", "same_as"), [(1.0, "teacher"), (0.0, "student")])
def test_the_ends(tau, same_as):
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    before = {"teacher": teacher.weight.clone(), "student": student.weight.clone()}
    ema_update(teacher, student, tau)
    assert torch.equal(teacher.weight, before[same_as])


def test_equal_weights_stay_equal_to_the_last_bit():
    student = nn.Linear(50, 50)
    teacher = copy.deepcopy(student)
    ema_update(teacher, student, 0.9963)
    assert torch.equal(teacher.weight, student.weight)
