"""The README says what the code says: deviations, files, commands."""

import importlib
import inspect
import re
from fnmatch import fnmatch

import pytest
from conftest import ROOT
from small import METHODS, read_log, run

from common.running.config import load_config

README = (ROOT / "README.md").read_text()
MARK = re.compile(r"(?:Deviation|our reading): ([^:\n]{3,40}):")
SOURCES = [
    *ROOT.glob("*.py"),
    *(ROOT / "common").rglob("*.py"),
    *(ROOT / "configs").rglob("*.yaml"),
]


def section(title):
    """Text of one section of the README."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_every_deviation_is_in_the_table_and_every_row_in_the_code():
    marks = {m for path in SOURCES for m in MARK.findall(path.read_text())}
    rows = set(re.findall(r"^\| (.+?) \|", section("Differences from the paper"), re.M))
    assert marks == rows - {"topic"}
    assert len(marks) > 20


def test_every_mark_names_its_topic():
    for path in SOURCES:
        text = path.read_text()
        assert len(MARK.findall(text)) == len(re.findall(r"Deviation:|our reading:", text)), path


FILES = sorted(set(re.findall(r"`((?:common|configs|tests)/[\w./]+)`", README)))


@pytest.mark.parametrize("path", FILES)
def test_files_that_it_names_are_there(path):
    assert (ROOT / path).exists()


def expand(name):
    """a{b,c}d -> abd, acd."""
    found = re.match(r"(.*?)\{([^}]*)\}(.*)$", name)
    if found is None:
        return [name]
    return [x for part in found[2].split(",") for x in expand(found[1] + part + found[3])]


def test_every_logged_key_is_explained(tmp_path, tiny_set):
    names = re.findall(r"`([\w*{},]+)`", section("Logged keys"))
    names = [x for name in names for x in expand(name)] + ["kind"]
    folder = run("dino", tmp_path, tiny_set, "keys", "optimization.epochs=1")
    for record in read_log(folder):
        for key in [*record, *record.get("diagnostics", {})]:
            assert any(fnmatch(key, name) for name in names if name not in ("train_*", "val_*")), (
                key
            )


COMMANDS = re.findall(
    r"^(?:python|torchrun --nproc_per_node=\d) (\w+)\.py ((?:.*\\\n)*.*)$", README, re.M
)


def test_commands_that_it_names_are_accepted():
    assert len(COMMANDS) >= 4
    for script, words in COMMANDS:
        argv = words.replace("\\\n", " ").split(" #")[0].split()
        if "optimization.lrr=0.1" not in argv:  # shown for the error that it gets
            load_config(importlib.import_module(script).Config, argv)


def test_losses_have_the_arguments_that_it_names():
    named = re.findall(r"`(\w+_loss)\(([^)]*)\)`", section("One script, annotated"))
    assert len(named) == 6
    for name, arguments in named:
        (loss,) = {
            getattr(m, name) for m in map(importlib.import_module, METHODS) if hasattr(m, name)
        }
        expected = list(inspect.signature(loss).parameters)
        given = arguments.split(", ")
        if given[-1] == "...":
            given, expected = given[:-1], expected[: len(given) - 1]
        assert given == expected
