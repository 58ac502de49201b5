"""A run from start to finish: the same for all methods, shown by one."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_set
from small import run, stop_at

import common.data
import common.running.process
from common.offline_probe import apply_probe
from common.running.checkpoint import read_checkpoint, save_checkpoint
from common.running.folder import read_json, write_config
from common.running.schema import read_yaml

pytestmark = pytest.mark.usefixtures("narrow")


METHOD = "simclr"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set):
    """A run that was never stopped."""
    return run(METHOD, tmp_path_factory.mktemp("runs"), tiny_set, "whole")


def test_a_run_leaves_what_the_design_says(finished, tiny_set):
    names = "config.yaml provenance.json train_subset.csv log.jsonl tensorboard last.pt"
    names += " val_scores.npz features_val.npz offline_probe.npz result.json status.json views.png"
    assert set(names.split()) <= set(os.listdir(finished))
    result = read_json(finished / "result.json")
    scores = "precision recall f1 f2 f2_ciw f2_ciw_strict f1_normal auroc average_precision"
    for part in ("train", "val", "val_offline", "val_offline_fixed"):
        assert set(f"{scores} threshold n n_defect".split()) <= set(result[part])
    assert list(result["val_at"]) == ["0.01", "0.02", "0.05", "0.15", "0.45"]
    assert result["method"] == "simclr" and result["epochs"] == 2
    assert result["val"]["n"] == 24 and result["val"]["n_defect"] == 8
    assert {"rankme", "std_embeddings", "std_features"} <= set(result["label_free"])
    # 64 rows, 8 of them unlabelled; p = 0.25 keeps 38 normals and 13 defects
    assert result["train_rows"] == {"normal": 37, "defect": 12, "unlabelled": 8}
    subset = (finished / "train_subset.csv").read_text().splitlines()
    assert len(subset) == 1 + 37 + 12 + 8
    assert Counter(line.split(",")[1] for line in subset[1:]) == {"0": 37, "1": 12, "": 8}
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in log if r["kind"] == "epoch"] == [0, 1]
    epoch = [r["loss"] for r in log if r["kind"] == "step" and r["epoch"] == 1]
    assert log[-1]["loss"] == pytest.approx(np.mean(epoch))
    with np.load(finished / "val_scores.npz") as stored:
        assert stored["filename"][0] == b"val_0000.png" and len(stored["logit"]) == 24
        assert stored["classes"].shape == (24, 2) and set(stored["label"]) == {0, 1}
    assert read_json(finished / "status.json")["state"] == "finished"


def test_a_finished_run_is_left_alone(finished, tmp_path, tiny_set, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != "lock"}
    run(METHOD, finished.parent, tiny_set, "whole")
    assert before == {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != "lock"}
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(METHOD, finished.parent, tiny_set, "whole", "optimization.lr=0.1")
    assert stop.value.code == 2 and "optimization.lr: 0.3 -> 0.1" in capsys.readouterr().err


def test_the_resolved_config_is_read_back_as_it_was(tmp_path):
    texts = ["1e-3", "010", "yes", "null", "~", "1", "a: b # c", "\u00e9'\"", "-", "#"]
    values = {"data": dict(zip("abcdefghij", texts, strict=True)), "x": [1e-6, 0.5, 3, True, None]}
    write_config(tmp_path, values)
    assert read_yaml(tmp_path / "config.yaml") == values


def stopped(folder, tiny_set, monkeypatch, at, *how):
    """A run that was stopped after `at` steps; its folder."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_at(patch, at)
        run(METHOD, folder, tiny_set, "run", *how)
    assert stop.value.code == 75
    return folder / "run"


def test_time_goes_on_where_a_run_was_stopped(tmp_path, tiny_set, monkeypatch):
    folder = stopped(tmp_path, tiny_set, monkeypatch, 3)
    saved = read_checkpoint(folder / "last.pt")
    assert 0 < saved["train_seconds"] < saved["seconds"]
    save_checkpoint(folder, saved | {"seconds": 5000.0, "train_seconds": 4000.0})
    run(METHOD, tmp_path, tiny_set, "run")
    result = read_json(folder / "result.json")
    assert 5000 < result["seconds"] < 6000
    assert 96 / 5000 < result["samples_per_second"] < 96 / 4000  # of 6 steps of 16


@pytest.mark.parametrize("damaged", [False, True])
def test_the_checkpoint_gone_on_from_outlives_the_next_save(
    damaged, tmp_path, tiny_set, monkeypatch
):
    how = ["run.checkpoint_every_steps=1"]
    folder = stopped(tmp_path, tiny_set, monkeypatch, 3, *how)
    from_step = 2 if damaged else 3
    if damaged:
        (folder / "last.pt").write_bytes(b"junk")
    assert read_checkpoint(folder / "prev.pt")["step"] == 2
    stopped(tmp_path, tiny_set, monkeypatch, from_step + 1, *how)
    steps = [read_checkpoint(folder / name)["step"] for name in ("prev.pt", "last.pt")]
    assert steps == [from_step, from_step + 1]


def test_without_any_label_there_are_features_but_no_scores(tmp_path):
    nothing_known = write_set(tmp_path / "set", unlabelled=64)
    overrides = [*nothing_known, "data.train_defect_proportion=null"]
    result = read_json(run(METHOD, tmp_path, overrides, "blind", *overrides) / "result.json")
    assert result["train_rows"]["unlabelled"] == 64 and result["val"]["n"] == 24
    assert set(result["val_offline"]) >= {"auroc", "f1", "undefined", "n"}
    assert result["val_offline"]["auroc"] is None and result["train"]["auroc"] is None
    assert "too few" in result["val_offline"]["undefined"]["auroc"]
    assert result["label_free"]["rankme"] > 1


def test_the_offline_probes_are_kept_and_the_fixed_one_is_of_all_labels(finished):
    result = read_json(finished / "result.json")
    assert result["val_offline"]["fit_rows"] == 49 and result["val_offline"]["fit_defects"] == 12
    fixed = result["val_offline_fixed"]
    assert fixed["fit_rows"] == 56 and fixed["fit_defects"] == 19  # 64 rows less 8 without a label
    with (
        np.load(finished / "offline_probe.npz") as probes,
        np.load(finished / "features_val.npz") as features,
        np.load(finished / "val_scores.npz") as scores,
    ):
        assert list(features["filename"]) == list(scores["filename"])
        for name in ("offline", "offline_fixed"):
            weight = torch.from_numpy(probes[name])
            logits = apply_probe(weight, torch.from_numpy(features["features"])).numpy()
            spread = scores[f"logit_{name}"].std()
            assert (
                np.abs(logits - scores[f"logit_{name}"]).max() < 0.05 * spread
            )  # float16 features


def test_the_fixed_probe_is_the_same_for_every_proportion_and_seed(tmp_path, tiny_set):
    """Of equal features: a random ViT has no statistics, and its weights are the seed's."""
    found = []
    for i, p in enumerate((0.1, 0.25)):
        overrides = [f"data.train_defect_proportion={p}", "run.frozen_encoder=true", "patch_size=8"]
        folder = run(METHOD, tmp_path, tiny_set, f"p{i}", *overrides, backbone="vit_tiny")
        found.append(read_json(folder / "result.json"))
    assert found[0]["val_offline_fixed"] == found[1]["val_offline_fixed"]
    assert found[0]["val_offline"] != found[1]["val_offline"]


def only(overrides, folder, keep):
    """The overrides of a set with a train.csv of those rows that keep(cells) is true of."""
    lines = Path(overrides[1].partition("=")[2]).read_text().splitlines()
    kept = [line for line in lines[1:] if keep(line.split(","))]
    path = folder / "some.csv"
    path.write_text("\n".join([lines[0], *kept]) + "\n")
    return [overrides[0], f"data.train_csv={path}", overrides[2]]


@pytest.mark.parametrize("label", ["0", "1"])
def test_training_on_one_class_is_no_mistake_but_gives_no_scores(tmp_path, tiny_set, label):
    one_class = only(tiny_set, tmp_path, lambda cells: cells[-1] == label)
    overrides = [*one_class, "data.train_defect_proportion=null"]
    folder = run(METHOD, tmp_path, overrides, "one", *overrides)
    result = read_json(folder / "result.json")
    parts = {**result["val_at"], **{k: result[k] for k in ("train", "val")}}
    for scores in (*parts.values(), result["val_offline"], result["val_offline_fixed"]):
        known = {k for k, v in scores.items() if v is not None}
        assert known <= {"n", "n_defect", "undefined"}
        why = scores["undefined"]["auroc"]
        assert ("0 defect" if label == "0" else "0 normal") in why
    assert result["val"]["n"] == 24 and result["label_free"]["rankme"] > 1
    with np.load(folder / "val_scores.npz") as stored:
        assert all(np.isnan(stored[name]).all() for name in stored.files if "logit" in name)
        assert np.isfinite(stored["score_knn"]).all() == (label == "0")
    distances = result["val_normal_only"]["knn"]
    if label == "0":
        assert distances["auroc"] > 0.5 and distances["undefined"] == {}
    else:
        assert "0 normal training images" in distances["undefined"]["auroc"]
    with pytest.raises(SystemExit) as stop:
        run("supervised", tmp_path, overrides, "supervised", *overrides)
    assert stop.value.code == 2


def test_one_image_a_rank_is_too_few_for_batchnorm_and_for_contrast(tmp_path, tiny_set, capsys):
    for method, backbone in (("simclr", "resnet18"), ("dino", "resnet18"), ("simclr", "vit_tiny")):
        quick = [
            "optimization.batch_size=1",
            "patch_size=8" if backbone == "vit_tiny" else "seed=1",
        ]
        with pytest.raises(SystemExit) as stop:
            run(method, tmp_path, tiny_set, f"{method}_{backbone}", *quick, backbone=backbone)
        assert stop.value.code == 2 and "optimization.batch_size" in capsys.readouterr().err
    quick = ["optimization.batch_size=1", "optimization.epochs=1", "data.subset_size=4"]
    quick += ["run.log_every=100", "patch_size=8"]
    folder = run("supervised", tmp_path, tiny_set, "vit", *quick, backbone="vit_tiny")
    assert (folder / "result.json").exists()  # a ViT needs no second image


def test_one_pass_of_the_loader_serves_all_epochs(tmp_path, tiny_set, monkeypatch):
    """So that an epoch's first batch is made while the last ones of the epoch before are used."""
    begun, start = [], common.data.start_iteration

    def counting(loader):
        begun.append(type(loader.dataset).__name__)
        return start(loader)

    monkeypatch.setattr(common.data, "start_iteration", counting)
    run("simclr", tmp_path, tiny_set, "a", "optimization.epochs=3", "run.val_every_epochs=3")
    *begun, of_fixed_views = begun
    assert begun.count("TrainImages") == 1 and of_fixed_views == "TrainImages"
