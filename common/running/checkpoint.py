"""Save so that a crash at any moment leaves a whole checkpoint, and load only what is whole.

A file is the sha256 (32 bytes) of what follows, then `torch.save` bytes of plain types and tensors;
it is read with weights_only=True, so a foreign file cannot run code. last.pt is the newest,
prev.pt the one before.
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.distributed import gather_unpadded
from common.probe import LinearProbe, RunningScores
from common.running.config import differences
from common.running.errors import REMEDY, UserError, listed, regular

FORMAT = 3  # 3: images are resized by torch; loss_sum of each rank
LAST, PREVIOUS = "last.pt", "prev.pt"
# What exFAT, cloud drives and network shares answer to a call that they do not have.
NOT_SUPPORTED = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
NOT_SUPPORTED |= {errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOTTY}


@dataclass
class TrainState:
    """Everything that a run changes while it trains."""

    model: nn.Module  # bare: not the DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    probe: LinearProbe
    scaler: torch.amp.GradScaler
    scores: RunningScores = field(init=False)  # of the current epoch
    loss_sum: float | torch.Tensor = 0.0  # over the current epoch's steps, of this rank
    loss_steps: int | torch.Tensor = 0  # in that sum: under a scaler those with a finite loss
    train_scores: dict | None = None  # of the last whole epoch
    skipped_steps: int = 0  # of the whole run, by the scaler
    skipped_in_a_row: int = 0  # until now

    def __post_init__(self):
        self.scores = RunningScores(leave_out=self.scaler.is_enabled())

    def loss_sums(self):
        """Each rank's `loss_sum`, (W,) float64 on CPU. All ranks call it."""
        loss_sum = torch.as_tensor(self.loss_sum, dtype=torch.float64)
        return gather_unpadded(loss_sum.cpu().reshape(1))

    def mean_loss(self):
        """Over the epoch's steps and all ranks; None without a finite one. All ranks call it."""
        sums, steps = self.loss_sums(), int(self.loss_steps)
        return float(sums.mean()) / steps if steps else None

    def start_epoch(self, train_scores):
        """Forget the epoch that ended but for its scores."""
        self.train_scores, self.loss_sum, self.loss_steps = train_scores, 0.0, 0
        self.scores.clear()

    def capture(self):
        """The state as plain types and tensors. All ranks call it (what is theirs is gathered)."""
        rows, logits = self.scores.gather()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "probe": self.probe.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scores": {"rows": rows, "logits": logits},
            "loss_sum": self.loss_sums(),
            "loss_steps": int(self.loss_steps),
            "train_scores": self.train_scores,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, saved, rank):
        """Take up what `capture` returned."""
        for name in ("model", "optimizer", "probe", "scaler"):
            try:
                getattr(self, name).load_state_dict(saved[name])
            except Exception as error:  # a torch.nn.Module alone raises four kinds
                raise ValueError(f"{name}: {type(error).__name__}: {error}") from None
        self.scores.restore(**saved["scores"], is_first_rank=rank == 0)
        self.loss_sum = float(saved["loss_sum"][rank])
        for name in ("loss_steps", "train_scores", "skipped_steps", "skipped_in_a_row"):
            setattr(self, name, saved[name])


NOT_SAVED = f"so nothing is saved; the last checkpoint stays. {REMEDY}"


def check_finite(name, content, so=NOT_SAVED):
    """Raises UserError where a float or tensor of nested dicts is not finite, naming it."""
    if isinstance(content, dict):
        for key, value in content.items():
            check_finite(f"{name}.{key}", value, so)
    elif isinstance(content, (float, torch.Tensor)):
        if not torch.isfinite(torch.as_tensor(content)).all():
            raise UserError(f"{name} is not finite, {so}")


def save_checkpoint(folder, content, keep_last=True):
    """content: dict of plain types and tensors.

    Writes a temporary file, syncs it, links last.pt to prev.pt and replaces last.pt. keep_last:
    False where last.pt is known to be damaged, so that prev.pt stays. Raises OSError where the disk
    fails, and leaves the last checkpoint whole.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getbuffer()
    folder = Path(folder)
    new, link = folder / (LAST + ".new"), folder / (PREVIOUS + ".new")
    try:
        with open(new, "wb") as file:
            file.write(hashlib.sha256(data).digest())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_last and (folder / LAST).exists():
            link.unlink(missing_ok=True)
            _link_or_copy(folder / LAST, link)
            os.replace(link, folder / PREVIOUS)
        os.replace(new, folder / LAST)
        sync_folder(folder)
    except OSError as error:
        error.filename, error.needed = error.filename or os.fspath(new), len(data)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def _link_or_copy(source, target):
    """A second name for a file, or a copy of it on file systems that have no hard links."""
    try:
        os.link(source, target)
    except (OSError, AttributeError) as error:  # of a system without: Windows' Python had none
        if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
            raise
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder):
    """Make the names in a folder last through a power cut, on file systems that can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def read_checkpoint(path):
    """One checkpoint file -> its content, tensors on CPU. Raises UserError naming the file."""
    try:
        data = Path(regular(path)).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise UserError(f"{path}: damaged, or no checkpoint (its checksum does not fit)")
    try:
        content = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError
    except Exception as error:
        raise UserError(f"{path}: no checkpoint of ours ({type(error).__name__})") from None
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')}, this version reads {FORMAT}")
    return content


def load_checkpoint(folder, warn):
    """The newest whole checkpoint of a folder and its file name; (None, None) where there is none.

    warn: called with a sentence where last.pt cannot be used and prev.pt is taken. Raises UserError
    where there are files but none can be used: a run never starts afresh over them.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = Path(folder) / name
        if not os.path.lexists(path):
            continue
        try:
            content = read_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            warn(f"{problems[0]}; going on from {path}")
        return content, name
    if problems:
        raise UserError("\n".join([*problems, "delete these files to start this run afresh"]))
    return None, None


def take_up(path, saved, state, rank, config, facts, steps):
    """Go on from a checkpoint; raises UserError, naming its file, where that is not possible.

    saved: its content; state: a TrainState; config: the identity of the run's config; facts: what
    must be as it was, {name: value}: world_size, data_sha, device; steps: of an epoch, of the run.
    """
    try:
        _check_same_run(path, saved, config, facts)
        check_finite(f"{path}: model", saved["model"], "so it cannot be gone on from")
        step, first = int(saved["step"]), int(saved["epochs_done"]) * steps[0]
        if not 0 <= first <= step <= min(first + steps[0], steps[1]):
            raise ValueError(f"step {step} of {steps[1]}, epochs_done {saved['epochs_done']}")
        state.restore(saved["state"] | {"model": saved["model"]}, rank)
    except UserError:
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{path} does not fit ({told}): it is of another version of the code. "
            "Use a new run.name, or start it as it was"
        ) from None


def _check_same_run(path, saved, config, facts):
    """Raises UserError where it was written by another run."""
    changed = differences(saved["config"], config)
    changed += [
        f"{name}: {saved[name]} -> {value}" for name, value in facts.items() if saved[name] != value
    ]
    if changed:
        told = listed(f"{path} was written by another run", changed)
        raise UserError(f"{told}\nuse a new run.name, or start it as it was")
