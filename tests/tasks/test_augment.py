from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from optuna_ohgw.tasks.augment import (
    MAGNITUDE_MAX,
    OPERATIONS,
    Augmentation,
    Draws,
    _rand_augment_round,
    augment,
    draw,
    normalize,
)

SMOOTH = (
    "rotate",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
STEPPED = ("solarize", "posterize")
PLAIN = Augmentation(flip=False, crop_padding=0, operations=0, cutout=0)
MAGNITUDES = (0.7, 3.3, 5.3, 9.1, MAGNITUDE_MAX)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_of(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator(seed))


def floats_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator(seed))


def one(images: Tensor, name: str, magnitude: Tensor | float, sign: float = 1.0) -> Tensor:
    """Return images in [0, 1] after one named operation, before the z-score."""
    operation = torch.full((len(images),), OPERATIONS.index(name))
    magnitude = torch.as_tensor(magnitude, dtype=images.dtype)
    return _rand_augment_round(images, magnitude, operation, torch.full((len(images),), sign))


def fixed(settings: Augmentation, images: Tensor, names: list[str], sign: float = 1.0) -> Draws:
    """Return draws whose operations are ``names``, one a round, for every image."""
    draws = draw(settings, len(images), *images.shape[2:], generator())
    operation = torch.tensor([OPERATIONS.index(name) for name in names]).expand(len(images), -1)
    return draws._replace(operation=operation, sign=torch.full(operation.shape, sign))


def torchvision_one(images: Tensor, name: str, magnitude: float, sign: float) -> Tensor:
    """Return what torchvision gives for the operation, for images in the form it wants."""
    m = sign * magnitude / MAGNITUDE_MAX
    height, width = images.shape[2:]
    blends = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "color": tv.adjust_saturation,
        "sharpness": tv.adjust_sharpness,
    }
    if name in blends:
        return blends[name](images, 1 + 0.9 * m)
    bilinear = InterpolationMode.BILINEAR
    if name == "rotate":
        return tv.rotate(images, 30 * m, bilinear)
    shear, translate, centre = [0.0, 0.0], [0.0, 0.0], None
    axis = 0 if name.endswith("x") else 1
    if name.startswith("shear"):
        shear[axis], centre = math.degrees(math.atan(0.3 * m)), [0.0, 0.0]
    else:
        translate[axis] = 150 / 331 * (width, height)[axis] * m
    return tv.affine(images, 0.0, translate, 1.0, shear, bilinear, center=centre)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*SMOOTH, *STEPPED, "identity"])
def test_magnitude_0_is_the_identity(name: str, channels: int) -> None:
    images = bytes_of(4, channels, 16, 13) / 255
    images[:, :, :2, :2] = 1.0  # white is where a threshold would err
    # a warp computes the pixel positions with the rounding of float32, about 1e-6 pixels
    atol = 5e-6 if name in GEOMETRIC else 0.0
    torch.testing.assert_close(one(images, name, 0.0), images, rtol=0, atol=atol)
    torch.testing.assert_close(one(images, name, 0.0, -1.0), images, rtol=0, atol=atol)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("channels", [1, 3])
def test_smooth_operations_equal_torchvision(
    name: str,
    channels: int,
    magnitude: float,
    sign: float,
) -> None:
    images = floats_of(3, channels, 16, 13)
    # the same formulas to rounding, but torchvision's weight of red in grey is 0.2989, not 0.299
    atol = 1e-4 if channels == 3 and name in ("contrast", "color") else 1e-10
    if name.startswith(("rotate", "shear", "translate")):
        atol = 1e-6  # torchvision 0.21 builds its grid in float32
    expected = torchvision_one(images, name, magnitude, sign)
    torch.testing.assert_close(one(images, name, magnitude, sign), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_solarize_equals_torchvision_on_all_levels(magnitude: float) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = tv.solarize(levels, 256 * (1 - magnitude / MAGNITUDE_MAX))
    result = one(levels.double() / 255, "solarize", magnitude)
    torch.testing.assert_close(result, expected.double() / 255, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [0.0, *MAGNITUDES])
def test_posterize_equals_torchvision_on_all_levels(magnitude: float, dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    bits = 8 - round(4 * magnitude / MAGNITUDE_MAX)
    expected = tv.posterize(levels, bits).to(dtype) / 255
    result = one(levels.to(dtype) / 255, "posterize", magnitude)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 16, 16), (1, 8, 8), (3, 9, 40)])
@pytest.mark.parametrize("span", [(0, 256), (90, 140), (200, 256), (7, 8)])
def test_equalize_equals_torchvision(shape: tuple[int, ...], span: tuple[int, int]) -> None:
    images = bytes_of(4, *shape, low=span[0], high=span[1])
    images[0] = 17  # constant
    images[1, 0, :, 2:] = 255  # a channel of few pixels below its highest level
    result = one(images / 255, "equalize", 5.0)
    assert torch.equal((result * 255).round().byte(), tv.equalize(images))


@pytest.mark.parametrize("channels", [1, 3])
def test_auto_contrast_equals_torchvision(channels: int) -> None:
    images = 0.3 + 0.4 * floats_of(4, channels, 16, 13)
    images[0, 0] = 0.6  # constant
    result = one(images, "auto_contrast", 5.0)
    torch.testing.assert_close(result, tv.autocontrast(images), rtol=0, atol=1e-12)


def test_each_image_gets_its_own_operation_and_no_other() -> None:
    images = (bytes_of(len(OPERATIONS), 3, 32, 32) / 255).clamp(0.1, 0.8)
    signs = torch.ones(len(OPERATIONS))
    mixed = _rand_augment_round(images, torch.tensor(4.0), torch.arange(len(OPERATIONS)), signs)
    for k, name in enumerate(OPERATIONS):
        torch.testing.assert_close(mixed[k], one(images, name, 4.0)[k], rtol=0, atol=1e-6)
        assert torch.equal(mixed[k], images[k]) == (name == "identity")


def test_flip_and_crop_equal_slices_of_the_padded_image() -> None:
    settings = Augmentation(operations=0, cutout=0, crop_padding=3)
    images = bytes_of(40, 3, 8, 11)
    draws = draw(settings, 40, 8, 11, generator())
    padded = torch.nn.functional.pad(images, [3] * 4)
    expected = []
    for image, flip, (top, left) in zip(padded, draws.flip, draws.crop.tolist(), strict=True):
        window = image[:, top : top + 8, left : left + 11]
        expected.append(window.flip(-1) if flip else window)
    result = augment(images, 5.0, draws, settings)
    assert torch.equal(result, normalize(torch.stack(expected)))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)])
def test_sliced_draws_give_the_images_of_the_whole_batch(shape: tuple[int, ...]) -> None:
    settings = Augmentation(cutout=5)
    images = bytes_of(60, *shape)
    draws = draw(settings, 60, *shape[1:], generator())
    whole = augment(images, 6.1, draws, settings)
    for part in (slice(0, 1), slice(1, 20), slice(20, 60), torch.tensor([5, 3, 44])):
        result = augment(images[part], 6.1, draws.rows(part), settings)
        torch.testing.assert_close(result, whole[part], rtol=0, atol=1e-6)


def test_same_seed_same_draws_and_other_seed_others() -> None:
    first, second, other = (draw(Augmentation(), 50, 32, 32, generator(s)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_draws_have_the_stated_shapes_types_and_ranges() -> None:
    draws = draw(Augmentation(operations=3, crop_padding=2), 4000, 9, 5, generator())
    assert draws.flip.shape == (4000,)
    assert draws.flip.dtype == torch.bool
    assert abs(draws.flip.float().mean() - 0.5) < 0.04  # five standard deviations
    assert draws.crop.unique().tolist() == list(range(5))
    assert draws.operation.shape == draws.sign.shape == (4000, 3)
    assert draws.sign.unique().tolist() == [-1, 1]
    assert draws.sign.dtype == torch.float32
    assert [column.unique().tolist() for column in draws.cutout.T] == [
        list(range(9)),
        list(range(5)),
    ]
    assert {draws.crop.dtype, draws.operation.dtype, draws.cutout.dtype} == {torch.int64}
    assert all(part.device.type == "meta" for part in draws.to("meta"))


def test_operations_are_drawn_uniformly() -> None:
    draws = draw(Augmentation(), 20_000, 8, 8, generator())
    for column in draws.operation.T:
        assert stats.chisquare(column.bincount(minlength=len(OPERATIONS)).numpy()).pvalue > 0.01


def assert_derivative(function: Callable[[Tensor], Tensor], magnitude: float) -> float:
    """Check the derivative of ``function(M)`` by central differences and return it.

    With h = 1e-6 in float64 a difference errs by rounding, 1e-16 / h = 1e-10 times the value, here
    a sum of some 10³: below 1e-5 of the derivative or 1e-7.
    """
    m = torch.tensor(magnitude, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(m), m)
    with torch.no_grad():
        numeric = (function(m + 1e-6) - function(m - 1e-6)) / 2e-6
    assert gradient.item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-7)
    return gradient.item()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_of_each_smooth_operation(name: str, channels: int, sign: float) -> None:
    images, weights = floats_of(4, channels, 16, 13), floats_of(4, channels, 16, 13, seed=1)
    derivative = assert_derivative(lambda m: (weights * one(images, name, m, sign)).sum(), 5.3)
    assert (derivative == 0) == (name == "color" and channels == 1)


@pytest.mark.parametrize(
    "names",
    [[a, b] for a, b in zip(SMOOTH, SMOOTH[1:] + SMOOTH[:1], strict=True)]
    + [["translate_x", "auto_contrast"], ["equalize", "rotate"], ["posterize", "shear_x"]],
)
def test_derivative_of_two_rounds_and_the_z_score(names: list[str]) -> None:
    settings = Augmentation(cutout=4)
    images, weights = floats_of(4, 3, 16, 17), floats_of(4, 3, 16, 17, seed=1)
    draws = fixed(settings, images, names)
    derivative = assert_derivative(
        lambda m: (weights * augment(images, m, draws, settings)).sum(), magnitude=5.3
    )
    assert derivative != 0


@pytest.mark.parametrize("name", [*STEPPED, "equalize", "auto_contrast", "identity"])
def test_step_operations_and_those_without_magnitude_contribute_zero(name: str) -> None:
    m = torch.tensor(5.3, dtype=torch.float64, requires_grad=True)
    result = one(floats_of(4, 3, 16, 16), name, m)
    (gradient,) = torch.autograd.grad(result.square().sum(), m)
    assert gradient == 0


@pytest.mark.parametrize("name", ["posterize", "equalize"])
def test_posterize_and_equalize_stop_the_derivative_of_an_earlier_round(name: str) -> None:
    settings = Augmentation(flip=False, crop_padding=0, cutout=0)
    images = floats_of(4, 3, 32, 32)  # pixels enough for equalize to act on every channel
    m = torch.tensor(5.3, dtype=torch.float64, requires_grad=True)
    result = augment(images, m, fixed(settings, images, ["color", name]), settings)
    (gradient,) = torch.autograd.grad((result * floats_of(4, 3, 32, 32, seed=1)).sum(), m)
    assert gradient == 0


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_z_score_undoes_brightness_and_contrast_that_do_not_clip(name: str) -> None:
    settings = Augmentation(flip=False, crop_padding=0, operations=1, cutout=0)
    images = floats_of(4, 3, 8, 8)
    draws = fixed(settings, images, [name], sign=-1.0)
    result = augment(images, 8.0, draws, settings)
    torch.testing.assert_close(result, normalize(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_is_a_square_around_its_centre_cut_at_the_border(side: int) -> None:
    settings = Augmentation(flip=False, crop_padding=0, operations=0, cutout=side)
    centres = [(0, 0), (0, 6), (4, 0), (9, 11), (5, 6)]
    images = floats_of(len(centres), 3, 10, 12)
    draws = draw(settings, len(centres), 10, 12, generator())._replace(cutout=torch.tensor(centres))
    expected = normalize(images)
    for image, (row, column) in zip(expected, centres, strict=True):
        top, left = row - side // 2, column - side // 2
        image[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    result = augment(images, 0.0, draws, settings)
    assert torch.equal(result, expected)
    assert (result[-1] == 0).sum() == 3 * side**2


def test_cutout_larger_than_the_image_leaves_zeros_and_side_0_nothing_cut() -> None:
    images = floats_of(3, 1, 8, 8)
    for side, expected in ((16, torch.zeros_like(images)), (0, normalize(images))):
        settings = Augmentation(flip=False, crop_padding=0, operations=0, cutout=side)
        draws = draw(settings, 3, 8, 8, generator())._replace(cutout=torch.full((3, 2), 4))
        assert torch.equal(augment(images, 0.0, draws, settings), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalized_images_have_mean_0_and_standard_deviation_1(channels: int) -> None:
    result = normalize(bytes_of(5, channels, 8, 8)).flatten(1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.mean(dim=1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.std(dim=1, correction=0), torch.ones(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_constant_images_normalize_to_zero_with_a_finite_derivative(level: int) -> None:
    images = torch.full((2, 3, 8, 8), level, dtype=torch.uint8)
    # float32 rounds the mean by 6e-8 at most, 6e-4 over the floor of the standard deviation
    torch.testing.assert_close(normalize(images), torch.zeros(2, 3, 8, 8), rtol=0, atol=1e-3)
    m = torch.tensor(MAGNITUDE_MAX, requires_grad=True)
    settings = Augmentation(flip=False, crop_padding=0, operations=1, cutout=0)
    for name in OPERATIONS:
        result = augment(images, m, fixed(settings, images, [name]), settings)
        (gradient,) = torch.autograd.grad(result.square().sum(), m)
        assert result.isfinite().all()
        assert gradient.isfinite()


def test_settings_all_off_are_the_evaluation_path() -> None:
    images = bytes_of(4, 3, 8, 8)
    draws = draw(PLAIN, 4, 8, 8, generator())
    assert torch.equal(augment(images, 5.0, draws, PLAIN), normalize(images))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 2, 2)])
def test_uint8_and_float_images_agree(shape: tuple[int, ...]) -> None:
    settings = Augmentation(crop_padding=1, cutout=1)
    images = bytes_of(60, *shape)
    draws = draw(settings, 60, *shape[1:], generator())
    result = augment(images, 5.3, draws, settings)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert torch.equal(result, augment(images / 255, 5.3, draws, settings))
    assert augment(images.double() / 255, 5.3, draws, settings).dtype == torch.float64


def test_magnitude_may_be_a_number_or_a_tensor_of_another_dtype() -> None:
    images = bytes_of(20, 3, 16, 16)
    draws = draw(Augmentation(), 20, 16, 16, generator())
    m = torch.tensor(5.3, dtype=torch.float64, requires_grad=True)
    result = augment(images, m, draws, Augmentation())
    assert result.dtype == torch.float32
    assert torch.equal(result, augment(images, 5.3, draws, Augmentation()))
    (gradient,) = torch.autograd.grad(result[:, :, 3].sum(), m)
    assert gradient.dtype == torch.float64
    assert gradient != 0


def test_nothing_is_kept_for_backward_unless_the_magnitude_asks() -> None:
    images = bytes_of(4, 3, 16, 16)
    draws = draw(Augmentation(), 4, 16, 16, generator())
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert not augment(images, torch.tensor(5.3), draws, Augmentation()).requires_grad
        assert not saved
        augment(images, torch.tensor(5.3, requires_grad=True), draws, Augmentation())
        assert saved


def test_nothing_is_read_back_from_the_device() -> None:
    # a meta tensor has no data: a host read or a data-dependent shape would raise
    images = bytes_of(4, 3, 32, 32).to("meta")
    draws = draw(Augmentation(), 4, 32, 32, generator()).to("meta")
    magnitude = torch.tensor(5.3, device="meta", requires_grad=True)
    result = augment(images, magnitude, draws, Augmentation())
    assert result.shape == images.shape
    result.sum().backward()


def test_inputs_are_left_as_they_were() -> None:
    images = floats_of(28, 3, 16, 16)
    draws = draw(Augmentation(), 28, 16, 16, generator())
    copies = [part.clone() for part in (images, *draws)]
    augment(images, 5.3, draws, Augmentation())
    assert all(torch.equal(a, b) for a, b in zip(copies, (images, *draws), strict=True))


def test_wrong_shapes_are_named() -> None:
    draws = draw(Augmentation(), 4, 8, 8, generator())
    with pytest.raises(ValueError, match=r"\[B, 1 or 3, H, W\] but got \[4, 2, 8, 8\]"):
        augment(torch.zeros(4, 2, 8, 8), 5.0, draws, Augmentation())
    with pytest.raises(ValueError, match=r"\[5, 2\] but got \[4, 2\]"):
        augment(torch.zeros(5, 3, 8, 8), 5.0, draws, Augmentation())
    with pytest.raises(ValueError, match=r"\[4, 1\] but got \[4, 2\]"):
        augment(torch.zeros(4, 3, 8, 8), 5.0, draws, Augmentation(operations=1))
