"""Every score in a sentence about a study stands in its kept results or a table of them."""

import csv
import json
import re

import pytest
from conftest import ROOT

from common.study.grid import read_grid
from common.study.report import write_report
from common.study.results import paper_values

PLACES = (  # page, heading, grid; the runs are kept in docs/results/GRID
    ("README.md", "# Which self-supervised features reveal rare defects?", "boards"),
    ("README.md", "## What is known", "boards"),
    ("docs/findings.md", "## The study on circuit boards", "boards"),
    ("docs/findings.md", "## Choosing among settings without labels", "label_free"),
)
WORDS = {  # as the page names them: as the tables do
    "supervised": "supervised",
    "BYOL": "byol",
    "Barlow Twins": "barlow",
    "SimCLR": "simclr",
    "LeJEPA": "lejepa",
    "DINO": "dino",
    "MAE": "mae",
    "random": "random",
    "everything a defect": "everything a defect",
    "pooled": "pooled",
}
SCORE = re.compile(r"(?<![\w.])[-−]?\.\d{2,3}\b")


def section(page, heading):
    text = (ROOT / page).read_text().split(f"{heading}\n")[1].split("\n## ")[0]
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def parts(text):
    """Sentences, and rows of tables, each with what is named in it or, of a sentence, before it."""
    for paragraph in text.split("\n\n"):
        if paragraph.lstrip().startswith("|"):
            yield from paragraph.strip().splitlines()
            continue
        before = ""
        for sentence in re.split(r"(?<=[.:;?])\s+(?=[A-Z`(])", " ".join(paragraph.split())):
            yield f"{before} || {sentence}" if not named(sentence) else sentence
            before = sentence


def named(text):
    return {name for word, name in WORDS.items() if word in text}


def tables_of(folder):
    """[(what a row is about, its numbers)] of every CSV of a report."""
    rows = []
    for path in folder.glob("*.csv"):
        with open(path, newline="") as file:
            for row in csv.reader(file):
                numbers = [float(c) for c in row if re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", c)]
                rows.append((" ".join(row[:4]), numbers))
    return rows


def results_in(folder):
    """The same of what each run scored by itself."""
    rows = []
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        scores = [result[key] for key in ("train", "val_offline", "val_offline_fixed")]
        scores += [of for of in result["val_normal_only"].values() if isinstance(of, dict)]
        numbers = [n for of in scores for n in of.values() if isinstance(n, float)]
        rows.append((result["method"], numbers))
    return rows


def unfounded(text, rows):
    """Scores of a text that stand in no row about what the sentence names; a sign may be turned."""
    found = []
    for part in parts(text):
        about = named(part)
        theirs = [(key[2], [value]) for key, value in paper_values().items()] * ("paper" in part)
        numbers = [n for label, of in rows + theirs if any(a in label for a in about) for n in of]
        for shown in SCORE.findall(part.split(" || ")[-1]):
            value, half = abs(float(shown.replace("−", "-"))), 0.5 * 10 ** -len(shown.split(".")[1])
            if not any(abs(abs(n) - value) <= half + 1e-9 for n in numbers):
                found.append((shown, part))
    return found


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """{grid: the rows of its runs and of its reports}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for grid in {grid for _, _, grid in PLACES}:
            kept = f"docs/results/{grid}"
            runs = read_grid(f"configs/grid/{grid}.yaml", [f"run.output_dir={kept}"])
            found[grid] = results_in(ROOT / kept)
            for probe in ("offline", "offline_fixed"):
                folder = tmp_path_factory.mktemp(probe)
                write_report(runs, folder, probe=probe)
                found[grid] += tables_of(folder)
    return found


@pytest.fixture(params=PLACES, ids=lambda place: place[1])
def study(request, tables):
    page, heading, grid = request.param
    return section(page, heading), tables[grid]


def test_every_score_stands_in_a_table(study):
    text, rows = study
    assert len(SCORE.findall(text)) > 5
    assert not unfounded(text, rows)


def test_a_score_that_is_made_up_is_found(study):
    text, rows = study
    shown = next(iter(SCORE.findall(text)))
    assert unfounded(text.replace(shown, ".999", 1), rows)
