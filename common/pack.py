"""Pack images once, decoded and shrunk, so that no epoch decodes the originals again.

    python -m common.pack --image-root DIR --annotations CSV... --out DIR [--form jpeg|raw]

Writes the images that the CSVs name as one store, which `data.packed=DIR` reads. jpeg: quality 90
with halved colour resolution, some 35 kB an image of a short side of 357 px; raw: its pixels, some
500 kB, for small sets and fast disks. Larger images are shrunk to a short side of --short-side px
(the default: what crops of 224 px from .395 of the image want). Stopped or killed, it goes on when
the same command is given again. Exit code 1: packed, but some images, named at the end, cannot be
read; training leaves them out, up to data.max_bad_images.
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from common.annotations import read_annotations
from common.augmentations import resize
from common.data import batches, cores, make_loader
from common.images import ImageFolder
from common.running.arguments import at_least, path_argument
from common.running.errors import ImageError, UserError
from common.running.faults import explain
from common.running.folder import read_json, write_json
from common.running.process import entry_point
from common.running.progress import Progress, clock, say, write_error
from common.running.standing import try_lock
from common.store import FORMAT, IMAGES, INDEX, NAMES, RECORD, SETTINGS, index_hash

SHORT_SIDE = 357  # pixels: 224 / sqrt(.395), the study's views and smallest crops
QUALITY = 90  # of JPEG, with 4:2:0 subsampling
PARTIAL = "index.partial"  # records of what is packed so far
AT_ONCE = 32  # images a piece of work
TRIED = 24  # images by which size and time are estimated


class Encoded(Dataset):
    """Position in names -> (bytes, height, width), or the ImageError."""

    def __init__(self, images, names, form, short_side):
        self.images, self.names, self.form, self.short_side = images, names, form, short_side

    def __len__(self):
        return len(self.names)

    def __getitem__(self, position):
        try:
            image = self.images.read(self.names[position].decode())
        except ImageError as error:
            return error
        height, width = image.shape[:2]
        scale = self.short_side / min(height, width)
        if scale < 1:
            size = [max(round(side * scale), 1) for side in (height, width)]
            image = resize(image, size).permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        if self.form == "raw":
            return image.tobytes(), height, width
        buffer = io.BytesIO()
        try:
            Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        except OSError as error:  # a side of more than 65,500 px
            return ImageError(f"{self.names[position].decode()}: cannot be a JPEG: {error}")
        return buffer.getvalue(), height, width


def _estimate(encoded, left, workers, out):
    """Say how much and how long it will be; raises UserError where the disk is too small."""
    start, tried = time.monotonic(), range(0, len(encoded), -(-len(encoded) // TRIED))
    sizes = [0 if isinstance(x, ImageError) else len(x[0]) for x in map(encoded.__getitem__, tried)]
    seconds = (time.monotonic() - start) / len(tried) * left / max(workers, 1)
    needed, free = sum(sizes) / len(tried) * left, shutil.disk_usage(out).free
    say(f"{left} images: about {needed / 1e9:.2g} GB and {clock(seconds)}, {workers} workers")
    if needed > free:
        raise UserError(f"{out}: about {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} are free")


def _append(file, item, end):
    """Write one image behind the others; its record."""
    if isinstance(item, ImageError):
        return (end, 0, 0, 0, 0)
    content, height, width = item
    file.write(content)
    return (end, len(content), height, width, zlib.crc32(content))


def _begin(out, settings, names):
    """The records of what an earlier call packed, an empty array where there was none.

    Raises UserError where the folder holds something else.
    """
    there = read_json(out / SETTINGS)
    if there is None:
        if not {path.name for path in out.iterdir()} <= {"lock", NAMES, f"{SETTINGS}.new"}:
            raise UserError(f"{out}: holds something else than a store; choose another folder")
        _save(out / NAMES, names)
        write_json(out / SETTINGS, settings)
    elif any(there.get(key) != settings[key] for key in settings if key != "finished"):
        raise UserError(f"{out}: holds a store of other images or settings; choose another folder")
    partial, images = out / PARTIAL, out / IMAGES
    whole = partial.stat().st_size // RECORD.itemsize if partial.exists() else 0
    records = np.fromfile(partial, RECORD, whole) if whole else np.zeros(0, RECORD)
    size = images.stat().st_size if images.exists() else 0
    lost = np.flatnonzero(records["offset"] + records["length"] > size)
    return records[: lost[0]] if len(lost) else records


def _save(path, array):
    """np.save, on the disk before anything speaks of it."""
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _pack(out, encoded, records, workers):
    """Append what is left to the images and the records, a piece at a time; returns all records."""
    end = int((records["offset"] + records["length"]).max(initial=0))
    progress = Progress(len(encoded), "packing", "images", len(records))
    with open(out / IMAGES, "ab") as images, open(out / PARTIAL, "ab") as partial:
        images.truncate(end)
        partial.truncate(records.nbytes)
        left = range(len(records), len(encoded))
        how = {"collate_fn": list, "batch_size": AT_ONCE, "sampler": left}
        for piece in batches(make_loader(encoded, workers, False, AT_ONCE, **how)):
            new = np.zeros(len(piece), RECORD)
            for i, item in enumerate(piece):
                new[i] = _append(images, item, end)
                end += int(new[i]["length"])
            images.flush()
            os.fsync(images.fileno())  # before the records that speak of it
            partial.write(new.tobytes())
            partial.flush()
            progress.update(len(piece))
    progress.close()
    return np.fromfile(out / PARTIAL, RECORD)


def _look_again(out, encoded, records):
    """{name: why} of what cannot be read, after one more try: a disk may have been away."""
    unreadable = {}
    with open(out / IMAGES, "ab") as file:
        for position in np.flatnonzero(records["length"] == 0):
            item = encoded[position]
            if isinstance(item, ImageError):
                unreadable[encoded.names[position].decode()] = str(item)
            else:
                records[position] = _append(file, item, file.tell())
        os.fsync(file.fileno())
    return unreadable


def pack(image_root, names, out, form="jpeg", short_side=SHORT_SIDE, workers=0):
    """Write a store of the named images (sorted, UTF-8 bytes); returns {name: why} of the others.

    What an earlier call with the same arguments left is gone on with.
    """
    out = Path(out)
    settings = {"format": FORMAT, "form": form, "quality": QUALITY if form == "jpeg" else None}
    settings |= {"short_side": short_side, "images": len(names)}
    settings |= {"image_root": os.path.realpath(image_root)}
    settings |= {"names_sha256": hashlib.sha256(names.tobytes()).hexdigest(), "finished": False}
    encoded = Encoded(ImageFolder(image_root), names, form, short_side)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "lock", "a") as lock:
            if not try_lock("lockf", lock):
                raise UserError(f"{out}: another process is packing there")
            records = _begin(out, settings, names)
            there = read_json(out / SETTINGS)
            if there["finished"]:
                say(f"{out} is packed, from {there['image_root']}")
                return there["unreadable"]
            if len(records) < len(names):
                _estimate(encoded, len(names) - len(records), workers, out)
            records = _pack(out, encoded, records, workers)
            unreadable = _look_again(out, encoded, records)
            _save(out / INDEX, records)
            done = {"finished": True, "index_sha256": index_hash(settings, names, records)}
            write_json(out / SETTINGS, settings | done | {"unreadable": unreadable})
            (out / PARTIAL).unlink()
            return unreadable
    except OSError as error:
        error.filename = error.filename or out
        what = f"{error.filename}: {error.strerror or error}"
        kept = UserError(f"{what}; what is packed is kept, the same command goes on")
        raise explain(error) or kept from None


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image-root", required=True, type=path_argument, metavar="DIR")
    parser.add_argument(
        "--annotations", required=True, type=path_argument, nargs="+", metavar="CSV"
    )
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR")
    parser.add_argument("--form", choices=("jpeg", "raw"), default="jpeg")
    parser.add_argument("--short-side", type=at_least(1), default=SHORT_SIDE, metavar="PX")
    parser.add_argument("--workers", type=at_least(0), default=cores(), metavar="N")
    args = parser.parse_args(argv)
    tables = [read_annotations(path).filename for path in args.annotations]
    names = np.unique(np.concatenate(tables))
    unreadable = pack(args.image_root, names, args.out, args.form, args.short_side, args.workers)
    size = (Path(args.out) / IMAGES).stat().st_size
    print(f"{args.out}: {len(names) - len(unreadable)} images, {size / 1e9:.3g} GB")
    if unreadable:
        many = f"{len(unreadable)} images cannot be read; {SETTINGS} lists them"
        write_error("\n".join([*unreadable.values(), many]))
        sys.exit(1)


if __name__ == "__main__":
    main()
