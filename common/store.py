"""The packed store: images decoded and shrunk once by `python -m common.pack`, read by position.

A folder with store.json (settings, what could not be read, a hash of the index), names.npy (N
names, sorted), index.npy (N records) and images.bin (one image after the other: JPEG, or raw RGB).
"""

import hashlib
import io
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from common.images import ImageFolder
from common.running.errors import ImageError, UserError, regular, some
from common.running.progress import say

FORMAT = 1
SETTINGS, NAMES, INDEX, IMAGES = "store.json", "names.npy", "index.npy", "images.bin"
RECORD = np.dtype(  # of an image; length 0: it could not be read
    [("offset", "<i8"), ("length", "<i4"), ("height", "<i4"), ("width", "<i4"), ("crc32", "<u4")]
)


def index_hash(settings, names, index):
    """sha256 of what a store holds: form, quality, size, and each image's name and checksum."""
    kept = {key: settings[key] for key in ("format", "form", "quality", "short_side")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for array in (names, index):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def stored_hash(path):
    """What a PackedStore has as `packed`, form and hash, as its settings say; None without them."""
    try:
        settings = json.loads(regular(Path(path) / SETTINGS).read_text(encoding="utf-8"))
        return f"{settings['form']} {settings['index_sha256']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


class PackedStore:
    """Has the methods of an ImageFolder. Any number of processes may read it at a time."""

    def __init__(self, path):
        """Raises UserError where the folder is no whole store."""
        self.path, self._file, self._pid = Path(path), None, None
        try:
            self.settings = json.loads(regular(self.path / SETTINGS).read_text(encoding="utf-8"))
            if self.settings["format"] != FORMAT:
                raise UserError(f"{path}: a store of another format; pack it again")
            if not self.settings["finished"]:
                raise UserError(f"{path}: not packed to the end; the same command goes on")
            self._open()
            size = (self.path / IMAGES).stat().st_size
            whole = index_hash(self.settings, self.names, self.index)
            is_whole = whole == self.settings["index_sha256"] and self.index.dtype == RECORD
        except UserError:
            raise
        except Exception as error:  # of damaged or forged bytes numpy may raise anything
            why = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"data.packed: {path} is no packed store ({why})") from None
        if not is_whole or size < (self.index["offset"] + self.index["length"]).max(initial=0):
            raise UserError(f"data.packed: {path} is damaged: copy or pack it again, elsewhere")
        self.packed = stored_hash(path)

    def _open(self):
        # Mapped, not read: the same memory serves all workers.
        self.names = np.load(regular(self.path / NAMES), mmap_mode="r")
        self.index = np.load(regular(self.path / INDEX), mmap_mode="r")

    def __getstate__(self):
        return {"path": self.path, "settings": self.settings, "packed": self.packed}

    def __setstate__(self, state):
        self.__dict__.update(state, _file=None, _pid=None)
        self._open()

    def _position(self, name):
        key = np.array(name.encode(), dtype=self.names.dtype)
        at = int(np.searchsorted(self.names, key))
        known = at < len(self.names) and self.names[at] == name.encode()
        return at if known else None

    def _bytes(self, record):
        if self._pid != os.getpid():  # a forked worker would share its parent's place in the file
            self._file = open(regular(self.path / IMAGES), "rb")  # noqa: SIM115 (held for life)
            self._pid = os.getpid()
        content = bytearray(int(record["length"]))
        self._file.seek(int(record["offset"]))
        if self._file.readinto(content) != len(content) or zlib.crc32(content) != record["crc32"]:
            raise ImageError("damaged since it was packed (its checksum does not fit)")
        return content

    def read(self, name, where="", check=True):
        """One image -> (H, W, 3) uint8 array. Its checksum is always looked at."""
        try:
            at = self._position(name)
            record = self.index[at] if at is not None else None
            if record is None or not record["length"]:
                raise ImageError("not in the store" if record is None else "was not readable")
            content = self._bytes(record)
            if self.settings["form"] == "jpeg":
                return np.array(Image.open(io.BytesIO(content), formats=("JPEG",)))
            shape = int(record["height"]), int(record["width"]), 3
            return np.frombuffer(content, np.uint8).reshape(shape)
        except (OSError, ImageError) as error:
            why = getattr(error, "strerror", None) or error
        raise ImageError(f"{self.path}: {name}{where}: cannot be used: {why}")

    def unreadable(self, annotations):
        """(N,) bool: which rows' images the store lists as unreadable.

        Raises UserError naming the first row whose image was never packed.
        """
        width = max(self.names.dtype.itemsize, annotations.filename.dtype.itemsize)
        names = self.names.astype(f"S{width}", copy=False)
        wanted = annotations.filename.astype(names.dtype, copy=False)
        at = np.searchsorted(names, wanted).clip(max=len(names) - 1)
        missing = np.flatnonzero(names[at] != wanted)
        if len(missing):
            first = missing[0]
            raise UserError(
                f"data.packed: {self.path} lacks {len(missing)} of the images of "
                f"{annotations.path}, the first {annotations.name(first)} "
                f"({annotations.place(first)}): pack them together, to another folder"
            )
        return self.index["length"][at] == 0

    def check(self, image_size, needed, *tables):
        """Warns where the smallest crops would be enlarged, for which `needed` px are wanted.

        Raises UserError where whole images would be, of which the originals had the pixels.
        """
        short = self.settings["short_side"]
        if not (np.minimum(self.index["height"], self.index["width"]) == short).any():
            return  # nothing was shrunk
        told = f"{self.path} holds images shrunk to a short side of {short} px"
        if short < image_size:
            raise UserError(f"data.image_size: {image_size}, but {told}: pack with --short-side")
        if short < math.floor(needed):
            say(f"warning: {told}; the smallest crops want {math.ceil(needed)}, and are enlarged")


def open_images(image_root, packed=None):
    """Where a run's images come from: the files below a folder, or a packed store."""
    return ImageFolder(image_root) if packed is None else PackedStore(packed)


def leave_out_unreadable(images, most, *tables):
    """Annotations less the rows whose image the store lists as unreadable; says which.

    Raises UserError where they are more than `most` in all. A file that is found unreadable while
    training stops the run.
    """
    bad = [images.unreadable(table) for table in tables]
    count = sum(int(rows.sum()) for rows in bad)
    if not count:
        return tables
    pairs = list(zip(tables, bad, strict=True))
    named = [table.name(row) for table, rows in pairs for row in np.flatnonzero(rows)]
    text = f"{count} images that {images.path} lists as unreadable: {some(named)}"
    if count > most:
        raise UserError(f"data.max_bad_images: {most}, but {text}")
    if any(rows.all() for rows in bad):
        raise UserError(f"data.packed: no image of a CSV is left: {text}")
    say(f"left out: {text}")
    return tuple(table.take(~rows) for table, rows in pairs)
