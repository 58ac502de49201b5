"""DeepPCB's tiles: the rule against a slow form, the real set's counts, restarts, bad inputs."""

import csv
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from common.annotations import check_disjoint, read_annotations
from common.sets import deeppcb
from common.sets.deeppcb import CLASSES, main, read_boards, read_boxes, tables, tiles_of

BOXES = {  # of three hand-made images: x1 y1 x2 y2 type
    "00041000": "10 10 40 40 1\n100 200 156 230 6\n\n",
    "12000007": "0 0 640 640 2\n600 600 640 640 3\n610 610 620 620 4",
    "92000001": "",
}


def slow_tiles(boxes):
    """The rule, pixel by pixel and in fractions."""
    kept = {}
    for row in range(5):
        for column in range(5):
            inside, touched = set(), False
            for x1, y1, x2, y2, kind in boxes:
                mask = np.zeros((640, 640), bool)
                mask[y1:y2, x1:x2] = True
                tile = mask[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
                share = Fraction(int(tile.sum()), int(mask.sum()))
                touched |= share > Fraction(2, 100)
                inside |= {int(kind)} if share >= Fraction(1, 2) else set()
            if inside or not touched:
                kept[row, column] = [kind in inside for kind in range(1, 7)]
    return kept


def fast_tiles(boxes):
    """tiles_of with plain lists."""
    tiles = tiles_of(np.array(boxes, np.int64).reshape(-1, 5))
    return {place: classes.tolist() for place, classes in tiles.items()}


@pytest.fixture
def root(tmp_path):
    """A small PCBData in the public repository's layout, with templates and lists beside it."""
    rng, root = np.random.default_rng(0), tmp_path / "PCBData"
    for name, text in BOXES.items():
        folder = root / f"group{name[:5]}"
        images, labels = folder / name[:5], folder / f"{name[:5]}_not"
        images.mkdir(parents=True), labels.mkdir()
        for kind in ("test", "temp"):
            coarse = rng.integers(0, 256, (40, 40), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((640, 640))
            image.save(images / f"{name}_{kind}.jpg")
        (labels / f"{name}.txt").write_text(text)
    (root / "trainval.txt").write_text("group00041/00041/00041000.jpg ...\n")
    return root


def label(root, name):
    """The file of defects of an image."""
    return root / f"group{name[:5]}" / f"{name[:5]}_not" / f"{name}.txt"


def image(root, name):
    """The tested image."""
    return root / f"group{name[:5]}" / name[:5] / f"{name}_test.jpg"


def contents(folder):
    """Bytes and time of every file below folder, by relative name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def refused(capsys, *argv):
    """The one sentence with which the command ends in exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_the_rule_is_the_slow_form_of_it():
    rng = np.random.default_rng(1)
    for size in (2, 30, 60, 150, 600):
        for count in (0, 1, 4, 9):
            corner = rng.integers(0, 640 - 2, (count, 2))
            other = np.minimum(corner + rng.integers(1, size + 1, (count, 2)), 640)
            boxes = np.hstack([corner, other, rng.integers(1, 7, (count, 1))])
            assert fast_tiles(boxes) == slow_tiles(boxes)


@pytest.mark.parametrize(
    ("box", "defects", "left_out"),
    [
        ((10, 10, 40, 40), {(0, 0)}, set()),
        ((118, 10, 138, 20), {(0, 0), (0, 1)}, set()),  # half and half: both
        ((117, 10, 137, 20), {(0, 0)}, {(0, 1)}),
        ((118, 118, 138, 138), set(), {(0, 0), (0, 1), (1, 0), (1, 1)}),  # a quarter each
        ((79, 10, 129, 20), {(0, 0)}, set()),  # 1 of 50 columns is .02, and not more
        ((80, 10, 129, 20), {(0, 0)}, {(0, 1)}),
        ((630, 300, 640, 310), {(2, 4)}, set()),  # rows go down, columns to the right
        ((0, 0, 640, 640), set(), {(r, c) for r in range(5) for c in range(5)}),
    ],
)
def test_tiles_on_the_edges_of_the_rule(box, defects, left_out):
    tiles = fast_tiles([(*box, 5)])
    assert tiles == slow_tiles([(*box, 5)])
    assert {place for place, classes in tiles.items() if any(classes)} == defects
    assert len(tiles) == 25 - len(left_out) and not left_out & set(tiles)
    assert all(tiles[place] == [kind == "copper" for kind in CLASSES] for place in defects)


def test_from_a_clone_to_a_set_that_is_read(root, tmp_path, capsys):
    out = tmp_path / "new" / "set"
    main([str(root), "--out", str(out)])
    said = capsys.readouterr().out
    train, val = read_annotations(out / "train.csv"), read_annotations(out / "val.csv")
    check_disjoint(train, val)
    for part in (train, val):
        assert part.class_names == CLASSES, "`group` is no class"
        assert f"{part.path}: {len(part)} tiles, {part.defect.sum()} defects" in said
        assert np.array_equal(part.classes.any(1), part.defect == 1)
    want = {}
    for name in BOXES:
        grey = np.asarray(Image.open(image(root, name)))
        for (row, column), classes in slow_tiles(read_boxes(label(root, name))).items():
            tile = grey[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            want[f"{name[:5]}/{name}_{row}{column}.png"] = (classes, tile > 127, name[:5])
    texts = [(out / name).read_text() for name in ("train.csv", "val.csv")]
    rows = [row for text in texts for row in csv.DictReader(text.splitlines())]
    assert {row["Filename"] for row in rows} == set(want) and len(rows) == len(want)
    assert {row["group"] for row in rows[len(train) :]} == {"00041"}
    for row in rows:
        classes, white, group = want[row["Filename"]]
        assert [row[name] == "1" for name in CLASSES] == classes and row["group"] == group
        with Image.open(out / "images" / row["Filename"]) as stored:
            assert stored.mode == "1" and np.array_equal(np.asarray(stored), white)
    written = {str(p.relative_to(out / "images")) for p in (out / "images").rglob("*.png")}
    assert written == set(want) and len(list(out.iterdir())) == 3


def test_the_real_set_has_the_known_counts(tmp_path):
    root = SHARED / "deeppcb" / "PCBData"
    if not root.is_dir():
        pytest.skip(f"no DeepPCB in {root}")
    boards = read_boards(root)
    files = {name: list(csv.DictReader(t.splitlines())) for name, t in tables(boards).items()}
    for name, n, n_defect in (("train.csv", 21386, 5429), ("val.csv", 12202, 3107)):
        defect = [row["Defect"] == "1" for row in files[name]]
        assert (len(defect), sum(defect)) == (n, n_defect)
    rows = [row for name in files for row in files[name]]
    groups = Counter(row["group"] for row in rows)
    defects = Counter(row["group"] for row in rows if row["Defect"] == "1")
    assert {group: (n, round(defects[group] / n, 3)) for group, n in groups.items()} == {
        "00041": (4932, 0.277),
        "12000": (309, 0.259),
        "12100": (3245, 0.253),
        "12300": (2211, 0.247),
        "13000": (4862, 0.254),
        "20085": (7416, 0.269),
        "44000": (2210, 0.273),
        "50600": (1773, 0.209),
        "77000": (2408, 0.209),
        "90100": (1636, 0.262),
        "92000": (2586, 0.226),
    }
    path, tiles = next(iter(boards.items()))
    deeppcb.write_tiles(path, tiles, tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == len(tiles)


def test_an_interrupted_cut_is_finished_by_the_same_command(root, tmp_path, monkeypatch):
    whole, out, write = tmp_path / "whole", tmp_path / "out", deeppcb.write_tiles
    main([str(root), "--out", str(whole)])

    def killed(path, *rest):
        if path.stem.startswith("12000007"):
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(deeppcb, "write_tiles", killed)
    with pytest.raises(SystemExit) as stop:
        main([str(root), "--out", str(out)])
    assert stop.value.code == 75 and not list(out.glob("*.csv")) and list(out.rglob("*.png"))
    next(out.rglob("*.png")).write_bytes(b"")  # half-written
    monkeypatch.undo()
    main([str(root), "--out", str(out)])
    assert {k: v[0] for k, v in contents(out).items()} == {
        k: v[0] for k, v in contents(whole).items()
    }


def test_what_a_folder_holds_is_never_overwritten(root, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(root), "--out", str(out)])
    before = contents(out)
    main([str(root), "--out", str(out)])
    assert contents(out) == before, "the same set: kept"
    label(root, "92000001").write_text("5 5 50 50 3\n")
    assert "holds something else" in refused(capsys, root, "--out", out)
    assert contents(out) == before
    label(root, "92000001").write_text("")
    next((out / "images").rglob("*.png")).unlink()
    assert "holds something else" in refused(capsys, root, "--out", out)
    source = contents(root)
    assert "holds something else" in refused(capsys, root, "--out", root)
    assert contents(root) == source
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(capsys, root, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in refused(capsys, root, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["absent", "file", "clone", "group"])
def test_a_wrong_folder_is_refused(root, tmp_path, capsys, where):
    (tmp_path / "file").write_text("")
    folder = {"clone": tmp_path, "group": root / "group00041"}.get(where, tmp_path / where)
    error = refused(capsys, folder, "--out", tmp_path / "out")
    assert str(folder) in error and "PCBData" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        "1 2 3 4",
        "1 2 3 4 5 6",
        "1,2,30,40,5",
        "a b c d e",
        "1.5 2 30 40 5",
        "-1 2 30 40 5",
        "1 2 30 40 0",
        "1 2 30 40 7",
        "30 2 1 40 5",
        "1 40 30 2 5",
        "1 2 1 40 5",
        "1 2 641 40 5",
        "1 2 30 999999999999999999999 5",
        "\u0661 2 30 40 5",
        "\0\1\2",
    ],
)
def test_a_malformed_box_is_named_with_its_line(root, tmp_path, capsys, line):
    path = label(root, "12000007")
    path.write_text(f"1 2 30 40 5\n{line}\n", encoding="utf-8")
    error = refused(capsys, root, "--out", tmp_path / "out")
    assert f"{path}:2: " in error and "x1 y1 x2 y2 type" in error
    assert not (tmp_path / "out").exists()


def test_images_and_defects_come_in_pairs(root, tmp_path, capsys):
    label(root, "12000007").rename(tmp_path / "kept.txt")
    error = refused(capsys, root, "--out", tmp_path / "out")
    assert str(label(root, "12000007")) in error
    (tmp_path / "kept.txt").rename(label(root, "12000007"))
    image(root, "92000001").unlink()
    error = refused(capsys, root, "--out", tmp_path / "out")
    assert str(label(root, "92000001")) in error and "image" in error
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_used_is_named(root, tmp_path, capsys):
    path = image(root, "12000007")
    whole = path.read_bytes()
    for damaged in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert str(path) in refused(capsys, root, "--out", tmp_path / "out")
    Image.new("L", (640, 639)).save(path)
    error = refused(capsys, root, "--out", tmp_path / "out")
    assert f"{path}: 640 x 639 pixels, expected 640 x 640" in error
    path.write_bytes(whole)
    main([str(root), "--out", str(tmp_path / "out")])  # mended: the same command finishes
    assert (tmp_path / "out" / "train.csv").exists()
