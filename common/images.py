"""An image file, as people have them, as RGB pixels; one that cannot be used, as a sentence."""

import contextlib
import functools
import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from common.running.errors import ImageError, UserError, regular
from common.running.keyed import FILE_CHECK, keyed_rng
from common.running.progress import say

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # only: for some others Pillow starts programs
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_IMAGE = 100_000_000  # pixels; a few bytes of PNG can ask for gigabytes of memory
CHECKED_FILES = 64  # rows whose file is looked at before a run starts
CHECKED_16_BIT = 8  # of these, images of 16 bits a channel that are decoded
TURNS = {  # EXIF's orientation -> what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
METADATA = "its metadata cannot be read ({}), though its pixels can: save it again without metadata"


def _to_rgb(image):
    """Any image that Pillow decodes -> RGB, 8 bit a channel; what is transparent becomes black."""
    if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip it to white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("it has more than 16 bits a pixel")
        values[values == image.info.get("transparency", -1)] = 0
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("its floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image)
        return black
    return image.convert("RGB")


def identify(content):
    """The bytes of a file -> PIL image of which only the header is known."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        size, pixels = f"{image.width} x {image.height}", image.width * image.height
    except Image.DecompressionBombError:  # Pillow's own limit, which is above ours
        size, pixels = "its", LARGEST_IMAGE + 1
    if pixels > LARGEST_IMAGE:
        allowed = f"{LARGEST_IMAGE // 10**6} million"
        raise ImageError(f"{size} pixels are more than the {allowed} that are allowed")
    key, depth = image.info.get("transparency"), content[24:25]
    if image.format == "PNG" and image.mode == "L" and depth in (b"\2", b"\4"):
        if key is not None:  # Pillow stretches grey values to 8 bits, but not the transparent one
            image.info["transparency"] = key * 255 // (2 ** depth[0] - 1)
    elif image.format == "PNG" and image.mode == "RGB" and depth == b"\x10" and key:
        image.info["transparency"] = tuple(k >> 8 for k in key)  # as it shortens the pixels
    return image


def _decode(content, check=True):
    """The bytes of a file -> RGB image as its maker saw it: upright."""
    image = identify(content)
    if check and image.format == "PNG":
        image.verify()  # checksums of all chunks, which decoding alone does not look at
        image = identify(content)
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception as error:
        raise ImageError(METADATA.format(f"EXIF: {error}")) from None
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _without_metadata(png):
    """The critical chunks of a PNG file: those that decoding needs."""
    kept, at = png[:8], 8
    while at + 8 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if not png[at + 4] & 32:  # a capital letter
            kept += png[at:end]
        at = end
    return kept


def _reason(error, content):
    """Why an image cannot be used, in words. content: its bytes, if they could be read."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if content.startswith(PNG_SIGNATURE):
        with contextlib.suppress(Exception):
            _decode(_without_metadata(content))
            return METADATA.format(error)
    if isinstance(error, UnidentifiedImageError):
        return f"it is no {', '.join(FORMATS)} image, or its header is damaged"
    return f"its pixels are damaged ({error})"


def _read(image_root, name):
    """The bytes of a regular file below image_root."""
    path = os.path.realpath(os.path.join(image_root, name))
    if not path.startswith(os.path.join(image_root, "")):
        raise ImageError(f"a link leads to {path}, outside the folder of the images, {image_root}")
    return Path(regular(path)).read_bytes()


def read_image(image_root, name, where, decode):
    """decode(the bytes of one file below image_root); raises ImageError as `open_image` does."""
    content = b""
    try:
        content = _read(image_root, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of sizes below our limit, of odd metadata
            return decode(content)
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes Pillow may raise anything
        why = _reason(error, content)
    raise ImageError(f"{os.path.join(image_root, name)}{where}: cannot be used: {why}")


def open_image(image_root, name, where="", check=True):
    """One file below image_root -> PIL RGB image, fully decoded, upright.

    image_root: a real path (no links). where: added to the error, such as the CSV and its line.
    check: whether the checksums of a PNG are looked at; without, as in a JPEG, only such damage is
    found as the decoder notices. Raises ImageError naming the file.
    """
    return read_image(image_root, name, where, functools.partial(_decode, check=check))


def brightest(content):
    """The largest value of a file of 16 bits a channel, or None where it has fewer bits."""
    image = identify(content)
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    if ";16" not in str(image.tile) or image.format == "BMP":  # whose 16 bits are a pixel's
        return None
    return int(np.asarray(image.convert("RGB")).max()) << 8  # Pillow keeps the upper 8 bits


class ImageFolder:
    """Where a run's images come from: the files below a folder."""

    packed = None  # what a packed store holds instead

    def __init__(self, image_root):
        if not os.path.isdir(image_root):
            raise UserError(f"data.image_root: {image_root} is no folder")
        self.path, self._root = image_root, os.path.realpath(image_root)

    def read(self, name, where="", check=True):
        """One image -> (H, W, 3) uint8 array; see `open_image`."""
        return np.array(open_image(self._root, name, where, check))

    def unreadable(self, annotations):
        """(N,) bool: rows whose image is known to be unreadable. Of files that is not known."""
        return np.zeros(len(annotations), bool)

    def check(self, image_size, needed, *tables):
        """Look at some files of each (Annotations, rows), the same on all ranks, before a run.

        Raises UserError where one is no image; warns where images of 16 bits are nearly black.
        """
        dark, looked_at = [], 0
        for annotations, rows in tables:
            enough = looked_at + CHECKED_16_BIT
            rng = keyed_rng(FILE_CHECK, len(rows))
            for row in rng.choice(rows, min(CHECKED_FILES, len(rows)), replace=False):
                name, look = annotations.name(row), looked_at < enough
                how, where = brightest if look else identify, f" ({annotations.place(row)})"
                try:
                    found = read_image(self._root, name, where, how)
                except ImageError as error:
                    raise UserError(str(error)) from None
                if look and found is not None:
                    looked_at += 1
                    dark += [name] * (found < 4096)
        if dark:
            say(
                f"warning: {os.path.join(self.path, dark[0])} has 16 bits a pixel and uses the "
                f"lowest 12 or fewer, as do {len(dark)} of the {looked_at} looked into: nearly "
                "black, with 16 grey levels where there were 4096. Multiply the values by 16 (a "
                "12-bit camera) or save the images with 8 bits"
            )
