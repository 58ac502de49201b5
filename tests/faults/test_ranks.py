"""Two ranks under torchrun, of which one dies or hangs: all end in time, and the run is whole."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
from conftest import PATIENCE, ROOT, on_ranks
from small import arguments, outcome

from common.running.folder import read_json

pytestmark = pytest.mark.usefixtures("narrow")
LIMIT = 180  # seconds until all ranks are gone; measured: under 15, on a busy machine under 45
HOW = ["run.checkpoint_every_steps=2", "optimization.batch_size=12"]

FAULT = """
import os, sys, time, signal
from datetime import timedelta
import common.data as data
import common.running.process as process
from common.running.run import Run
import simclr
from small import make_narrow

make_narrow()
what, rank, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
process.START_TIMEOUT = timedelta(seconds=8 if at == 1 else 600)
data.LOADER_TIMEOUT, data.SECONDS_AN_IMAGE = 5, 0.5  # of a rank's batch of 6
end_step = Run.end_step

def failing(self, *args, **kwargs):
    if os.environ["RANK"] == rank and self.step + 1 == at:
        open(sys.argv[4], "w").close()  # that it is time to look at the clock
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(10_000)
    return end_step(self, *args, **kwargs)

Run.end_step = failing
simclr.main(sys.argv[5:])
"""


def whole_run(argv):
    import simclr

    simclr.main(argv)
    return []


@pytest.fixture(scope="module")
def whole(tiny_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    on_ranks(2, folder / "r", whole_run, arguments("simclr", tiny_set, folder, "whole", *HOW))
    return folder / "whole"


def processes_of(group):
    """How many processes a session still has, zombies apart."""
    found = 0
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            found += int(session) == group and state != "Z"
    return found


def fails(folder, tiny_set, what, rank, at):
    """Seconds from the fault until the last process of the run is gone, and what was said."""
    (folder / "fault.py").write_text(FAULT)
    argv = arguments("simclr", tiny_set, folder, "run", *HOW)
    words = [folder / "fault.py", what, rank, at, folder / "now", *argv]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with open(folder / "said.txt", "w") as said:
        run = subprocess.Popen(
            [*command, *map(str, words)], cwd=ROOT, env=env, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + PATIENCE
        while not (folder / "now").exists():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        begun = time.monotonic()
        run.wait(PATIENCE)
        while processes_of(run.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    return time.monotonic() - begun, run.returncode, (folder / "said.txt").read_text()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="no /proc to find processes in")
@pytest.mark.parametrize(("what", "rank"), [("dies", 0), ("dies", 1), ("hangs", 0), ("hangs", 1)])
def test_a_rank_that_is_gone(what, rank, whole, tmp_path, tiny_set, count):
    goes(what, rank, 3 + rank, whole, tmp_path, tiny_set, count)


@pytest.mark.long
@pytest.mark.parametrize("trial", range(16))
def test_a_rank_that_is_gone_at_any_step(trial, whole, tmp_path, tiny_set, count):
    what, rank = ("dies", "hangs")[trial % 2], trial // 2 % 2
    goes(what, rank, 1 + trial // 2, whole, tmp_path, tiny_set, count)


def goes(what, rank, at, whole, tmp_path, tiny_set, count):
    seconds, code, said = fails(tmp_path, tiny_set, what, rank, at)
    argv = arguments("simclr", tiny_set, tmp_path, "run", *HOW)
    on_ranks(2, tmp_path / "r", whole_run, argv)
    same = outcome(tmp_path / "run") == outcome(whole)
    count("a rank that dies or hangs", tried=1, ended=seconds < LIMIT, exact=same)
    count("longest wait after a rank's fault", seconds=round(seconds, 1))
    assert code == 1 and seconds < LIMIT, said
    if what == "hangs":
        assert "another rank hangs, or is gone" in said and "in vain (" in said, said
    assert "a wait for another rank of more than 8.0 s ends the run" in said
    assert same
    assert read_json(tmp_path / "run/status.json")["state"] == "finished"
