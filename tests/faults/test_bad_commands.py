"""The commands on a team's own images: what people give them, and files that somebody changed."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import exit_code
from PIL import Image
from refusal import refused
from test_odd_study import forge_array

from common import annotate, compare, export, pack, predict, review
from common.study.__main__ import main as study

DEEP = "[" * 100_000
MAIN = {
    "predict": predict.main,
    "annotate": annotate.main,
    "review": review.main,
    "export": export.main,
    "pack": pack.main,
    "compare": compare.main,
    "study": study,
}


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
    """Folder with a run, 12 images in class folders, their CSVs and their scores."""
    folder, rng = tmp_path_factory.mktemp("scored"), np.random.default_rng(0)
    for i in range(12):
        place = folder / "new" / ("free" if i % 2 else "crack")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:02}.png")
    shutil.copytree(finished, folder / "runs/run")
    (folder / "empty").mkdir()
    words = "--run", folder / "runs/run", folder / "new", "--out", folder / "s.csv"
    assert exit_code(predict.main, *words, "--workers", 0) == 0
    assert exit_code(annotate.main, folder / "new", "--out", folder / "csv") == 0
    return folder


def here(scored, tmp_path):
    """A copy that a case may change."""
    shutil.copytree(scored, tmp_path / "at")
    return tmp_path / "at"


def text(name, content):
    """Another content of a file."""
    return lambda at: (at / name).write_text(content)


def gone(name):
    return lambda at: (at / name).unlink()


def nothing(at):
    pass


def record(name, **changes):
    """A JSON file with other values; None takes a key away."""

    def change(at):
        content = json.loads((at / name).read_text()) | changes
        content = {k: v for k, v in content.items() if v is not None}
        (at / name).write_text(json.dumps(content))

    return change


def cells(name, row, column, value):
    """A CSV with another cell."""

    def change(at):
        with open(at / name, newline="") as file:
            table = list(csv.reader(file))
        table[row][column] = value
        with open(at / name, "w", newline="") as file:
            csv.writer(file).writerows(table)

    return change


PREDICT = "predict --run runs/run new --out o.csv --workers 0"
REVIEW = "review s.csv --out r.html"
LABELS = "annotate new --out csv --labels labels.csv"
EXPORT = "export --run runs/run --out out"
PACK = "pack --image-root new --annotations csv/train.csv --out store"
RUN = "runs/run"
CASES = {  # what is wrong: (command, what happened before, what the message has to name)
    "predict, no run": ("predict --run none new --out o.csv", nothing, ["none"]),
    "predict, a file for a run": ("predict --run s.csv new --out o.csv", nothing, ["s.csv"]),
    "predict, an unfinished run": (PREDICT, gone(f"{RUN}/result.json"), ["result.json"]),
    "predict, a run without weights": (PREDICT, gone(f"{RUN}/last.pt"), ["last.pt"]),
    "predict, damaged weights": (PREDICT, text(f"{RUN}/last.pt", "no"), ["last.pt"]),
    "predict, a run without probe": (PREDICT, gone(f"{RUN}/offline_probe.npz"), ["offline_probe"]),
    "predict, a damaged probe": (
        PREDICT,
        text(f"{RUN}/offline_probe.npz", "no"),
        ["offline_probe.npz"],
    ),
    "predict, a huge probe": (
        PREDICT,
        lambda at: forge_array(at / RUN / "offline_probe.npz", 10**12),
        ["offline_probe.npz"],
    ),
    "predict, damaged scores of the run": (
        PREDICT,
        text(f"{RUN}/val_scores.npz", "no"),
        ["val_scores.npz"],
    ),
    "predict, a damaged config": (PREDICT, text(f"{RUN}/config.yaml", "a: [1"), ["config.yaml"]),
    "predict, a deep result": (PREDICT, text(f"{RUN}/result.json", DEEP), ["result.json"]),
    "predict, no such image": (PREDICT.replace("new", "none"), nothing, ["none"]),
    "predict, a folder without images": (PREDICT.replace(" new", " empty"), nothing, ["empty"]),
    "predict, a prevalence of 0": (f"{PREDICT} --prevalence 0", nothing, ["--prevalence", "0"]),
    "predict, a prevalence in percent": (f"{PREDICT} --prevalence 5", nothing, ["--prevalence"]),
    "predict, a prevalence of text": (f"{PREDICT} --prevalence few", nothing, ["--prevalence"]),
    "predict, a prevalence of nan": (f"{PREDICT} --prevalence nan", nothing, ["--prevalence"]),
    "predict, a recall above 1": (f"{PREDICT} --recall 1.5", nothing, ["--recall"]),
    "predict, false alarms in percent": (
        f"{PREDICT} --false-alarms 2",
        nothing,
        ["--false-alarms"],
    ),
    "predict, a threshold of 2": (f"{PREDICT} --threshold 2", nothing, ["--threshold"]),
    "predict, two thresholds": (f"{PREDICT} --recall .9 --threshold .5", nothing, ["--threshold"]),
    "predict, negative workers": (
        PREDICT.replace("--workers 0", "--workers -1"),
        nothing,
        ["--workers"],
    ),
    "predict, scores are there": (PREDICT.replace("o.csv", "s.csv"), nothing, ["s.csv", "--force"]),
    "predict, a folder for the scores": (PREDICT.replace("o.csv", "new"), nothing, ["new"]),
    "predict, no folder for the scores": (
        PREDICT.replace("o.csv", "none/o.csv"),
        nothing,
        ["none"],
    ),
    "predict, another command's part": (PREDICT, text("o.csv.part", '{"a": 1}\n'), ["o.csv.part"]),
    "predict, no output": ("predict --run runs/run new", nothing, ["--out"]),
    "predict, a CSV without Filename": (
        "predict --run runs/run bad.csv --out o.csv",
        text("bad.csv", "a,b\n1,2\n"),
        ["bad.csv", "Filename"],
    ),
    "predict, a CSV and a folder": (
        "predict --run runs/run csv/val.csv new --out o.csv",
        nothing,
        ["val.csv"],
    ),
    "review, no scores": ("review none.csv --out r.html", nothing, ["none.csv"]),
    "review, a folder for scores": ("review new --out r.html", nothing, ["new"]),
    "review, another table": (REVIEW, text("s.csv", "a,b\n1,2\n"), ["s.csv"]),
    "review, no byte": (REVIEW, text("s.csv", ""), ["s.csv"]),
    "review, a score of text": (REVIEW, cells("s.csv", 2, 1, "high"), ["s.csv", "3", "high"]),
    "review, a score of nan": (REVIEW, cells("s.csv", 2, 1, "nan"), ["s.csv", "3", "nan"]),
    "review, a score that is huge": (REVIEW, cells("s.csv", 2, 1, "1e999"), ["s.csv", "3"]),
    "review, no JSON": (REVIEW, gone("s.json"), ["s.json"]),
    "review, JSON that is none": (REVIEW, text("s.json", "{"), ["s.json"]),
    "review, JSON of another kind": (REVIEW, text("s.json", "[1]"), ["s.json"]),
    "review, deep JSON": (REVIEW, text("s.json", DEEP), ["s.json"]),
    "review, JSON without its root": (REVIEW, record("s.json", root=None), ["s.json", "root"]),
    "review, a root that is no text": (REVIEW, record("s.json", root=3), ["s.json", "root"]),
    "review, a prevalence of text": (
        REVIEW,
        record("s.json", prevalence="few"),
        ["s.json", "prevalence"],
    ),
    "review, validation of another kind": (
        REVIEW,
        record("s.json", validation=[1]),
        ["s.json", "validation"],
    ),
    "review, images that moved": (REVIEW, record("s.json", root="/nowhere"), ["/nowhere"]),
    "review, a page that is there": (REVIEW, text("r.html", "mine"), ["r.html", "--force"]),
    "review, no image wanted": (f"{REVIEW} --most 0", nothing, ["--most"]),
    "review, another order": (f"{REVIEW} --next best", nothing, ["--next"]),
    "annotate, no folder": ("annotate none --out d", nothing, ["none"]),
    "annotate, a file for a folder": ("annotate s.csv --out d", nothing, ["s.csv"]),
    "annotate, no images": ("annotate empty --out d", nothing, ["empty"]),
    "annotate, no such normal": (
        "annotate new --out d --normal good",
        nothing,
        ["--normal", "good"],
    ),
    "annotate, a share of 0": ("annotate new --out d --val-share 0", nothing, ["--val-share"]),
    "annotate, a share of 1": ("annotate new --out d --val-share 1", nothing, ["--val-share"]),
    "annotate, a pattern that is none": (
        ["annotate", "new", "--out", "d", "--group", "["],
        nothing,
        ["--group"],
    ),
    "annotate, CSVs are there": ("annotate new --out csv", nothing, ["csv", "--force"]),
    "annotate, no marks": (LABELS, nothing, ["labels.csv"]),
    "annotate, marks of another table": (LABELS, text("labels.csv", "a,b\n"), ["labels.csv"]),
    "annotate, marks of no kind": (
        LABELS,
        text("labels.csv", "Filename,Defect\ncrack/00.png,yes\n"),
        ["labels.csv:2", "yes"],
    ),
    "annotate, marks of unknown images": (
        LABELS,
        text("labels.csv", "Filename,Defect\nx.png,1\n"),
        ["labels.csv", "x.png"],
    ),
    "annotate, check of no table": ("annotate new --check none.csv", nothing, ["none.csv"]),
    "export, no run": ("export --run none --out out", nothing, ["none"]),
    "export, an unfinished run": (EXPORT, gone(f"{RUN}/result.json"), ["result.json"]),
    "export, damaged weights": (EXPORT, text(f"{RUN}/last.pt", "no"), ["last.pt"]),
    "export, a file for the folder": ("export --run runs/run --out s.csv", nothing, ["s.csv"]),
    "export, a folder that is used": (
        f"{EXPORT}",
        lambda at: ((at / "out").mkdir(), (at / "out/README.md").write_text("mine")),
        ["out", "--force"],
    ),
    "pack, no images": (PACK.replace("new", "none"), nothing, ["none"]),
    "pack, no table": (PACK.replace("train.csv", "none.csv"), nothing, ["none.csv"]),
    "pack, a file for the store": (PACK.replace("store", "s.csv"), nothing, ["s.csv"]),
    "pack, another form": (f"{PACK} --form zip", nothing, ["--form"]),
    "pack, no side": (f"{PACK} --short-side 0", nothing, ["--short-side"]),
    "pack, a damaged index": (
        PACK,
        lambda at: ((at / "store").mkdir(), (at / "store/store.json").write_text("{")),
        ["store:", "another folder"],
    ),
    "compare, no run": ("compare none", nothing, ["none"]),
    "compare, an unfinished run": (f"compare {RUN}", gone(f"{RUN}/result.json"), ["result.json"]),
    "compare, a deep result": (f"compare {RUN}", text(f"{RUN}/result.json", DEEP), ["result.json"]),
    "compare, no CSV": (
        f"compare {RUN}",
        text(f"{RUN}/config.yaml", "a: 1\n"),
        ["config.yaml"],
    ),
    "study, no grid": ("study plan --grid none.yaml", nothing, ["none.yaml"]),
    "study, a grid of text": ("study plan --grid g.yaml", text("g.yaml", "x\n"), ["g.yaml"]),
    "study, a grid without groups": (
        "study plan --grid g.yaml",
        text("g.yaml", "groups: {}\n"),
        ["g.yaml", "groups"],
    ),
    "study, a config that is not there": (
        "study plan --grid g.yaml",
        text("g.yaml", "groups: {a: {configs: [none.yaml], axes: {}, overrides: {}}}\n"),
        ["g.yaml", "none.yaml"],
    ),
    "study, no command": ("study", nothing, ["command"]),
    "study, another command": ("study start", nothing, ["start"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_command(case, scored, tmp_path, capsys, count, monkeypatch):
    at = here(scored, tmp_path)
    command, before, words = CASES[case]
    before(at)
    monkeypatch.chdir(at)
    name, *argv = command if isinstance(command, list) else command.split()
    refused(MAIN[name], argv, words, at, capsys, count, f"commands, {name}", own={"lock"})
