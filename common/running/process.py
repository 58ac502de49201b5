"""A process from start to exit: torchrun's environment, device, signals, errors and exit codes."""

import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from common.data import STOP_SIGNALS
from common.running.errors import ConfigError, FaultError, UserError
from common.running.faults import explain
from common.running.folder import note_refused_config
from common.running.progress import say, speaks, write_error

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that a rank has
DONE, USER_ERROR, FAULT, STOPPED = 0, 2, 3, 75  # exit codes
SECONDS_FOR_OTHER_RANKS = 120
SECONDS_BETWEEN_MEETINGS = 5  # at most, while steps take what they took
START_TIMEOUT = timedelta(minutes=10)  # of a collective until the first step is done


class Stopped(SystemExit):
    """A signal asked for the end; the state is saved and the same command goes on from there."""


class Finished(SystemExit):
    """There is nothing left to do."""


class Place(NamedTuple):
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    device: torch.device


def read_ranks():
    """(rank, number of ranks) by torchrun's environment; (0, 1) without it.

    Raises UserError where only a part of it is there, as a shell or a job may leave it behind.
    """
    known = {name: os.environ[name] for name in TORCHRUN if os.environ.get(name)}
    rank, ranks = known.get("RANK", "0"), known.get("WORLD_SIZE", "1")
    if (rank, ranks) == ("0", "1"):
        return 0, 1
    whole = len(known) == len(TORCHRUN) and rank.isdecimal() and ranks.isdecimal()
    if not whole or int(rank) >= int(ranks):
        told = ", ".join(f"{name}={known.get(name, '')}" for name in TORCHRUN)
        error = UserError(f"this is no torchrun's environment: {told}. Use torchrun, or unset them")
        error.one_rank = True  # whoever the others are
        raise error
    return int(rank), int(ranks)


def start_process(seed, deterministic):
    """Join the ranks that torchrun started, if any; choose the device; seed the weights' draw."""
    rank, world_size = read_ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=START_TIMEOUT)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    return Place(rank, world_size, device)


def on_first_rank(call):
    """call() on rank 0. All ranks get what it returns, or raise the UserError that it raised."""
    outcome = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = call()
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


class StopSignal:
    """SIGTERM, SIGUSR1 or Ctrl-C set a flag; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received, self._pid = None, os.getpid()
        self._met, self._next = (0, -math.inf), 0  # (step, when) of the last meeting; next step
        for number in STOP_SIGNALS:
            _handlers.setdefault(number, signal.signal(number, self._handle))

    def _handle(self, number, frame):
        if os.getpid() != self._pid:  # a loader worker: its parent ends it
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        when = "after this step" if not dist.is_initialized() else "once all ranks know of it"
        say(f"{self.received.name}: saving and stopping {when}")

    def name(self):
        """The signal's name."""
        return self.received.name if self.received else "a signal to another rank"

    def agreed(self, step, due):
        """Whether any rank was asked to stop; the same answer on all ranks. Called after each step.

        A single process looks each time. Several ranks meet where `due`, the same on all of them,
        and at steps they agreed on at the last meeting: by its own clock a rank would come alone.
        """
        if not dist.is_initialized():
            return self.received is not None
        if step < self._next and not due:
            return False
        (before, when), self._met = self._met, (step, time.monotonic())
        seconds = (self._met[1] - when) / (step - before)  # a step
        told = torch.tensor([self.received is not None, seconds], dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        asked, seconds = told.tolist()
        self._next = step + max(1, int(SECONDS_BETWEEN_MEETINGS / max(seconds, 1e-6)))
        return bool(asked)


_handlers = {}  # what handled a signal before a StopSignal did
_at_exit = []  # callback(state, why, retryable), where a script ends otherwise than planned


def report_failures_to(callback):
    """callback(state, why, retryable) notes a failure; returns an earlier one's status, or {}."""
    _at_exit[:] = [callback]


def entry_point(main):
    """Decorates a script's main: errors become one sentence, a status and an exit code.

    0 done, 2 the user's input (a UserError, or more than the GPU's memory holds), 3 a fault worth
    retrying, 75 stopped by a signal and resumable. Rank 0 speaks, unless only one rank knows.
    """

    @functools.wraps(main)
    def run(argv=None):
        _at_exit.clear()
        try:
            code = _run(main, argv)
        finally:
            while _handlers:
                signal.signal(*_handlers.popitem())
        if dist.is_initialized() and code == DONE:
            dist.destroy_process_group()
        if code in (USER_ERROR, FAULT):
            end_workers(seconds=3)
        if code == USER_ERROR and dist.is_initialized():
            # torchrun ends all ranks once one is gone, and Python takes its time to leave: at once,
            # so that each rank has the exit code that is its own.
            sys.stderr.flush()
            os._exit(code)
        if code != DONE:
            sys.exit(code)

    return run


@atexit.register  # later than multiprocessing's own, so called before it, which would wait for ever
def end_workers(seconds=30):
    """SIGKILL for loader workers that do not end by themselves: they do not hear SIGTERM."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) is not None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for the killed
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0))
        if worker.is_alive():
            worker.kill()


def _run(main, argv):
    """main(argv), and the exit code."""
    try:
        main(argv)
    except UserError as error:
        return _tell(error, speaks())
    except (Finished, Stopped) as end:
        return DONE if isinstance(end, Finished) else STOPPED
    except KeyboardInterrupt:
        say("stopped at once; a run goes on from its last checkpoint")
        _report("preempted", "Ctrl-C", True)
        return STOPPED
    except Exception as error:
        if known := explain(error):
            return _tell(known, speaks())
        earlier = _report("failed", f"{type(error).__name__}: {error}", True)
        if earlier.get("state") == "failed" and dist.is_initialized():
            return FAULT if earlier["retryable"] else USER_ERROR  # that rank has spoken
        write_error(traceback.format_exc().rstrip())
        return FAULT
    return DONE


def _tell(error, is_first):
    """Say what a UserError says, and note it; the exit code."""
    retryable = isinstance(error, FaultError)
    if error.one_rank or is_first or not _others_came(is_first):
        write_error(f"error: {error}")
        if isinstance(error, ConfigError):
            note_refused_config(error.values, str(error))
        _report("failed", str(error), retryable)
    if is_first and not error.one_rank:
        _others_came(is_first)
    return FAULT if retryable else USER_ERROR


def _report(state, why, retryable):
    """Tell the run folder; returns the status that an earlier failure left there, or {}."""
    with contextlib.suppress(OSError):  # its disk may be what failed
        return _at_exit[0](state, why, retryable) if _at_exit else {}
    return {}


def _others_came(is_first):
    """Let all ranks come to the error that they share, and rank 0 speak, before any ends.

    torchrun ends all ranks as soon as one does, and a rank that is gone breaks the others'
    collectives. False where the others do not have the error, so that this one has to speak.
    """
    came = torch.ones(1)
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank is elsewhere, or gone: no reason to wait
            meeting = dist.all_reduce(came, async_op=True)
            meeting.wait(timedelta(seconds=SECONDS_FOR_OTHER_RANKS))
        return came.item() == dist.get_world_size()
    if not is_first:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(USER_ERROR))
        time.sleep(SECONDS_FOR_OTHER_RANKS)
    return False
