"""New images scored by a finished run."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import exit_code
from PIL import Image
from small import run

from common import predict
from common.inspection import trained
from common.inspection.listing import list_images
from common.inspection.scores_file import Part, read_scores
from common.running.checkpoint import read_checkpoint, save_checkpoint
from common.running.errors import UserError


def call(*words):
    """Exit code of the command."""
    return exit_code(predict.main, *words, "--workers", 0)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    """30 images, of which the first 6 lie one folder below."""
    rng = np.random.default_rng(0)
    (tmp_path / "new" / "a").mkdir(parents=True)
    for i in range(30):
        name = f"a/{i:02}.png" if i < 6 else f"{i:02}.png"
        pixels = rng.integers(0, 120, (36, 40, 3), dtype=np.uint8)
        pixels[5:20, 5:20] = 255 * (i % 2)
        Image.fromarray(pixels).save(tmp_path / "new" / name)
    return tmp_path / "new"


def stop_after_three(monkeypatch):
    """Ctrl-C in the third piece of work, once; returns the list of the pieces' sizes."""
    add, seen = Part.add, []

    def stopping(self, lines):
        add(self, lines)
        seen.append(len(lines))
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Part, "add", stopping)
    return seen


def overrides(tiny_set):
    return {word.split("=")[0]: word.split("=")[1] for word in tiny_set}


def stored(run_folder, key):
    with np.load(run_folder / "val_scores.npz") as arrays:
        return dict(zip(arrays["filename"].astype(str), arrays[key], strict=True))


def test_validation_images_get_their_scores_again(finished, tiny_set, tmp_path):
    data, out = overrides(tiny_set), tmp_path / "s.csv"
    how = "--image-root", data["data.image_root"], "--prevalence", 0.1
    assert call("--run", finished, data["data.val_csv"], "--out", out, *how) == 0
    known, rows = stored(finished, "logit_offline"), rows_of(out)
    assert [row["file"] for row in rows] == list(known)
    for row in rows:
        assert float(row["score"]) == pytest.approx(known[row["file"]], abs=1e-3)
    about = json.loads((tmp_path / "s.json").read_text())
    assert about["score"] == "offline" and about["prevalence"] == 0.1
    assert about["root"] == data["data.image_root"] and about["run"] == str(finished)
    p = [float(row["probability"]) for row in rows]
    assert [row["decision"] == "defect" for row in rows] == [x >= 0.5 for x in p]
    assert np.argsort(p).tolist() == np.argsort([float(row["score"]) for row in rows]).tolist()
    flagged = sum(row["decision"] == "defect" for row in rows)
    assert about["counts"] == {"images": len(rows), "unreadable": 0, "flagged": flagged}
    assert not (tmp_path / "s.csv.part").exists()


@pytest.mark.parametrize("features", ["class_token", "mean_of_patches"])
def test_an_encoder_is_the_one_that_was_scored(features, tiny_set, tmp_path):
    setting = f"ssl_settings.features={features}"
    trained = run("mae", tmp_path, tiny_set, "mae", setting, "optimization.epochs=1")
    data, out = overrides(tiny_set), tmp_path / "s.csv"
    how = "--image-root", data["data.image_root"]
    assert call("--run", trained, data["data.val_csv"], "--out", out, *how) == 0
    known = stored(trained, "logit_offline")
    for row in rows_of(out):
        assert float(row["score"]) == pytest.approx(known[row["file"]], abs=1e-3)


def test_folders_files_and_names(folder, tmp_path):
    (folder / "notes.txt").write_text("no image")
    root, names, others, _ = list_images([str(folder)])
    assert (root, len(names), others) == (str(folder), 30, 1)
    assert names[:2].tolist() == [b"06.png", b"07.png"] and names[-1] == b"a/05.png"
    files = [str(folder / "a" / "01.png"), str(folder / "07.png"), str(folder / "a" / "01.png")]
    root, names, *_ = list_images(files)
    assert (root, names.tolist()) == (str(folder), [b"a/01.png", b"07.png"])
    root, names, *_ = list_images([str(folder / "a"), str(folder / "07.png")], str(tmp_path))
    assert (root, names[0], names[-1]) == (str(tmp_path), b"new/a/00.png", b"new/07.png")
    (tmp_path / "list.csv").write_text("x;Filename\n1;a\\01.png\n2;./07.png\n\n3;07.png\n")
    root, names, *_ = list_images([str(tmp_path / "list.csv")], str(folder))
    assert (root, names.tolist()) == (str(folder), [b"a/01.png", b"07.png"])
    (tmp_path / "list.csv").write_text('Filename;"notes, a, b, c"\n07.png;"x, y"\n')
    assert list_images([str(tmp_path / "list.csv")], str(folder))[1].tolist() == [b"07.png"]
    bad = (
        ([str(folder / "none.png")], None, "none.png: no such file"),
        ([str(folder)], str(folder / "a"), "not below --image-root"),
        ([str(tmp_path / "empty")], None, "no images"),
        ([str(tmp_path / "up.csv")], None, "up.csv:3: Filename '../x.png' points outside"),
        ([str(tmp_path / "no.csv")], None, "column 'Filename' is missing"),
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "up.csv").write_text("Filename\na.png\n../x.png\n")
    (tmp_path / "no.csv").write_text("file\na.png\n")
    for paths, image_root, why in bad:
        with pytest.raises(UserError, match=why):
            list_images(paths, image_root)


def test_unreadable_images_come_last(finished, folder, tmp_path, capsys):
    content = (folder / "07.png").read_bytes()
    (folder / "06.png").write_bytes(content[: len(content) // 2])
    (folder / "a" / "b\nc.png").write_bytes(content)
    (folder / "a" / "00.png").write_text("no image")
    (folder / "a" / "link.png").symlink_to(__file__)
    out = tmp_path / "s.csv"
    assert call("--run", finished, folder, "--out", out) == 1
    rows = rows_of(out)
    assert len(rows) == 32 and {r["decision"] for r in rows[:28]} <= {"defect", "normal"}
    last = {row["file"] for row in rows[28:]}
    assert last == {"06.png", "a/b\nc.png", "a/00.png", "a/link.png"}
    assert all((r["score"], r["decision"]) == ("", "unreadable") for r in rows[28:])
    error = capsys.readouterr().err
    assert "4 images cannot be used" in error and "06.png" in error
    about = read_scores(out)[1]
    assert set(about["unreadable"]) == last and about["counts"]["unreadable"] == 4


def test_goes_on_where_it_was_stopped(finished, folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.csv", tmp_path / "s.csv"
    (folder / "08.png").write_text("no image")
    monkeypatch.setattr(predict, "AT_ONCE", 4)
    assert call("--run", finished, folder, "--out", whole) == 1
    seen = stop_after_three(monkeypatch)
    assert call("--run", finished, folder, "--out", out) == 75
    part = tmp_path / "s.csv.part"
    assert not out.exists() and len(part.read_text().splitlines()) == 13
    assert json.loads(part.read_text().splitlines()[0])["run"] == str(finished)
    with open(part, "a") as file:
        file.write("-12.5")  # half a line
    assert call("--run", finished, folder / "a", "--out", out) == 2
    assert "other images" in capsys.readouterr().err
    assert call("--run", finished, folder, "--out", out, "--prevalence", 0.1) == 1
    assert sum(seen) == 30
    scores = [[row["file"], row["score"]] for row in rows_of(out)]
    assert scores == [[row["file"], row["score"]] for row in rows_of(whole)]
    assert call("--run", finished, folder / "a", "--out", out) == 2
    assert "--force overwrites" in capsys.readouterr().err
    assert call("--run", finished, folder / "a", "--out", out, "--force") == 0
    assert len(rows_of(out)) == 6


def test_a_signal_stops_it(finished, folder, tmp_path, monkeypatch, capsys):
    add = Part.add

    def told(self, lines):
        add(self, lines)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Part, "add", told)
    monkeypatch.setattr(predict, "AT_ONCE", 8)
    assert call("--run", finished, folder, "--out", tmp_path / "s.csv") == 75
    assert "stopped after 8 images" in capsys.readouterr().err
    monkeypatch.setattr(Part, "add", add)
    assert call("--run", finished, folder, "--out", tmp_path / "s.csv") == 0


def relabelled(finished, target, change):
    """A copy of a run whose validation has other labels or logits."""
    shutil.copytree(finished, target)
    with np.load(target / "val_scores.npz") as arrays:
        arrays = dict(arrays)
    change(arrays)
    np.savez(target / "val_scores.npz", **arrays)
    return target


def test_without_a_defect_in_validation(finished, tiny_set, tmp_path, capsys):
    def no_defect(arrays):
        arrays["label"] = np.where(arrays["label"] == 1, -1, arrays["label"])

    normal = relabelled(finished, tmp_path / "run", no_defect)
    data, out = overrides(tiny_set), tmp_path / "s.csv"
    how = "--run", normal, "--image-root", data["data.image_root"], "--out", out
    assert call(*how, data["data.val_csv"], "--false-alarms", 0.2) == 0
    known, rows = stored(normal, "score_knn"), rows_of(out)
    assert all(row["probability"] == "" for row in rows)
    for row in rows:
        assert float(row["score"]) == pytest.approx(known[row["file"]], abs=1e-5)
    assert {row["decision"] for row in rows} == {"defect", "normal"}
    capsys.readouterr()
    assert call(*how, data["data.val_csv"], "--force") == 0
    assert "no decisions: --false-alarms" in capsys.readouterr().err
    assert {row["decision"] for row in rows_of(out)} == {""}
    for option in (("--threshold", 0.5), ("--prevalence", 0.1), ("--recall", 0.9)):
        assert call(*how, data["data.val_csv"], "--force", *option) == 2
        assert "0 defect images" in (said := capsys.readouterr().err) or "has 0" in said
    # A training image of the reference is no neighbour of its own.
    assert call(*how, data["data.train_csv"], "--force") == 0
    itself = {row["file"]: float(row["score"]) for row in rows_of(out)}
    with np.load(normal / "normal_features.npz") as arrays:
        assert all(itself[name.decode()] > 1e-7 for name in arrays["filename"])


def test_thresholds(finished, tiny_set, tmp_path, capsys):
    def mixed(arrays):
        rng = np.random.default_rng(0)
        n = 4000
        arrays["label"] = np.repeat((0, 1), (n, n)).astype(np.int8)
        arrays["logit_offline"] = rng.normal(arrays["label"]).astype(np.float32)

    run_folder = relabelled(finished, tmp_path / "run", mixed)
    with np.load(run_folder / "val_scores.npz") as arrays:
        label, logit = arrays["label"], arrays["logit_offline"]
    data, out = overrides(tiny_set), tmp_path / "s.csv"
    how = "--run", run_folder, data["data.image_root"], "--out", out, "--force"
    for option, value in (("--recall", 0.9), ("--false-alarms", 0.05), ("--threshold", 0.3)):
        assert call(*how, option, value, "--prevalence", 0.05) == 0
        about = json.loads((tmp_path / "s.json").read_text())
        at, expected = about["threshold"]["score"], about["expected"]
        flagged = logit >= at
        assert expected["recall"][0] == pytest.approx(flagged[label == 1].mean(), abs=2e-3)
        assert expected["false_alarms"][0] == pytest.approx(flagged[label == 0].mean(), abs=2e-3)
        assert option != "--recall" or flagged[label == 1].mean() >= 0.9
        assert option != "--false-alarms" or flagged[label == 0].mean() <= 0.05
        for row in rows_of(out):
            assert (row["decision"] == "defect") == (float(row["score"]) >= at)
        said = capsys.readouterr().err
        assert "at a prevalence of 0.05 expect precision" in said and "of 88 images" in said


def test_what_cannot_score(finished, folder, tmp_path, capsys):
    out = tmp_path / "s.csv"
    plain = shutil.copytree(finished, tmp_path / "plain")
    (plain / "result.json").unlink()
    broken = shutil.copytree(finished, tmp_path / "broken")
    (broken / "offline_probe.npz").write_bytes(b"PK")
    cases = (
        (("--run", tmp_path / "none", folder), "none: no result.json"),
        (("--run", plain, folder), "no result.json, so no finished run"),
        (("--run", broken, folder), "offline_probe.npz: cannot be read"),
        (("--run", finished, tmp_path / "no"), "no: no such file"),
        (("--run", finished, folder, "--recall", "0.9", "--threshold", "0.5"), "not allowed with"),
        (("--run", finished, folder, "--prevalence", "2"), "inside 0 to 1"),
    )
    for words, why in cases:
        assert call(*words, "--out", out) == 2
        assert why in capsys.readouterr().err
    assert call("--run", finished, folder, "--out", tmp_path / "no" / "s.csv") == 2
    assert not list(tmp_path.glob("s.*"))


def test_of_a_run_with_few_labels_the_fixed_probe_scores(finished, folder, tmp_path):
    kept = shutil.copytree(finished, tmp_path / "run")
    with np.load(kept / "offline_probe.npz") as arrays:
        np.savez(kept / "offline_probe.npz", offline_fixed=arrays["offline_fixed"])
    assert call("--run", kept, folder, "--out", tmp_path / "s.csv") == 0
    assert read_scores(tmp_path / "s.csv")[1]["score"] == "offline_fixed"


def test_a_checkpoint_of_before_the_end_is_refused(finished, folder, tmp_path, capsys):
    kept = shutil.copytree(finished, tmp_path / "run")
    save_checkpoint(kept, read_checkpoint(kept / "last.pt") | {"epochs_done": 1})
    assert call("--run", kept, folder, "--out", tmp_path / "s.csv") == 2
    assert "last.pt: not of the run's end" in capsys.readouterr().err


def test_what_was_done_survives_a_restart_by_force(finished, folder, tmp_path, monkeypatch, capsys):
    """Also where what is overwritten is there already, and after a run that was misspelt."""
    out = tmp_path / "s.csv"
    assert call("--run", finished, folder / "a", "--out", out) == 0
    monkeypatch.setattr(predict, "AT_ONCE", 4)

    seen = stop_after_three(monkeypatch)
    assert call("--run", finished, folder, "--out", out, "--force") == 75
    assert call("--run", tmp_path / "typo", folder, "--out", out, "--force") == 2
    assert call("--run", finished, folder, "--out", out, "--force") == 0
    assert sum(seen) == 30 and len(rows_of(out)) == 30


def test_normals_alone_may_be_scored_with_both_kinds_in_validation(finished, folder, tmp_path):
    """A run without a probe: calibrated by distance, as validation has defects to see it by."""
    kept = shutil.copytree(finished, tmp_path / "run")
    np.savez(kept / "offline_probe.npz")
    how = "--run", kept, folder, "--out", tmp_path / "s.csv", "--prevalence", 0.1
    assert call(*how, "--recall", 0.5) == 0
    rows, about = read_scores(tmp_path / "s.csv")
    assert about["score"] == "knn" and about["prevalence"] == 0.1 and about["expected"]["precision"]
    assert all(row["probability"] and row["decision"] for row in rows)


def test_validation_without_a_label(finished, folder, tmp_path, capsys):
    def nothing_known(arrays):
        arrays["label"] = np.full_like(arrays["label"], -1)

    blind = relabelled(finished, tmp_path / "run", nothing_known)
    assert call("--run", blind, folder, "--out", tmp_path / "s.csv") == 0
    rows, about = read_scores(tmp_path / "s.csv")
    assert {row["decision"] for row in rows} == {""} and len(rows) == 30
    assert about["validation"]["score_recall_false_alarms"] == []


def test_features_that_overflow_are_no_normals(finished, folder, tmp_path, monkeypatch):
    score = trained.apply_probe
    monkeypatch.setattr(
        trained, "apply_probe", lambda *how: score(*how).index_fill(0, torch.tensor([0]), np.nan)
    )
    assert call("--run", finished, folder, "--out", tmp_path / "s.csv") == 1
    rows, about = read_scores(tmp_path / "s.csv")
    assert rows[-1]["decision"] == "unreadable"
    assert "not finite" in about["unreadable"][rows[-1]["file"]]


def test_folders_that_were_not_looked_into_are_named(finished, folder, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "07.png", tmp_path / "elsewhere" / "x.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert call("--run", finished, folder, "--out", tmp_path / "s.csv") == 1
    said = capsys.readouterr().err
    assert (
        "linked: a link to a folder; name it" in said and "1 folders were not looked into" in said
    )
    both = [str(folder / "a"), str(folder / "linked")]
    root, names, *_ = list_images(both)
    assert root == str(tmp_path) and names[-1] == b"elsewhere/x.png"
