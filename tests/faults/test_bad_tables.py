"""CSVs as people save them, file names as they come, and splits that cannot be made."""

import csv
import io

import pytest
from conftest import write_set
from refusal import refused
from small import OVERRIDES, arguments

from simclr import main

pytestmark = pytest.mark.usefixtures("narrow")

HEADER = "Filename,RB,FS,ND,Defect"


def rows(change):
    """A change of the parsed rows -> one of the text."""

    def of_text(text):
        table = list(csv.reader(io.StringIO(text)))
        changed = change(table)
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(table if changed is None else changed)
        return lines.getvalue()

    return of_text


def cell(row, column, value):
    """One cell replaced; row 0 is the header."""

    def change(table):
        table[row][column] = value

    return rows(change)


def renamed(name):
    """The first image's name."""
    return cell(1, 0, name)


def without(column):
    return rows(lambda table: [[c for i, c in enumerate(row) if i != column] for row in table])


TABLES = {  # what is wrong: (text of train.csv -> text or bytes), what the message has to name
    "no byte": (lambda t: "", ["train.csv", "empty"]),
    "a header alone": (lambda t: t.partition("\n")[0] + "\n", ["train.csv", "no row"]),
    "no header": (lambda t: t.partition("\n")[2], ["train.csv", "'Filename' is missing"]),
    "no Filename": (without(0), ["train.csv", "Filename"]),
    "no Defect": (without(4), ["train.csv", "Defect"]),
    "a column renamed": (cell(0, 4, "defect"), ["train.csv", "Defect"]),
    "a column twice": (cell(0, 1, "Defect"), ["train.csv", "Defect", "twice"]),
    "Filename twice": (cell(0, 1, "Filename"), ["train.csv", "Filename", "twice"]),
    "UTF-16, as Excel's Unicode text": (lambda t: t.encode("utf-16"), ["train.csv", "UTF-8"]),
    "Latin-1": (lambda t: renamed("\xe4.png")(t).encode("latin-1"), ["train.csv", "UTF-8"]),
    "an Excel file": (lambda t: b"PK\x03\x04\x14\0\6\0\x08\0\xff", ["train.csv"]),
    "a web page": (lambda t: "<!DOCTYPE html>\n<html>404</html>\n", ["train.csv", "Filename"]),
    "a quote left open": (lambda t: t.replace("train_0003", '"train_0003'), ["train.csv"]),
    "a short row": (lambda t: t.replace("train_0003.png,1", "train_0003.png"), ["train.csv:5"]),
    "a long row": (lambda t: t.replace("train_0003.png", "train_0003.png,9"), ["train.csv:5"]),
    "a row cut off": (lambda t: t[:-9], ["train.csv:65"]),
    "yes for 1": (cell(1, 4, "yes"), ["train.csv:2", "'yes'", "0, 1 or empty"]),
    "a class number for 1": (cell(1, 4, "2"), ["train.csv:2", "'2'"]),
    "a share for 1": (cell(1, 4, "0.5"), ["train.csv:2", "'0.5'"]),
    "NaN for empty": (cell(1, 4, "NaN"), ["train.csv:2", "'NaN'"]),
    "minus one for empty": (cell(1, 4, "-1"), ["train.csv:2", "'-1'"]),
    "a class of no value": (cell(1, 1, "x"), ["train.csv:2", "RB", "'x'"]),
    "a name twice": (renamed("train_0009.png"), ["train.csv:11", "train_0009.png", "once"]),
    "a name twice, written otherwise": (renamed("./train_0009.png"), ["train_0009.png", "once"]),
    "no name": (renamed(""), ["train.csv:2", "empty"]),
    "a name that is above": (renamed("../../etc/passwd"), ["train.csv:2", "outside"]),
    "a name that goes up inside": (renamed("a/../../x.png"), ["train.csv:2", "outside"]),
    "a name with its disk": (renamed("C:\\x.png"), ["train.csv:2", "outside"]),
    "a share's name": (renamed("\\\\server\\x.png"), ["train.csv:2", "outside"]),
    "a whole path": (renamed("/etc/passwd"), ["train.csv:2", "outside"]),
    "a line break in a name": (renamed("a\nb.png"), ["train.csv:3", "line break"]),
    "an escape in a name": (renamed("a\x1b[2J.png"), ["train.csv:2", "control character"]),
    "a null byte in a name": (renamed("a\0b.png"), ["train.csv:2"]),
    "a file that is not there": (renamed("none.png"), ["none.png", "train.csv:2"]),
    "another case": (renamed("TRAIN_0000.png"), ["TRAIN_0000.png", "train.csv:2"]),
    "an accent of two signs": (renamed("a\u0308.png"), ["train.csv:2"]),
    "a name of a formula": (renamed("=cmd|' /C calc'!A0"), ["=cmd", "train.csv:2"]),
    "an option for a name": (renamed("-rf"), ["-rf", "train.csv:2"]),
    "a name longer than a disk has": (renamed("x" * 300 + ".png"), ["train.csv:2"]),
    "a cell of ten megabytes": (renamed("x" * 10_000_000), ["train.csv:2"]),
    "an image of validation": (renamed("val_0000.png"), ["val_0000.png"]),
    "a merge conflict": (lambda t: t.replace("\n", "\n<<<<<<< HEAD\n", 1), ["train.csv:2"]),
    "no label at all, but a proportion": (
        rows(lambda table: [table[0], *([r[0], "", "", "", ""] for r in table[1:])]),
        ["data.train_defect_proportion", "0 normal and 0 defect"],
    ),
}
PLACES = {
    "no such file": (lambda path: None, ["train.csv"]),
    "a folder": (lambda path: path.mkdir(), ["train.csv"]),
    "a link to itself": (lambda path: path.symlink_to(path), ["train.csv"]),
}
SPLITS = {  # counts (normal, defect) of 64 images: overrides, what the message has to name
    "no defect": ((64, 0), ["data.train_defect_proportion=0.1"], ["64 normal and 0 defect"]),
    "no normal": ((0, 64), ["data.train_defect_proportion=0.1"], ["0 normal and 64 defect"]),
    "a share of one in a thousand": (
        (40, 24),
        ["data.train_defect_proportion=0.001"],
        ["data.train_defect_proportion", "0.001"],
    ),
    "a share of nothing": ((40, 24), ["data.train_defect_proportion=0"], ["proportion"]),
    "a share below nothing": ((40, 24), ["data.train_defect_proportion=-0.1"], ["-0.1"]),
    "a share that is no number": ((40, 24), ["data.train_defect_proportion=nan"], ["number"]),
    "no fraction": ((40, 24), ["data.fraction=0"], ["data.fraction"]),
    "more than all": ((40, 24), ["data.fraction=1.5"], ["data.fraction", "1.5"]),
    "a fraction that leaves no defect": (
        (62, 2),
        ["data.fraction=0.02", "data.train_defect_proportion=0.1"],
        ["0 defect"],
    ),
    "a subset larger than the set": ((40, 24), ["data.subset_size=5000"], ["subset_size", "5000"]),
    "a subset of one": (
        (40, 24),
        ["data.subset_size=1", "data.train_defect_proportion=0.25"],
        ["data.subset_size"],
    ),
    "a subset smaller than a batch": (
        (40, 24),
        ["data.subset_size=8", "data.train_defect_proportion=0.25"],
        ["optimization.batch_size", "16"],
    ),
    "a fraction smaller than a batch": (
        (40, 24),
        ["data.fraction=0.1", "data.train_defect_proportion=null"],
        ["optimization.batch_size"],
    ),
    "a batch of one": ((40, 24), ["optimization.batch_size=1"], ["optimization.batch_size"]),
    "no label in the budget": ((40, 24), ["data.labels=0"], ["data.labels"]),
    "a budget beyond the labels": ((40, 24), ["data.labels=65"], ["data.labels", "65"]),
    "a crop of a crop": ((40, 24), ["augmentation.min_scale=nan"], ["augmentation.min_scale"]),
}


def command(overrides, folder, *more):
    return arguments("simclr", overrides, folder / "runs", "run", *OVERRIDES["simclr"], *more)


@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize("case", [*TABLES, *PLACES])
def test_a_table(case, which, tmp_path, capsys, count):
    overrides = write_set(tmp_path / "set", n_train=64, n_val=64)
    path = tmp_path / "set" / f"{which}.csv"
    make, words = (TABLES | PLACES)[case]
    if which == "val":
        if "proportion" in case or "of validation" in case:
            pytest.skip("of training only")  # counted as skipped
        words = [word.replace("train", "val").replace("TRAIN", "VAL") for word in words]
    if case in TABLES:
        text = path.read_text()
        swap = text if which == "train" else text.replace("val_", "train_")
        content = make(swap)
        if which == "val" and isinstance(content, str):
            content = content.replace("train_", "val_").replace("TRAIN_", "VAL_")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        path.unlink()
        make(path)
    argv = command(overrides, tmp_path)
    kind = "tables" if which == "train" else "tables of validation"
    refused(main, argv, words, tmp_path, capsys, count, kind)


@pytest.mark.parametrize("case", SPLITS)
def test_a_split(case, tmp_path, capsys, count):
    (normal, defect), more, words = SPLITS[case]
    overrides = write_set(tmp_path / "set", n_train=64, n_val=6)
    lines = [f"train_{i:04d}.png,{int(i < defect)}" for i in range(normal + defect)]
    (tmp_path / "set/train.csv").write_text("\n".join(["Filename,Defect", *lines]) + "\n")
    argv = command(overrides, tmp_path, *more)
    refused(main, argv, words, tmp_path, capsys, count, "splits")
