"""Who may know whom: scripts import common, never each other; common imports no script."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = [p for p in ROOT.glob("*.py")]
COMMON = sorted((ROOT / "common").rglob("*.py"))


def imported(path):
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert all(alias.name != "*" for alias in node.names), "no star"
            yield node.module


@pytest.mark.parametrize("path", SCRIPTS + COMMON, ids=lambda p: p.stem)
def test_nobody_imports_a_script(path):
    assert not {p.stem for p in SCRIPTS} & {name.split(".")[0] for name in imported(path)}


COMMANDS = (
    "synthetic",
    "pack",
    "annotate",
    "compare",
    "export",
    "predict",
    "review",
    "sets/deeppcb",
)  # the rest of common/ itself is the science
FOR_ALL = {f"common.running.{name}" for name in ("keyed", "errors", "progress")}


def room(path):
    """`commands`, the folder below common/ that a module lies in, or `science`."""
    name = path.relative_to(ROOT / "common").with_suffix("").as_posix()
    if name in COMMANDS:
        return "commands"
    folder = name.split("/")[0]
    return folder if folder in ("running", "sets", "study", "inspection") else "science"


MAY_IMPORT = {
    "science": ("science",),
    "sets": ("science", "sets"),
    "running": ("science", "running"),
    "inspection": ("science", "running", "inspection"),
    "commands": ("science", "running", "sets", "inspection", "commands"),
    "study": ("science", "running", "sets", "study"),
}


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.stem)
def test_each_room_imports_only_what_it_may(path):
    for name in imported(path):
        if name.split(".")[0] == "common" and name not in FOR_ALL:
            other = ROOT / f"{name.replace('.', '/')}.py"
            other = other if other.exists() else other.with_suffix("") / "__init__.py"
            assert room(other) in MAY_IMPORT[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.stem)
def test_the_config_stays_outside_common(path):
    names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
    arguments = {n.arg for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg)}
    if room(path) not in ("running", "study"):
        assert not {"cfg"} & (names | arguments)
    methods = ("simclr", "byol", "barlow", "lejepa", "dino", "mae")
    strings = {
        n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
    }
    assert not set(methods) & strings, "common knows no method by name"


def test_modules_stay_small():
    for path in COMMON:
        assert len(path.read_text().splitlines()) <= 250, path
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 300, path
