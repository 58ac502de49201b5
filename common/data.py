"""Datasets over images, and the loaders of a run."""

import gc
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from common.augmentations import resize_squash
from common.running.errors import ImageError
from common.running.progress import say
from common.store import open_images

LOADER_TIMEOUT = 120  # seconds without a batch before a hung worker becomes an error, and
SECONDS_AN_IMAGE = 2  # as much for each image of a batch on top, which honest work may take


def longest_wait(images):
    """Seconds that a batch of a rank may take before the run ends, and a rank for the others."""
    return LOADER_TIMEOUT + SECONDS_AN_IMAGE * images


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


class _Rows(Dataset):
    """Images of some rows of the annotations, one way or another."""

    def __init__(self, images, annotations):
        """images: as `open_images` returns it, or the folder that they lie in."""
        self.images = open_images(images) if isinstance(images, (str, os.PathLike)) else images
        # Where workers are not forked each has a copy, and none needs the classes.
        self.annotations = replace(annotations, classes=annotations.classes[:, :0].copy())

    def read(self, row, check=True):
        where = f" ({self.annotations.place(row)})"
        return self.images.read(self.annotations.name(row), where, check)


class TrainImages(_Rows):
    """(epoch, row) -> Batch of one; an ImageError is returned, not raised, and `batches` raises it.

    A worker that raises would bury the sentence under its own traceback.
    """

    def __init__(self, images, annotations, crop_views):
        super().__init__(images, annotations)
        self.crop_views = crop_views
        self.first_epoch = None  # that this worker saw: in it files are looked at more closely

    def __getitem__(self, key):
        epoch, row = key
        if self.first_epoch is None:
            self.first_epoch = epoch
        try:
            drawn = self.crop_views(self.read(row, epoch == self.first_epoch), epoch, row)
        except ImageError as error:
            return error
        return Batch(*drawn, self.annotations.defect[row], row)


class CleanImages(_Rows):
    """Position in `rows` -> (whole image (3, S, S) uint8, row), without augmentation."""

    def __init__(self, images, annotations, rows, image_size):
        super().__init__(images, annotations)
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


def cores():
    """That this process may use: a job's, not a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
STOP_SIGNALS += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []  # Windows has none


def ignore_stop_signals(_worker):
    """For a process whose parent answers them and ends it: a group's signal reaches all of it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_iteration(loader):
    """iter(loader), whose workers are deaf to STOP_SIGNALS from their first moment on.

    They inherit what is blocked while they are started, by fork, spawn and forkserver alike.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which sends no signal to a group
        return iter(loader)
    if loader.num_workers and multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # where it starts in between, it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    gc.freeze()  # else a fork's first collection writes to, so copies, every page that it shares
    try:
        return iter(loader)
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Workers:
    """When a worker dies torch raises from its signal handler, at whatever moment: where a failure
    is told, too. Let it be while a batch is waited for.
    """

    waiting, died, raise_for_the_dead = False, False, None

    def watch(self):
        """Put ourselves in front of torch's handler, which the first loader installs."""
        if not hasattr(signal, "SIGCHLD"):
            return
        there = signal.getsignal(signal.SIGCHLD)
        if callable(there) and there != self._notice:
            self.raise_for_the_dead = there
            signal.signal(signal.SIGCHLD, self._notice)

    def _notice(self, *_):
        self.died = True
        self.check()

    def check(self):
        if self.waiting and self.died and self.raise_for_the_dead:
            self.died = False
            self.raise_for_the_dead(None, None)


_workers = _Workers()


def batches(loader):
    """The loader's batches; raises the ImageError that a worker met."""
    iterator = start_iteration(loader)
    if loader.num_workers:
        _workers.watch()
    while True:
        _workers.waiting = True
        try:
            _workers.check()
            batch = next(iterator, None)
        finally:
            _workers.waiting = False
        if batch is None:
            return
        if isinstance(batch, ImageError):
            raise batch
        yield batch


def make_loader(dataset, num_workers, pin_memory, images, collate_fn=_collate, **how):
    """images: of a batch."""
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
        timeout=longest_wait(images) if num_workers else 0,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # its own: the global one must not depend on how often we load
        **how,
    )


def clean_loader(images, annotations, rows, image_size, batch_size, num_workers, pin_memory):
    """Loader of (images (B, 3, S, S) uint8, rows (B,)) in the order of `rows`, each once.

    images: as `open_images` returns it, or the folder that they lie in.
    """
    dataset = CleanImages(images, annotations, rows, image_size)
    return make_loader(dataset, num_workers, pin_memory, batch_size, batch_size=batch_size)


def build_loaders(images, train, train_sampler, crop_views, val, num_workers, device):
    """Training loader (yields Batch) and validation loader (clean images) of one rank.

    images: as `open_images` returns it, or the folder that they lie in. train, val: Annotations.
    train_sampler: an EpochSampler. Every image of val is in exactly one rank's share, without
    padding.
    """
    val_rows = np.arange(train_sampler.rank, len(val), train_sampler.world_size)
    pin_memory = device.type == "cuda"
    train_images = TrainImages(images, train, crop_views)
    needed = crop_views.image_size / math.sqrt(crop_views.min_scale)
    tables = (train, train_sampler.rows), (val, np.arange(len(val)))
    train_images.images.check(crop_views.image_size, needed, *tables)
    share = train_sampler.batch_size // train_sampler.world_size
    train_loader = make_loader(
        train_images,
        num_workers,
        pin_memory,
        share,
        batch_sampler=train_sampler,
        persistent_workers=num_workers > 0,
    )
    late = ["a batch"] * (num_workers > 0)
    late += ["a wait for another rank"] * (train_sampler.world_size > 1)
    if late:
        say(f"{' or '.join(late)} of more than {longest_wait(share)} s ends the run")
    val_loader = clean_loader(
        train_images.images, val, val_rows, crop_views.image_size, share, num_workers, pin_memory
    )
    return train_loader, val_loader
