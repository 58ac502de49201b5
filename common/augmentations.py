"""Views of an image: crops in the loader's workers, colour and normalisation on the device.

The worker draws what is random about a view from its key (seed, epoch, row, view), crops
and resizes on uint8, and sends the colour factors along; the device applies them to a whole batch,
each image with its own factors. Each operation is that of torchvision, image for image.
Deviation: order of the colour operations: drawn for each step and view, not for each image as by
torchvision, because a batch shares its kernels.
Deviation: resizing: by torch's bicubic on uint8, as torchvision's of tensors; the study's is
Pillow's.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.running.keyed import JITTER_ORDER, MASK, VIEW, keyed_rng

# Sewer-ML's channel statistics; the study uses them, and so does its released code.
MEAN = (0.523, 0.453, 0.345)
STD = (0.210, 0.199, 0.154)

ASPECT_RATIO = (3 / 4, 4 / 3)  # of a crop; torchvision's default, as the study
FLIP = 4  # column of the factors, behind those of the four colour operations


def _array(image):
    return image if isinstance(image, np.ndarray) else np.array(image)


def resize(image, size):
    """(H, W, 3) uint8 array or PIL RGB image -> (3, *size) uint8 tensor, bicubic, antialiased.

    By torch, whose kernel for uint8 is faster than Pillow's; the two differ by rounding. It counts
    in whole numbers, the same on every processor.
    """
    pixels = torch.from_numpy(_array(image)).permute(2, 0, 1)[None]  # channels_last: it likes that
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)[0]


def resize_squash(image, size):
    """(H, W, 3) uint8 array or PIL image -> (3, size, size) uint8, all of it: what is scored."""
    return resize(image, (size, size)).contiguous()


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
        """(H, W, 3) uint8 array or PIL RGB image, epoch and row, which are the key of every draw.

        Returns views (V, 3, S, S) uint8, factors (V, 5) and noise (V, L) float32.
        """
        image = _array(image)
        size, many = self.image_size, self.num_views
        views, factors = torch.empty((many, 3, size, size), dtype=torch.uint8), []
        noise = np.zeros((many, self.noise_size), np.float32)
        for view in range(many):
            rng = keyed_rng(VIEW, self.seed, epoch, row, view)
            height, width = image.shape[:2]
            left, top, w, h = draw_crop(rng, width, height, self.min_scale)
            views[view] = resize(image[top : top + h, left : left + w], (size, size))
            t = self.t_val
            colour = rng.uniform(1 - t, 1 + t, 3)
            hue = rng.uniform(-t / 2, t / 2)
            factors.append([*colour, hue, rng.random() < self.flip_prob])
            if self.noise_size:
                rng = keyed_rng(MASK, self.seed, epoch, row, view)
                rng.random(out=noise[view], dtype=np.float32)
        return views, torch.tensor(factors, dtype=torch.float32), torch.from_numpy(noise)


# The four operations as in torchvision.transforms.v2.functional, for a batch, in few passes over
# memory; what x was is lost. x: (B, 3, H, W) in 0 to 1; factor: (B, 1, 1, 1), a factor an image.


def _grey(x):
    """Luma (B, 1, H, W) by ITU-R 601-2, as torchvision."""
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _blend(x, other, factor):
    return x.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)


def adjust_brightness(x, factor):
    """1: unchanged, 0: black."""
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """1: unchanged, 0: the image's mean grey."""
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    """1: unchanged, 0: grey."""
    return _blend(x, _grey(x), factor)


def adjust_hue(x, shift):
    """shift: of the hue circle, -0.5 to 0.5. RGB to HSV, shift, and back.

    With h the hue in sixths of the circle and spread = max - min, which a shift leaves alone, HSV
    to RGB is channel = min + spread * ramp(h), where the ramps are |h - 3| - 1 (red), 2 - |h - 2|
    (green) and 2 - |h - 4| (blue), clamped to 0 and 1.
    """
    r, g, b = x.unbind(dim=1)
    highest = torch.maximum(torch.maximum(r, g), b)
    lowest = torch.minimum(torch.minimum(r, g), b)
    spread = highest - lowest
    from_green, from_blue = (b - r).add_(spread, alpha=2), (r - g).add_(spread, alpha=4)
    h = torch.where(highest == r, g - b, torch.where(highest == g, from_green, from_blue))
    h = h.div_(spread.clamp_min(1e-12))  # where the spread is 0, h does not matter
    h = h.add_(6 * shift.flatten(1)[:, :, None])
    h = h.sub_((h / 6).floor_(), alpha=6)
    ramps = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()
    channels = [torch.addcmul(lowest, spread, ramp.clamp_(0, 1)) for ramp in ramps]
    return torch.stack(channels, dim=1)


def flip_normalize(x, flip, mean, std):
    """x: (B, 3, H, W) in 0 to 1; flip: (B, 1, 1, 1), whether to; mean, std: of the channels."""
    return torch.where(flip > 0, x.flip(-1), x).sub_(mean).div_(std)


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
AT_ONCE = 1 << 19  # values that a CPU works on at a time, so that they stay in its cache


class ColorJitterNormalize(nn.Module):
    """What is left to do on the device: colour jitter, horizontal flip, normalisation."""

    def __init__(self, seed, compiled=False):
        """compiled: by torch.compile, each operation one kernel."""
        super().__init__()
        self.seed = seed
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        steps = *OPERATIONS, flip_normalize
        if compiled:
            steps = [torch.compile(step, dynamic=False) for step in steps]
        *self._operations, self._flip_normalize = steps

    def clean(self, images):
        """images: (B, 3, S, S) uint8 -> normalised float32."""
        return (images.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, views, factors, step):
        """views: (B, V, 3, S, S) uint8; factors: (B, V, 5) -> (V, B, 3, S, S) float32, normalised.

        step: of the whole run; the order of the colour operations is drawn from it.
        """
        batch, num_views, *shape = views.shape
        some = batch if views.is_cuda else max(AT_ONCE // math.prod(shape), 1)
        done = torch.empty((num_views, batch, *shape), device=views.device)
        for view in range(num_views):
            order = keyed_rng(JITTER_ORDER, self.seed, step, view).permutation(len(OPERATIONS))
            for first in range(0, batch, some):
                at = slice(first, first + some)
                f = factors[at, view, :, None, None, None]  # (some, 5, 1, 1, 1)
                x = views[at, view].float() / 255
                for operation in order:
                    x = self._operations[operation](x, f[:, operation])
                done[view, at] = self._flip_normalize(x, f[:, FLIP], self.mean, self.std)
        return done
