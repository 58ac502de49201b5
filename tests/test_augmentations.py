import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from common.augmentations import (
    MEAN,
    OPERATIONS,
    STD,
    ColorJitterNormalize,
    CropViews,
    draw_crop,
    resize_squash,
)
from common.running.keyed import JITTER_ORDER, keyed_rng

SIZES = 32, 64, 224
RESIZED = ["d5800766", "b62d0ba9", "cca46a80"]
TORCHVISION = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


@pytest.fixture
def images():
    """(8, 3, 33, 47) uint8 with grey, black, white and saturated pixels among the random ones."""
    x = torch.randint(0, 256, (8, 3, 33, 47), dtype=torch.uint8, generator=torch.manual_seed(0))
    x[0, :, :5] = 128
    x[1, :, :5], x[2, :, :5] = 0, 255
    x[3, 0], x[4, 1], x[5, 2] = 255, 0, 255
    x[6, 1] = x[6, 0]  # two channels share the maximum or minimum
    return x


@pytest.mark.parametrize("operation", range(4))
def test_each_operation_is_torchvisions_image_for_image(images, operation):
    x = images.float() / 255
    low, high = (-0.5, 0.5) if operation == 3 else (0.2, 1.8)
    factor = torch.linspace(low, high, len(x))
    ours = OPERATIONS[operation](x.clone(), factor.view(-1, 1, 1, 1))
    for i, f in enumerate(factor.tolist()):
        torch.testing.assert_close(ours[i], TORCHVISION[operation](x[i], f), atol=1e-5, rtol=0)


def test_the_whole_chain_is_torchvisions_image_for_image(images):
    views = torch.stack([images, images.flip(-2)], dim=1)  # (B, 2, 3, H, W)
    rng = np.random.default_rng(1)
    factors = torch.tensor(rng.uniform(0.7, 1.3, (8, 2, 5)), dtype=torch.float32)
    factors[:, :, 3] -= 1
    factors[:, :, 4] = torch.tensor(rng.integers(0, 2, (8, 2)))
    ours = ColorJitterNormalize(seed=5)(views, factors, step=17)
    assert ours.shape == (2, 8, 3, 33, 47)
    for v in range(2):
        order = keyed_rng(JITTER_ORDER, 5, 17, v).permutation(4)
        for i in range(8):
            x = views[i, v].float() / 255
            for k in order:
                x = TORCHVISION[k](x, float(factors[i, v, k]))
            x = TF.horizontal_flip(x) if factors[i, v, 4] else x
            torch.testing.assert_close(ours[v, i], TF.normalize(x, MEAN, STD), atol=1e-5, rtol=0)


def test_the_order_of_operations_changes_from_step_to_step_and_view_to_view():
    orders = [
        tuple(keyed_rng(JITTER_ORDER, 0, s, v).permutation(4)) for s in range(50) for v in (0, 1)
    ]
    assert len(set(orders)) > 15 and orders[::2] != orders[1::2]


@pytest.mark.parametrize("size", [(352, 288), (40, 400), (90, 120)])
def test_crops_are_drawn_as_torchvision_draws_them(size):
    width, height = size
    rng = np.random.default_rng(0)
    ours = np.array([draw_crop(rng, width, height, 0.395) for _ in range(4000)])
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    theirs = [
        RandomResizedCrop.get_params(blank, (0.395, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)
    ]
    theirs = np.array([(left, top, w, h) for top, left, h, w in theirs])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all() and (ours[:, 1] + ours[:, 3] <= height).all()
    for column in range(4):  # the two samples' deciles agree
        q = np.arange(0.1, 1, 0.1)
        difference = np.quantile(ours[:, column], q) - np.quantile(theirs[:, column], q)
        assert abs(difference).max() <= 0.03 * max(size)


def test_a_crop_is_resized_as_torchvision_and_pillow_do():
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crop = resize_squash(noise[5:44, 7:57], 32)
    assert torch.equal(crop, resize_squash(image.crop((7, 5, 57, 44)), 32))
    how = 5, 7, 39, 50, [32, 32], InterpolationMode.BICUBIC  # top, left, height, width
    of_tensor = TF.resized_crop(TF.pil_to_tensor(image), *how, antialias=True)
    assert torch.equal(crop, of_tensor)
    of_pillow = TF.pil_to_tensor(TF.resized_crop(image, *how))
    assert (crop.int() - of_pillow.int()).abs().max() <= 1


def test_resizing_gives_the_same_bits_on_every_processor():
    """Of AVX2, of the plain kernel, of torch's releases: found by all of them."""
    noise = np.random.default_rng(7).integers(0, 256, (91, 133, 3), dtype=np.uint8)
    found = [hashlib.sha256(resize_squash(noise, size).numpy()).hexdigest()[:8] for size in SIZES]
    assert found == RESIZED


def test_a_view_is_a_function_of_seed_epoch_row_and_view():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8))

    def views(seed=1, epoch=2, row=3, n=2):
        return CropViews(16, 0.4, 0.275, 0.5, n, seed, 7)(image, epoch, row)

    base, factors, noise = views()
    assert base.shape == (2, 3, 16, 16) and base.dtype == torch.uint8 and factors.shape == (2, 5)
    assert noise.shape == (2, 7) and 0 <= noise.min() and noise.max() < 1
    assert all(torch.equal(a, b) for a, b in zip(views(), views(), strict=True))
    without = CropViews(16, 0.4, 0.275, 0.5, 2, 1)(image, 2, 3)
    assert torch.equal(base, without[0]) and without[2].shape == (2, 0)  # noise changes no crop
    assert torch.equal(base[:1], views(n=1)[0])  # view 0 does not depend on how many there are
    assert not torch.equal(base[0], base[1])
    for other in (views(seed=2), views(epoch=3), views(row=4)):
        assert not any(torch.equal(a, b) for a, b in zip(views(), other, strict=True))
    assert not torch.equal(noise[0], noise[1])


def test_factors_stay_in_their_ranges_and_use_them():
    crops = CropViews(8, 0.4, 0.3, 0.25, 1, seed=0)
    image = Image.new("RGB", (20, 20))
    factors = torch.cat([crops(image, 0, row)[1] for row in range(1000)])
    colour, hue, flip = factors[:, :3], factors[:, 3], factors[:, 4]
    assert 0.7 <= colour.min() < 0.72 and 1.28 < colour.max() <= 1.3
    assert -0.15 <= hue.min() < -0.14 and 0.14 < hue.max() <= 0.15
    assert set(flip.tolist()) == {0.0, 1.0} and abs(flip.mean() - 0.25) < 0.05
