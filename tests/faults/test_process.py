"""How ranks agree on a stop, and what a process says where the device's memory is too small."""

import time

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from small import run

import simclr
from common.running import process
from common.running.folder import read_json
from common.running.process import StopSignal


def meetings(seconds, due, asked_at, steps):
    """(steps at which this rank met the others, step at which it was told to stop or 0).

    seconds: a step, by rank; due: steps at which all meet anyway; asked_at: when rank 1 is asked.
    """
    rank, clock, met = dist.get_rank(), [100.0 * dist.get_rank()], []
    time.monotonic, real = lambda: clock[0], time.monotonic
    stop, reduce = StopSignal(), dist.all_reduce
    dist.all_reduce = lambda *args: (met.append(step), reduce(*args))
    told = 0
    for step in range(1, steps + 1):
        clock[0] += seconds[rank]
        if rank == 1 and step == asked_at:
            stop.received = "asked"
        if stop.agreed(step, step in due):
            told = step
            break
    time.monotonic, dist.all_reduce = real, reduce
    return [torch.tensor(met), torch.tensor(told)]


@pytest.mark.parametrize(
    ("seconds", "due", "asked_at", "expected"),
    [
        # The first meeting knows no speed yet; then every 5 s of the slower rank, 20 steps.
        ((0.1, 0.25), (30,), 55, [1, 2, 22, 30, 50, 70]),
        ((0.1, 7.0), (), 4, [1, 2, 3, 4]),  # slower than that: at every step
    ],
)
def test_all_ranks_look_at_the_same_steps(tmp_path, seconds, due, asked_at, expected):
    for met, told in on_ranks(2, tmp_path / "r", meetings, seconds, due, asked_at, 100):
        assert met.tolist() == expected and told == expected[-1]


def test_a_single_process_looks_at_every_step():
    stop = StopSignal()
    assert not stop.agreed(1, False) and not stop.agreed(2, True)
    stop.received = "asked"
    assert stop.agreed(3, False)
    while process._handlers:
        process.signal.signal(*process._handlers.popitem())


def test_too_little_memory_is_one_sentence(tmp_path, tiny_set, monkeypatch, capsys):
    def failing(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB. "
            "See documentation for Memory Management"
        )

    monkeypatch.setattr(simclr, "nt_xent_loss", failing)
    with pytest.raises(SystemExit) as stop:
        run("simclr", tmp_path, tiny_set, "full")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said and said.count("error: ") == 1
    assert "Tried to allocate 2.00 GiB: lower optimization.batch_size" in said
    status = read_json(tmp_path / "full/status.json")
    assert status["state"] == "failed" and status["retryable"] is False
