"""The synthetic set: deterministic, consistent labels, exact shares, every class drawn."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from common import synthetic
from common.synthetic import CLASS_WEIGHTS, CLASSES, HEADER, Row, draw_rows, generate, render

DRAWN = sorted(CLASS_WEIGHTS)


def read(folder, split):
    """Rows of one CSV as dicts."""
    with open(folder / f"SewerML_{split}.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """Bytes of every file below folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with 24 train and 12 val images of 32 pixels."""
    folder = tmp_path_factory.mktemp("synthetic")
    assert generate(folder, 24, 12, 32, 5)
    return folder


def test_same_seed_same_bytes_other_seed_other_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "cores", lambda: 1)  # other workers, same bytes
    generate(tmp_path / "again", 24, 12, 32, 5)
    generate(tmp_path / "other", 24, 12, 32, 6)
    assert contents(tmp_path / "again") == contents(made)
    other = contents(tmp_path / "other")
    assert all(other[name] != data for name, data in contents(made).items() if "images" in name)


def test_an_image_depends_on_its_row_only(made):
    rows = draw_rows(24, 12, 5)
    for row in (rows[30], rows[3]):  # alone and out of order
        stored = np.asarray(Image.open(made / "images" / f"{row.index:08d}.png"))
        assert np.array_equal(render(row, 32, 5), stored)


def test_layout_and_labels(made):
    names = {split: [row["Filename"] for row in read(made, split)] for split in ("Train", "Val")}
    assert names["Train"] == [f"{i:08d}.png" for i in range(1, 25)]
    assert names["Val"] == [f"{i:08d}.png" for i in range(25, 37)]
    assert {p.name for p in (made / "images").iterdir()} == {*names["Train"], *names["Val"]}
    for split in names:
        first = (made / f"SewerML_{split}.csv").read_text().splitlines()[0]
        assert first == ",".join(HEADER)
        for row in read(made, split):
            defect = any(row[c] == "1" for c in CLASSES)
            assert row["Defect"] == str(int(defect))
            assert row["ND"] == str(int(not defect and row["VA"] == "0"))
            with Image.open(made / "images" / row["Filename"]) as image:
                assert image.size == (round(32 * 352 / 288), 32) and image.mode == "RGB"


def test_rows_have_exact_shares_and_split_by_video():
    rows = draw_rows(1500, 600, 0)
    train, val = rows[:1500], rows[1500:]
    assert sum(bool(r.classes) for r in train) == round(0.4685 * 1500)
    assert sum(bool(r.classes) for r in val) == round(0.4719 * 600)
    assert not {r.video for r in train} & {r.video for r in val}
    videos = {r.video: [] for r in train}
    for row in train:
        videos[row.video].append(bool(row.classes))
    lengths = [len(flags) for flags in videos.values()]
    assert max(lengths) <= 12 and min(lengths[:-1]) >= 6
    assert np.mean([len(set(flags)) == 2 for flags in videos.values()]) > 0.8
    assert {len(r.classes) for r in rows} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_drawn_class_occurs_in_400_rows(seed):
    assert len(DRAWN) >= 10
    assert {c for row in draw_rows(400, 1, seed) for c in row.classes} == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_every_class_changes_the_picture(name):
    changed = []
    for index in range(1, 9):
        row = Row(index, "Train", index, 5, 0, ())
        without = render(row, 64, 0).astype(int)
        with_class = render(row._replace(classes=(name,)), 64, 0).astype(int)
        changed.append(np.mean(np.abs(with_class - without).max(2) > 25))
    assert np.median(changed) > 0.006  # at least 30 of 4992 pixels, clearly visible


def test_an_existing_set_is_kept(made, tmp_path):
    before = contents(made)
    assert generate(made, 24, 12, 32, 5) is False
    for other in [(24, 12, 40, 5), (24, 12, 32, 6), (25, 12, 32, 5)]:
        with pytest.raises(ValueError, match="already holds"):
            generate(made, *other)
    assert contents(made) == before
    (tmp_path / "SewerML_Train.csv").write_text("Filename\n")
    with pytest.raises(ValueError, match="already holds"):
        generate(tmp_path, 2, 2, 16, 0)


def test_an_interrupted_set_is_redone(tmp_path):
    generate(tmp_path, 3, 2, 16, 0)
    whole = contents(tmp_path)
    (tmp_path / "synthetic.json").unlink()
    (tmp_path / "images" / "00000002.png").write_bytes(b"")
    assert generate(tmp_path, 3, 2, 16, 0)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("counts", [(0, 1, 16, 0), (1, -1, 16, 0), (1, 1, 0, 0), (1, 1, 16, -1)])
def test_bad_numbers_are_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="positive"):
        generate(tmp_path / "new", *counts)
    assert not (tmp_path / "new").exists()


def test_command_line(made, tmp_path, monkeypatch, capsys):
    same = ["--train", "24", "--val", "12", "--size", "32", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(made), *same])
    synthetic.main()
    assert "already there" in capsys.readouterr().out
    for wrong in (["--size", "0"], ["--seed", "x"], []):  # [] is another set in the same folder
        monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(made), *wrong])
        with pytest.raises(SystemExit) as stop:
            synthetic.main()
        assert stop.value.code == 2


def test_the_folder_may_start_at_home_and_holds_no_control_characters(made, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(made.parent))
    same = ["--train", "24", "--val", "12", "--size", "32", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", f"~/{made.name}", *same])
    synthetic.main()
    assert "already there" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", "a\nb", *same])
    with pytest.raises(SystemExit) as stop:
        synthetic.main()
    assert stop.value.code == 2 and "control character" in capsys.readouterr().err
