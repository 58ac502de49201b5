"""Views of an image: crops in the loader's workers, colour and normalisation on the device.

The worker draws everything that is random about a view from its key (seed, epoch, row, view), crops
and resizes on uint8, and sends the colour factors along; the device applies them to a whole batch,
each image with its own factors. Each operation is that of torchvision, image for image.
Deviation: order of the colour operations: drawn for each step and view, not for each image as by
torchvision, because a batch shares its kernels.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.running.keyed import JITTER_ORDER, MASK, VIEW, keyed_rng

# Sewer-ML's channel statistics; the study uses them, and so does its released code.
MEAN = (0.523, 0.453, 0.345)
STD = (0.210, 0.199, 0.154)

ASPECT_RATIO = (3 / 4, 4 / 3)  # of a crop; torchvision's default, as the study
BRIGHTNESS, CONTRAST, SATURATION, HUE, FLIP = range(5)  # columns of the factors


def to_uint8(image):
    """PIL RGB image -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize_squash(image, size):
    """PIL image -> (3, size, size) uint8, the whole image, bicubic: what is scored."""
    return to_uint8(image.resize((size, size), Image.Resampling.BICUBIC))


def draw_crop(rng, width, height, min_scale):
    """Crop box (left, top, width, height) in pixels as torchvision's RandomResizedCrop draws it.

    Area from min_scale to 1 of the image, aspect ratio log-uniform from 3/4 to 4/3; after ten
    draws that do not fit, the largest central crop with an allowed ratio.
    """
    low, high = ASPECT_RATIO
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1.0)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * high))
    h = min(height, round(width / low))
    return (width - w) // 2, (height - h) // 2, w, h


class CropViews:
    """V random crops of an image and the factors of what the device is to do with them."""

    def __init__(self, image_size, min_scale, t_val, flip_prob, num_views, seed, noise_size=0):
        """image_size: pixels. t_val: brightness, contrast and saturation; hue is half of it.

        noise_size: uniform random numbers a view, for whoever masks it.
        """
        self.image_size, self.min_scale, self.t_val = image_size, min_scale, t_val
        self.flip_prob, self.num_views, self.seed = flip_prob, num_views, seed
        self.noise_size = noise_size

    def __call__(self, image, epoch, row):
        """PIL RGB image -> views (V, 3, S, S) uint8, factors (V, 5) and noise (V, L) float32."""
        views, factors, noise = [], [], []
        for view in range(self.num_views):
            rng = keyed_rng(VIEW, self.seed, epoch, row, view)
            left, top, w, h = draw_crop(rng, *image.size, self.min_scale)
            crop = image.crop((left, top, left + w, top + h))
            views.append(resize_squash(crop, self.image_size))
            t = self.t_val
            colour = rng.uniform(1 - t, 1 + t, 3)
            hue = rng.uniform(-t / 2, t / 2)
            factors.append([*colour, hue, rng.random() < self.flip_prob])
            rng = keyed_rng(MASK, self.seed, epoch, row, view)
            noise.append(rng.random(self.noise_size, dtype=np.float32))
        factors = torch.tensor(factors, dtype=torch.float32)
        return torch.stack(views), factors, torch.from_numpy(np.stack(noise))


# The four operations as in torchvision.transforms.v2.functional, for a batch.
# x: (B, 3, H, W) in 0 to 1; factor: (B, 1, 1, 1), a factor an image.


def _grey(x):
    """Luma (B, 1, H, W) by ITU-R 601-2, as torchvision."""
    weights = x.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


def _blend(x, other, factor):
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(x, factor):
    """1: unchanged, 0: black."""
    return (x * factor).clamp(0, 1)


def adjust_contrast(x, factor):
    """1: unchanged, 0: the image's mean grey."""
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    """1: unchanged, 0: grey."""
    return _blend(x, _grey(x), factor)


def adjust_hue(x, shift):
    """shift: of the hue circle, -0.5 to 0.5. RGB to HSV, shift, and back."""
    r, g, b = x.unbind(dim=1)
    highest, lowest = x.amax(dim=1), x.amin(dim=1)
    spread = highest - lowest
    grey = spread == 0
    safe = torch.where(grey, 1.0, spread)
    saturation = spread / torch.where(grey, 1.0, highest)
    to_red, to_green, to_blue = ((highest - c) / safe for c in (r, g, b))
    is_red = highest == r
    is_green = (highest == g) & ~is_red
    hue = torch.where(
        is_red,
        to_blue - to_green,
        torch.where(is_green, 2 + to_red - to_blue, 4 + to_green - to_red),
    )
    hue = (hue / 6 + 1 + shift.flatten(1)[:, :, None]) % 1
    # HSV to RGB: channel = v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, n = 5, 3, 1
    n = x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (n + 6 * hue[:, None]) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return highest[:, None] * (1 - saturation[:, None] * ramp)


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


class ColorJitterNormalize(nn.Module):
    """What is left to do on the device: colour jitter, horizontal flip, normalisation."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def clean(self, images):
        """images: (B, 3, S, S) uint8 -> normalised float32."""
        return (images.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, views, factors, step):
        """views: (B, V, 3, S, S) uint8; factors: (B, V, 5) -> (V, B, 3, S, S) float32, normalised.

        step: of the whole run; the order of the colour operations is drawn from it.
        """
        done = []
        for view in range(views.shape[1]):
            x = views[:, view].float() / 255
            f = factors[:, view, :, None, None, None]  # (B, 5, 1, 1, 1)
            order = keyed_rng(JITTER_ORDER, self.seed, step, view).permutation(len(OPERATIONS))
            for operation in order:
                x = OPERATIONS[operation](x, f[:, operation])
            x = torch.where(f[:, FLIP] > 0, x.flip(-1), x)
            done.append((x - self.mean) / self.std)
        return torch.stack(done)
