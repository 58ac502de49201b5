"""Whether a run folder holds the run that is asked for, as status, report and script tell it."""

import errno
import fcntl
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, write_set
from small import arguments, make_up
from test_grid import group, write_grid

import simclr
from common.running import progress, provenance
from common.running.config import load_config
from common.running.errors import UserError
from common.running.folder import read_json
from common.running.standing import open_folder, read_result, standing
from common.study import grid
from common.study.__main__ import main
from common.study.grid import read_grid, state
from common.study.launch import Launcher, claim
from common.study.results import collect
from common.study.slurm import submit


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


class Study:
    """A grid of one run that a config names, finished; its data, its command lines."""

    def __init__(self, folder):
        self.folder, self.data = folder / "runs/mine", write_set(folder / "set", n_train=32)
        self.argv = arguments("simclr", self.data, folder / "runs", "mine")
        self.path = write_grid(folder / "g.yaml", a=group(axes={"seed": [42]}))
        make_up(self.run(), np.random.default_rng(0))

    def run(self, *overrides):
        (run,) = read_grid(self.path, [*self.argv[2:], *overrides])
        return run

    def script(self, *overrides):
        simclr.main([*self.argv, *overrides])

    def csv(self, split):
        return self.folder.parent.parent / f"set/{split}.csv"


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def refuses(study, capsys, *words, overrides=()):
    """Status, report, launcher, Slurm and script all name what is wrong with the words."""
    run = study.run(*overrides)
    at, why = state(run)
    assert at == "refused" and all(word in why for word in words), (at, why)
    command = ["--grid", str(study.path), *study.argv[2:], *overrides]
    main(["status", *command])
    said = capsys.readouterr().out
    assert "1 refused" in said and why in said and "1 left" in said
    main(["plan", *command])
    assert why in capsys.readouterr().out
    assert why in collect([run])[1][run.name]
    with pytest.raises(SystemExit) as stop:
        main(["run", *command])
    assert stop.value.code == 2 and why in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", *command])
    assert why in capsys.readouterr().err
    with pytest.raises(UserError, match="refused") as error:
        submit([run], 1, ["true"], [])
    assert why in str(error.value)
    with pytest.raises(SystemExit) as stop:
        study.script(*overrides)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {why}\n" in said and "\n" not in why
    return why


def test_a_finished_run_is_finished(study, capsys):
    assert state(study.run()) == ("finished", None)
    assert state(study.run("data.num_workers=3", "run.log_every=7")) == ("finished", None)
    main(["status", "--grid", str(study.path), *study.argv[2:]])
    assert capsys.readouterr().out == "1 finished\n0 left\n"
    before = sorted(p.name for p in study.folder.iterdir())
    study.script()
    assert sorted({*before, "lock", "status.json"}) == sorted(os.listdir(study.folder))
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimization.lr=0.001", "optimization.lr: 0.3 -> 0.001"),
        ("seed=7", "seed: 42 -> 7"),
        ("data.subset_size=9", "data.subset_size: null -> 9"),
        ("run.frozen_encoder=true", "run.frozen_encoder: false -> true"),
        ("data.val_csv=other.csv", "data.val_csv"),
    ],
)
def test_another_settings_run_is_not_taken_for_this_one(study, capsys, override, words):
    refuses(study, capsys, "another config", words, "run.name", overrides=[override])


def test_a_checkpoint_and_a_running_process_of_another_config_are_told_too(
    study, capsys, monkeypatch
):
    (study.folder / "result.json").unlink()
    assert state(study.run("seed=7"))[0] == "queued"  # nothing there that counts
    (study.folder / "last.pt").write_bytes(b"")
    refuses(study, capsys, "seed: 42 -> 7", overrides=["seed=7"])
    assert state(study.run("data.val_csv=elsewhere.csv"))[0] == "queued"  # known by its hash
    (study.folder / "last.pt").unlink()
    monkeypatch.setattr(grid, "is_held", lambda path: True)
    assert state(study.run()) == ("running", None)
    assert state(study.run("seed=7"))[0] == "refused"


def test_who_opens_an_empty_folder_says_whose_it_is(study):
    shutil.rmtree(study.folder)
    lock, _ = open_folder(study.folder, study.run().cfg)
    assert standing(study.folder, study.run().cfg, is_held=True) == (None, None)
    assert standing(study.folder, study.run("seed=7").cfg, is_held=True)[0] == "refused"
    lock.close()
    open_folder(study.folder, study.run("seed=7").cfg)[0].close()  # no work is lost


DAMAGE = ["", "{", "[]", "null", '{"val": {"f1": 1}}', "\0" * 100]


@pytest.mark.parametrize("text", DAMAGE)
def test_a_result_that_cannot_be_read_is_told(study, capsys, text):
    (study.folder / "result.json").write_text(text)
    refuses(study, capsys, "result.json", "damaged", "delete")


@pytest.mark.parametrize("key", ["method", "train", "val_offline", "label_free", "seconds"])
def test_a_result_without_one_of_its_keys_is_told(study, capsys, key):
    result = read_result(study.folder)
    for changed in ({k: v for k, v in result.items() if k != key}, result | {key: 3}):
        if key in changed and not isinstance(result[key], dict):
            continue
        (study.folder / "result.json").write_text(json.dumps(changed))
        refuses(study, capsys, "result.json", f"lacks {key}")


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "folder"])
def test_without_its_scores_a_run_is_not_finished(study, capsys, damage):
    path = study.folder / "val_scores.npz"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(content[:-100] if damage == "cut" else b"")
    refuses(study, capsys, "val_scores.npz", "damaged or not there", "result.json")


@pytest.mark.parametrize("damage", ["gone", "empty", "junk", "yaml"])
def test_without_its_config_nobody_knows_whose_result_it_is(study, capsys, damage):
    path = study.folder / "config.yaml"
    path.write_text({"junk": "3", "yaml": "a: 1\na: 2"}.get(damage, ""))
    if damage == "gone":
        path.unlink()
    refuses(study, capsys, "config.yaml", "delete the folder")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_csv_that_has_changed_is_told(study, capsys, split):
    path, before = study.csv(split), study.csv(split).read_bytes()
    path.write_bytes(before.replace(b"0,0,1,0", b"1,0,0,1", 1))  # as long as before
    refuses(study, capsys, f"set/{split}.csv (data.{split}_csv) has changed", "put it back")
    path.write_bytes(before)
    assert state(study.run()) == ("finished", None)


@pytest.mark.parametrize("gone", [["train"], ["val"], ["train", "val"]])
def test_where_a_csv_is_absent_the_run_is_finished_and_that_is_said(study, capsys, gone):
    for split in gone:
        study.csv(split).unlink()
    at, why = state(study.run())
    assert at == "finished" and all(f"{split}.csv" in why for split in gone)
    for command in ("status", "run"):
        with pytest.raises(SystemExit) if command == "run" else pytest.MonkeyPatch.context():
            main([command, "--grid", str(study.path), *study.argv[2:]])
        assert f"1 finished, {why}" in "".join(capsys.readouterr())
    study.script()
    assert why in capsys.readouterr().err
    (entry,), missing = collect([study.run()])
    assert entry.note == why and not missing


def test_a_run_of_before_there_were_hashes_is_finished_and_that_is_said(study):
    for text in ("{}", "{", '{"csv_sha256": null}'):
        (study.folder / "provenance.json").write_text(text)
        at, why = state(study.run())
        assert at == "finished" and "no hash" in why
    (study.folder / "provenance.json").write_text('{"csv_sha256": {"train_csv": null}}')
    assert state(study.run())[0] == "finished"  # it was not readable then
    (study.folder / "provenance.json").unlink()
    assert state(study.run())[0] == "finished"


def test_a_key_that_is_missing_is_a_key_that_is_null(study):
    path = study.folder / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved.pop("patch_size", "gone") is None and saved["data"].pop("subset_size", 0) is None
    for old in (saved, saved | {"later": None}, saved | {"later": {"a": None, "b": {"c": None}}}):
        path.write_text(yaml.safe_dump(old))
        assert state(study.run()) == ("finished", None)
    assert "later" in state_of(study, path, saved | {"later": {"a": 1}})
    assert "later" in state_of(study, path, saved | {"later": 0})
    assert "augmentation" in state_of(study, path, saved | {"augmentation": None})
    assert "seed" in state_of(study, path, {k: v for k, v in saved.items() if k != "seed"})


def state_of(study, path, values):
    path.write_text(yaml.safe_dump(values))
    at, why = state(study.run())
    assert at == "refused"
    return why


def test_a_command_hashes_each_file_once(study, monkeypatch):
    hashed, sha256 = [], provenance.hashlib.sha256
    monkeypatch.setattr(provenance.hashlib, "sha256", lambda: hashed.append(1) or sha256())
    os.utime(study.csv("train"), (1, 1)), os.utime(study.csv("val"), (1, 1))
    monkeypatch.chdir(study.csv("val").parent)
    names = ["train.csv", "train.csv", str(study.csv("train"))]
    data = [SimpleNamespace(train_csv=name, val_csv="val.csv") for name in names]
    hashes = list(map(provenance.csv_hashes, data))
    assert hashes[0] == hashes[1] == hashes[2] and len(hashed) == 2


def test_the_launcher_starts_nothing_where_a_folder_is_anothers(study, monkeypatch):
    def popen(*_, **__):
        raise AssertionError("started")

    monkeypatch.setattr("common.study.launch.subprocess.Popen", popen)
    monkeypatch.setattr("common.study.launch.signal.signal", lambda *_: None)
    assert Launcher([study.run("seed=7")]).run() == 2
    assert Launcher([study.run()]).run() == 0


def test_two_runs_of_one_grid_do_not_share_a_folder(study):
    study.path = write_grid(study.path, a=group(), b=group(**{"optimization.lr": 0.1}))
    with pytest.raises(UserError, match=r"named mine \(optimization.lr: 0.3 -> 0.1\)"):
        study.run()


NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO)


@pytest.fixture
def locks(monkeypatch):
    """Lets every lock fail with an error number."""
    progress.say_once.cache_clear()

    def fail(number):
        def refuse(file, how):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", refuse)
        monkeypatch.setattr(fcntl, "flock", refuse)

    yield fail
    progress.say_once.cache_clear()


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_everything_goes_on_with_one_warning(study, locks, capsys, number):
    locks(number)
    shutil.rmtree(study.folder)
    run, cfg = study.run(), load_config(simclr.Config, study.argv)
    lock, finished = open_folder(study.folder, cfg)
    assert not finished and json.loads((study.folder / "lock").read_text())["pid"] == os.getpid()
    lock.close()
    assert not grid.is_held(study.folder / "lock") and state(run)[0] == "queued"
    with claim(run) as mine:
        assert mine
    said = capsys.readouterr().err
    assert said.count("no locks") == 1 and os.strerror(number) in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_only_a_refusal_means_that_another_holds_it(study, locks, capsys, number):
    open_folder(study.folder, study.run().cfg)[0].close()
    locks(number)
    with pytest.raises(UserError, match="another process is running this run"):
        open_folder(study.folder, study.run().cfg)
    assert grid.is_held(study.folder / "lock")
    with claim(study.run()) as mine:
        assert not mine
    assert "no locks" not in capsys.readouterr().err


def test_a_result_is_that_of_a_finished_run(study, tmp_path):
    assert read_result(study.folder) == read_json(study.folder / "result.json")
    with pytest.raises(UserError, match="no result.json, so no finished run"):
        read_result(tmp_path)
