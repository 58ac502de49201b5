"""What a machine lacks or takes away: workers, shared memory, files, folders, a clock, a locale."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, exit_code, on_ranks, write_set
from small import arguments, outcome, run
from torch.utils.data import get_worker_info
from warm import call

import common.data
import simclr
from common.annotations import Annotations
from common.augmentations import CropViews
from common.data import build_loaders
from common.running.folder import read_json
from common.sampler import EpochSampler

pytestmark = pytest.mark.usefixtures("narrow")


def end_worker(how):
    """A loader's worker ends at its 20th image."""
    read, seen = common.data.TrainImages.__getitem__, []

    def ending(self, key):
        seen.append(key)
        if get_worker_info() and len(seen) == 20:
            os._exit(1) if how == "exit" else os.kill(os.getpid(), how)
        return read(self, key)

    common.data.TrainImages.__getitem__ = ending


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, "exit"])
def test_a_worker_that_dies_ends_the_run_at_once(how, tiny_set, tmp_path, count):
    argv = arguments("simclr", tiny_set, tmp_path, "run", "data.num_workers=1")
    begun = time.monotonic()
    done = call(tmp_path, "simclr", *argv, first=(end_worker, how))
    seconds = time.monotonic() - begun
    assert done.poll() == 3 and done.err.count("error: ") == 1, done.err
    assert "data.num_workers" in done.err and "Traceback" not in done.err
    assert read_json(tmp_path / "run/status.json")["retryable"] is True
    count("longest wait after a worker's death", seconds=round(seconds, 1))


def few_files(more):
    """Than are open now."""
    most = len(os.listdir("/proc/self/fd")) + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_too_few_open_files_are_one_sentence(tiny_set, tmp_path):
    """Four workers need more; torch's own words on a loader that was never whole come besides."""
    more = ["data.num_workers=4", "optimization.batch_size=4"]
    argv = arguments("simclr", tiny_set, tmp_path, "run", *more)
    done = call(tmp_path, "simclr", *argv, first=(few_files, 12))
    assert done.poll() == 2 and done.err.count("error: ") == 1, done.err
    assert "ulimit -n" in done.err


SMALL_SHM = """
mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 99
exec {python} simclr.py {argv}
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_a_small_shared_memory_is_one_sentence(tmp_path):
    words = write_set(tmp_path / "set", size=256)
    more = ["data.image_size=256", "data.num_workers=1", "optimization.batch_size=32"]
    argv = arguments("simclr", words, tmp_path, "run", *more)
    script = SMALL_SHM.format(size="4m", python=sys.executable, argv=" ".join(argv))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ["unshare", "--mount", "bash", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no mounts of one's own here: {done.stderr.strip()[:100]}")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "--shm-size" in done.stderr and "Traceback" not in done.stderr


def test_without_a_place_for_tensorboard_the_run_goes_on(tiny_set, tmp_path, capsys):
    whole = run("simclr", tmp_path, tiny_set, "whole")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tensorboard").write_text("no folder")
    capsys.readouterr()
    other = run("simclr", tmp_path, tiny_set, "other")
    assert capsys.readouterr().err.count("warning: ") == 1
    assert outcome(other) == outcome(whole)


PLACES = {  # what stands where the run's folder belongs
    "a file": lambda path: path.write_text(""),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("none") / "x"),
    "below a file": None,
}


@pytest.mark.parametrize("case", PLACES)
def test_a_folder_that_cannot_be_written(case, tiny_set, tmp_path, capsys):
    """Before any data is read."""
    place = tmp_path / "out"
    make = PLACES[case]
    if make:
        make(place)
    else:
        place.write_text("")
        place = place / "runs"
    argv = arguments("simclr", tiny_set, place, "run", "data.train_csv=/none.csv")
    assert exit_code(simclr.main, *argv) == 2
    said = capsys.readouterr().err
    assert str(place) in said and said.count("error: ") == 1 and "none.csv" not in said


def other_circumstances():
    """A clock that jumps back, no home, and a folder that cannot be written to."""
    real = time.time
    begun = real()
    time.time = lambda: real() - 10_000 * (real() - begun > 1)
    os.chdir("/proc")


def test_a_clock_a_home_a_locale_and_a_folder_make_no_difference(tiny_set, tmp_path):
    whole = run("simclr", tmp_path, tiny_set, "whole")
    odd = tmp_path / "a b'c \u00e4"
    argv = arguments("simclr", tiny_set, odd, "run")
    env = {"HOME": "", "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = call(tmp_path, "simclr", *argv, env=env, first=(other_circumstances,))
    assert done.poll() == 0, done.err
    assert outcome(odd / "run") == outcome(whole)


class OneImage:
    """What `open_images` returns, without a file."""

    def read(self, name, where="", check=True):
        return np.zeros((20, 20, 3), np.uint8)

    def check(self, *_):
        """Nothing to find."""


def megabytes():
    """Resident memory of this process and its workers, what they share counted once."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def memory_of_three_epochs(rows):
    """Megabytes after the first batches, and after each epoch."""
    names = np.array([f"folder/of/images/{i:08d}.png".encode() for i in range(rows)])
    defect, classes = np.zeros(rows, np.int8), np.zeros((rows, 0), bool)
    table = Annotations("a.csv", names, defect, classes, (), np.arange(rows, dtype=np.int32), ())
    sampler = EpochSampler(np.arange(rows), 500, seed=0)
    crops = CropViews(8, 0.4, 0.275, 0.5, 2, seed=0)
    loader, _ = build_loaders(OneImage(), table, sampler, crops, table, 2, torch.device("cpu"))
    loader.batch_sampler.start(0, 0, 3)
    found = []
    for step, _ in enumerate(common.data.batches(loader), 1):
        if step == 10 or step % sampler.steps_per_epoch == sampler.steps_per_epoch - 10:
            found.append(megabytes())
    return found


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="no /proc")
def test_memory_stays_flat_over_epochs(tmp_path, count):
    """Two workers, three epochs; of a list of Python's strings each look writes a count, so each
    worker ends with a copy: 40 MB more."""
    (found,) = on_ranks(1, tmp_path / "r", memory_of_three_epochs, 200_000)
    assert len(found) == 4
    growth = max(found) / found[0] - 1
    assert growth < 0.02, found
    count("growth of memory over three epochs", percent=round(100 * growth, 1))
