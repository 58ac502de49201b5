import os

import numpy as np
import pytest
import torch
from conftest import write_set
from PIL import Image

from common.annotations import read_annotations
from common.augmentations import CropViews
from common.data import batches, build_loaders, clean_loader, open_image
from common.running.errors import ImageError, UserError
from common.sampler import EpochSampler


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
    for name in ("none.png", "."):
        with pytest.raises(ImageError, match="cannot be used"):
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
    for side, words in ((8000, "8000 x 8000"), (20000, "cannot be used")):
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
        with pytest.raises(ImageError, match=words):
            opened(tmp_path, "bomb.png")


@pytest.fixture
def small(tmp_path):
    write_set(tmp_path / "s", n_train=24, n_val=10)
    train, val = (read_annotations(tmp_path / "s" / f"{n}.csv") for n in ("train", "val"))
    return tmp_path / "s" / "images", train, val


def loaders(small, num_workers, rank=0, world_size=1):
    root, train, val = small
    sampler = EpochSampler(np.arange(24), 8, 3, rank, world_size)
    crops = CropViews(16, 0.4, 0.275, 0.5, 2, seed=3, noise_size=4)
    return build_loaders(root, train, sampler, crops, val, num_workers, torch.device("cpu"))


def test_what_a_sample_gets_depends_neither_on_workers_nor_on_ranks(small):
    def samples(*how):
        loader, _ = loaders(small, *how)
        loader.batch_sampler.start(1)
        found = {}
        for batch in batches(loader):
            for i, row in enumerate(batch.row.tolist()):
                found[row] = (batch.views[i], batch.factors[i], batch.noise[i], batch.label[i])
        return found

    alone = samples(0)
    split = samples(2, 0, 2) | samples(0, 1, 2)
    assert alone.keys() == split.keys() and len(alone) == 24
    for row, values in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(values, split[row], strict=True))


def test_loading_leaves_the_global_generator_alone(small):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train_loader, val_loader = loaders(small, 0)
    list(batches(train_loader)), list(batches(val_loader))
    assert torch.equal(before, torch.get_rng_state())


def test_clean_images_come_once_and_in_order(small):
    root, _, val = small
    loader = clean_loader(root, val, np.arange(10), 16, 4, 0, False)
    got = list(batches(loader))
    assert torch.cat([rows for _, rows in got]).tolist() == list(range(10))
    assert got[0][0].shape == (4, 3, 16, 16) and got[0][0].dtype == torch.uint8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_one_sentence_from_any_worker(small, num_workers):
    root, train, _ = small
    (root / train.name(5)).write_bytes(b"junk")
    loader, _ = loaders(small, num_workers)
    with pytest.raises(ImageError) as error:
        list(batches(loader))
    assert train.name(5) in str(error.value) and "Traceback" not in str(error.value)
    assert "train.csv" in str(error.value)


def test_missing_files_are_noticed_before_a_run(small):
    root, train, _ = small
    (root / train.name(5)).unlink()
    with pytest.raises(UserError, match=train.name(5)):
        loaders(small, 0)
    with pytest.raises(UserError, match="image_root"):
        loaders((root / "none", *small[1:]), 0)
