"""The page on which scored images are marked: what is on it, and in a real browser what it does."""

import csv
import json
import re
import shutil
import time

import numpy as np
import pytest
from chromium import CHROMIUM, Page
from conftest import PATIENCE, exit_code
from PIL import Image
from small import run

from common import annotate, predict
from common.annotations import read_annotations
from common.inspection.scores_file import read_scores
from common.review import chosen, main


def data_of(page):
    text = page.read_text()
    return json.loads(re.search(r'<script id="data".*?>(.*?)</script>', text, re.S)[1])


ODD = "a,b \"<i>x<!-- &'.png"


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
    """30 images, one with an odd name, one unreadable, scored at a prevalence of .1."""
    folder, rng = tmp_path_factory.mktemp("scored"), np.random.default_rng(0)
    (folder / "new").mkdir()
    for i in range(30):
        pixels = rng.integers(0, 120, (36, 40, 3), dtype=np.uint8)
        pixels[5:20, 5:20] = 8 * i
        Image.fromarray(pixels).save(folder / "new" / (ODD if i == 29 else f"{i:02}.png"))
    (folder / "new" / "bad.png").write_text("no image")
    words = "--run", finished, folder / "new", "--out", folder / "s.csv", "--prevalence", 0.1
    assert exit_code(predict.main, *words, "--workers", 0) == 1
    return folder


def test_most_likely_first(scored, tmp_path):
    out = tmp_path / "r.html"
    assert exit_code(main, scored / "s.csv", "--out", out, "--most", 12) == 0
    data, rows = data_of(out), read_scores(scored / "s.csv")[0]
    wanted = sorted((r for r in rows if r["score"]), key=lambda r: -float(r["score"]))[:12]
    assert [image["file"] for image in data["images"]] == [row["file"] for row in wanted]
    assert [i["score"] for i in data["images"]] == [float(row["score"]) for row in wanted]
    assert data["total"] == 30 and data["prevalence"] == 0.1
    assert all(i["picture"].startswith("/9j/") for i in data["images"])
    assert exit_code(main, scored / "s.csv", "--out", out) == 2
    assert exit_code(main, scored / "s.csv", "--out", out, "--force") == 0
    assert len(data_of(out)["images"]) == 30


def test_least_certain_first(scored):
    rows, about = read_scores(scored / "s.csv")
    at = about["threshold"]["score"]
    found = chosen(rows, about, 500, "uncertain")
    off = [abs(row["score"] - at) for row in found]
    assert off == sorted(off) and len(off) == 30
    assert [r["file"] for r in chosen(rows, about, 5, "score", {"03.png", "04.png"})] in (
        ["03.png", "04.png"],
        ["04.png", "03.png"],
    )
    with pytest.raises(Exception, match="no threshold"):
        chosen(rows, about | {"threshold": None}, 5, "uncertain")


def test_only_what_is_not_labelled(scored, tmp_path):
    (tmp_path / "train.csv").write_text("Filename,Defect\n00.png,1\n01.png,\n02.png,\nx.png,\n")
    words = "--unlabelled", tmp_path / "train.csv"
    assert exit_code(main, scored / "s.csv", "--out", tmp_path / "r.html", *words) == 0
    names = {image["file"] for image in data_of(tmp_path / "r.html")["images"]}
    assert names == {"01.png", "02.png"}


def test_names_cannot_leave_their_place(scored, tmp_path):
    assert exit_code(main, scored / "s.csv", "--out", tmp_path / "r.html") == 0
    text = (tmp_path / "r.html").read_text()
    assert "<i>x" not in text and text.count("</script>") == 2 and text.isascii()
    assert ODD in {image["file"] for image in data_of(tmp_path / "r.html")["images"]}


def test_images_that_moved_or_are_gone(scored, tmp_path, capsys):
    moved = shutil.copytree(scored / "new", tmp_path / "moved")
    (moved / "03.png").unlink()
    words = scored / "s.csv", "--out", tmp_path / "r.html", "--image-root", moved
    assert exit_code(main, *words) == 1
    assert "1 images cannot be read" in capsys.readouterr().err
    assert len(data_of(tmp_path / "r.html")["images"]) == 29
    for words, why in (
        ((tmp_path / "none.csv",), "none.json: cannot be read"),
        ((scored / "s.csv", "--image-root", tmp_path / "none"), "is no folder"),
        ((scored / "s.csv", "--most", 0), "at least 1"),
    ):
        assert exit_code(main, *words, "--out", tmp_path / "x.html") == 2
        assert why in capsys.readouterr().err


# ---- in a browser ----

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def outlook(page):
    ids = ("at", "precision", "recall", "images")
    return [page.js(f"document.getElementById('{name}').textContent") for name in ids]


@needs_browser
def test_slider_and_prevalence(scored, tmp_path):
    assert exit_code(main, scored / "s.csv", "--out", tmp_path / "r.html") == 0
    data = data_of(tmp_path / "r.html")
    with Page(tmp_path / "r.html", tmp_path) as page:
        assert outlook(page)[0] == "50 %"  # where predict decided
        for at in (0, len(data["curve"]) // 2, len(data["curve"]) - 1):
            for p in (0.1, 0.4):
                page.js(
                    f"""$("threshold").value = {at}; $("prevalence").value = {p};
                    $("prevalence").dispatchEvent(new Event("input"))"""
                )
                score, recall, alarms = data["curve"][at]
                flagged = p * recall + (1 - p) * alarms
                shown = outlook(page)
                assert shown[3] == f"{int(flagged * 30 + 0.5)} of 30"
                assert float(shown[1][:-2]) == pytest.approx(100 * p * recall / flagged, abs=0.51)
                assert float(shown[2][:-2]) == pytest.approx(100 * recall, abs=0.51)
                below = page.js("document.querySelectorAll('figure.below').length")
                assert below == sum(image["score"] < score for image in data["images"])
        c = data["calibration"]
        odds = c["slope"] * data["images"][0]["score"] + c["intercept"]
        odds += np.log(0.4 / 0.6) - np.log(c["share"] / (1 - c["share"]))
        text = page.js("document.querySelector('figure b').textContent")
        chance = float(text.split()[1])
        assert chance == pytest.approx(100 / (1 + np.exp(-odds)), abs=0.51)
        page.js("$('threshold').focus(); $('threshold').value = 3")
        page.press("ArrowRight")
        assert page.js("$('threshold').value") == "4"  # the keyboard moves the slider, too
        assert page.js("document.querySelectorAll('figcaption i').length") == 30


@needs_browser
def test_look_mark_retrain(finished, tiny_set, tmp_path):
    """Three marks by keyboard alone, a reload, a save; annotate --labels; a run that has them."""
    data = {word.split("=")[0]: word.split("=")[1] for word in tiny_set}
    root, csvs = data["data.image_root"], tmp_path / "csvs"
    csvs.mkdir()
    for name in ("train", "val"):
        shutil.copy(data[f"data.{name}_csv"], csvs / f"{name}.csv")
    scores, page_path = tmp_path / "s.csv", tmp_path / "r.html"
    words = "--run", finished, csvs / "train.csv", "--image-root", root, "--workers", 0
    assert exit_code(predict.main, *words, "--out", scores) == 0
    words = "--next", "uncertain", "--unlabelled", csvs / "train.csv"
    assert exit_code(main, scores, "--out", page_path, *words) == 0
    names = [image["file"] for image in data_of(page_path)["images"]]
    assert len(names) == 8
    with Page(page_path, tmp_path) as page:
        count = "document.getElementById('count').textContent"
        page.press("s")
        assert "nothing is marked" in page.js("$('told').textContent")
        page.press("d", "n", "u", "z", "ArrowRight", "u", "d", "z")
        assert page.js(count) == "1 defect, 1 normal, 1 unsure, 5 left"
        page.reload()
        assert page.js(count) == "1 defect, 1 normal, 1 unsure, 5 left"
        assert page.js("current") == 2  # the first that is not marked
        page.press("z", "u", "ArrowLeft", "ArrowLeft", "End")
        assert page.js("current") == 7
        page.press("s")
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "labels.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    with open(tmp_path / "labels.csv", newline="") as file:
        marks = {row["Filename"]: row["Defect"] for row in csv.DictReader(file)}
    assert marks == {names[0]: "1", names[1]: "0", names[3]: ""}
    assert exit_code(annotate.main, root, "--out", csvs, "--labels", tmp_path / "labels.csv") == 0
    table = read_annotations(csvs / "train.csv")
    assert (table.defect == -1).sum() == 6
    own = [f"data.image_root={root}", f"data.train_csv={csvs / 'train.csv'}", tiny_set[2]]
    quick = "data.train_defect_proportion=null", "optimization.epochs=1"
    again = run("simclr", tmp_path, own, "again", *quick)
    assert json.loads((again / "result.json").read_text())["train_rows"]["unlabelled"] == 6


@needs_browser
def test_odd_names_are_text_and_come_back(scored, tmp_path):
    assert exit_code(main, scored / "s.csv", "--out", tmp_path / "r.html") == 0
    with Page(tmp_path / "r.html", tmp_path) as page:
        at = page.js(f"data.images.findIndex(i => i.file === {json.dumps(ODD)})")
        shown = page.js(f"document.querySelectorAll('figcaption span')[{at}].textContent")
        assert (
            shown == ODD and page.js("document.querySelectorAll('main figcaption i i').length") == 0
        )
        page.js(f"move({at})")
        page.press("d", "s")
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "labels.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    table = read_annotations(tmp_path / "labels.csv")
    assert table.name(0) == ODD and table.defect.tolist() == [1]


@needs_browser
def test_what_nobody_knows_is_not_shown(scored, tmp_path):
    """Without a prevalence there is no precision; without labels in validation, no rates at all."""
    shutil.copy(scored / "s.csv", tmp_path / "s.csv")
    about = json.loads((scored / "s.json").read_text())
    blind = about | {"prevalence": None, "calibration": None}
    nothing = blind | {"threshold": None, "validation": {"score_recall_false_alarms": []}}
    for name, content in (("blind", blind), ("nothing", nothing)):
        (tmp_path / "s.json").write_text(json.dumps(content))
        page_path = tmp_path / f"{name}.html"
        assert (
            exit_code(main, tmp_path / "s.csv", "--out", page_path, "--image-root", scored / "new")
            == 0
        )
        with Page(page_path, tmp_path / name) as page:  # a browser that has seen no mark yet
            at, precision, recall, images = outlook(page)
            assert precision == "unknown" and (recall == "unknown") == (name == "nothing")
            assert ("of the normals" in images) == (name == "blind")
            page.press("d", "n")
            assert page.js("$('count').textContent").startswith("1 defect, 1 normal")
