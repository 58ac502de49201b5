"""Datasets over image files, and the loaders of a run."""

import io
import multiprocessing
import os
import signal
import warnings
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, default_collate

from common.augmentations import resize_squash
from common.running.errors import ImageError, UserError
from common.running.keyed import FILE_CHECK, keyed_rng
from common.running.progress import say

LARGEST_IMAGE = 50_000_000  # pixels; a few bytes of PNG can ask for gigabytes of memory
LOADER_TIMEOUT = 120  # seconds without a batch before a hung worker becomes an error, and
SECONDS_AN_IMAGE = 2  # as much for each image of a batch on top, which honest work may take
CHECKED_FILES = 64  # rows whose file is looked for before a run starts


class Batch(NamedTuple):
    """B training images of one rank."""

    views: torch.Tensor  # (B, V, 3, S, S) uint8 crops
    factors: torch.Tensor  # (B, V, 5) float32: brightness, contrast, saturation, hue, flip
    noise: torch.Tensor  # (B, V, L) float32, uniform from 0 to 1: for whoever masks the views
    label: torch.Tensor  # (B,) int8: 1 defect, 0 normal, -1 not labelled
    row: torch.Tensor  # (B,) int64 rows of the annotations

    def to(self, device):
        """The batch on a device; asynchronous where the memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def _to_rgb(image):
    """Any image that Pillow decodes -> RGB, 8 bit a channel."""
    if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip it to white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("RGB")


def open_image(image_root, name, where=""):
    """One file below image_root -> PIL RGB image, fully decoded.

    image_root: a real path (no links). where: added to the error, such as the CSV and its line.
    Raises ImageError naming the file. Damage of a PNG is always found; that of a JPEG only where
    its decoder notices.
    """
    path = os.path.realpath(os.path.join(image_root, name))
    try:
        if not path.startswith(os.path.join(image_root, "")):
            raise ValueError("it lies outside data.image_root")
        with open(path, "rb") as file:
            content = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, lower limit of size; ours is below
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"{image.width} x {image.height} pixels are more than allowed")
            if image.format == "PNG":
                image.verify()  # checksums of all chunks, which decoding alone does not look at
                image = Image.open(io.BytesIO(content))
            return _to_rgb(image)
    except UnidentifiedImageError:
        why = "it is not an image that Pillow knows"
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        why = str(error)
    raise ImageError(f"{os.path.join(image_root, name)}{where}: cannot be used: {why}")


class _Rows(Dataset):
    """Images of some rows of the annotations, one way or another."""

    def __init__(self, image_root, annotations):
        self.image_root = os.path.realpath(image_root)
        self.annotations = annotations

    def read(self, row):
        where = f" ({self.annotations.place(row)})"
        return open_image(self.image_root, self.annotations.name(row), where)


class TrainImages(_Rows):
    """(epoch, row) -> Batch of one; an ImageError is returned, not raised, and `batches` raises it.

    A worker that raises would bury the sentence under its own traceback.
    """

    def __init__(self, image_root, annotations, crop_views):
        super().__init__(image_root, annotations)
        self.crop_views = crop_views

    def __getitem__(self, key):
        epoch, row = key
        try:
            drawn = self.crop_views(self.read(row), epoch, row)
        except ImageError as error:
            return error
        return Batch(*drawn, self.annotations.defect[row], row)


class CleanImages(_Rows):
    """Position in `rows` -> (whole image (3, S, S) uint8, row), without augmentation."""

    def __init__(self, image_root, annotations, rows, image_size):
        super().__init__(image_root, annotations)
        self.rows, self.image_size = rows, image_size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        row = int(self.rows[position])
        try:
            return resize_squash(self.read(row), self.image_size), row
        except ImageError as error:
            return error


def _collate(samples):
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    return default_collate(samples)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals(_worker):
    """For a process whose parent answers them and ends it: a group's signal reaches all of it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_iteration(loader):
    """iter(loader), whose workers are deaf to STOP_SIGNALS from their first moment on.

    They inherit what is blocked while they are started, by fork, spawn and forkserver alike.
    """
    if loader.num_workers and multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # where it starts in between, it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def batches(loader):
    """The loader's batches; raises the ImageError that a worker met."""
    for batch in start_iteration(loader):
        if isinstance(batch, ImageError):
            raise batch
        yield batch


def _loader(dataset, num_workers, pin_memory, images, **how):
    """images: of a batch."""
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        timeout=LOADER_TIMEOUT + SECONDS_AN_IMAGE * images if num_workers else 0,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # its own: the global one must not depend on how often we load
        **how,
    )


def clean_loader(image_root, annotations, rows, image_size, batch_size, num_workers, pin_memory):
    """Loader of (images (B, 3, S, S) uint8, rows (B,)) in the order of `rows`, each once."""
    dataset = CleanImages(image_root, annotations, rows, image_size)
    return _loader(dataset, num_workers, pin_memory, batch_size, batch_size=batch_size)


def build_loaders(image_root, train, train_sampler, crop_views, val, num_workers, device):
    """Training loader (yields Batch) and validation loader (clean images) of one rank.

    train, val: Annotations. train_sampler: an EpochSampler. Every image of val is in exactly one
    rank's share, without padding.
    """
    val_rows = np.arange(train_sampler.rank, len(val), train_sampler.world_size)
    pin_memory = device.type == "cuda"
    root = Path(image_root)
    if not root.is_dir():
        raise UserError(f"data.image_root: {root} is no folder")
    for annotations, rows in ((train, train_sampler.rows), (val, val_rows)):
        rng = keyed_rng(FILE_CHECK, len(rows))
        for row in rng.choice(rows, min(CHECKED_FILES, len(rows)), replace=False):
            path = root / annotations.name(row)
            if not path.is_file():
                raise UserError(f"{path}: not there ({annotations.place(row)})")
    share = train_sampler.batch_size // train_sampler.world_size
    train_loader = _loader(
        TrainImages(image_root, train, crop_views),
        num_workers,
        pin_memory,
        share,
        batch_sampler=train_sampler,
        persistent_workers=num_workers > 0,
    )
    if num_workers:
        say(f"a batch that takes longer than {train_loader.timeout} s ends the run")
    val_loader = clean_loader(
        image_root, val, val_rows, crop_views.image_size, share, num_workers, pin_memory
    )
    return train_loader, val_loader
