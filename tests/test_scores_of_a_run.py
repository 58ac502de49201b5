"""What a run writes down is what its checkpoint gives, computed again by other means."""

import csv
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import on_ranks
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from small import METHODS, arguments, read_log, run, step
from torchvision.transforms.v2 import functional as T

import lejepa
from common.augmentations import MEAN, STD
from common.inspection.trained import trained_encoder
from common.probe import LinearProbe
from common.running.checkpoint import read_checkpoint
from common.running.folder import read_json
from common.running.run import Run
from common.scoring import PREVALENCES, Scoring, fixed_rows

pytestmark = pytest.mark.usefixtures("narrow")
OWN = ["probe.lr=0.03", "probe.momentum=0.8", "probe.weight_decay=0.02"]


def whole_run(*how):
    run(*how)
    return []


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "two ranks"])
def folder(request, tmp_path_factory, tiny_set):
    """A SimCLR run, alone or on two ranks, whose shares of 24 images interleave."""
    folder = tmp_path_factory.mktemp("run")
    if request.param == 1:
        return run("simclr", folder, tiny_set, "run", *OWN)
    on_ranks(2, folder / "ranks", whole_run, "simclr", folder, tiny_set, "run", *OWN)
    return folder / "run"


def rows_of(path):
    with open(path, newline="") as file:
        return {row["Filename"]: row["Defect"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def again(folder, tiny_set):
    """names -> (features, embeddings) by the encoder and projector of the checkpoint."""
    encoder = trained_encoder(folder)[0].eval()
    w = {k: v for k, v in read_checkpoint(folder / "last.pt")["model"].items() if "projector" in k}
    root = tiny_set[0].partition("=")[2]

    def encode(names):
        images = (Image.open(f"{root}/{name}").convert("RGB") for name in names)
        whole = [T.pil_to_tensor(i.resize((32, 32), Image.Resampling.BICUBIC)) for i in images]
        images = T.normalize(torch.stack(whole) / 255, MEAN, STD)
        with torch.no_grad():
            h = encoder(images)
            z = F.relu(h @ w["projector.0.weight"].T + w["projector.0.bias"])
            return h.numpy(), (z @ w["projector.2.weight"].T + w["projector.2.bias"]).numpy()

    return encode


@pytest.fixture(scope="module")
def kept(folder):
    found = {}
    for name in ("val_scores", "features_val", "offline_probe"):
        with np.load(folder / f"{name}.npz") as stored:
            found[name] = dict(stored)
    return found | {"result": read_json(folder / "result.json")}


def close(found, expected, share=0.03):
    assert np.abs(found - expected).max() < share * np.std(expected)


def test_features_and_embeddings_are_the_encoders_and_the_projectors(kept, again):
    stored = kept["features_val"]
    features, embeddings = again([n.decode() for n in stored["filename"]])
    close(stored["features"], features)
    close(stored["embeddings"], embeddings)
    for name, z in (("features", features), ("embeddings", embeddings)):
        s = np.linalg.svd(z.astype(float), compute_uv=False)
        p = s / s.sum()
        rankme = np.exp(-(p * np.log(p)).sum())
        assert kept["result"]["label_free"][f"rankme_{name}"] == pytest.approx(rankme, rel=1e-2)
        c = np.linalg.svd(z - z.mean(axis=0), compute_uv=False) ** 2
        stable = kept["result"]["label_free"][f"stable_rank_{name}"]
        assert stable == pytest.approx(c.sum() / c.max(), rel=1e-2)


def test_labels_are_the_csvs_and_the_logits_the_probes(kept, again, folder, tiny_set):
    stored, truth = kept["val_scores"], rows_of(tiny_set[2].partition("=")[2])
    names = [n.decode() for n in stored["filename"]]
    assert names == list(truth) and stored["label"].tolist() == [int(v) for v in truth.values()]
    weight = read_checkpoint(folder / "last.pt")["state"]["probe"]["weight"].numpy()
    close(stored["logit"], again(names)[0] @ weight[:-1] + weight[-1])


def test_offline_probes_are_regressions_on_the_runs_rows_and_on_all(kept, again, folder, tiny_set):
    names = [n.decode() for n in kept["val_scores"]["filename"]]
    rows = {"offline": rows_of(folder / "train_subset.csv")}
    rows["offline_fixed"] = rows_of(tiny_set[1].partition("=")[2])
    for name, of in rows.items():
        of = {k: int(v) for k, v in of.items() if v}
        x, y = again(list(of))[0].astype(float), np.array(list(of.values()))
        mean, std = x.mean(axis=0), x.std(axis=0)
        std[std == 0] = 1
        weight = np.where(y == 1, (y == 0).sum() / y.sum(), 1.0)
        c = 1 / (kept["result"][f"val_{name}"]["l2"] * len(y))
        fit = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
        fit.fit((x - mean) / std, y, sample_weight=weight)
        expected = fit.decision_function((again(names)[0] - mean) / std)
        close(kept["val_scores"][f"logit_{name}"], expected)
        bias = kept["offline_probe"][name]
        close(again(names)[0] @ bias[:-1] + bias[-1], expected)


def test_scores_are_those_of_the_kept_logits(kept):
    stored, result = kept["val_scores"], kept["result"]
    label, normal_only = stored["label"], result["val_normal_only"]
    whose = {"logit": result["val"], "logit_offline": result["val_offline"]}
    whose |= {"logit_offline_fixed": result["val_offline_fixed"]}
    whose |= {f"score_{name}": normal_only[name] for name in ("knn", "mahalanobis")}
    for name, scores in whose.items():
        assert scores["auroc"] == pytest.approx(roc_auc_score(label, stored[name]))
        expected = average_precision_score(label, stored[name])
        assert scores["average_precision"] == pytest.approx(expected)
    called = stored["logit"] > 0
    recall, false_alarms = called[label == 1].mean(), called[label == 0].mean()
    for p in PREVALENCES:
        precision = p * recall / max(p * recall + (1 - p) * false_alarms, 1e-9)
        found = result["val_at"][str(p)]
        assert found["recall"] == pytest.approx(recall)
        if called.any():
            assert found["precision"] == pytest.approx(precision)
        sample_weight = np.where(label == 1, p / label.mean(), (1 - p) / (1 - label.mean()))
        expected = average_precision_score(label, stored["logit"], sample_weight=sample_weight)
        assert found["average_precision"] == pytest.approx(expected)


def test_distances_are_to_the_runs_normals(kept, again, folder):
    normals = [k for k, v in rows_of(folder / "train_subset.csv").items() if v == "0"]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (again(normals)[0],)][0]
    val = again([n.decode() for n in kept["val_scores"]["filename"]])[0]
    val = val / np.linalg.norm(val, axis=1, keepdims=True)
    expected = np.sort(1 - val @ unit.T, axis=1)[:, :5].mean(axis=1)
    close(kept["val_scores"]["score_knn"], expected)
    assert kept["result"]["val_normal_only"]["reference"] == len(normals)


def test_what_the_labels_add_is_of_features_and_embeddings(kept):
    label, found = kept["val_scores"]["label"], kept["result"]["given_labels"]
    for name in ("features", "embeddings"):
        z = kept["features_val"][name].astype(float)
        one, other = z[label == 1], z[label == 0]
        inside = (one.var(axis=0, ddof=1).sum() + other.var(axis=0, ddof=1).sum()) / 2
        margin = np.linalg.norm(one.mean(axis=0) - other.mean(axis=0)) / inside**0.5
        assert found[f"margin_{name}"] == pytest.approx(margin, rel=0.02)


@pytest.fixture(scope="module", params=METHODS)
def watched(request, tmp_path_factory, tiny_set):
    """(method, folder, its probe, the probe's rates, [(loss on held-out views, expected)])."""
    method, rates, losses, seen = request.param, [], [], {}
    final, probe_step = Scoring.final, LinearProbe.step

    def watching(self, model, probe, train_scores, folder, loss_of):
        def watching_loss(views, batch):
            assert not model.training
            noise = batch.noise.transpose(0, 1)
            expected = step(method, model, model, views, noise, batch.label)[0]
            losses.append((float(loss_of(views, batch)), float(expected)))
            return loss_of(views, batch)

        seen["probe"] = probe
        return final(self, model, probe, train_scores, folder, loss_of and watching_loss)

    def stepping(self, features, labels, lr):
        rates.append(lr)
        return probe_step(self, features, labels, lr)

    own = {  # as in small.step
        "simclr": ["ssl_settings.temperature=0.2"],
        "dino": [f"ssl_settings.{w}teacher_temperature=0.04" for w in ("", "warmup_")],
        "barlow": ["ssl_settings.lambda_=0.0051", "ssl_settings.scale_loss=0.024"],
        "lejepa": ["ssl_settings.lambda_=0.05"],
    }.get(method, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scoring, "final", watching)
        patch.setattr(LinearProbe, "step", stepping)
        patch.setattr(lejepa, "draw_slices", lambda *_: torch.eye(16))
        place = tmp_path_factory.mktemp(method)
        folder = run(method, place, tiny_set, "run", *OWN, *own, "optimization.epochs=3")
    return method, folder, seen["probe"], rates, losses


def test_the_loss_on_held_out_views_is_the_methods(watched):
    method, folder, _, _, losses = watched
    found = read_json(folder / "result.json")["label_free"]["loss_held_out"]
    if method == "supervised":
        assert not losses and found is None
        return
    given, expected = np.array(losses).T
    assert len(given) == 5 and given == pytest.approx(expected, rel=1e-5)  # 16 of 24, five times
    assert found == pytest.approx(given.mean(), rel=1e-6)


def test_the_online_probe_learns_by_its_own_settings(watched):
    method, folder, probe, rates, _ = watched
    if method != "supervised":  # whose head is the probe
        expected = [0.03 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]
        assert rates == pytest.approx(expected, abs=1e-9)
        logged = [record["probe_lr"] for record in read_log(folder, "step")]
        assert logged == pytest.approx(expected, abs=1e-9)
    assert (probe.momentum, probe.weight_decay) == (0.8, 0.02)
    assert float(probe.pos_weight) == pytest.approx(37 / 12)


def test_validation_comes_every_so_many_epochs_and_at_the_end(tmp_path, tiny_set):
    often = ["optimization.epochs=5", "run.val_every_epochs=2"]
    log = read_log(run("simclr", tmp_path, tiny_set, "run", *often), "epoch")
    assert [record["epoch"] for record in log if "val_auroc" in record] == [1, 3, 4]
    assert [record["epoch"] for record in log] == [0, 1, 2, 3, 4]


def losses_here(argv):
    """A run on this rank; its own losses, a step each."""
    losses, end = [], Run.end_step

    def ending(self, state, loss, *how):
        losses.append(float(loss))
        return end(self, state, loss, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_step", ending)
        importlib.import_module("simclr").main(argv)
    return torch.tensor(losses, dtype=torch.float64)


def test_a_logged_loss_is_the_mean_over_ranks(tmp_path, tiny_set):
    argv = arguments("simclr", tiny_set, tmp_path, "run")
    one, other = on_ranks(2, tmp_path / "ranks", losses_here, argv)
    mean = ((one + other) / 2).tolist()
    assert (one - other).abs().min() > 1e-3 and len(mean) == 6
    log = read_log(tmp_path / "run")
    assert [r["loss"] for r in log if r["kind"] == "step"] == pytest.approx(mean, rel=1e-6)
    of_epochs = [np.mean(mean[:3]), np.mean(mean[3:])]
    assert [r["loss"] for r in log if r["kind"] == "epoch"] == pytest.approx(of_epochs, rel=1e-6)


def test_rows_for_label_free_measures_are_spread_sorted_and_nested():
    few, many = fixed_rows(5000, 100), fixed_rows(5000, 400)
    assert np.array_equal(few, fixed_rows(5000, 100)) and set(few) < set(many)
    assert (np.diff(many) > 0).all() and 2200 < many.mean() < 2800 and len(many) == 400
    assert fixed_rows(7, 100).tolist() == list(range(7))
