"""What a run folder keeps of the code that made it."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import arguments, run, stop_at

import simclr
from common.running import provenance
from common.running.config import load_config
from common.running.folder import read_json
from common.running.process import Place

pytestmark = pytest.mark.usefixtures("narrow")

PLACE = Place(0, 1, torch.device("cpu"))


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_run_keeps_its_script_and_its_csvs_hashes(tmp_path, tiny_set):
    folder = run("simclr", tmp_path, tiny_set, "a", "optimization.epochs=1")
    found = read_json(folder / "provenance.json")
    assert sha(folder / "script.py") == sha(simclr.__file__) == found["script_sha256"]
    csvs = [override.split("=")[1] for override in tiny_set[1:]]
    assert list(found["csv_sha256"].values()) == list(map(sha, csvs))


def test_a_resume_under_another_script_warns_and_keeps_both(
    tmp_path, tiny_set, monkeypatch, capsys
):
    fork = tmp_path / "mine.py"
    fork.write_text(Path(simclr.__file__).read_text() + "\n# mine\n")
    stop_at(monkeypatch, 2)
    with pytest.raises(SystemExit):
        run("simclr", tmp_path, tiny_set, "a")
    monkeypatch.undo()
    before = sha(simclr.__file__)
    capsys.readouterr()
    monkeypatch.setattr(sys.modules["simclr"], "__file__", str(fork))
    folder = run("simclr", tmp_path, tiny_set, "a")
    said, earlier = capsys.readouterr().err, folder / f"script_{before[:8]}.py"
    assert said.count("another script") == 1 and str(earlier) in said
    assert (sha(earlier), sha(folder / "script.py")) == (before, sha(fork))
    found = read_json(folder / "provenance.json")
    assert [s["script_sha256"] for s in (*found["earlier_starts"], found)] == [before, sha(fork)]


@pytest.fixture
def cfg(tiny_set, tmp_path):
    return load_config(simclr.Config, arguments("simclr", tiny_set, tmp_path, "a"))


def test_the_same_script_or_a_fresh_start_gives_no_warning(cfg, tmp_path, capsys, monkeypatch):
    for step in (0, 3):
        provenance.add(tmp_path, cfg, PLACE, step, {})
    (tmp_path / "fork.py").write_text("# another\n")
    monkeypatch.setattr(sys.modules["simclr"], "__file__", str(tmp_path / "fork.py"))
    provenance.add(tmp_path, cfg, PLACE, 0, {})
    assert "warning" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("script*.py"))) == 2
    provenance.add(tmp_path, cfg, PLACE, 3, {})
    assert "warning" not in capsys.readouterr().err  # as it was at the last start


def test_the_script_is_the_one_that_is_run_though_its_config_is_anothers(
    cfg, tmp_path, monkeypatch
):
    """mine.py may import simclr's Config."""
    main = sys.modules["__main__"]
    (tmp_path / "mine.py").write_text("# mine\n")
    monkeypatch.setattr(main, "Config", simclr.Config, raising=False)
    monkeypatch.setattr(main, "__file__", str(tmp_path / "mine.py"), raising=False)
    provenance.add(tmp_path, cfg, PLACE, 0, {})
    assert (tmp_path / "script.py").read_text() == "# mine\n"
    monkeypatch.delattr(main, "__file__")  # a notebook: nothing to keep
    provenance.add(tmp_path, cfg, PLACE, 0, {})
    assert read_json(tmp_path / "provenance.json")["script_sha256"] is None


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git repository with one committed file, in the place of this project."""
    folder = tmp_path / "project"
    (folder / "common/running").mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    monkeypatch.setattr(provenance, "__file__", str(folder / "common/running/provenance.py"))
    return folder


def test_what_differs_from_the_last_commit_is_kept(cfg, project, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    provenance.add(out, cfg, PLACE, 0, {})
    found = read_json(out / "provenance.json")
    assert not (out / "git.diff").exists() and found["git_modified"] is False
    (project / "code.py").write_bytes(b"x = 2  # \xff\n")
    provenance.add(out, cfg, PLACE, 1, {})
    first = (out / "git.diff").read_bytes()
    assert b"-x = 1\n+x = 2  # \xff\n" in first
    assert read_json(out / "provenance.json")["git_diff_sha256"] == sha(out / "git.diff")
    (project / "code.py").write_text("x = 3\n")
    provenance.add(out, cfg, PLACE, 2, {})
    assert b"+x = 3\n" in (out / "git.diff").read_bytes()
    assert [p.read_bytes() for p in out.glob("git_*.diff")] == [first]
    (project / "code.py").write_text("x = 1\n")
    provenance.add(out, cfg, PLACE, 3, {})
    assert not (out / "git.diff").exists() and len(list(out.glob("git_*.diff"))) == 2
    assert "cut" not in capsys.readouterr().err


@pytest.mark.parametrize("lines", [100_000, 3_000_000])  # the pipe is full before git has ended
def test_a_large_difference_is_cut_and_that_is_said(cfg, project, tmp_path, capsys, lines):
    (project / "code.py").write_text("another line\n" * lines)
    provenance.add(tmp_path, cfg, PLACE, 0, {})
    assert (tmp_path / "git.diff").stat().st_size == 1 << 20
    assert "cut at 1 MB" in capsys.readouterr().err


def test_without_git_or_a_repository_there_is_no_difference(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "x.py"))
    provenance.add(tmp_path, cfg, PLACE, 0, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    provenance.add(tmp_path, cfg, PLACE, 0, {})
    found = read_json(tmp_path / "provenance.json")
    assert found["git_commit"] is None and found["git_diff_sha256"] is None
    assert not (tmp_path / "git.diff").exists()
