"""What a run leaves for reading: log.jsonl, TensorBoard, and one picture of its views."""

import json
import math
import os
from pathlib import Path

import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from common.augmentations import MEAN, STD
from common.running.errors import UserError, regular
from common.running.progress import say

LOG = "log.jsonl"
VIEWS_SHOWN = 8  # images


def read_log(path):
    """log.jsonl -> list of records; a last line that is still being written is left out.

    Raises UserError naming a file that is damaged.
    """
    try:
        lines = Path(regular(path)).read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__})") from None
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: damaged: a line of it is no record")
    return records


def none_for_nan(record):
    """Nested dicts in which what is not finite (an overflow) is None."""
    if isinstance(record, dict):
        return {key: none_for_nan(value) for key, value in record.items()}
    return None if isinstance(record, float) and not math.isfinite(record) else record


def epoch_record(loss, scores):
    """scores: {name: dict or None}. One flat dict, keys name_key."""
    record = {"loss": loss}
    for name, values in scores.items():
        record |= {f"{name}_{k}": v for k, v in (values or {}).items() if k != "undefined"}
    return record


def in_words(scores):
    """The same in a few words."""
    known = {k: of for k, of in scores.items() if of is not None and of["auroc"] is not None}
    shown = [f"{k} F1 {of['f1']:.3f} AUROC {of['auroc']:.3f}" for k, of in known.items()]
    return ", ".join(shown) or "nothing to score"


class _Board:
    """TensorBoard. Where it cannot be written, a warning, and the run goes on without it."""

    def __init__(self, folder, step):
        self._folder, self._writer = folder, None
        try:
            self._writer = SummaryWriter(folder, purge_step=step)
        except OSError as error:
            self._tell(error)

    def do(self, name, *args):
        """A SummaryWriter's method."""
        try:
            if self._writer is not None:
                getattr(self._writer, name)(*args)
        except OSError as error:
            self._writer = None
            self._tell(error)

    def _tell(self, error):
        say(f"warning: {self._folder}: no more TensorBoard ({error.strerror}); {LOG} has it all")


class RunLog:
    """One writer a run folder (rank 0)."""

    def __init__(self, folder, size, step):
        """size: bytes of log.jsonl to keep, step: of the checkpoint that is gone on from, or 0.

        What a killed process wrote after its last checkpoint goes.
        """
        self.folder = Path(folder)
        self._file = open(self.folder / LOG, "ab")  # noqa: SIM115 (held for life)
        if self._file.tell() < size:
            raise UserError(f"{self.folder / LOG}: shorter than when the checkpoint was written")
        self._file.truncate(size)
        self._file.seek(size)
        self._board = _Board(self.folder / "tensorboard", step)

    def write(self, kind, step, record):
        """One line, at once on its way to the disk, and its numbers to TensorBoard."""
        line = {"kind": kind, "step": step, **record}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        for key, value in (record | record.get("diagnostics", {})).items():
            if isinstance(value, (int, float)):
                self._board.do("add_scalar", f"{kind}/{key}", value, step)

    def sync(self):
        """On the disk before a checkpoint that counts on it."""
        os.fsync(self._file.fileno())

    def size(self):
        """Bytes of log.jsonl so far."""
        return self._file.tell()

    def show_views(self, views):
        """views: (V, B, 3, S, S) normalised -> views.png and TensorBoard: images side by side."""
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        images = views[:, :VIEWS_SHOWN].transpose(0, 1).flatten(0, 1).float().cpu() * std + mean
        grid = torchvision.utils.make_grid(images.clamp(0, 1), nrow=2 * len(views))
        torchvision.utils.save_image(grid, self.folder / "views.png")
        self._board.do("add_image", "views", grid, 0)

    def close(self):
        """Flush what TensorBoard still holds."""
        self._board.do("close")
