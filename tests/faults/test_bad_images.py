"""Images as disks, cameras and strangers leave them: what stands where one image belongs."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from conftest import write_set
from PIL import Image
from refusal import refused
from small import OVERRIDES, arguments

from simclr import main

pytestmark = pytest.mark.usefixtures("narrow")

NAME = "train_0007.png"


def saved(kind, mode="RGB", size=(40, 40), **how):
    """Bytes of an image of noise."""
    shape = (size[1], size[0], 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **how)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG that asks for side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + content


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :]


def zeroed(data, start, end):
    return data[:start] + b"\0" * (end - start) + data[end:]


PNG, JPEG, TIFF, WEBP = saved("PNG"), saved("JPEG"), saved("TIFF"), saved("WEBP")
BMP = saved("BMP")
CONTENT = {  # what is wrong: the file's bytes, part of the reason
    "no byte": (b"", "header"),
    "a text": (b"this is no image", "header"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "header"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header"),
    "zeros": (b"\0" * 5000, "header"),
    "a PNG's header alone": (PNG[:33], "damaged"),
    "a PNG's signature alone": (PNG[:8], ""),
    "a PNG cut in the middle": (PNG[: len(PNG) // 2], "damaged"),
    "a PNG without its last bytes": (PNG[:-9], "damaged"),
    "a PNG with a flipped bit": (flipped(PNG, len(PNG) // 2), "damaged"),
    "a PNG with a flipped bit in its header": (flipped(PNG, 18), ""),
    "a PNG with a zeroed block": (zeroed(PNG, 1000, 3000), "damaged"),
    "a PNG without width": (PNG[:16] + struct.pack(">I", 0) + PNG[20:], ""),
    "a PNG copied as text": (PNG.replace(b"\n", b"\r\n"), ""),
    "a JPEG's header alone": (JPEG[:40], ""),
    "a JPEG cut in the middle": (JPEG[: len(JPEG) // 2], "damaged"),
    "a TIFF cut in the middle": (TIFF[: len(TIFF) // 2], ""),
    "a TIFF with a wild offset": (TIFF[:4] + b"\xff\xff\xff\x7f" + TIFF[8:], ""),
    "a WebP cut in the middle": (WEBP[: len(WEBP) // 2], ""),
    "a BMP cut in the middle": (BMP[: len(BMP) // 2], "damaged"),
    "a BMP of two billion rows": (BMP[:22] + struct.pack("<i", 2**31 - 1) + BMP[26:], ""),
    "a GIF": (saved("GIF"), "it is no PNG, JPEG, BMP, TIFF, WEBP image"),
    "an EPS": (saved("EPS"), "it is no PNG, JPEG, BMP, TIFF, WEBP image"),
    "a JPEG 2000": (saved("JPEG2000"), "it is no PNG, JPEG, BMP, TIFF, WEBP image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "header"),
    "a PDF": (b"%PDF-1.4\n", "header"),
    "a phone's HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1", "header"),
    "a bomb of 121 million pixels": (bomb(11_000), "100 million"),
    "a bomb of 4 billion pixels": (bomb(65_000), "100 million"),
    "floating-point pixels": (saved("TIFF", "F"), "floating-point"),
    "metadata of gigabytes": (
        PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 5_000_000)) + PNG[33:],
        "metadata",
    ),
    "a broken EXIF": (PNG[:33] + chunk(b"eXIf", b"none") + PNG[33:], "metadata"),
}


def sock(path):
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(here)


PLACES = {  # what stands there: how it is made, part of the reason
    "nothing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "directory"),
    "a pipe": (os.mkfifo, "no regular file"),
    "a socket": (sock, "no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "outside"),
    "a link to nothing": (lambda path: path.symlink_to(path.with_name("none")), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "a link out of the folder": (lambda path: path.symlink_to("/etc/hostname"), "outside"),
    "a link to the folder above": (lambda path: path.symlink_to(".."), "outside"),
}


@pytest.mark.parametrize("case", [*CONTENT, *PLACES])
def test_an_image(case, tmp_path, capsys, count):
    overrides = write_set(tmp_path / "set", n_train=16, n_val=6)
    path = tmp_path / "set/images" / NAME
    what, reason = (CONTENT | PLACES)[case]
    path.unlink()
    path.write_bytes(what) if case in CONTENT else what(path)
    quick = ["data.train_defect_proportion=null", "optimization.batch_size=8"]
    argv = arguments("simclr", overrides, tmp_path / "runs", "run", *OVERRIDES["simclr"], *quick)
    words = [NAME, "cannot be used", reason]
    refused(main, argv, words, tmp_path, capsys, count, "images")


@pytest.mark.parametrize("root", ["none", "train.csv"])
def test_no_folder_of_images(root, tmp_path, capsys, count):
    overrides = write_set(tmp_path / "set", n_train=16, n_val=6)
    more = f"data.image_root={tmp_path / 'set' / root}"
    argv = arguments("simclr", overrides, tmp_path / "runs", "run", more)
    refused(main, argv, ["data.image_root", root], tmp_path, capsys, count, "images")
