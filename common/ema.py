"""The teacher of self-distillation: an exponential moving average of the student."""

from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_update(teacher, student, tau):
    """teacher <- tau * teacher + (1 - tau) * student, parameter by parameter, in place.

    Modules of the same structure. Buffers are left alone: the teacher sees data of its own.
    """
    get_ema_multi_avg_fn(tau)(list(teacher.parameters()), list(student.parameters()), None)
