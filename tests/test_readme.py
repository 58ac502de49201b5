"""README and docs/ say what the code says: deviations, keys, files, links, commands."""

import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import typing
from fnmatch import fnmatch

import numpy as np
import pytest
from conftest import ROOT
from small import METHODS, read_log, run

from common.running.config import load_config
from common.running.errors import ConfigError
from common.running.folder import read_json
from common.study import __main__ as study

PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = README = (ROOT / "README.md").read_text()
ALL = "\n".join(PAGES.values())
MARK = re.compile(r"(?:Deviation|our reading): ([^:\n]{3,40}):")
SOURCES = [
    *ROOT.glob("*.py"),
    *(ROOT / "common").rglob("*.py"),
    *(ROOT / "configs").rglob("*.yaml"),
]


def section(page, title):
    """Text of one section of a page."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[page], re.M | re.S)[1]


def inline(text):
    """What stands between backticks within a line."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230
    for page, text in PAGES.items():
        wide = [line for line in text.splitlines() if len(line) > 105 and line[0] not in "|!"]
        assert not wide, page


# ---- deviations ----


def test_every_deviation_is_in_the_table_and_every_row_in_the_code():
    marks = {m for path in SOURCES for m in MARK.findall(path.read_text())}
    rows = set(re.findall(r"^\| (.+?) \|", PAGES["docs/differences.md"], re.M))
    assert marks == rows - {"topic"}
    assert len(marks) > 20


def test_every_mark_names_its_topic():
    for path in SOURCES:
        text = path.read_text()
        assert len(MARK.findall(text)) == len(re.findall(r"Deviation:|our reading:", text)), path


# ---- files and links ----


def test_files_that_they_name_are_there():
    named = re.findall(r"\b(?:common|configs|tests|docs)/[\w./-]*\w", ALL)
    named += [word for word in inline(ALL) if re.fullmatch(r"[\w./]+\.(py|sh|toml)", word)]
    layout = re.search(r"```\n(.*?)```", section("README.md", "Layout"), re.S)[1]
    named += [word for line in layout.splitlines() for word in line.split("  ")[0].split()]
    made = {"script.py", "configs/mine_r18.yaml"}  # by a run, by the reader
    missing = [name for name in sorted({*named} - made) if not (ROOT / name).exists()]
    assert not missing
    assert len({*named}) > 30


def anchors(text):
    """What GitHub lets a link point at: headings in lower case, hyphens, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_readme_links_every_page():
    assert {f"({page})" for page in PAGES if page != "README.md"} <= {
        f"({path})" for path in re.findall(r"\]\((docs/[\w-]+\.md)", README)
    }


# ---- what a run leaves ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_set):
    """A run folder of DINO, which logs the most."""
    return run("dino", tmp_path_factory.mktemp("runs"), tiny_set, "RUN", "optimization.epochs=1")


def expand(name):
    """a{b,c}d -> abd, acd."""
    found = re.match(r"(.*?)\{([^}]*)\}(.*)$", name)
    if found is None:
        return [name]
    return [x for part in found[2].split(",") for x in expand(found[1] + part + found[3])]


def test_every_logged_key_is_explained(folder):
    names = re.findall(r"`([\w*{},]+)`", section("docs/keys.md", "Logged keys"))
    names = [x for name in names for x in expand(name)] + ["kind"]
    for record in read_log(folder):
        for key in [*record, *record.get("diagnostics", {})]:
            assert any(fnmatch(key, name) for name in names if name not in ("train_*", "val_*")), (
                key
            )


def test_every_file_array_and_group_of_scores_is_explained(folder):
    files = inline(section("docs/keys.md", "The run folder"))
    for path in folder.iterdir():
        assert path.name in {name.rstrip("/") for name in files}
        if path.suffix == ".npz":
            assert {*np.load(path).files} <= {*files}, path.name
    result = read_json(folder / "result.json")
    groups = {key for key, value in result.items() if isinstance(value, dict)} - {"train_rows"}
    assert groups <= {*re.findall(r"^\| `(\w+)` \|", section("docs/keys.md", "Scores"), re.M)}


# ---- commands ----


def commands(text):
    """The words of every command in the bash blocks of a page; arrays are put in."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        block = block.replace("\\\n", " ")
        array = re.compile(r"^(\w+)=\((.*?)\)$", re.M | re.S)
        for name, words in array.findall(block):
            block = block.replace(f'"${{{name}[@]}}"', " ".join(words.split()))
        for line in array.sub("", block).splitlines():
            if words := shlex.split(line, comments=True):
                yield words


grid = functools.cache(study.read_grid)  # the paper's takes seconds


def check_grid(words, monkeypatch):
    """The words after run_grid.sh are understood, and name runs."""
    asked = []
    monkeypatch.setattr(study, "read_grid", lambda path, words: grid(path, tuple(words)))
    for name in ("plan", "run", "status", "report"):
        monkeypatch.setattr(study, name, lambda runs, args: asked.append(runs))
    study.main(words)
    assert asked and asked[0]


def check_module(name, words, monkeypatch, capsys):
    """python -m NAME has the options."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert {word for word in words if word.startswith("--")} <= {*known}


SCRIPT = re.compile(r"(\w+)\.py")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    given = [*commands(PAGES[page]), *map(str.split, inline(PAGES[page]))]
    for words in given:
        match words:
            case ["./run_grid.sh", *rest]:
                check_grid(rest, monkeypatch)
            case ["python", "-m", name, *rest] if "." in name and "NAME" not in name:
                check_module(name, rest, monkeypatch, capsys)
            case ["python", script, "--config", *rest] if SCRIPT.fullmatch(script):
                config = importlib.import_module(script[:-3]).Config
                load_config(config, ["--config", *rest])
            case ["torchrun", count, script, *rest] if SCRIPT.fullmatch(script):
                assert re.fullmatch(r"--nproc_per_node=\d", count)
                load_config(importlib.import_module(script[:-3]).Config, rest)
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, re.M), target


def test_no_command_is_of_a_kind_that_is_not_checked():
    kinds = {words[0] for text in PAGES.values() for words in commands(text)}
    assert kinds <= {"./run_grid.sh", "python", "torchrun", "make", "git"}
    scripts = [words for text in PAGES.values() for words in commands(text) if words[0] == "python"]
    assert all(words[1] == "-m" or words[2] == "--config" for words in scripts)
    assert len(scripts) >= 9


def test_options_of_the_study_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    of_commands = PAGES["docs/own-images.md"]  # whose options they have themselves
    text = ALL.replace(of_commands, "")
    options = [shlex.split(x) for x in inline(text) if re.fullmatch(r"--\w+ [^A-Z]+", x)]
    assert len(options) >= 3
    for words in options:
        check_grid(["report", *words], monkeypatch)
    axes = [x for x in inline(ALL) if re.fullmatch(r"\"?[\w.]+=\[.*\]\"?", x)]
    assert axes
    for words in axes:
        check_grid(["plan", *shlex.split(words)], monkeypatch)


def test_the_mistake_gets_the_answer_that_is_shown(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = re.search(r"^\$ python simclr.py (.*)\nerror: ((?:.+\n)+)```", README, re.M)
    command, answer = shown.groups()
    with pytest.raises(ConfigError) as error:
        load_config(importlib.import_module("simclr").Config, command.split())
    assert str(error.value) == answer.strip()


def keys(config, prefix=""):
    """section.key names of a Config."""
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        yield prefix + field.name
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from keys(kinds[field.name], f"{prefix}{field.name}.")


def test_keys_and_overrides_that_they_name_are_accepted():
    configs = {name: importlib.import_module(name).Config for name in METHODS}
    known = {key for config in configs.values() for key in keys(config)}
    sections = {key.split(".")[0] for key in known if "." in key}
    named = [x for x in inline(ALL) if re.match(r"[a-z_]+\.[a-z_]+(=|$)", x)]
    named = [x for x in named if x.split(".")[0] in sections]
    assert len(named) > 12
    assert {x.partition("=")[0] for x in named} <= known
    for override in (x for x in named if "=" in x):
        refused = 0
        for name, config in configs.items():
            file = sorted((ROOT / "configs").glob(f"{name}_*.yaml"))[0]
            try:
                load_config(config, ["--config", str(file), override])
            except ConfigError:
                refused += 1
        assert refused < len(configs), override


# ---- the annotated script ----


def test_losses_have_the_arguments_that_it_names():
    named = re.findall(r"`(\w+_loss)\(([^)]*)\)`", section("README.md", "One script, annotated"))
    assert len(named) == 7
    for name, arguments in named:
        (loss,) = {
            getattr(m, name) for m in map(importlib.import_module, METHODS) if hasattr(m, name)
        }
        expected = list(inspect.signature(loss).parameters)
        given = arguments.split(", ")
        if given[-1] == "...":
            given, expected = given[:-1], expected[: len(given) - 1]
        assert given == expected


def test_the_lines_that_it_quotes_are_simclrs():
    (quoted,) = re.findall(
        r"```python\n(.*?)```", section("README.md", "One script, annotated"), re.S
    )
    assert quoted.replace(" ", "") in (ROOT / "simclr.py").read_text().replace(" ", "")
