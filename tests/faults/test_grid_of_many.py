"""A grid of 258 runs, its launcher killed 20 times: each is done once, the table is the same."""

import random
import signal
import sys
import time

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, exit_code
from small import HEAD, make_up
from test_grid import group, write_grid
from warm import Command

from common.study import grid
from common.study.__main__ import main
from common.study.grid import read_grid, state

RUNS, KILLS, JOBS = 258, 20, 8
# A run of .2 s: what a real one leaves lies ready; the lock is a real one's, for life.
STUB = """
import fcntl, os, shutil, sys, time
ready, folder, done = sys.argv[1:]
os.makedirs(folder, exist_ok=True)
lock = open(os.path.join(folder, "lock"), "a+")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
time.sleep(0.2)
names = sorted(os.listdir(ready), key=lambda name: name == "result.json")  # that last
for name in names:
    shutil.copy(os.path.join(ready, name), os.path.join(folder, name + ".new"))
    os.replace(os.path.join(folder, name + ".new"), os.path.join(folder, name))
with open(done, "a") as file:
    file.write(os.path.basename(folder) + "\\n")
"""


def pretend(folder):
    """In the launcher's process: runs are stubs."""
    folder = str(folder)

    def command(self, python, nproc):
        words = [sys.executable, "-S", "-E", f"{folder}/stub.py", f"{folder}/ready/{self.name}"]
        return [*words, str(self.folder), f"{folder}/done.txt"]

    grid.GridRun.command = command


@pytest.fixture
def study(tmp_path, tiny_set, monkeypatch):
    """(grid file, its runs); what each run will leave lies in ready/."""
    monkeypatch.chdir(ROOT)
    settings = dict(o.split("=", 1) for o in [*tiny_set, *TINY, *HEAD])
    settings = {key: yaml.safe_load(value) for key, value in settings.items()}
    settings["run.output_dir"] = str(tmp_path / "ready")
    seeds = {"seed": list(range(1, RUNS + 1))}
    write_grid(tmp_path / "g.yaml", a=group(axes=seeds, **settings))
    (tmp_path / "stub.py").write_text(STUB)
    for i, run in enumerate(read_grid(tmp_path / "g.yaml")):
        make_up(run, np.random.default_rng(i))
    settings["run.output_dir"] = str(tmp_path / "runs")
    path = write_grid(tmp_path / "g.yaml", a=group(axes=seeds, **settings))
    runs = read_grid(path)
    for run in runs:  # their config names the folder that they will lie in
        config = tmp_path / "ready" / run.name / "config.yaml"
        config.write_text(
            config.read_text().replace(str(tmp_path / "ready"), str(tmp_path / "runs"))
        )
    return path, runs


def report(path, folder):
    assert exit_code(main, "report", "--grid", path, "--out", folder) == 0
    return {p.name: p.read_bytes() for p in folder.glob("*.csv")}


def test_a_grid_of_many_runs_and_kills(study, tmp_path, count, monkeypatch):
    path, runs = study
    argv = ["run", "--grid", path, "--jobs", JOBS]
    rng, killed = random.Random(0), 0
    while True:
        door = Command(
            tmp_path, "common.study.__main__", *argv, group=True, first=(pretend, tmp_path)
        )
        done = count_of(tmp_path)
        wanted = done + rng.randint(1, 2 * RUNS // (3 * KILLS))  # so that all kills find work left
        while killed < KILLS and door.poll() is None and count_of(tmp_path) < wanted:
            time.sleep(0.01)
        if killed == KILLS or door.poll() is not None:
            code = door.wait()
            if code == 0:
                break
            assert code == 75, door.err[-2000:]  # a run of a killed door still ends by itself
            continue
        door.send(signal.SIGKILL, group=True)
        door.wait()
        killed += 1
    once = sorted((tmp_path / "done.txt").read_text().split()) == sorted(run.name for run in runs)
    table = report(path, tmp_path / "report")
    (tmp_path / "runs").rename(tmp_path / "interrupted")  # and now without a kill
    (tmp_path / "done.txt").unlink()
    door = Command(tmp_path, "common.study.__main__", *argv, first=(pretend, tmp_path))
    assert door.wait() == 0, door.err[-2000:]
    same = report(path, tmp_path / "report2") == table
    count("grid of 258 runs", kills=killed, done_once=RUNS if once else 0, table_same=same)
    assert killed == KILLS and once and same
    assert all(state(run)[0] == "finished" for run in runs)


def count_of(tmp_path):
    done = tmp_path / "done.txt"
    return done.read_text().count("\n") if done.exists() else 0
