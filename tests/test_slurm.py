"""A grid through Slurm. `make test-slurm` starts a one-node Slurm and runs this."""

import fnmatch
import json
import os
import subprocess
import time

import pytest
from conftest import ROOT
from test_grid import LONGER, door, group, small_grid, write_grid

from common.running.folder import read_json
from common.study.grid import read_grid, state
from common.study.slurm import SCRIPT, submit


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def needs_slurm():
    if not os.environ.get("SLURM_TEST"):
        pytest.skip("no Slurm: see make test-slurm")


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_grid_runs_as_an_array_and_a_stopped_task_is_requeued(tmp_path, tiny_set):
    needs_slurm()
    path = small_grid(tmp_path, tiny_set, [1, 2], **LONGER)
    runs = read_grid(path)
    words = ["run", "--grid", path, "--launcher", "slurm", "--sbatch=--time=60"]
    said = door(*words).communicate()[0]
    job = said.split("job ")[1].split(":")[0]
    assert "2 runs, 1 at a time" in said, said
    wait_for(lambda: (runs[0].folder / "log.jsonl").exists())
    subprocess.run(["scancel", "--signal=TERM", "--batch", f"{job}_0"], check=True)
    wait_for(lambda: all(state(run)[0] == "finished" for run in runs))
    first = read_json(runs[0].folder / "provenance.json")
    assert first["step"] > 0 and len(first["earlier_starts"]) == 1  # requeued, and gone on with
    wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout)
    assert "every run is finished" in door(*words).communicate()[0]


def test_without_slurm_it_says_so(tmp_path, tiny_set, monkeypatch):
    runs = read_grid(small_grid(tmp_path, tiny_set, [1, 2]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match="no sbatch"):
        submit(runs, 1, ["true"], [])


def test_what_is_handed_to_slurm(tmp_path, tiny_set, monkeypatch):
    runs = read_grid(small_grid(tmp_path, tiny_set, [1, 2]))
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\necho "17;test"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert submit(runs, 3, ["./run_grid.sh", "run", "a b"], ["--gres=gpu:1"]) == "17"
    script = tmp_path / "runs/logs/grid.sbatch"
    output = f"--output={script.parent}/slurm_%A_%a.log"
    words = ["--parsable", output, "--gres=gpu:1", str(script)]
    assert (tmp_path / "words").read_text().split() == words
    text = script.read_text()
    assert "--array=0-1%3" in text and "--requeue" in text and "run 'a b' --only" in text
    assert all(run.name in text for run in runs) and text.startswith(SCRIPT[:11])
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("awkward", ['it\'s [1] "#"', "50% $HOME `a`;b", "-x *? {c}"])
def test_names_and_folders_with_any_sign_reach_the_task_whole(tmp_path, monkeypatch, awkward):
    """The script is run as Slurm would run it, with sbatch and the command pretended."""
    name = json.dumps(awkward)
    path = write_grid(tmp_path / "g.yaml", a=group(axes={"run.name": ["first", awkward]}))
    runs = read_grid(path, [f"run.output_dir={json.dumps(str(tmp_path / awkward))}"])
    (tmp_path / "bin").mkdir()
    for command, says in (
        ("sbatch", 'echo 1; printf "%s\\n" "$@" >'),
        ("me", 'printf "%s\\n" "$@" >'),
    ):
        (tmp_path / f"bin/{command}").write_text(f"#!/bin/sh\n{says} '{tmp_path}/{command}.txt'\n")
        (tmp_path / f"bin/{command}").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    submit(runs, 1, ["me", awkward, name], [])
    words = (tmp_path / "sbatch.txt").read_text().splitlines()
    logs = tmp_path / awkward / "logs"
    assert words == [
        "--parsable",
        f"--output={logs}/slurm_%A_%a.log".replace(awkward, awkward.replace("%", "%%")),
        f"{logs}/grid.sbatch",
    ]
    env = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", words[-1]], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done
    *first, only = (tmp_path / "me.txt").read_text().splitlines()
    assert first == [awkward, name]
    chosen = [r.name for r in runs if fnmatch.fnmatch(r.name, only.removeprefix("--only="))]
    assert chosen == [awkward]
