"""From a folder to CSVs by group, marks into CSVs, and the check for shortcuts."""

import csv
import functools
import os
import re
import shutil

import numpy as np
import pytest
from conftest import exit_code
from PIL import Image

from common.annotate import classes_of, groups_of, main, split
from common.annotations import read_annotations, read_split
from common.inspection.shortcuts import check, cue_auroc, date_of
from common.running.errors import UserError

call = functools.partial(exit_code, main)


def rows_of(path):
    with open(path, newline="") as file:
        return {row["Filename"]: row for row in csv.DictReader(file)}


def draw(path, seed, defect=False, size=(30, 30)):
    """A picture of noise, with a bright square where it is a defect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(90, 160, (*size, 3), dtype=np.uint8)
    if defect:
        pixels[4:12, 4:12] = 255
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """80 images of 40 parts, two exposures each: 24 good, 8 with a crack, 8 with a hole."""
    root = tmp_path_factory.mktemp("classes") / "parts"
    for part in range(40):
        kind = "good" if part < 24 else "crack" if part < 32 else "hole"
        for exposure in range(2):
            name = f"{kind}/p{7 * part % 100:03}_{exposure}.png"
            draw(root / name, 2 * part + exposure, kind != "good")
    (root / "good" / "notes.txt").write_text("no image")
    return root


def test_class_folders_become_csvs_by_group(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(classes, "--out", out, "--group", r"p(\d+)_") == 0
    train, val = read_split(out / "train.csv", out / "val.csv")
    assert train.class_names == val.class_names == ("crack", "hole")
    both = rows_of(out / "train.csv") | rows_of(out / "val.csv")
    assert len(both) == 80 == len(train) + len(val)
    for name, row in both.items():
        kind = name.split("/")[0]
        assert row["Defect"] == str(int(kind != "good"))
        assert (row["crack"], row["hole"]) == (str(int(kind == "crack")), str(int(kind == "hole")))
    parts = [
        {re.search(r"p(\d+)_", n)[1] for n in rows_of(out / f"{s}.csv")} for s in ("train", "val")
    ]
    assert not parts[0] & parts[1]
    for kind, n in (("good", 48), ("crack", 16), ("hole", 16)):
        in_val = sum(name.startswith(kind) for name in rows_of(out / "val.csv"))
        assert in_val == pytest.approx(0.3 * n, abs=1.01)
    said = capsys.readouterr()
    assert "40 groups; --group finds something in 80 of 80 names" in said.err
    assert "1 other files are no images" in said.err
    assert re.search(r"val.csv: \d+ images: \d+ good, \d crack, \d hole", said.out)
    again = tmp_path / "again"
    assert call(classes, "--out", again, "--group", r"p(\d+)_") == 0
    assert (again / "val.csv").read_bytes() == (out / "val.csv").read_bytes()
    assert call(classes, "--out", out) == 2 and "--force overwrites" in capsys.readouterr().err
    assert call(classes, "--out", out, "--force", "--val-share", 0.5) == 0
    assert len(rows_of(out / "val.csv")) == pytest.approx(40, abs=3)


def test_a_flat_folder_is_not_labelled(tmp_path, capsys):
    for i in range(20):
        draw(tmp_path / "flat" / f"v{i // 5}_{i}.png", i)
    assert call(tmp_path / "flat", "--out", tmp_path, "--group", r"^v\d") == 0
    train, val = read_split(tmp_path / "train.csv", tmp_path / "val.csv")
    assert (train.defect == -1).all() and (val.defect == -1).all() and len(val) == 5
    assert "no check for shortcuts" in capsys.readouterr().err


def test_what_folders_are():
    names = ["a/x.png", "Good/y.png", "z.png", "a/b/w.png"]
    assert classes_of(names) == (["a", "Good", None, "a"], "Good")
    assert classes_of(names, "a") == (["a", "Good", None, "a"], "a")
    assert classes_of(["OK/x", "ok/y"], "ok") == (["OK", "ok"], "ok")  # OK is a class of Sewer-ML
    assert classes_of(["x.png"]) == ([None], None)
    for wrong, normal in ((["a/x", "b/y"], None), (["ok/x", "good/y"], None), (names, "none")):
        with pytest.raises(UserError, match="--normal.*; which of these"):
            classes_of(wrong, normal)


def test_copies_stay_together(classes, tmp_path, capsys):
    root = shutil.copytree(classes, tmp_path / "parts")
    (root / "good" / "notes.txt").unlink()
    source = sorted((root / "good").iterdir())[:6]
    for i, path in enumerate(source):
        shutil.copy(path, root / "good" / f"p9{i}0_0.png")
    assert call(root, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "6 images are copies of another" in said and f"good/{source[0].name} = " in said
    val = set(rows_of(tmp_path / "out" / "val.csv"))
    for i, path in enumerate(source):
        assert (f"good/{path.name}" in val) == (f"good/p9{i}0_0.png" in val)


def test_groups():
    pattern = re.compile(r"_(\d+)")
    names = ["a_1", "b_1", "c_2", "d", "e", "f_2"]
    found = groups_of(names, ["x", "y", "z", "u", "u", "y"], pattern)
    assert found[0] == found[1] == found[2] == found[5]  # 1 and 2 meet in the same bytes
    assert found[3] == found[4] != found[0]
    assert len(set(groups_of(names, [None] * 6))) == 6
    assert len(set(groups_of(names, [None] * 6, re.compile(r"_\d")))) == 4


def test_a_split_is_no_matter_of_order_and_keeps_one_of_each_kind():
    names = [f"{i}.png" for i in range(60)]
    kinds = ["n"] * 50 + ["d"] * 9 + ["rare"]
    first = split(names, kinds, range(60), 0.3)
    order = np.random.default_rng(0).permutation(60)
    again = split([names[i] for i in order], [kinds[i] for i in order], range(60), 0.3)
    assert [first[i] for i in order] == again
    assert sum(first[:50]) == 15 and sum(first[50:59]) == 3 and not first[59]


def test_marks_fill_empty_cells(classes, tmp_path, capsys):
    out = tmp_path / "out"
    call(classes, "--out", out)
    train = rows_of(out / "train.csv")
    names = list(train)
    lines = (out / "train.csv").read_text().splitlines()
    emptied = names[:10]
    for i, line in enumerate(lines):
        if line.split(",")[0] in emptied:
            lines[i] = line.split(",")[0] + ",,,"
    (out / "train.csv").write_text("\n".join(lines) + "\n")
    before = (out / "train.csv").read_bytes()
    marks = {
        emptied[0]: 1,
        emptied[1]: 0,
        emptied[2]: "",
        names[20]: 1 - int(train[names[20]]["Defect"]),
    }
    labels = tmp_path / "labels.csv"
    labels.write_text("Filename,Defect\n" + "".join(f"{k},{v}\n" for k, v in marks.items()))
    capsys.readouterr()
    assert call(classes, "--out", out, "--labels", labels) == 0
    said = capsys.readouterr()
    assert "2 of 3 marks filled in, 1 unsure" in said.out and "1 marks contradict" in said.err
    now = rows_of(out / "train.csv")
    assert now[emptied[0]]["Defect"] == "1" and now[emptied[1]]["Defect"] == "0"
    assert now[emptied[2]]["Defect"] == "" and now[names[20]] == train[names[20]]
    assert (out / "train_1.csv").read_bytes() == before and list(now) == names
    table = read_annotations(out / "train.csv")
    assert (table.defect == -1).sum() == 8 and table.class_names == ("crack", "hole")
    assert call(classes, "--out", out, "--labels", labels) == 0
    assert (out / "train_2.csv").exists()
    for name, why in ((list(rows_of(out / "val.csv"))[0], "val.csv"), ("no.png", "does not name")):
        labels.write_text(f"Filename,Defect\n{name},1\n")
        kept = (out / "train.csv").read_bytes()
        assert call(classes, "--out", out, "--labels", labels) == 2
        error = capsys.readouterr().err
        assert why in error and name in error and (out / "train.csv").read_bytes() == kept


def test_separators_and_spellings_stay(classes, tmp_path):
    (tmp_path / "train.csv").write_text("note;Filename;Defect\na;.\\x.png;\nb;y.png;True\n")
    (tmp_path / "val.csv").write_text("Filename,Defect\nz.png,1\n")
    (tmp_path / "labels.csv").write_text("Filename,Defect\nx.png,1\n")
    assert call(classes, "--out", tmp_path, "--labels", tmp_path / "labels.csv") == 0
    text = (tmp_path / "train.csv").read_text()
    assert text == "note;Filename;Defect\na;.\\x.png;1\nb;y.png;True\n"
    (tmp_path / "train.csv").write_text('Filename;Defect;"notes, a, b, c"\nx.png;;"p, q"\n')
    assert call(classes, "--out", tmp_path, "--labels", tmp_path / "labels.csv") == 0
    assert (tmp_path / "train.csv").read_text() == "Filename;Defect;notes, a, b, c\nx.png;1;p, q\n"


# ---- shortcuts ----


def test_one_cue():
    rng, y = np.random.default_rng(0), np.repeat((0, 1), 500)
    up = rng.normal(y * 2.0)
    assert cue_auroc(up, y, up, y) > 0.85
    assert cue_auroc(rng.permutation(up), y, rng.permutation(up), y) == pytest.approx(0.5, abs=0.06)
    middle = np.where(y, rng.normal(0, 0.2, 1000), rng.normal(0, 2, 1000))  # up and down
    assert cue_auroc(middle, y, middle, y) > 0.85
    known = np.where(y, 1.0, np.nan)  # only defects have one
    assert cue_auroc(np.where(y, up, np.nan), y, known, y) > 0.99
    assert cue_auroc(np.ones(1000), y, up, y) is None
    assert cue_auroc(up[:500], y[:500], up, y) is None


def test_dates_in_names():
    assert date_of("line/2024-03-07_1.png") == date_of("x20240307.png") == 738952
    for name in ("x1234567890.png", "2024-13-07.png", "2023-02-31.png", "12024030712.png"):
        assert np.isnan(date_of(name))


def planted(folder, cue):
    """80 images; defects differ in one cue."""
    rows, rng = [], np.random.default_rng(1)
    for i, at in enumerate(rng.permutation(80)):
        defect = i % 2
        name, size = f"{at:03}.png", (30, 30)
        if cue == "width":
            size = (30, 30 + 4 * defect)
        if cue == "name order":
            name = f"{80 * defect + at:03}.png"
        if cue == "date":
            name = f"{at:03}_2024-0{1 + defect}-{1 + at % 28:02}.png"
        draw(folder / "images" / name, i, cue == "mean grey" and defect, size)
        if cue == "bytes" and defect:
            with open(folder / "images" / name, "ab") as file:
                file.write(bytes(5000))
        rows.append(f"{name},{defect}")
    (folder / "all.csv").write_text("\n".join(["Filename,Defect", *rows]) + "\n")


@pytest.mark.parametrize("cue", ["bytes", "width", "name order", "date", "mean grey", None])
def test_a_planted_cue_is_found(cue, tmp_path, capsys):
    planted(tmp_path, cue)
    assert call(tmp_path / "images", "--check", tmp_path / "all.csv") == 0
    said = capsys.readouterr().out
    warned = [line for line in said.splitlines() if line.startswith("warning")]
    of_file = {"bytes": "size of its file", "width": "width", "date": "date"}
    if cue in (None, "mean grey"):
        assert not [w for w in warned if "width" in w or "date" in w or "order" in w]
    else:
        assert [w for w in warned if of_file.get(cue, "order of names") in w]
    value = re.search(r"mean grey ([\d.]+)", said)[1]
    assert (float(value) > 0.9) == (cue == "mean grey")
    assert "16x16 thumbnails" in said and "on 40 images (20 defects)" in said


def test_a_single_csv_is_halved_by_group(tmp_path):
    planted(tmp_path, None)
    seen = []

    def half(names, labels):
        seen.append((len(names), int(labels.sum())))
        return np.arange(len(names)) % 4 < 2

    check(tmp_path / "images", [tmp_path / "all.csv"], half)
    assert seen == [(80, 40)]


def test_unreadable_images_are_passed_over(classes, tmp_path):
    root = shutil.copytree(classes, tmp_path / "parts")
    (root / "good" / "p000_0.png").write_text("no image")
    assert call(root, "--out", tmp_path / "out") == 0


def test_wrong_calls(classes, tmp_path, capsys):
    for words, why in (
        ((classes,), "either --out or --check"),
        ((classes, "--out", tmp_path / "o", "--check", "x.csv"), "either --out or --check"),
        ((classes, "--check", "a.csv", "b.csv", "c.csv"), "got 3"),
        ((classes, "--out", tmp_path / "o", "--group", "("), "no regular expression"),
        ((classes, "--out", tmp_path / "o", "--normal", "fine"), "crack, good, hole"),
        ((tmp_path / "none", "--out", tmp_path / "o"), "no such file or folder"),
        ((classes, "--out", tmp_path / "o", "--val-share", "1"), "inside 0 to 1"),
        ((classes, "--out", tmp_path / "o", "--labels", tmp_path / "l.csv"), "l.csv: cannot be"),
    ):
        assert call(*words) == 2 and why in capsys.readouterr().err


def test_names_and_folders_that_cannot_be_used(classes, tmp_path, capsys):
    root = shutil.copytree(classes, tmp_path / "parts")
    content = sorted((root / "good").iterdir())[1].read_bytes()
    with open(os.fsencode(root / "good") + b"/Ri\xdf.png", "wb") as file:
        file.write(content + b"0")
    (root / "good" / "linked").symlink_to(tmp_path)
    assert call(root, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "Ri\\udcdf" in said or "Ri\\xdf" in said
    assert "linked: a link to a folder" in said and "2 files or folders are not in these" in said
    read_split(tmp_path / "out" / "train.csv", tmp_path / "out" / "val.csv")
    (root / "crack").rename(root / "Defect")
    assert call(root, "--out", tmp_path / "no") == 2
    assert "folder Defect: a column of that name" in capsys.readouterr().err
    assert call(classes, "--out", tmp_path / "no", "--group", r"^()") == 2
    assert "1 groups of images cannot be split" in capsys.readouterr().err
    assert not (tmp_path / "no" / "train.csv").exists()


def test_unlabelled_images_beside_classes_are_for_training(classes, tmp_path):
    root = shutil.copytree(classes, tmp_path / "parts")
    for i in range(20):
        draw(root / f"new_{i}.png", 1000 + i)
    assert call(root, "--out", tmp_path / "out") == 0
    train, val = read_split(tmp_path / "out" / "train.csv", tmp_path / "out" / "val.csv")
    assert (train.defect == -1).sum() == 20 and (val.defect >= 0).all()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])  # a spreadsheet's
def test_marks_of_another_folder_are_refused(delimiter, classes, tmp_path, capsys):
    assert call(classes, "--out", tmp_path / "out") == 0
    name = next(iter(rows_of(tmp_path / "out" / "train.csv")))
    for root, code in ((tmp_path, 2), (classes, 0), ("", 0)):
        text = f"Filename,Defect,Root\n{name},1,{root}\n".replace(",", delimiter)
        (tmp_path / "l.csv").write_text(text)
        assert call(classes, "--out", tmp_path / "out", "--labels", tmp_path / "l.csv") == code
        assert (code == 2) == ("marks of images in" in capsys.readouterr().err)
