"""What becomes of a step whose numbers overflow under a gradient scaler (fp16 on CUDA).

The scaler skips the optimiser's step where a gradient is not finite, and lowers its scale. Such
steps are counted here, and a run that does nothing else ends. Where the loss itself is not finite,
the step leaves nothing behind: no sum, no score, no running statistics. Nothing here waits for the
device in an ordinary step.
"""

import torch

from common.distributed import all_reduce_mean
from common.running.errors import REMEDY, UserError

MOST_IN_A_ROW = 20  # skipped steps
SMALLEST_SCALE = 1.0  # below it gradients would overflow unscaled, too


class OverflowGuard:
    """Without an enabled scaler it only sums the loss. state: a TrainState; it keeps the counts."""

    def __init__(self, state):
        self.state, self.enabled = state, state.scaler.is_enabled()
        self._trains = any(p.requires_grad for p in state.model.parameters())
        self._stepped = False
        if self.enabled:
            state.optimizer.register_step_post_hook(self._note_step)
            self._statistics = [b for b in state.model.buffers() if b.is_floating_point()]
            self._kept = [b.clone() for b in self._statistics]

    def _note_step(self, *_):
        self._stepped = True

    def before_step(self):
        """Keep the statistics that a forward pass moves."""
        self._stepped = False
        if self.enabled and self._kept:
            torch._foreach_copy_(self._kept, self._statistics)

    @torch.no_grad()
    def after_step(self, loss):
        """Count the step, and undo it where the loss of a rank is not finite. loss: this rank's.

        Adds the loss to the state's sum. Raises UserError where nothing is learned any more.
        """
        state, loss = self.state, loss.double()
        counts = torch.ones_like(loss, dtype=torch.bool)
        if self.enabled:
            counts = all_reduce_mean(loss).isfinite()  # on the device: the host does not wait
        state.loss_sum = state.loss_sum + torch.where(counts, loss, 0.0)
        state.loss_steps = state.loss_steps + counts
        if not self.enabled:
            return
        state.scores.keep_last_if(counts)
        for now, before in zip(self._statistics, self._kept, strict=True):
            now.copy_(torch.where(counts, now, before))
        skipped = self._trains and not self._stepped
        state.skipped_steps += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        if state.skipped_in_a_row >= MOST_IN_A_ROW:
            self._stop(f"the last {MOST_IN_A_ROW} steps were skipped")

    def scale(self):
        """The loss scale, None without a scaler. Waits for the device."""
        if not self.enabled:
            return None
        scale = self.state.scaler.get_scale()
        if self._trains and scale < SMALLEST_SCALE:
            self._stop(f"the loss scale fell to {scale:g}")
        return scale

    def check_end(self, steps):
        """Raises UserError where a run of so many steps never took one."""
        if self.enabled and self.state.skipped_steps == steps:
            self._stop(f"all {steps} steps were skipped")

    @staticmethod
    def _stop(what):
        raise UserError(
            f"{what}: gradients are not finite in fp16, so nothing is learned. {REMEDY}"
        )
