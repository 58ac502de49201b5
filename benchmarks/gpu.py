"""How fast is one CUDA device, what holds it up, and how long will the full study take on it?

Prints one JSON line a question, within eight minutes; without a CUDA device it says so and prints
none. 224 px, the configs' own batch, precision and workers, on drawn frames:

- images a second that the loader alone delivers, from files and from both packed stores;
- for each method and backbone: images a second of whole training steps on batches that are there
  at once; beside it lightly's plain loop where it is installed and time allows; the share of a step
  that would be spent waiting for each loader (1 - loader / step, as the two overlap); the share in
  which the device runs no kernel (torch.profiler); peak memory; floating-point operations as a
  share of the device's matrix peak (a multiply-add is two), null for a device not in PEAKS;
- the same compiled, as far as time allows;
- GPU hours of configs/grid/paper.yaml at those rates, by the pixels of other image sizes.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks._within import run_main
from common.augmentations import ColorJitterNormalize
from common.data import Batch
from common.data import batches as loaded
from common.running.config import read_config
from common.sampler import imbalanced_indices
from common.study.grid import read_grid
from common.synthetic import generate

ROOT = Path(__file__).parent.parent
METHODS = ("simclr", "byol", "barlow", "lejepa", "dino", "supervised")
PAIRS = [(m, b) for m in METHODS for b in ("r18", "vit_tiny")] + [("mae", "vit_tiny")]
BUDGET = 480  # seconds in all
FRAMES, COPIES, FRAME = 256, 8, 288  # drawn frames, names of each, pixels of their height
WARMUPS, STEPS, PROFILED = 5, 15, 3
LOADED = 12  # batches that a loader is timed over
NORMALS, DEFECTS = 552_820, 487_309  # Sewer-ML's training rows
# Dense matrix peaks in TFLOP/s by NVIDIA's data sheets: (fp16 and bf16, TF32).
PEAKS = {
    "H100 PCIe": (756, 378),
    "H100": (989, 494),
    "H200": (989, 494),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "A10": (125, 62),
    "V100": (125, None),
    "T4": (65, None),
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def line(name, value, unit, peer=None, **more):
    """One question's answer. ratio: how many times as much as the peer."""
    ratio = value / peer if value and peer else None
    content = {"name": name, "ours": value, "peer": peer, "ratio": ratio, "target": None}
    print(json.dumps(content | {"unit": unit} | more), flush=True)


def peak(precision):
    """The device's matrix peak in FLOP/s, None where it is not known."""
    name = torch.cuda.get_device_name()
    for part, (half, tf32) in PEAKS.items():
        if part in name:
            tera = tf32 if precision == "fp32" else half
            return tera and tera * 1e12
    return None


def draw(folder):
    """Overrides that name FRAMES frames under COPIES names each."""
    generate(folder / "set", FRAMES, 16, FRAME, seed=0)
    images, csv = folder / "set/images", folder / "set/SewerML_Train.csv"
    header, *rows = csv.read_text().splitlines()
    for copy in range(1, COPIES):
        for row in rows[:FRAMES]:
            name = row.partition(",")[0]
            os.link(images / name, images / f"{copy}_{name}")
            rows.append(f"{copy}_{row}")
    csv.write_text("\n".join([header, *rows]) + "\n")
    val = folder / "set/SewerML_Val.csv"
    return [f"data.image_root={images}", f"data.train_csv={csv}", f"data.val_csv={val}"]


def pack(folder, overrides, form):
    """Overrides that name a packed store of these images; None where it cannot be written."""
    root, train, val = (text.partition("=")[2] for text in overrides)
    command = [sys.executable, "-m", "common.pack", "--image-root", root, "--annotations", train]
    command += [val, "--out", str(folder / form), "--form", form]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        say(f"no {form} store: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return [*overrides, f"data.packed={folder / form}"]


def arguments(method, backbone, folder, overrides, name, *more):
    how = ["data.train_defect_proportion=null", f"run.output_dir={folder / 'runs'}"]
    config = str(ROOT / f"configs/{method}_{backbone}.yaml")
    return ["--config", config, *overrides, *how, f"run.name={name}", "run.compile=false", *more]


def loader_rate(folder, overrides, name):
    """Images a second of a training loader of two views, with nobody in its way."""
    found = []

    def batches(loader):
        start = count = 0
        for epoch in range(1 + LOADED):  # as many as it takes
            loader.batch_sampler.start(epoch)
            for batch in loaded(loader):
                count += 1
                if count == 3:  # the workers have started
                    start = time.perf_counter()
                if count == 3 + LOADED:
                    found.append(LOADED * len(batch.row) / (time.perf_counter() - start))
                    return
        yield

    run_main("simclr", arguments("simclr", "r18", folder, overrides, name), batches)
    return found[0] if found else None


def idle_share(profile):
    """Share of the time from the first kernel to the last in which none ran."""
    cuda = torch.autograd.DeviceType.CUDA
    spans = [e.time_range for e in profile.events() if e.device_type == cuda]
    spans = sorted((span.start, span.end) for span in spans)
    if not spans:
        return None
    first, until, busy = spans[0][0], spans[0][0], 0.0
    for start, end in spans:
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return 1 - busy / (until - first)


def batch_like(cfg):
    """A batch of noise in pinned memory, as a loader would give it."""
    count, size, views = cfg.optimization.batch_size, cfg.data.image_size, 2
    views = 1 if cfg.method == "supervised" else views
    generator = torch.manual_seed(0)
    images = torch.randint(0, 256, (count, views, 3, size, size), generator=generator)
    factors = torch.ones(count, views, 5) * torch.tensor([1.1, 0.9, 1.1, 0.05, 1.0])
    noise = torch.rand(count, views, (size // (cfg.patch_size or 16)) ** 2, generator=generator)
    rows = torch.arange(count)
    parts = images.to(torch.uint8), factors, noise, (rows % 2).to(torch.int8), rows
    return Batch(*(part.pin_memory() for part in parts))


def step_facts(method, argv, batch):
    """Seconds a step, share of it that the device idles, FLOPs, peak bytes; None: it exited."""
    from torch.profiler import ProfilerActivity
    from torch.utils.flop_counter import FlopCounterMode

    facts, compiled = {}, "run.compile=true" in argv

    def batches(loader):
        for _ in range(WARMUPS):
            yield batch
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(STEPS):
            yield batch
        torch.cuda.synchronize()
        facts["seconds"] = (time.perf_counter() - start) / STEPS
        facts["peak"] = torch.cuda.max_memory_allocated()
        how = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=how) as profile:
            for _ in range(PROFILED):
                yield batch
            torch.cuda.synchronize()
        facts["idle"] = idle_share(profile)
        if not compiled:  # the counter sees operations one by one
            with FlopCounterMode(display=False) as counter:
                yield batch
            facts["flops"] = counter.get_total_flops()

    script = importlib.import_module(method)
    things = {(script, "build_loaders"): lambda *how: (None, None)}
    run_main(method, argv, batches, things)
    torch.cuda.empty_cache()
    return facts or None


def lightly_seconds(method, cfg, batch):
    """Seconds a step of lightly's loop, with our augmentation on the device; None without it."""
    try:
        from benchmarks.step import peer_step
    except ImportError:
        return None
    device, augment = torch.device("cuda"), ColorJitterNormalize(0).cuda()

    def views():
        there = batch.to(device)
        return augment(there.views, there.factors, 0)

    step = peer_step(method, cfg, views, device)
    for _ in range(WARMUPS):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def study_hours(rates):
    """(hours of training on one device, runs) of the full study. rates: {(method, backbone): images
    a second}. A frozen encoder's runs count like SimCLR's, so too much; validation is left out."""
    hours, runs = 0.0, 0
    defect = np.repeat([0, 1], [NORMALS, DEFECTS]).astype(np.int8)
    counts = {}
    for run in read_grid(ROOT / "configs/grid/paper.yaml"):
        cfg, data = run.cfg, run.cfg.data
        key = data.train_defect_proportion, data.fraction, data.subset_size
        if key not in counts:
            p, fraction, size = key
            counts[key] = len(imbalanced_indices(defect, p, cfg.seed, fraction, size))
        rate = rates.get((cfg.method, "r18" if cfg.backbone == "resnet18" else cfg.backbone))
        if rate is None:
            return None, 0
        seconds = counts[key] * cfg.optimization.epochs / rate * (data.image_size / 224) ** 2
        hours, runs = hours + seconds / 3600, runs + 1
    return hours, runs


def measure(pair, folder, overrides, loaders, compiled, with_peer):
    """The lines of one method and backbone; returns its images a second, None where it exited."""
    method, backbone = pair
    how = f"run.compile={str(compiled).lower()}"
    name = f"{method}_{backbone}{'_compiled' if compiled else ''}"
    argv = arguments(method, backbone, folder, overrides, name, how)
    cfg = read_config(importlib.import_module(method).Config, argv[1], argv[2:])
    batch, count = batch_like(cfg), cfg.optimization.batch_size
    facts = step_facts(method, argv, batch)
    if facts is None:
        say(f"{name}: no figures")
        return None
    peer = None
    if with_peer and method != "supervised":
        with contextlib.suppress(torch.OutOfMemoryError):
            peer = lightly_seconds(method, cfg, batch)
    torch.cuda.empty_cache()
    rate, what = count / facts["seconds"], f"{name} {cfg.optimization.precision}"
    most = peak(cfg.optimization.precision)
    line(f"{what}: a step", rate, "images/s", peer and count / peer, seconds=facts["seconds"])
    for form, given in loaders.items():
        waiting = None if given is None else 1 - min(given / rate, 1)
        line(f"{what}: waits for data from {form}", waiting, "of a step")
    line(f"{what}: launch gaps", facts["idle"], "of a step")
    line(f"{what}: peak memory", facts["peak"] / 2**30, "GiB")
    if not compiled:
        share = most and facts["flops"] / facts["seconds"] / most
        line(f"{what}: of the matrix peak", share, "", flops=facts["flops"])
    return rate


def main():
    if not torch.cuda.is_available():
        say("benchmarks/gpu.py: no CUDA device, so nothing is measured")
        return
    start, rates = time.monotonic(), {}
    device = torch.cuda.get_device_name()
    line("device", None, "", device=device, torch=torch.__version__, cores=os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        overrides = draw(folder)
        loaders = {"files": loader_rate(folder, overrides, "files")}
        for form in ("jpeg", "raw"):
            packed = pack(folder, overrides, form)
            loaders[form] = packed and loader_rate(folder, packed, form)
        for form, rate in loaders.items():
            line(f"loader alone, two views, from {form}", rate, "images/s")
        for pair in PAIRS:
            with_peer = time.monotonic() - start < BUDGET - 180
            rates[pair] = measure(pair, folder, overrides, loaders, False, with_peer)
        hours, runs = study_hours(rates)
        line("the full study, training alone", hours, "GPU hours", runs=runs)
        for pair in PAIRS:
            if time.monotonic() - start > BUDGET - 100:  # what the slowest compilation may take
                break
            measure(pair, folder, overrides, loaders, True, False)
    say(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
