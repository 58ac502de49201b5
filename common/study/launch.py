"""Start the runs of a grid here: one after another, or some at a time, spread over the GPUs."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from common.data import cores
from common.running.errors import regular
from common.running.folder import STATUS, read_json
from common.running.process import DONE, FAULT, STOPPED, USER_ERROR
from common.running.progress import say
from common.running.standing import try_lock
from common.study.cost import TimeLeft
from common.study.grid import state

LOGS = "logs"  # in the output folder: what each run prints
TRIES = 3  # of a run that fails with a fault worth retrying
LINES_SHOWN = 8  # of the log of a failed run


class Launcher:
    """Starts what is not finished; `run` may be called by several processes at once."""

    def __init__(self, runs, jobs=1, nproc=1, gpus=()):
        """jobs: runs at a time; nproc: processes (GPUs) a run; gpus: ids of this machine's."""
        self.runs, self.jobs, self.nproc, self.gpus = runs, jobs, nproc, list(gpus)
        self._places, self._time_left = queue.SimpleQueue(), TimeLeft(runs)
        self._children, self.stopped = {}, False
        self.failed, self.refused, self.elsewhere = {}, {}, []
        for place in range(jobs):
            self._places.put(place)

    def run(self):
        """Returns the exit code.

        0 all done, 75 stopped or some done elsewhere, 3 some failed, 2 some refused (see `state`).
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._work, run): run for run in self.runs}
            while wait(futures, 0.2).not_done:  # without a timeout, signals would have to wait
                pass
        for future, run in futures.items():
            if future.exception():
                self.failed[run] = repr(future.exception())
        for run, why in self.failed.items():
            say(f"failed: {run.name}: {why}\n{tail(log_path(run))}")
        for run, why in self.refused.items():
            say(f"refused: {run.name}: {why}")
        if self.stopped:
            say("stopped; the same command goes on from here")
        elif self.elsewhere:
            say(f"left to others: {', '.join(self.elsewhere)}")
        if (self.failed or self.refused) and not self.stopped:
            return FAULT if self.failed else USER_ERROR
        return STOPPED if self.stopped or self.elsewhere else DONE

    def _stop(self, number, frame):
        """First the runs may save; a second Ctrl-C kills them, and they go on from a checkpoint.

        torchrun's ranks have sessions of their own: it ends them itself, half a minute after.
        """
        children = list(self._children.values())
        again = self.stopped and number == signal.SIGINT
        if not self.stopped:
            kill = "; Ctrl-C again kills them" if self.nproc == 1 else ""
            say(f"{signal.Signals(number).name}: waiting for {len(children)} to save{kill}")
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                if again and self.nproc == 1:
                    os.killpg(child.pid, signal.SIGKILL)
                elif not self.stopped:
                    child.send_signal(signal.SIGTERM)
        self.stopped = True

    def _work(self, run):
        if self.stopped:
            return
        place = self._places.get()
        try:
            with claim(run) as mine:
                at, why = state(run)
                if at == "finished":
                    return
                if at == "refused":
                    self.refused[run] = why
                elif mine and at != "running":
                    self._finish(run, place)
                else:
                    self.elsewhere.append(run.name)
        finally:
            self._places.put(place)

    def _finish(self, run, place):
        """Start a run, again where it is worth it."""
        for _ in range(TRIES):
            how = "starts" if state(run)[0] == "queued" else "goes on"
            say(f"{time.strftime('%H:%M:%S')} {run.name}: {how}, log in {log_path(run)}")
            before = _written(run.folder / STATUS)
            code = self._start(run, place)
            of_this_start = _written(run.folder / STATUS) != before
            told = (read_json(run.folder / STATUS) or {}) if of_this_start else {}
            if told.get("state") == "preempted":  # torchrun has exit codes of its own
                code = STOPPED
            ends = code in (DONE, STOPPED, USER_ERROR) or told.get("retryable") is False
            if self.stopped or ends:
                break
        at, why = state(run)
        if at == "finished":
            left = self._time_left.text(self.jobs)
            done = f"{self._time_left.finished()} of {len(self.runs)} finished"
            say(f"{run.name}: finished; {done}, {left}")
        elif code == STOPPED:
            self.elsewhere.append(run.name)  # somebody stopped this one run
        elif not self.stopped:
            self.failed[run] = told.get("why") or why or f"exit code {code}"

    def _start(self, run, place):
        """One process from start to end; returns its exit code."""
        log_path(run).parent.mkdir(parents=True, exist_ok=True)
        with open(log_path(run), "ab") as log:
            child = subprocess.Popen(
                run.command(sys.executable, self.nproc),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(place, self.jobs, self.nproc, self.gpus),
                start_new_session=True,  # Ctrl-C reaches it through us alone
            )
            self._children[run.name] = child
            if self.stopped:
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            del self._children[run.name]
        return code


def environment(place, jobs, nproc, gpus):
    """What a run at a place (0 to jobs - 1) starts with: its GPUs, or its share of the cores."""
    env = dict(os.environ)
    if gpus:
        devices = [gpus[i % len(gpus)] for i in range(place * nproc, (place + 1) * nproc)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(devices))
    elif jobs > 1:  # runs that each take all cores slow each other down many times
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    return env


def gpu_ids():
    """Ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


def _written(path):
    """When a file was written, by whatever clock; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def log_path(run):
    """Where what a run prints is kept."""
    return run.folder.parent / LOGS / f"{run.name}.log"


def tail(path):
    """The last lines of a log, indented."""
    try:
        lines = Path(regular(path)).read_text("utf-8", "replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-LINES_SHOWN:])


@contextlib.contextmanager
def claim(run):
    """Yields whether this process may start the run: false where another is about to."""
    path = log_path(run).with_suffix(".claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        yield try_lock("flock", file)
