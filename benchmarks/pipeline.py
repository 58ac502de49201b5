"""Two augmented 224-px views of a frame, on one core: what the loader's workers do, and all of it.

The peer is torchvision's PIL pipeline from the PNG file, as solo-learn and the study use it.
Frames are drawn, with a camera's noise, at Sewer-ML's two usual sizes. `workers` is what bounds a
GPU: ours leaves colour to the device. `all on the CPU` has the jitter, too, in batches of 32.
Beside each stand its parts, in ms a sample: to read and decode, to crop and resize twice, to jitter
twice.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from benchmarks.timing import emit, medians
from common.annotations import read_annotations
from common.augmentations import MEAN, STD, ColorJitterNormalize, CropViews
from common.data import TrainImages
from common.images import ImageFolder
from common.pack import pack
from common.sets.sewer_frame import render
from common.store import PackedStore
from common.synthetic import draw_rows

FRAMES, SIZE, SMALLEST, T, REPEATS = 32, 224, 0.395, 0.275, 7
NOISE = 2.0  # grey levels: the files are then as large as Sewer-ML's, 1.4 bytes a pixel
SIZES = {"720x576": (720, 576), "352x288": (352, 288)}
TARGETS = {  # workers, all on the CPU, the same compiled
    ("720x576", "jpeg"): (6, 3, 4),
    ("720x576", "raw"): (12, 4, 6),
    ("720x576", "files"): (1.6, None, None),
    ("352x288", "jpeg"): (9, 2.5, 5),
    ("352x288", "raw"): (16, 3, 7),
    ("352x288", "files"): (3, None, None),
}


def draw_frames(folder, width, height):
    """FRAMES PNG files and a CSV that names them."""
    rng, lines = np.random.default_rng(0), ["Filename,Defect"]
    for i, row in enumerate(draw_rows(FRAMES, 1, 0)[:FRAMES]):
        frame = Image.fromarray(render(row, height, 0)).resize((width, height))
        pixels = np.asarray(frame, float)
        pixels = (pixels + rng.normal(0, NOISE, pixels.shape)).round().clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:08d}.png")
        lines.append(f"{i:08d}.png,{i % 2}")
    (folder / "frames.csv").write_text("\n".join(lines))
    return read_annotations(folder / "frames.csv")


def pil_pipeline():
    """One view as the peers make it."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, (SMALLEST, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.ColorJitter(T, T, T, T / 2),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def psnr(a, b):
    """Of (n, 3, S, S) uint8 tensors, in decibel; None where they are equal."""
    return (
        None
        if torch.equal(a, b)
        else float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))
    )


def measure(name, folder, eager, compiled):
    """All lines of one size of frames."""
    annotations = draw_frames(folder, *SIZES[name])
    names = np.sort(annotations.filename)
    sources = {"files": ImageFolder(folder)}
    for form in ("jpeg", "raw"):
        pack(folder, names, folder / form, form)
        sources[form] = PackedStore(folder / form)
    crops = CropViews(SIZE, SMALLEST, T, 0.5, 2, seed=0)
    sets = {form: TrainImages(images, annotations, crops) for form, images in sources.items()}
    for images in sets.values():
        images.first_epoch = 0  # the checksums of PNG files are looked at in it
    view = pil_pipeline()

    def peer():
        for i in range(FRAMES):
            with Image.open(folder / annotations.name(i)) as file:
                image = file.convert("RGB")
            view(image), view(image)

    def workers(form):
        return [sets[form][1, i] for i in range(FRAMES)]

    def everything(form, augment):
        batch = default_collate(workers(form))
        augment(batch.views, batch.factors, 0)

    calls = {"peer": peer}
    for form in sets:
        calls[form, 0] = lambda form=form: workers(form)
        calls[form, "read"] = lambda form=form: [sets[form].read(i, False) for i in range(FRAMES)]
        if form != "files":
            calls[form, 1] = lambda form=form: everything(form, eager)
            calls[form, 2] = lambda form=form: everything(form, compiled)
    for i, augment in ((1, eager), (2, compiled)):
        batch = default_collate(workers("jpeg"))
        calls["jitter", i] = lambda a=augment, b=batch: a(b.views, b.factors, 0)
    seconds = medians(calls, REPEATS, 2, time.process_time)
    views = {form: torch.stack([b.views for b in workers(form)]).flatten(0, 1) for form in sets}
    whats = "workers", "all on the CPU", "all on the CPU, run.compile=true (a kernel an operation)"
    for (size, form), targets in TARGETS.items():
        if size != name:
            continue
        for i, (what, target) in enumerate(zip(whats, targets, strict=True)):
            if target is not None:
                like = {} if form == "files" else {"psnr": psnr(views[form], views["files"])}
                keys = (form, i), "peer", (form, 0), (form, "read"), ("jitter", max(i, 1))
                ours, theirs, both, read, jitter = (1000 * seconds[k] / FRAMES for k in keys)
                like |= {"read": read, "crop": both - read} | ({"jitter": jitter} if i else {})
                emit(f"{what}: {name}, {form}", ours, theirs, target, "ms a sample", **like)


def main():
    torch.set_num_threads(1)
    eager, compiled = ColorJitterNormalize(0), ColorJitterNormalize(0, compiled=True)
    for name in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), eager, compiled)


if __name__ == "__main__":
    main()
