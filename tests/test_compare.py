import re
import shutil

import numpy as np
import pytest
from conftest import TINY, write_set
from PIL import Image
from small import run

from common.compare import LABELS, SHOWN, collect, main, table
from common.running.errors import UserError
from common.running.folder import read_json

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_set):
    """Folders of a random encoder and of SimCLR."""
    folder = tmp_path_factory.mktemp("runs")
    quick = "optimization.epochs=1"
    return [
        run("simclr", folder, tiny_set, "random", quick, "run.frozen_encoder=true"),
        run("simclr", folder, tiny_set, "simclr", quick),
    ]


def test_the_table_has_the_floors_and_every_run(runs):
    entries, val, _ = collect(runs)
    names = [entry.name for entry in entries]
    assert names[:2] == ["all-defect", "16x16 thumbnails"]
    assert names[2:] == ["random encoder, resnet18", "simclr, resnet18"]
    everything = entries[0].own
    assert everything["f1"] == pytest.approx(0.5) and everything["auroc"] == 0.5  # 8 of 24
    assert everything["average_precision"] == pytest.approx(8 / 24)
    # A bright square is plain to see in a thumbnail.
    assert entries[1].own["auroc"] > 0.9 and entries[1].fixed["auroc"] > 0.9
    for folder, entry in zip(runs, entries[2:], strict=True):
        result = read_json(folder / "result.json")
        assert entry.own == result["val_offline"] and entry.fixed == result["val_offline_fixed"]
        distances = result["val_normal_only"]
        assert entry.score("knn", "auroc") == distances["knn"]["auroc"] > 0.5
        assert entry.score("mahalanobis", "auroc") == distances["mahalanobis"]["auroc"] > 0.5
    assert entries[1].score("knn", "auroc") > 0.9 and entries[0].score("knn", "auroc") == 0.5
    text = table(entries, val)
    last = [f"{entries[-1].score(*shown):.3f}" for shown in SHOWN]
    assert text.splitlines()[-1].split()[-len(SHOWN) :] == last
    assert re.split(r"  +", text.splitlines()[1].strip()) == LABELS
    assert "24 labelled images, 8 defects" in text and len(text.splitlines()) == 6


def test_the_command_prints_a_table_and_draws_a_picture(runs, tmp_path, capsys):
    picture = tmp_path / "compare.png"
    main([*map(str, runs), "--out", str(picture)])
    assert "simclr, resnet18" in capsys.readouterr().out
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[0] > 500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_a_run_without_labels_of_its_own_is_in_the_table(tmp_path, capsys):
    blind = write_set(tmp_path / "set", unlabelled=64)
    quick = ["data.train_defect_proportion=null", "optimization.epochs=1"]
    folder = run("simclr", tmp_path, blind, "blind", *quick)
    main([str(folder), "--out", str(tmp_path / "blind.png")])
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith("simclr, resnet18") and line.split()[2:] == ["-"] * len(SHOWN)
    assert (tmp_path / "blind.png").exists()


def test_paths_may_start_at_home_and_hold_no_control_characters(runs, monkeypatch, capsys):
    home = runs[0].parent
    monkeypatch.setenv("HOME", str(home))
    main(["~/random", "~/simclr", "--out", "~/c.png"])
    assert (home / "c.png").exists() and f"picture: {home}/c.png" in capsys.readouterr().out
    for words in (["a\nb"], ["~/random", "--out", "a\x1b.png"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and "control character" in capsys.readouterr().err


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys):
    with pytest.raises(UserError, match="no finished run"):
        collect([tmp_path])
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    with np.load(other / "val_scores.npz") as stored:
        arrays = dict(stored)
    np.savez(other / "val_scores.npz", **(arrays | {"filename": arrays["filename"][::-1]}))
    with pytest.raises(SystemExit) as stop:
        main([str(runs[0]), str(other)])
    assert stop.value.code == 2 and "different validation sets" in capsys.readouterr().err


def test_real_sewer_images_end_to_end(sewer_ml, tmp_path):
    overrides = [
        f"data.image_root={sewer_ml / 'images'}",
        f"data.train_csv={sewer_ml / 'train.csv'}",
        f"data.val_csv={sewer_ml / 'val.csv'}",
    ]
    quick = ["optimization.epochs=1", "data.fraction=0.2", "data.train_defect_proportion=0.3"]
    folder = run("simclr", tmp_path, overrides, "real", *TINY, *quick)
    result = read_json(folder / "result.json")
    assert result["train_rows"] == {"normal": 8, "defect": 3, "unlabelled": 194}
    assert result["val"]["n"] == 61 and result["val"]["n_defect"] == 21
    assert result["val"]["f2_ciw"] is not None and result["val_offline"]["fit_rows"] == 11
