"""Odd and forged files and names in a study: each is named, and the rest goes on."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_yaml, write_set
from small import make_up

from common.metrics import all_scores
from common.running.errors import UserError
from common.running.folder import read_json, write_json
from common.running.log import read_log
from common.running.progress import write_error
from common.study.evaluate import load_scores
from common.study.grid import read_grid
from common.study.report import write_report
from common.study.results import collect
from simclr import main

DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def runs_of(folder, words, p="[0.05, 0.45]"):
    words = [*words, f"run.output_dir={folder / 'runs'}", f"data.train_defect_proportion={p}"]
    runs = read_grid(ROOT / "configs/grid/mini.yaml", words)
    runs = [r for r in runs if "methods" in r.groups and r.cfg.method in ("simclr", "byol")]
    for run in runs:
        make_up(run, np.random.default_rng(len(run.name)))
    return runs


def forge_array(path, shape):
    """An .npy header that asks for more than any memory holds."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape},), }}"
    header += " " * (117 - len(header)) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(path, "w") as file:
        for name in ("logit", "label", "classes", "class_names"):
            file.writestr(f"{name}.npy", content)


def lengths(path):
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **arrays | {"label": arrays["label"][:-1]})


ODD = {  # file of a run: what happens to it
    "log.jsonl, deep": ("log.jsonl", lambda path: path.write_text(DEEP + "\n")),
    "log.jsonl, text": ("log.jsonl", lambda path: path.write_text("not JSON\n")),
    "log.jsonl, a list": ("log.jsonl", lambda path: path.write_text("[1]\n")),
    "log.jsonl, bytes": ("log.jsonl", lambda path: path.write_bytes(b"\xff\xfe\n")),
    "log.jsonl, a folder": ("log.jsonl", lambda path: (path.unlink(), path.mkdir())),
    "result.json, deep": ("result.json", lambda path: path.write_text(DEEP)),
    "result.json, a folder": ("result.json", lambda path: (path.unlink(), path.mkdir())),
    "val_scores.npz, huge": ("val_scores.npz", lambda path: forge_array(path, 10**12)),
    "val_scores.npz, lengths": ("val_scores.npz", lengths),
    "val_scores.npz, text": ("val_scores.npz", lambda path: path.write_text("no")),
}


@pytest.mark.parametrize("case", ODD)
def test_a_broken_run_is_named_and_the_others_are_reported(case, tiny_set, tmp_path):
    runs = runs_of(tmp_path, tiny_set)
    name, harm = ODD[case]
    harm(runs[0].folder / name)
    finished, missing = collect(runs)
    assert len(finished) == len(runs) - 1 and list(missing) == [runs[0].name]
    assert str(runs[0].folder / name) in missing[runs[0].name]
    assert "finished" not in missing[runs[0].name].split(":")[0]


def only_defects(label):
    return np.ones_like(label)


def no_label(label):
    return np.full_like(label, -1)


@pytest.mark.parametrize("of", [only_defects, no_label])
def test_validation_of_one_kind_or_none_is_reported(of, tmp_path):
    """What cannot be known is left out; the page is made."""
    words = write_set(tmp_path / "set")
    for name in ("train", "val"):
        path = tmp_path / f"set/{name}.csv"
        header, *lines = path.read_text().splitlines()
        cells = ",0,0,0,1" if of is only_defects else ",,,,"
        lines = [line.split(",")[0] + cells for line in lines]
        path.write_text("\n".join([header, *lines]) + "\n")
    runs = runs_of(tmp_path, words, "null")
    for run in runs:
        path = run.folder / "val_scores.npz"
        with np.load(path) as stored:
            arrays = dict(stored)
        classes, names = np.zeros_like(arrays["classes"]), [str(n) for n in arrays["class_names"]]
        label = of(arrays["label"])
        np.savez(path, **arrays | {"label": label, "classes": classes})
        scores = all_scores(arrays["logit"], label, classes, names)
        result = read_json(run.folder / "result.json")
        splits = "train", "val", "val_offline", "val_offline_fixed"
        write_json(run.folder / "result.json", result | dict.fromkeys(splits, scores))
    page = write_report(runs, tmp_path / "report").read_text()
    assert f"{len(runs)} of {len(runs)} runs" in page
    assert (tmp_path / "report/performance_val.csv").exists()


@pytest.mark.parametrize("first", ["lejepa", "simclr"])
def test_the_order_of_methods_in_a_grid_is_free(first, tiny_set, tmp_path):
    grid = read_yaml(ROOT / "configs/grid/label_free.yaml")
    grid["groups"] = dict(sorted(grid["groups"].items(), key=lambda g: first not in g[0]))
    (tmp_path / "g.yaml").write_text(json.dumps(grid))
    runs = read_grid(tmp_path / "g.yaml", [*tiny_set, f"run.output_dir={tmp_path / 'runs'}"])
    assert runs[0].cfg.method == first
    for i, run in enumerate(runs):
        make_up(run, np.random.default_rng(i))
    page = write_report(runs, tmp_path / "report").read_text()
    assert "24 of 24 runs" in page and "<td>pooled" in page


def test_a_number_that_overflowed_does_not_count(tiny_set, tmp_path):
    run = runs_of(tmp_path, tiny_set)[0]
    with open(run.folder / "log.jsonl", "a") as log:
        for a, b in ((None, None), (1.0, None), (2.0, None)):
            record = {"kind": "step", "epoch": 9, "diagnostics": {"a": a, "b": b}}
            log.write(json.dumps(record) + "\n")
    (entry,) = collect([run])[0]
    assert entry.diagnostics() == {"a": 1.5, "b": None}


def test_readers_of_odd_files(tmp_path):
    (tmp_path / "x.json").write_text(DEEP)
    assert read_json(tmp_path / "x.json") is None
    forge_array(tmp_path / "val_scores.npz", 10**12)
    with pytest.raises(UserError, match="val_scores.npz"):
        load_scores(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"kind": "step"}\n{"ki')
    assert read_log(tmp_path / "log.jsonl") == [{"kind": "step"}]


def test_dollars_in_class_names_are_dollars(tmp_path):
    words = write_set(tmp_path / "set")
    for word in words[1:]:
        path = Path(word.partition("=")[2])
        path.write_text(path.read_text().replace("RB", "$x^$", 1).replace("FS", "a$\\frac", 1))
    runs = runs_of(tmp_path, words, "[0.25]")
    page = write_report(runs, tmp_path / "report")
    text = page.read_text()
    assert "A part that could not be made" not in text and "$x^$" in text


@pytest.mark.parametrize("name, shown", [("2024", "2024"), ("null", "null"), ("true", "true")])
def test_groups_may_have_any_name(name, shown, tiny_set, tmp_path):
    (tmp_path / "grid.yaml").write_text(
        f"groups:\n  {name}:\n    configs: [configs/simclr_r18.yaml]\n    axes: {{seed: [1]}}\n"
        "    overrides: {data.train_defect_proportion: 0.25}\n"
    )
    runs = read_grid(tmp_path / "grid.yaml", [*tiny_set, f"run.output_dir={tmp_path / 'runs'}"])
    assert runs[0].groups == (shown,)
    make_up(runs[0], np.random.default_rng(0))
    assert write_report(runs, tmp_path / "report").exists()


def test_terminal_escapes_do_not_reach_the_terminal(capsys):
    write_error("a\x1b[31mb\r\x07\x9bc\td\ne\udcff")
    assert capsys.readouterr().err == "a\\x1b[31mb\\r\\x07\\x9bc\td\ne\\udcff\n"


def test_two_configs_are_a_mistake(capsys):
    config = str(ROOT / "configs/simclr_r18.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["--config", config, "--config", config])
    assert stop.value.code == 2
    assert "--config stands twice" in capsys.readouterr().err
