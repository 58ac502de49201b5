"""Image files as people have them: every kind of pixels, of metadata and of damage."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from common.images import brightest, open_image
from common.running.errors import ImageError


def opened(folder, name):
    return np.asarray(open_image(os.path.realpath(folder), name))


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    rgb = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    three_greys = np.repeat(grey[:, :, None], 3, axis=2)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "grey_alpha.png")
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "palette.png")
    bits = Image.fromarray(grey).convert("1")
    bits.save(tmp_path / "bits.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(np.uint16([[0, 128, 129, 65535]])).save(tmp_path / "rounding.png")
    for name in ("rgb", "rgba"):
        assert (opened(tmp_path, f"{name}.png") == rgb).all()
    for name in ("grey", "grey_alpha", "sixteen"):
        assert (opened(tmp_path, f"{name}.png") == three_greys).all(), name
    assert (opened(tmp_path, "palette.png") == np.asarray(palette.convert("RGB"))).all()
    assert set(np.unique(opened(tmp_path, "bits.png"))) == {0, 255}
    assert opened(tmp_path, "rounding.png")[0, :, 0].tolist() == [0, 0, 1, 255]


def test_jpegs_grey_colour_and_cmyk(tmp_path):
    smooth = np.full((32, 32, 3), (200, 120, 40), np.uint8)
    image = Image.fromarray(smooth)
    image.save(tmp_path / "rgb.jpg", quality=95)
    image.convert("L").save(tmp_path / "grey.jpg", quality=95)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert abs(opened(tmp_path, "rgb.jpg").astype(int) - smooth).max() < 6
    assert abs(opened(tmp_path, "cmyk.jpg").astype(int) - smooth).max() < 6
    assert np.ptp(opened(tmp_path, "grey.jpg"), axis=2).max() == 0


def test_damage_is_an_error_that_names_the_file(tmp_path):
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        good
    )
    whole = good.read_bytes()
    damaged = {
        "empty.png": b"",
        "short.png": whole[: len(whole) // 2],
        "text.png": b"this is no image",
        "page.jpg": b"<html>404</html>",
    }
    rng = np.random.default_rng(1)
    for i in range(40):  # single flipped bits, anywhere behind the signature
        flipped = bytearray(whole)
        flipped[rng.integers(8, len(whole))] ^= 1 << rng.integers(8)
        damaged[f"flip{i}.png"] = bytes(flipped)
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            opened(tmp_path, name)
    os.mkdir(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for name in ("none.png", "folder.png", "pipe.png"):
        with pytest.raises(ImageError, match=f"{name}: cannot be used: (No such|Is a|it is no)"):
            opened(tmp_path, name)


def test_nothing_outside_the_image_root_is_opened(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("link.png", "../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(ImageError, match="outside"):
            opened(root, name)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    for side, words in ((10001, "10001 x 10001 pixels"), (20000, "its pixels")):
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
        with pytest.raises(ImageError, match=f"{words} are more than the 100 million"):
            opened(tmp_path, "bomb.png")


def test_a_phones_fifty_megapixels_are_allowed(tmp_path):
    Image.new("1", (8192, 6144)).save(tmp_path / "phone.png")
    assert open_image(os.path.realpath(tmp_path), "phone.png").size == (8192, 6144)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour, *rows, before=b"", after=b""):
    """A PNG from packed rows. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha;
    before, after: chunks around the pixels."""
    width = len(rows[0]) * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def pixels_of(folder, content):
    """The first row of a file with that content, as lists of (R, G, B)."""
    (folder / "x.png").write_bytes(content)
    return opened(folder, "x.png")[0].tolist()


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "deep.png", "deep.tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(tmp_path, name, orientation):
    array = np.zeros((48, 32, 3), np.uint8)
    array[:16, :16], array[:16, 16:], array[16:, :16] = 250, 160, 80
    image = Image.fromarray(array)
    if name.startswith("deep"):
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / name, exif=exif)
    tagged = Image.fromarray(array)
    tagged.getexif()[ExifTags.Base.Orientation] = orientation
    expected = np.asarray(ImageOps.exif_transpose(tagged)).astype(int)
    got = opened(tmp_path, name)
    assert got.shape == expected.shape
    assert np.median(abs(got - expected)) < 3 and abs(got - expected)[4:-4, 4:-4].mean() < 3


def test_what_is_transparent_is_black(tmp_path):
    colours = np.uint8([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]])
    rgba = Image.fromarray(colours)
    half = [[100, 50, 25], [101, 51, 26]]
    for name in ("x.png", "x.tif", "x.webp"):
        rgba.save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        got = opened(tmp_path, name)[0].tolist()
        assert got[:2] == [[200, 100, 50], [0, 0, 0]] and half[0] <= got[2] <= half[1], name
    rgba.convert("LA").save(tmp_path / "la.png")
    grey = opened(tmp_path, "la.png")[0, :, 0].tolist()
    assert grey[0] > 100 and grey[1] == 0 and grey[2] == pytest.approx(grey[0] / 2, abs=1)
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    row = bytes([0, 1, 2])
    for alpha, second, third in (
        (b"\xff\0", [0, 0, 0], [70, 80, 90]),  # one transparent entry: Pillow keeps its number
        (b"\xff\x80\0", [20, 25, 30], [0, 0, 0]),
    ):
        got = pixels_of(tmp_path, png(8, 3, row, before=palette + chunk(b"tRNS", alpha)))
        assert got == [[10, 20, 30], second, third]


@pytest.mark.parametrize(
    ("depth", "row", "key", "grey"),
    [
        (1, b"\x50", 1, [0, 0, 0, 0, 0, 0, 0, 0]),
        (2, b"\x1b", 2, [0, 85, 0, 255]),
        (4, b"\x03\x5f", 5, [0, 51, 0, 255]),
        (8, bytes([0, 3, 9, 255]), 9, [0, 3, 0, 255]),
        (16, words(0, 771, 5000, 65535), 5000, [0, 3, 0, 255]),
        (16, words(0, 771, 5000, 65535), 65535, [0, 3, 19, 0]),
    ],
)
def test_the_transparent_grey_of_a_png_is_black(tmp_path, depth, row, key, grey):
    got = pixels_of(tmp_path, png(depth, 0, row, before=chunk(b"tRNS", words(key))))
    assert got == [[value] * 3 for value in grey]


def test_the_transparent_colour_of_a_png_is_black(tmp_path):
    row, key = bytes([1, 2, 3, 1, 2, 4]), chunk(b"tRNS", words(1, 2, 3))
    assert pixels_of(tmp_path, png(8, 2, row, before=key)) == [[0, 0, 0], [1, 2, 4]]
    row, key = words(65535, 300, 0, 65535, 900, 0), chunk(b"tRNS", words(65535, 300, 0))
    assert pixels_of(tmp_path, png(16, 2, row, before=key)) == [[0, 0, 0], [255, 3, 0]]
    row = words(40000, 65535, 40000, 0)
    assert pixels_of(tmp_path, png(16, 4, row)) == [[156] * 3, [0] * 3]


@pytest.mark.parametrize("scale", [1, 16])
def test_twelve_bits_in_sixteen_are_seen(tmp_path, scale):
    grey = np.uint16([[0, 4095]]) * scale
    files = {"L.png": png(16, 0, words(0, 4095 * scale))}
    files["LA.png"] = png(16, 4, words(0, 65535, 4095 * scale, 65535))
    files["RGB.png"] = png(16, 2, words(0, 0, 4095 * scale))
    files["RGBA.png"] = png(16, 6, words(0, 0, 4095 * scale, 65535))
    for name, image in (("L", Image.fromarray(grey)), ("big", Image.fromarray(grey.astype(">u2")))):
        image.save(tmp_path / "x.tif")
        files[f"{name}.tif"] = (tmp_path / "x.tif").read_bytes()
    for name, content in files.items():
        assert (brightest(content) < 4096) == (scale == 1), name
        upper = 4095 * scale & 0xFF00  # of colours
        assert brightest(content) in (4095 * scale, upper), name
    for image in (Image.new("L", (3, 3)), Image.new("RGB", (3, 3)), Image.new("1", (3, 3))):
        for kind in ("PNG", "BMP", "TIFF"):
            image.save(tmp_path / "x", kind)
            assert brightest((tmp_path / "x").read_bytes()) is None


def test_only_formats_that_pillow_reads_by_itself_are_opened(tmp_path, monkeypatch):
    image = Image.new("RGB", (16, 16), (9, 9, 9))
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    for kind in ("EPS", "GIF", "PPM", "TGA", "PCX", "ICO", "JPEG2000"):
        image.save(tmp_path / "x.png", kind)
        with pytest.raises(ImageError, match="it is no PNG, JPEG, BMP, TIFF, WEBP image"):
            opened(tmp_path, "x.png")
    assert not started
    for kind in ("PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP"):
        image.save(tmp_path / "x.dat", kind)
        assert abs(opened(tmp_path, "x.dat").astype(int) - 9).max() < 3, kind


def test_of_several_frames_the_first_is_taken(tmp_path):
    frames = [Image.new("RGB", (16, 16), (c, c, c)) for c in (200, 10, 90)]
    for name in ("x.png", "x.webp", "x.tif", "x.mpo"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert abs(opened(tmp_path, name).astype(int) - 200).max() < 3, name


LONG_TEXT = chunk(b"zTXt", b"key\0\0" + zlib.compress(b"a" * 3_000_000))
BROKEN_TEXT = chunk(b"tEXt", b"key\0text")[:-1] + b"!"


@pytest.mark.parametrize(
    "where",
    [
        {"before": LONG_TEXT},
        {"after": LONG_TEXT},
        {"before": BROKEN_TEXT},
        {"after": BROKEN_TEXT},
        {"before": chunk(b"pHYs", b"ab")},
        {"before": chunk(b"iCCP", b"name\0\0" + zlib.compress(b"a" * 3_000_000))},
        {"before": chunk(b"eXIf", b"this is no EXIF")},
        {"before": chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz")},
    ],
)
def test_refused_metadata_is_told_apart_from_damaged_pixels(tmp_path, where):
    with pytest.raises(ImageError, match="x.png: cannot be used: its metadata cannot be read .*:"):
        pixels_of(tmp_path, png(8, 0, b"abcd", **where))
    damaged = png(8, 0, b"abcd")
    at = damaged.index(b"IDAT") + 8
    damaged = damaged[:at] + bytes([damaged[at] ^ 1]) + damaged[at + 1 :]
    with pytest.raises(ImageError, match="its pixels are damaged"):
        pixels_of(tmp_path, damaged)


def test_a_jpeg_is_as_it_is_stored_where_its_exif_is_broken(tmp_path):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "JPEG", exif=b"Exif\0\0 this is none")
    assert len(pixels_of(tmp_path, data.getvalue())) == 64
    with pytest.raises(ImageError, match="its pixels are damaged"):
        pixels_of(tmp_path, data.getvalue()[:-500])
