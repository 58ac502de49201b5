"""A grid of real runs through its front door: stopped, gone on with, and with a run that fails."""

import os
import signal
import time

import pytest
from conftest import PATIENCE, ROOT, exit_code
from test_grid import LONGER, door, small_grid

from common.running.folder import read_json
from common.study.__main__ import main
from common.study.grid import read_grid, state
from common.study.launch import log_path


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_grid_runs_is_stopped_and_goes_on_without_doing_anything_twice(
    tmp_path, tiny_set, capsys, monkeypatch
):
    path = small_grid(tmp_path, tiny_set, [1, 2], **LONGER)
    runs = read_grid(path)
    first = door("run", "--grid", path)
    second = door("run", "--grid", path)  # at the same time: takes the other run
    deadline, paused = time.monotonic() + PATIENCE, {}
    try:
        while len(paused) < 2:  # who starts first waits, or it might end before the other starts
            assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
            for run in runs:
                if run.name not in paused and (run.folder / "log.jsonl").exists():
                    paused[run.name] = read_json(run.folder / "lock")["pid"]
                    os.kill(paused[run.name], signal.SIGSTOP)
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        second.send_signal(signal.SIGINT)
        for process in (first, second):
            assert any("waiting for 1 to save" in line for line in process.stdout)
    finally:
        for pid in paused.values():
            os.kill(pid, signal.SIGCONT)
    assert first.wait() == second.wait() == 75
    assert [state(run)[0] for run in runs] == ["preempted", "preempted"]
    steps = [read_json(run.folder / "provenance.json")["step"] for run in runs]
    assert steps == [0, 0]
    again = door("run", "--grid", path)
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert [state(run)[0] for run in runs] == ["finished", "finished"]
    for run in runs:  # each was started twice, and the second time went on
        provenance = read_json(run.folder / "provenance.json")
        assert provenance["step"] > 0 and len(provenance["earlier_starts"]) == 1
    times = [(run.folder / "result.json").stat().st_mtime_ns for run in runs]
    with monkeypatch.context() as here:  # in this process, whose handlers stay
        here.setattr(signal, "signal", lambda *_: None)
        assert exit_code(main, "run", "--grid", path) == 0
    assert times == [(run.folder / "result.json").stat().st_mtime_ns for run in runs]
    assert exit_code(main, "status", "--grid", path) == 0
    status = capsys.readouterr().out
    assert "2 finished" in status and "0 left" in status


def test_a_failed_run_is_listed_with_its_log_and_the_others_go_on(tmp_path, tiny_set, capsys):
    path = small_grid(tmp_path, tiny_set, [1, 2], **{"optimization.epochs": 1})
    runs = read_grid(path)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "last.pt").write_bytes(b"junk")  # no checkpoint: the user has to look
    process = door("run", "--grid", path)
    said, _ = process.communicate()
    assert process.returncode == 3
    assert f"failed: {runs[0].name}" in said and "    error: " in said and "last.pt" in said
    assert log_path(runs[0]).read_text().count("error: ") == 1  # not retried
    assert [state(run)[0] for run in runs] == ["failed", "finished"]
    exit_code(main, "status", "--grid", path)
    assert f"failed: {runs[0].name}" in capsys.readouterr().out
