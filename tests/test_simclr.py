import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, on_ranks, python, write_set
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import simclr
from common.backbones import build_backbone
from common.checkpoint import TrainState, read_checkpoint
from common.config import identity, load_config
from common.run_folder import open_folder, read_json
from simclr import SimCLR, nt_xent_loss

CONFIG = ["--config", str(ROOT / "configs/simclr_r18.yaml")]


def embeddings(seed=0, n=6, dim=5):
    g = torch.manual_seed(seed)
    return torch.randn(n, dim, generator=g), torch.randn(n, dim, generator=g)


def slow_nt_xent(z0, z1, temperature):
    """Eq. 1 written out: a loop over anchors and negatives, in float64."""
    z = torch.cat([z0, z1]).double()
    n, total = len(z0), 0.0
    for i in range(2 * n):

        def sim(j, i=i):
            return torch.dot(z[i], z[j]) / (z[i].norm() * z[j].norm()) / temperature

        others = sum(torch.exp(sim(j)) for j in range(2 * n) if j != i)
        total = total - torch.log(torch.exp(sim((i + n) % (2 * n))) / others)
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_loss_is_the_papers_equation(temperature):
    z0, z1 = embeddings()
    ours, slow = nt_xent_loss(z0, z1, temperature), slow_nt_xent(z0, z1, temperature)
    assert float(ours) == pytest.approx(float(slow), rel=1e-5)


def test_gradient_is_that_of_the_papers_equation():
    grads = []
    for loss in (nt_xent_loss, slow_nt_xent):
        z0, z1 = (z.double().requires_grad_() for z in embeddings())
        loss(z0, z1, 0.2).backward()
        grads.append(torch.cat([z0.grad, z1.grad]))
    torch.testing.assert_close(*grads)


def test_loss_known_values_and_invariances():
    same = torch.ones(8, 4)
    assert float(nt_xent_loss(same, same, 0.2)) == pytest.approx(np.log(15), rel=1e-6)  # ln(2B - 1)
    apart = torch.eye(4)
    expected = -np.log(np.e**5 / (np.e**5 + 6))
    assert float(nt_xent_loss(apart, apart, 0.2)) == pytest.approx(expected, rel=1e-5)
    z0, z1 = embeddings()
    base = nt_xent_loss(z0, z1, 0.2)
    order = torch.randperm(6)
    torch.testing.assert_close(nt_xent_loss(z0[order], z1[order], 0.2), base)
    torch.testing.assert_close(nt_xent_loss(z1, 7 * z0, 0.2), base)
    assert nt_xent_loss(z0, z1.flip(0), 0.2) != base


class Encoder(nn.Module):
    """A small encoder without BatchNorm, so that 2 ranks and 1 rank must agree exactly."""

    def __init__(self):
        super().__init__()
        self.conv, self.num_features = nn.Conv2d(3, 6, 3, stride=2), 6

    def forward(self, x):
        return F.relu(self.conv(x)).mean(dim=(2, 3))


def loss_and_gradients(views, ranks=1, rank=0):
    torch.manual_seed(0)
    model = SimCLR(Encoder(), 6, 8, 5).double()
    ddp = DistributedDataParallel(model) if ranks > 1 else model
    share = views.shape[1] // ranks
    _, z = ddp(views[:, rank * share : (rank + 1) * share])
    loss = nt_xent_loss(*z, 0.2)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def some_views():
    return torch.randn(2, 8, 3, 12, 12, generator=torch.manual_seed(3)).double()


def on_one_of_two():
    return loss_and_gradients(some_views(), 2, torch.distributed.get_rank())


def test_two_ranks_through_ddp_have_the_gradient_of_one(tmp_path):
    loss, *whole = loss_and_gradients(some_views())
    first, second = on_ranks(2, tmp_path / "r", on_one_of_two)
    torch.testing.assert_close((first[0] + second[0]) / 2, loss)
    for a, b, expected in zip(first[1:], second[1:], whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("name", "patch"), [("resnet18", None), ("vit_tiny", 16)])
def test_gradient_reaches_every_tensor(name, patch):
    torch.manual_seed(0)
    backbone, dim = build_backbone(name, 32, patch)
    model = SimCLR(backbone, dim, 16, 8)
    h, z = model(torch.randn(2, 8, 3, 32, 32))
    assert h.shape == (2, 8, dim) and z.shape == (2, 8, 8)
    nt_xent_loss(*z, 0.2).backward()
    largest = max(p.grad.norm() for p in model.parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 1e-6 * largest, name


def test_batchnorm_sees_one_view_at_a_time():
    torch.manual_seed(0)
    backbone, dim = build_backbone("resnet18", 32)
    model = SimCLR(backbone, dim, 16, 8)
    views = torch.randn(2, 8, 3, 32, 32)
    h, _ = model(views)
    torch.testing.assert_close(h[1], model.encode(views[1])[0])
    assert not torch.allclose(h[1], backbone(views.flatten(0, 1))[8:])


def run(tmp_path, tiny_set, name, *overrides):
    argv = [*CONFIG, *tiny_set, *TINY, f"run.output_dir={tmp_path}", f"run.name={name}", *overrides]
    simclr.main(argv)
    return tmp_path / name


TIMES = ("seconds", "samples_per_second")  # all that may differ


def outcome(folder):
    """Everything of a run that must be the same however often it was stopped."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = read_json(folder / "result.json")
    for record in (*log, result):
        for key in TIMES:
            del record[key]
    saved = read_checkpoint(folder / "last.pt")
    tensors = {**saved["model"], **{f"probe.{k}": v for k, v in saved["state"]["probe"].items()}}
    for i, state in saved["state"]["optimizer"]["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    arrays = {}
    for name in ("val_scores", "features_val"):
        with np.load(folder / f"{name}.npz") as stored:
            arrays |= {f"{name}.{k}": stored[k].tobytes() for k in stored.files}
    return log, result, {k: v.numpy().tobytes() for k, v in tensors.items()}, arrays


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set):
    """A run that was never stopped."""
    return run(tmp_path_factory.mktemp("runs"), tiny_set, "whole")


def test_a_run_leaves_what_the_design_says(finished, tiny_set):
    names = "config.yaml provenance.json train_subset.csv log.jsonl tensorboard last.pt"
    names += " val_scores.npz features_val.npz result.json status.json views.png"
    assert set(names.split()) <= set(os.listdir(finished))
    result = read_json(finished / "result.json")
    scores = "precision recall f1 f2 f2_ciw f2_ciw_strict f1_normal auroc average_precision"
    for part in ("train", "val", "val_offline"):
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
    run(finished.parent, tiny_set, "whole")
    assert before == {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != "lock"}
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(finished.parent, tiny_set, "whole", "optimization.lr=0.1")
    assert stop.value.code == 2 and "optimization.lr: 0.3 -> 0.1" in capsys.readouterr().err


def stop_at(monkeypatch, step):
    """Let a SIGTERM arrive in that step."""
    original = simclr.Run.end_step

    def stopping(self, *args, **kwargs):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(simclr.Run, "end_step", stopping)


@pytest.mark.parametrize("steps", [(1,), (2, 3, 5)])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, tiny_set, monkeypatch, steps):
    """SIGTERM after given steps: in mid-epoch, at an epoch's last step; then the same command."""
    for step in steps:
        stop_at(monkeypatch, step)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, tiny_set, "stopped")
        assert stop.value.code == 75
        assert read_json(tmp_path / "stopped/status.json")["state"] == "preempted"
        monkeypatch.undo()
    folder = run(tmp_path, tiny_set, "stopped")
    for ours, whole in zip(outcome(folder), outcome(finished), strict=True):
        assert ours == whole


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(finished, tmp_path, tiny_set):
    """SIGKILL a few times, after whatever the log says was reached; other worker counts too."""
    argv = [sys.executable, "simclr.py", *CONFIG, *tiny_set, *TINY, f"run.output_dir={tmp_path}"]
    argv += ["run.name=killed", "run.checkpoint_every_steps=1"]
    log = tmp_path / "killed/log.jsonl"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for lines in (2, 5):
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= lines):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
    folder = run(tmp_path, tiny_set, "killed", "data.num_workers=1")
    for ours, whole in zip(outcome(folder), outcome(finished), strict=True):
        assert ours == whole


@pytest.mark.parametrize("part", ["optimizer", "probe", "scores", "loss_sum", "train_scores"])
def test_each_part_of_the_checkpoint_is_needed(finished, tmp_path, tiny_set, monkeypatch, part):
    """The control of the two tests above: without one part, the outcome differs."""
    if part == "train_scores":  # needed where only the finish is left to do
        monkeypatch.setattr(simclr.Run, "finish", lambda self, result: sys.exit(75))
    else:
        stop_at(monkeypatch, 5)
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_set, "part")
    monkeypatch.undo()
    restore = TrainState.restore

    def forgetful(self, saved, is_first_rank):
        kept = {p: getattr(self, p) for p in (part,) if p in ("loss_sum", "train_scores")}
        fresh = TrainState(self.model, self.optimizer, self.probe, self.scaler).capture()
        restore(self, saved | ({part: fresh[part]} if part not in kept else {}), is_first_rank)
        for name, value in kept.items():
            setattr(self, name, value)

    monkeypatch.setattr(TrainState, "restore", forgetful)
    folder = run(tmp_path, tiny_set, "part")
    assert outcome(folder) != outcome(finished)


def test_first_losses_are_as_stored(finished):
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in log if r["kind"] == "step"]
    assert losses == pytest.approx(STORED_LOSSES, rel=2e-3)


STORED_LOSSES = [3.6720, 3.2267, 3.4996, 3.3949, 3.3720, 3.3368]


def test_a_random_encoder_stays_random(tmp_path, tiny_set):
    folder = run(tmp_path, tiny_set, "frozen", "run.frozen_encoder=true")
    result = read_json(folder / "result.json")
    assert result["method"] == "random" and result["val_offline"]["auroc"] is not None
    torch.manual_seed(42)
    backbone, dim = build_backbone("resnet18", 32)
    fresh = SimCLR(backbone, dim, 32, 16).state_dict()
    saved = read_checkpoint(folder / "last.pt")
    for name, tensor in fresh.items():
        assert torch.equal(tensor, saved["model"][name]), name
    assert saved["state"]["probe"]["weight"].abs().sum() > 0


def test_vit_tiny_runs(tmp_path, tiny_set):
    config = ["--config", str(ROOT / "configs/simclr_vit_tiny.yaml")]
    argv = [*config, *tiny_set, *TINY, f"run.output_dir={tmp_path}", "run.name=vit", "patch_size=8"]
    simclr.main([*argv, "optimization.epochs=1"])
    assert read_json(tmp_path / "vit/result.json")["backbone"] == "vit_tiny"


def torchrun(*args):
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args)


def test_two_ranks_score_every_image_once(tmp_path, tiny_set):
    argv = ["simclr.py", *CONFIG, *tiny_set, *TINY, f"run.output_dir={tmp_path}", "run.name=two"]
    done = torchrun(*argv)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "two/result.json")
    assert result["val"]["n"] == 24 and result["val"]["n_defect"] == 8
    with np.load(tmp_path / "two/val_scores.npz") as stored:
        assert len(set(stored["filename"])) == 24 and np.isfinite(stored["logit"]).all()
    assert done.stderr.count("epoch 2/2") == 1  # rank 0 speaks, the other is silent


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train_csv=none.csv", ["none.csv"]),
        ("data.train_defect_proportion=0.001", ["data.train_defect_proportion", "0.001"]),
        ("optimization.batch_size=500", ["optimization.batch_size", "500"]),
        ("data.image_root=none", ["data.image_root", "none"]),
    ],
)
def test_a_users_mistake_is_one_sentence_and_a_status(tmp_path, tiny_set, capsys, override, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tiny_set, "wrong", override)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("error:") == 1
    status = read_json(tmp_path / "wrong/status.json")
    assert status["state"] == "failed" and status["retryable"] is False
    assert words[0] in status["why"]
    assert (run(tmp_path, tiny_set, "wrong") / "result.json").exists()  # mended: it goes on


def test_under_torchrun_one_rank_speaks_and_all_exit_2(tmp_path, tiny_set):
    argv = ["simclr.py", *CONFIG, *tiny_set, *TINY, f"run.output_dir={tmp_path}", "run.name=wrong"]
    for override in ("data.train_csv=none.csv", "optimization.lrr=1"):
        done = torchrun(*argv, override)
        assert done.returncode == 1  # torchrun's own
        assert done.stderr.count("error: ") == 1 and "exitcode  : 2" in done.stderr, done.stderr
        assert read_json(tmp_path / "wrong/status.json")["state"] == "failed"


def test_two_processes_do_not_share_a_folder(tmp_path, tiny_set):
    argv = [*CONFIG, *tiny_set, *TINY, f"run.output_dir={tmp_path}", "run.name=locked"]
    cfg = load_config(simclr.Config, argv)
    lock, _ = open_folder(tmp_path / "locked", identity(cfg, False), identity(cfg, True))
    done = python("simclr.py", *argv)
    lock.close()
    assert done.returncode == 2 and f'"pid": {os.getpid()}' in done.stderr


def unfinished(tmp_path, tiny_set, monkeypatch, name):
    """A run with a checkpoint behind its last epoch, but without a result."""
    monkeypatch.setattr(simclr.Run, "finish", lambda self, result: sys.exit(75))
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_set, name)
    monkeypatch.undo()
    return tmp_path / name


def files_of(folder):
    files = [p for p in folder.iterdir() if p.is_file() and p.name not in ("lock", "status.json")]
    return {p.name: p.read_bytes() for p in files}


def test_other_data_in_the_same_folder_is_refused(tmp_path, tiny_set, monkeypatch, capsys):
    other = write_set(tmp_path / "other", seed=1, n_train=80)
    folder = unfinished(tmp_path, tiny_set, monkeypatch, "data")
    before = files_of(folder)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, other, "data")
    assert stop.value.code == 2 and "data_sha" in capsys.readouterr().err
    assert files_of(folder) == before
    run(tmp_path, tiny_set, "data")  # finished: known by the paths
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, other, "data")
    assert stop.value.code == 2 and "data.train_csv" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny_set, monkeypatch, capsys):
    folder = unfinished(tmp_path, tiny_set, monkeypatch, "mine")
    (tmp_path / "copy").mkdir()
    for name in ("last.pt", "log.jsonl"):
        shutil.copy(folder / name, tmp_path / "copy")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tiny_set, "copy", "optimization.lr=0.1")
    assert stop.value.code == 2 and "optimization.lr: 0.3 -> 0.1" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    tmp_path, tiny_set, monkeypatch, capsys
):
    loss = simclr.nt_xent_loss
    calls = []

    def failing(z0, z1, temperature):
        calls.append(1)
        return loss(z0, z1, temperature) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(simclr, "nt_xent_loss", failing)
    for log_every in (1, 50):  # noticed where it is logged, or where features are scored
        calls.clear()
        overrides = [f"run.log_every={log_every}", "run.checkpoint_every_steps=2"]
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, tiny_set, f"nan{log_every}", *overrides)
        assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
        assert read_checkpoint(tmp_path / f"nan{log_every}/last.pt")["step"] == 2


def test_a_fault_is_worth_retrying(tmp_path, tiny_set, monkeypatch, capsys):
    def failing(z0, z1, temperature):
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(simclr, "nt_xent_loss", failing)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tiny_set, "fault")
    assert stop.value.code == 3 and "Traceback" in capsys.readouterr().err
    status = read_json(tmp_path / "fault/status.json")
    assert status["state"] == "failed" and status["retryable"] is True
    assert "the device fell off" in status["why"]


def test_without_any_label_there_are_features_but_no_scores(tmp_path):
    nothing_known = write_set(tmp_path / "set", unlabelled=64)
    overrides = [*nothing_known, "data.train_defect_proportion=null"]
    result = read_json(run(tmp_path, overrides, "blind", *overrides) / "result.json")
    assert result["train_rows"]["unlabelled"] == 64 and result["val"]["n"] == 24
    assert set(result["val_offline"]) >= {"auroc", "f1", "undefined", "n"}
    assert result["val_offline"]["auroc"] is None and result["train"]["auroc"] is None
    assert "too few" in result["val_offline"]["undefined"]["auroc"]
    assert result["label_free"]["rankme"] > 1


def three_ranks(argv, stop):
    if stop:
        original = simclr.Run.end_step

        def stopping(self, *args, **kwargs):
            if self.step == 1 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        simclr.Run.end_step = stopping
    try:
        simclr.main(argv)
    except SystemExit as end:
        return [torch.tensor(end.code)]
    finally:
        if stop:
            simclr.Run.end_step = original
    return [torch.tensor(0)]


def test_three_ranks_stop_together_and_go_on_bit_for_bit(tmp_path, tiny_set):
    def ranks(name, stop):
        argv = [*CONFIG, *tiny_set, *TINY, f"run.output_dir={tmp_path}", f"run.name={name}"]
        argv += ["optimization.batch_size=18"]
        codes = on_ranks(3, tmp_path / "r", three_ranks, argv, stop)
        return [int(code[0]) for code in codes]

    assert ranks("whole", stop=False) == [0, 0, 0]
    assert ranks("stopped", stop=True) == [75, 75, 75]
    assert ranks("stopped", stop=False) == [0, 0, 0]
    for ours, whole in zip(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"), strict=True):
        assert ours == whole


def test_an_image_that_one_rank_cannot_read_is_one_message(tmp_path):
    overrides = write_set(tmp_path / "set", n_train=32)
    (tmp_path / "set/images/train_0007.png").write_bytes(b"junk")
    argv = ["simclr.py", *CONFIG, *overrides, *TINY, f"run.output_dir={tmp_path}", "run.name=bad"]
    done = torchrun(*argv, "data.train_defect_proportion=null")
    assert done.stderr.count("error: ") == 1 and "train_0007.png" in done.stderr
    assert "simclr.py" not in done.stderr.replace("simclr.py FAILED", "")  # no traceback of ours
    status = read_json(tmp_path / "bad/status.json")
    assert status["state"] == "failed" and "train_0007.png" in status["why"]
