"""Image augmentation whose magnitude is one continuous, differentiable tensor.

RandAugment (Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced
search space"), flip, crop and Cutout (DeVries & Taylor 2017, "Improved Regularization of
Convolutional Neural Networks with Cutout"), on the whole mini-batch at once. Every random number
is in :class:`Draws`; with them given, :func:`augment` is a deterministic function of the images
and of the magnitude M in [0, 10]. At M = 0 every operation that takes a magnitude is the identity.
With m = M / 10 and a random sign ±:

============================  ============================  ============================
operation                     parameter                     derivative in M
============================  ============================  ============================
identity                      none                          0
auto_contrast                 none                          that of earlier rounds
equalize                      none                          0, also of earlier rounds
rotate                        angle ±30 m degrees           yes
solarize                      inverts from 256 (1 − m) up   0 in its own threshold
color                         factor 1 ± 0.9 m              yes; identity if C = 1
posterize                     8 − round(4 m) bits           0, also of earlier rounds
contrast, brightness          factor 1 ± 0.9 m              yes; see below
sharpness                     factor 1 ± 0.9 m              yes
shear_x, shear_y              slope ±0.3 m                  yes
translate_x, translate_y      shift ±150/331 m of the side  yes
============================  ============================  ============================

A factor blends with black (brightness), the mean grey (contrast), the grey image (color) or the
smoothed image (sharpness). Geometry is bilinear and fills with 0; the upper left corner of a
sheared image stays in place. The derivative exists almost everywhere: bilinear interpolation has
kinks at whole-pixel shifts, M = 0 among them. The z-score that follows undoes brightness and
contrast except where they clip: with sign − they change nothing, nor has M a derivative there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia import enhance
from kornia.geometry.transform import warp_affine
from torch import Tensor

MAGNITUDE_MAX = 10.0
OPERATIONS: tuple[str, ...] = (
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)

_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_ROTATE_MAX_RAD = math.radians(30.0)
_SHEAR_MAX = 0.3
_TRANSLATE_MAX_SIDE = 150.0 / 331.0  # 150 pixels of the 331 of AutoAugment's ImageNet pictures
_FACTOR_MAX = 0.9
_POSTERIZE_MAX_BITS = 4.0
_STD_FLOOR = 1e-4


@dataclass(frozen=True)
class Augmentation:
    """The static settings of an augmentation.

    Attributes:
        flip: Whether to flip left to right with probability 1/2.
        crop_padding: Pixels of zero padding on each side before a random crop to the same size;
            0: none.
        operations: RandAugment operations an image; 0: none.
        cutout: Side in pixels of the square set to 0 after the z-score; 0: none.
    """

    flip: bool = True
    crop_padding: int = 4
    operations: int = 2
    cutout: int = 16


class Draws(NamedTuple):
    """Every random number of an augmentation, one row an image.

    Attributes:
        flip: Whether to flip, ``[n]`` bool.
        crop: Upper and left edge of the crop in the padded image, ``[n, 2]`` int64.
        operation: Index into ``OPERATIONS`` by round, ``[n, operations]`` int64.
        sign: Sign of the magnitude by round, ``[n, operations]`` ±1, float32.
        cutout: Row and column of the centre of the square, ``[n, 2]`` int64.
    """

    flip: Tensor
    crop: Tensor
    operation: Tensor
    sign: Tensor
    cutout: Tensor

    def rows(self, index: Tensor | slice) -> Draws:
        """Return the draws of some of the images."""
        return Draws(*(part[index] for part in self))

    def to(self, device: torch.device | str) -> Draws:
        """Return the draws on a device."""
        return Draws(*(part.to(device, non_blocking=True) for part in self))


def draw(
    settings: Augmentation,
    n: int,
    height: int,
    width: int,
    generator: torch.Generator,
) -> Draws:
    """Return the draws of ``n`` images of ``height`` × ``width`` pixels, on the CPU.

    ``generator`` is of the CPU too, so the draws do not depend on the device of the images.
    """
    rounds = (n, settings.operations)
    centre = [torch.randint(side, (n,), generator=generator) for side in (height, width)]
    return Draws(
        flip=torch.rand(n, generator=generator) < 0.5,
        crop=torch.randint(2 * settings.crop_padding + 1, (n, 2), generator=generator),
        operation=torch.randint(len(OPERATIONS), rounds, generator=generator),
        sign=torch.randint(2, rounds, generator=generator).float() * 2 - 1,
        cutout=torch.stack(centre, dim=1),
    )


def augment(
    images: Tensor,
    magnitude: Tensor | float,
    draws: Draws,
    settings: Augmentation,
) -> Tensor:
    """Return augmented and normalised images, differentiable in ``magnitude``.

    In order: flip and crop, ``settings.operations`` rounds of RandAugment, z-score, Cutout. Every
    image goes through every operation with parameters of its own, neutral but for the one drawn,
    so shapes are static and nothing is read back from the device.

    Args:
        images: ``[B, C, H, W]`` with C 1 or 3, uint8 in 0..255 or floating in [0, 1].
        magnitude: M in [0, ``MAGNITUDE_MAX``], 0-d; cast to the dtype of the images.
        draws: The draws of these images, on their device.
        settings: The settings that ``draws`` was drawn with.

    Returns:
        ``[B, C, H, W]``: float32 for uint8 images, else the dtype of the images.

    Raises:
        ValueError: If the images are of another shape, or the draws do not fit them.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [B, 1 or 3, H, W] but got {list(images.shape)}")
    expected = (images.shape[0], settings.operations)
    if draws.operation.shape != expected:
        raise ValueError(
            f"draws.operation must be [images, operations] {list(expected)} "
            f"but got {list(draws.operation.shape)}; draw with the same settings"
        )
    if settings.flip or settings.crop_padding:
        images = _flip_and_crop(images, draws, settings)
    images = _to_unit(images)
    if isinstance(magnitude, Tensor):
        magnitude = magnitude.to(images.device, images.dtype, non_blocking=True)
    else:  # filled on the device: a copy from the host would wait for it
        magnitude = torch.full((), magnitude, dtype=images.dtype, device=images.device)
    for k in range(settings.operations):
        images = _rand_augment_round(images, magnitude, draws.operation[:, k], draws.sign[:, k])
    images = _z_score(images)
    return _cutout(images, draws.cutout, settings.cutout) if settings.cutout else images


def normalize(images: Tensor) -> Tensor:
    """Return the z-score of each image, without augmentation: the path of evaluation.

    Mean and standard deviation are over (C, H, W); the latter is at least 1e-4, so a constant
    image becomes 0.

    Args:
        images: ``[B, C, H, W]``, uint8 in 0..255 or floating in [0, 1].
    """
    return _z_score(_to_unit(images))


def _to_unit(images: Tensor) -> Tensor:
    """Return floating images in [0, 1]."""
    return images if images.is_floating_point() else images.float() / 255.0


def _z_score(images: Tensor) -> Tensor:
    """Return each image less its mean, over its standard deviation."""
    centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
    variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
    return centred / variance.clamp_min(_STD_FLOOR**2).sqrt()


def _flip_and_crop(images: Tensor, draws: Draws, settings: Augmentation) -> Tensor:
    """Return the images cropped at random from their zero-padded form, some of them flipped."""
    _, channels, height, width = images.shape
    padding = settings.crop_padding
    row = torch.arange(height, device=images.device).expand(len(images), -1)
    column = torch.arange(width, device=images.device).expand(len(images), -1)
    if settings.flip:
        column = torch.where(draws.flip[:, None], width - 1 - column, column)
    if padding:
        images = F.pad(images, [padding] * 4)
        row, column = row + draws.crop[:, :1], column + draws.crop[:, 1:]
    index = row[:, :, None] * images.shape[3] + column[:, None, :]
    index = index.flatten(1)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(-1, channels, height, width)


def _cutout(images: Tensor, centre: Tensor, side: int) -> Tensor:
    """Return the images with a square of ``side`` pixels set to 0, cut at the border."""

    def inside(length: int, middle: Tensor) -> Tensor:
        offset = torch.arange(length, device=images.device) - middle[:, None] + side // 2
        return (offset >= 0) & (offset < side)

    rows, columns = (inside(images.shape[2 + i], centre[:, i]) for i in (0, 1))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _rand_augment_round(x: Tensor, magnitude: Tensor, operation: Tensor, sign: Tensor) -> Tensor:
    """Return images after one operation each: ``operation`` ``[B]`` with ``sign`` ``[B]``."""
    chosen = operation[:, None] == torch.arange(len(OPERATIONS), device=x.device)
    unit = (magnitude / MAGNITUDE_MAX).expand(len(x))[:, None]
    signed = torch.where(chosen, unit * sign.to(x.dtype)[:, None], 0.0)
    unsigned = torch.where(chosen, unit.detach(), 0.0)

    def at(table: Tensor, name: str) -> Tensor:
        return table[:, OPERATIONS.index(name)]

    def factor(name: str) -> Tensor:
        return 1.0 + _FACTOR_MAX * at(signed, name)

    height, width = x.shape[2:]
    x = enhance.adjust_brightness_accumulative(x, factor("brightness"))
    x = enhance.adjust_contrast_with_mean_subtraction(x, factor("contrast"))
    x = enhance.adjust_saturation_with_gray_subtraction(x, factor("color"))
    # 256 and not 255 levels, so that white stays white at magnitude 0
    threshold = (1.0 - at(unsigned, "solarize")) * (256.0 / 255.0)
    x = torch.where(x < threshold[:, None, None, None], x, 1.0 - x)
    x = _posterize(x, _POSTERIZE_MAX_BITS * at(unsigned, "posterize"))
    x = _auto_contrast(x, at(chosen, "auto_contrast"))
    if height * width > 255:  # fewer pixels leave the histogram's step at 0: PIL's identity
        x = _equalize(x, at(chosen, "equalize"))
    if min(height, width) > 2:  # no pixel has all its neighbours in a smaller image
        x = _sharpen(x, factor("sharpness"))
    geometric = torch.stack([at(chosen, name) for name in _GEOMETRIC]).any(dim=0)
    matrix = _matrices([at(signed, name) for name in _GEOMETRIC], height, width)
    warped = warp_affine(x, matrix, (height, width), align_corners=True)
    return torch.where(geometric[:, None, None, None], warped, x)


def _sharpen(x: Tensor, factor: Tensor) -> Tensor:
    """Return images blended by ``factor`` ``[B]`` with their smoothed form, PIL's kernel.

    The kernel is (1 1 1; 1 5 1; 1 1 1) / 13, so the smoothed form is 9/13 of the way to the 3 × 3
    mean; border pixels stay. Unlike kornia's, exact at factor 1, and sums of slices take a
    quarter of the time of a convolution on a CPU.
    """
    threes = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    nines = threes[..., :-2] + threes[..., 1:-1] + threes[..., 2:]
    change = (nines - 9.0 * x[..., 1:-1, 1:-1]) * ((1.0 - factor) / 13.0)[:, None, None, None]
    return (x + F.pad(change, [1] * 4)).clamp(0.0, 1.0)


def _matrices(levels: list[Tensor], height: int, width: int) -> Tensor:
    """Return ``[B, 2, 3]`` maps of source to destination pixels.

    ``levels`` are the signed m ``[B]`` of ``_GEOMETRIC``, at most one not 0 in a row.
    """
    rotate, shear_x, shear_y, translate_x, translate_y = levels
    angle = _ROTATE_MAX_RAD * rotate
    cos, sin = torch.cos(angle), torch.sin(angle)
    slope_x, slope_y = -_SHEAR_MAX * shear_x, -_SHEAR_MAX * shear_y
    shift_x = _TRANSLATE_MAX_SIDE * width * translate_x
    shift_y = _TRANSLATE_MAX_SIDE * height * translate_y
    x, y = (width - 1) / 2, (height - 1) / 2
    # the fixed point is the centre for a rotation, the corner (-1/2, -1/2) for a shear
    shift_x = shift_x + slope_x / 2 + (1 - cos) * x - sin * y
    shift_y = shift_y + slope_y / 2 + (1 - cos) * y + sin * x
    rows = [cos, sin + slope_x, shift_x, slope_y - sin, cos, shift_y]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def _posterize(x: Tensor, dropped_bits: Tensor) -> Tensor:
    """Return images without the lowest ``round(dropped_bits)`` ``[B]`` of their 8 bits."""
    step = torch.exp2(dropped_bits.round())[:, None, None, None]
    levels = (x.detach() * 255.0).round_().div_(step).floor_().mul_(step / 255.0)
    return torch.where(step == 1.0, x, levels)


def _auto_contrast(x: Tensor, chosen: Tensor) -> Tensor:
    """Return images with each channel of the ``chosen`` ``[B]`` stretched to [0, 1]."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    stretched = chosen[:, None, None, None] & (high > low)
    return (x - torch.where(stretched, low, 0.0)) / torch.where(stretched, high - low, 1.0)


def _equalize(x: Tensor, chosen: Tensor) -> Tensor:
    """Return images with each channel of the ``chosen`` ``[B]`` equalised by PIL's rule.

    With h the histogram of the 256 levels and s = (pixels below the highest level) // 255, level k
    becomes (s // 2 + Σ_{j<k} h_j) // s; a channel with s = 0 stays as it is.
    """
    level = (x.detach() * 255.0).round_().to(torch.uint8).flatten(0, 1).flatten(1)
    highest = level.amax(dim=1, keepdim=True).long()
    index = level.long()
    histogram = torch.zeros(len(index), 256, dtype=torch.int32, device=x.device)
    histogram.scatter_add_(1, index, histogram.new_ones(1).expand_as(index))
    step = (index.shape[1] - histogram.gather(1, highest)).div_(255, rounding_mode="floor")
    below = histogram.cumsum(1, dtype=torch.int32).sub_(histogram)
    table = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    equalized = (table.to(x.dtype) / 255.0).gather(1, index).view_as(x)
    changed = (step > 0).view(*x.shape[:2], 1, 1) & chosen[:, None, None, None]
    return torch.where(changed, equalized, x)
