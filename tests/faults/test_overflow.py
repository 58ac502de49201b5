"""Steps that overflow under a gradient scaler, as fp16 on CUDA has one; here a scaler on fp32."""

import os
import signal

import numpy as np
import pytest
import torch
from small import outcome, read_log, run

import simclr
from common.running.checkpoint import read_checkpoint
from common.running.folder import read_json
from common.running.run import Run

pytestmark = pytest.mark.usefixtures("narrow")

LOSS = simclr.nt_xent_loss
SKIPPED = 3  # the step whose loss overflows, from 1


@pytest.fixture
def scaled(monkeypatch):
    """A function: run with a scaler of that first scale."""

    def start(scale):
        def precision(*_):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return torch.autocast("cpu", enabled=False), scaler

        monkeypatch.setattr(simclr, "mixed_precision", precision)

    return start


def infinite_gradients(z0, z1, temperature):
    z0 = z0 * 1
    z0.register_hook(lambda gradient: gradient * float("inf"))
    return LOSS(z0, z1, temperature)


@pytest.mark.parametrize(
    ("scale", "epochs", "words"),
    [
        (65536.0, 2, "all 6 steps were skipped"),  # too short for the others
        (65536.0, 8, "the loss scale fell to 0.5"),
        (2.0**40, 8, "the last 20 steps were skipped"),
    ],
)
def test_a_run_that_learns_nothing_does_not_finish(
    tmp_path, tiny_set, monkeypatch, capsys, scaled, scale, epochs, words
):
    scaled(scale)
    monkeypatch.setattr(simclr, "nt_xent_loss", infinite_gradients)
    with pytest.raises(SystemExit) as stop:
        run("simclr", tmp_path, tiny_set, "inf", f"optimization.epochs={epochs}")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and "precision=bf16 or fp32" in said
    folder = tmp_path / "inf"
    assert not (folder / "result.json").exists()
    assert read_json(folder / "status.json")["state"] == "failed"
    steps = read_log(folder, "step")
    assert [r["skipped_steps"] for r in steps] == list(range(1, len(steps) + 1))
    assert [r["loss_scale"] for r in steps] == [scale / 2**k for k in range(1, len(steps) + 1)]


def overflowing(monkeypatch):
    """Step SKIPPED overflows from its first layer on. Returns running means after each step."""
    forward, end_step, seen = simclr.SimCLR.forward, Run.end_step, []

    def spoiling(self, views):
        return forward(self, views * float("inf") if self.spoil else views)

    def counting(self, state, *args):
        end_step(self, state, *args)
        state.model.spoil = self.step + 1 == SKIPPED
        seen.append(state.model.backbone.bn1.running_mean.clone())

    monkeypatch.setattr(simclr.SimCLR, "forward", spoiling)
    monkeypatch.setattr(simclr.SimCLR, "spoil", False, raising=False)
    monkeypatch.setattr(Run, "end_step", counting)
    return seen


def test_one_loss_that_is_not_finite_is_left_out(tmp_path, tiny_set, monkeypatch, scaled):
    scaled(65536.0)
    statistics = overflowing(monkeypatch)
    folder = run("simclr", tmp_path, tiny_set, "one", "run.checkpoint_every_steps=1")
    steps, epochs = read_log(folder, "step"), read_log(folder, "epoch")
    assert [r["loss"] is None for r in steps] == [k + 1 == SKIPPED for k in range(6)]
    assert [r["skipped_steps"] for r in steps] == [0, 0, 1, 1, 1, 1]
    assert steps[SKIPPED - 1]["embedding_std"] is None
    assert epochs[0]["loss"] == pytest.approx(np.mean([r["loss"] for r in steps[:2]]))
    assert torch.equal(statistics[SKIPPED - 1], statistics[SKIPPED - 2])
    assert not torch.equal(statistics[SKIPPED], statistics[SKIPPED - 1])
    # 16 images a step in two views, some of them without a label
    assert epochs[0]["train_n"] < epochs[1]["train_n"] and epochs[1]["train_n"] > 64
    assert read_json(folder / "result.json")["val"]["auroc"] is not None


@pytest.mark.parametrize("at", [SKIPPED - 1, SKIPPED])
def test_a_run_stopped_around_it_goes_on_bit_for_bit(tmp_path, tiny_set, monkeypatch, scaled, at):
    scaled(65536.0)
    overflowing(monkeypatch)
    whole = outcome(run("simclr", tmp_path, tiny_set, "whole"))
    agreed = Run.end_step

    def stopping(self, state, *args):
        if self.step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        agreed(self, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stopping)
        with pytest.raises(SystemExit) as stop:
            run("simclr", tmp_path, tiny_set, "stopped")
        assert stop.value.code == 75
    if at == SKIPPED - 1:  # what was to come is no part of a checkpoint
        monkeypatch.setattr(simclr.SimCLR, "spoil", True)
    else:
        saved = read_checkpoint(tmp_path / "stopped/last.pt")["state"]
        assert saved["skipped_steps"] == saved["skipped_in_a_row"] == 1
        assert saved["loss_steps"] in (0, 2)  # 0: an epoch ends there
    stopped = outcome(run("simclr", tmp_path, tiny_set, "stopped"))
    for ours, theirs in zip(stopped, whole, strict=True):
        assert ours == theirs


def test_without_a_scaler_nothing_is_left_out(tmp_path, tiny_set, monkeypatch, capsys):
    overflowing(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        run("simclr", tmp_path, tiny_set, "plain")
    assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
    record = read_log(tmp_path / "plain", "step")[0]
    assert record["loss_scale"] is None and record["skipped_steps"] == 0
