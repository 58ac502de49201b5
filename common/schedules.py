"""Schedules as pure functions of the step: nothing to restore after a resume.

step counts optimiser steps from 0; the last one is total_steps - 1.
"""

import math


def linear(step, steps, start, end):
    """From start at step 0 to end at `steps`, and end from there on."""
    return start + (end - start) * step / steps if step < steps else end


def cosine(step, total_steps, start, end):
    """From start at step 0 to end at the last step, along half a cosine."""
    progress = min(step / max(total_steps - 1, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step, total_steps, warmup_steps, lr, warmup_start_lr, min_lr):
    """Linear from warmup_start_lr at step 0 to lr at warmup_steps, then cosine to min_lr."""
    if step < warmup_steps:
        return linear(step, warmup_steps, warmup_start_lr, lr)
    return cosine(step - warmup_steps, total_steps - warmup_steps, lr, min_lr)
