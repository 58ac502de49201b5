"""Start the runs of a grid: here, one after another or one a GPU, or through Slurm."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.errors import UserError
from common.process import DONE, STOPPED, USER_ERROR
from common.progress import clock, say
from common.run_folder import RESULT, STATUS, read_json, write_json
from common.run_log import LOG
from common.study.grid import CALIBRATION, cost_key, seconds_left, state

LOGS = "logs"  # in the output folder: what each run prints
TRIES = 3  # of a run that fails with a fault worth retrying
LINES_SHOWN = 8  # of the log of a failed run
CALIBRATION_STEPS = (2, 6)  # the first takes longer


class Launcher:
    """Starts what is not finished; `run` may be called by several processes at once."""

    def __init__(self, runs, jobs=1, nproc=1, gpus=0):
        """jobs: runs at a time; nproc: processes (GPUs) a run; gpus: on this machine."""
        self.runs, self.jobs, self.nproc, self.gpus = runs, jobs, nproc, gpus
        self._left, self._lock = list(runs), threading.Lock()
        self._children, self.stopped, self.failed = {}, False, {}

    def run(self):
        """Returns the exit code: 0 all done, 3 some failed, 75 stopped by a signal."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        workers = [threading.Thread(target=self._work, args=(i,)) for i in range(self.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():  # a plain join would keep signals waiting
                worker.join(0.2)
        for run, why in self.failed.items():
            say(f"failed: {run.name}: {why}\n{tail(log_path(run))}")
        if self.stopped:
            say("stopped; the same command goes on from here")
            return STOPPED
        return 3 if self.failed else DONE

    def _stop(self, number, frame):
        self.stopped = True
        for child in list(self._children.values()):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    def _work(self, place):
        while not self.stopped:
            with self._lock:
                if not self._left:
                    return
                run = self._left.pop(0)
            with claim(run) as mine:
                if mine and state(run)[0] not in ("finished", "running"):
                    self._finish(run, place)

    def _finish(self, run, place):
        """Start a run, again where it is worth it."""
        for _ in range(TRIES):
            say(f"{time.strftime('%H:%M:%S')} {run.name}: {state(run)[0]}, log in {log_path(run)}")
            code = self._start(run, place)
            if code == DONE or self.stopped:
                break
            status = read_json(run.folder / STATUS) or {}
            if code == USER_ERROR or status.get("retryable") is False:
                break
        left = [r for r in self.runs if state(r)[0] != "finished"]
        if state(run)[0] == "finished":
            seconds, unknown = seconds_left(left, self.runs)
            note = f" and {unknown} runs of unknown length" if unknown else ""
            done = f"{len(self.runs) - len(left)} of {len(self.runs)} finished"
            say(f"{run.name}: finished; {done}, about {clock(seconds / self.jobs)}{note} left")
        elif not self.stopped:
            self.failed[run] = state(run)[1] or f"exit code {code}"

    def _start(self, run, place):
        """One process from start to end; returns its exit code."""
        env = dict(os.environ)
        if self.gpus:
            first = place * self.nproc
            devices = [str(i % self.gpus) for i in range(first, first + self.nproc)]
            env.setdefault("CUDA_VISIBLE_DEVICES", ",".join(devices))
        elif self.jobs > 1:  # runs that each take all cores slow each other down many times
            env.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // self.jobs)))
        log_path(run).parent.mkdir(parents=True, exist_ok=True)
        with open(log_path(run), "ab") as log:
            child = subprocess.Popen(
                run.command(sys.executable, self.nproc),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C reaches it through us alone
            )
            self._children[run.name] = child
            if self.stopped:
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            del self._children[run.name]
        return code


def log_path(run):
    """Where what a run prints is kept."""
    return run.folder.parent / LOGS / f"{run.name}.log"


def tail(path):
    """The last lines of a log, indented."""
    try:
        lines = Path(path).read_text(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-LINES_SHOWN:])


@contextlib.contextmanager
def claim(run):
    """Yields whether this process may start the run: false where another is about to."""
    path = log_path(run).with_suffix(".claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def calibrate(runs):
    """Train a few steps of every kind of run that nothing is known of; keep the time an image."""
    done = set()
    for run in runs:
        key, path = cost_key(run), run.folder.parent / CALIBRATION
        known = read_json(path) or {}
        if key in done or key in known:
            continue
        done.add(key)
        say(f"timing {key}")
        seconds = _time_steps(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known | {key: seconds})


def _time_steps(run):
    """Seconds an image in training, from a run that is stopped after some steps."""
    folder = run.folder.with_name(f"calibrate_{run.name}")
    more = [f"run.name={folder.name}", "run.log_every=1"]
    words = [*run.command(sys.executable), *more]
    first, last = CALIBRATION_STEPS
    with open(os.devnull, "wb") as nowhere:
        child = subprocess.Popen(words, stdout=nowhere, stderr=subprocess.PIPE, text=True)
        times = {}
        while last not in times and child.poll() is None:
            time.sleep(0.05)
            log = folder / LOG
            lines = log.read_text().count('"kind": "step"') if log.exists() else 0
            times.setdefault(lines, time.monotonic())
        child.terminate()
        said = child.communicate()[1]
    steps = [n for n in times if first <= n <= last]
    if (folder / RESULT).exists():  # a run that short
        result = read_json(folder / RESULT)
        return result["seconds"] / (sum(result["train_rows"].values()) * result["epochs"])
    if len(steps) < 2:
        raise UserError(f"{shlex.join(words)}: could not be timed:\n{said}")
    images = (max(steps) - min(steps)) * run.cfg.optimization.batch_size
    return (times[max(steps)] - times[min(steps)]) / images
