"""Every method and backbone at its real size on one CUDA device: `make test-gpu`, an hour or less.

Needs pytest, torch 2.10 or newer, the other runtime packages and a checkout: no installation, no
network. A device with less than 40 GB
gets half of the batch. Peak memory is printed and goes into a --junit-xml report.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the device's first product

import importlib  # noqa: E402

from conftest import ROOT, on_ranks  # noqa: E402
from small import PAIRS, outcome, read_log, stop_at  # noqa: E402

from common.running.folder import read_json  # noqa: E402
from common.synthetic import generate  # noqa: E402

MEMORY = torch.cuda.get_device_properties(0).total_memory / 2**30  # GiB
BATCH = 256 if MEMORY > 39 else 128
EPOCHS, STEPS_AN_EPOCH = 4, 3
SIZE, FRAME = 224, 288  # pixels: of a view, of the images' height
PRECISIONS = ("fp32", "bf16", "fp16")
HALF = {
    "fp32": 0.0,
    "bf16": 0.05,
    "fp16": 0.02,
}  # relative: how far a first loss may be from fp32's


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Overrides that name a drawn set of a few batches."""
    folder = tmp_path_factory.mktemp("drawn")
    generate(folder, STEPS_AN_EPOCH * BATCH, 64, FRAME, seed=0)
    csv = [f"data.{key}_csv={folder}/SewerML_{key.title()}.csv" for key in ("train", "val")]
    return [f"data.image_root={folder}/images", *csv]


def arguments(method, backbone, drawn, folder, name, *overrides):
    """Command line: the config as it is, but few and small epochs at the full learning rate."""
    config = ROOT / f"configs/{method}_{'r18' if backbone == 'resnet18' else 'vit_tiny'}.yaml"
    how = [f"data.image_size={SIZE}", "data.train_defect_proportion=null", "data.num_workers=4"]
    how += [f"optimization.batch_size={BATCH}", f"optimization.epochs={EPOCHS}"]
    how += ["optimization.warmup_epochs=0", "run.log_every=1", "run.compile=false"]
    how += [f"run.output_dir={folder}", f"run.name={name}"]
    return ["--config", str(config), *drawn, *how, *overrides]


def train(method, backbone, drawn, folder, name, *overrides):
    """Run a method's main; returns the run folder and the peak memory in GiB."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    argv = arguments(method, backbone, drawn, folder, name, *overrides)
    importlib.import_module(method).main(argv)
    return folder / name, torch.cuda.max_memory_allocated() / 2**30


def losses(folder):
    return [record["loss"] for record in read_log(folder, "step")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_it_learns_in_every_precision(
    method, backbone, compiled, drawn, tmp_path, record_property, capsys
):
    """The loss falls, and half precision's is near float32's. A teacher's target moves at first."""
    found = {}
    for precision in PRECISIONS:
        how = [f"optimization.precision={precision}", f"run.compile={str(compiled).lower()}"]
        folder, peak = train(method, backbone, drawn, tmp_path, precision, *how)
        found[precision] = losses(folder)
        record_property(f"peak_gib_{precision}", round(peak, 2))
        with capsys.disabled():
            print(f"\n{method} {backbone} {precision} compiled={compiled}: {peak:.1f} GiB", end="")
    for precision, numbers in found.items():
        assert len(numbers) == EPOCHS * STEPS_AN_EPOCH
        assert numbers[0] == pytest.approx(found["fp32"][0], rel=HALF[precision])
        assert sum(numbers) == pytest.approx(sum(found["fp32"]), rel=0.1)
        if method != "dino":
            assert sum(numbers[-3:]) < sum(numbers[:3])


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_a_stopped_run_goes_on_bit_for_bit(method, backbone, drawn, tmp_path, monkeypatch):
    how = ["run.deterministic=true", "optimization.precision=fp16"]
    whole, _ = train(method, backbone, drawn, tmp_path, "whole", *how)
    stop_at(monkeypatch, STEPS_AN_EPOCH + 1)
    with pytest.raises(SystemExit) as stop:
        train(method, backbone, drawn, tmp_path, "stopped", *how)
    assert stop.value.code == 75
    monkeypatch.undo()
    stopped, _ = train(method, backbone, drawn, tmp_path, "stopped", *how)
    for ours, theirs in zip(outcome(stopped), outcome(whole), strict=True):
        assert ours == theirs


def one_of_two(method, argv):
    importlib.import_module(method).main(argv)


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny"])
def test_two_ranks_on_one_device_are_as_one(backbone, drawn, tmp_path):
    """Through gloo: NCCL wants a device a rank. SyncBatchNorm and negatives are of both ranks."""
    how = ["optimization.precision=fp32", "optimization.epochs=1", "run.compile=auto"]
    alone, _ = train("simclr", backbone, drawn, tmp_path, "one", *how, "run.compile=false")
    argv = arguments("simclr", backbone, drawn, tmp_path, "two", *how)
    on_ranks(2, tmp_path / "ranks", one_of_two, "simclr", argv)
    assert read_json(tmp_path / "two/result.json")["val"]["n"] == 64
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=0.02)


def test_too_little_memory_is_one_sentence(drawn, tmp_path, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(SystemExit) as stop:
            train("simclr", "resnet18", drawn, tmp_path, "full")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("error: ") == 1 and "Traceback" not in said
    assert "lower optimization.batch_size" in said
    assert read_json(tmp_path / "full/status.json")["retryable"] is False
