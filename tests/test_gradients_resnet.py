"""Hyper-gradients through the real ResNet-20, BatchNorm and augmentation, against central differences.

Float64, |difference| ≤ 1e-4·|g| + 10·ε·|L|/h: h = 1e-5 in search coordinates; for the magnitude
through ReLU h = 1e-8 of its 0 to 10 scale, because switching units make the loss rough there at any
larger step. The magnitude is away from whole-pixel shifts, where bilinear sampling has a kink.
Through ReLU the step is short, so that ±h of lr or momentum crosses no kink of the held-out loss;
from horizon 2 on a ReLU network's look-ahead loss jumps with lr, and no difference means anything.
"""

from __future__ import annotations

import pytest
import torch
from optuna.distributions import FloatDistribution

from optuna_ohgw.hypergrad import HyperGradient, direct, exact, finite_difference, lean
from optuna_ohgw.lookahead import LookaheadLoss, lookahead_loss
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.tasks.augment import OPERATIONS, Augmentation, augment, draw, normalize
from optuna_ohgw.tasks.data import load_arrays
from optuna_ohgw.tasks.models import build_model, initialize

PSI = {"lr": 0.01, "weight_decay": 1e-3, "momentum": 0.9, "magnitude": 5.3, "label_smoothing": 0.1}
SHORT = {**PSI, "lr": 1e-3, "momentum": 0.5}
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-4, 1.0, log=True),
        "weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
        "momentum": FloatDistribution(0.0, 0.99),
        "magnitude": FloatDistribution(0.0, 10.0),
        "label_smoothing": FloatDistribution(0.0, 0.3),
    }
)
EPSILON = torch.finfo(torch.float64).eps


def resnet_loss(
    activation: str, horizon: int, *, rest: bool = True, dtype=torch.float64, images: int = 8
) -> LookaheadLoss:
    arrays = load_arrays("digits", size=32, channels=3)
    model = build_model("resnet20", channels=3, size=32, classes=10, activation=activation)
    initialize(model, "resnet20", 0)
    model.to(dtype)
    settings, generator = Augmentation(flip=False), torch.Generator().manual_seed(7)

    def batch(position: int):
        rows = slice(images * position, images * (position + 1))
        # Noise, because the flat ground of a digit would put many units on one and the same kink.
        digits = torch.from_numpy(arrays.train_images[rows].copy()).double() / 255
        noise = torch.rand(digits.shape, generator=generator.manual_seed(position), dtype=torch.float64)
        pictures = (0.6 * digits + 0.4 * noise).to(dtype)
        draws = draw(settings, images, 32, 32, generator.manual_seed(100 + position))
        return (pictures, draws), torch.from_numpy(arrays.train_labels[rows].copy())

    velocity = None
    if not rest:
        velocity = {
            n: 1e-3 * torch.randn(p.shape, generator=generator, dtype=dtype)
            for n, p in model.named_parameters()
        }
    return lookahead_loss(
        model,
        batch,
        horizon=horizon,
        augment=lambda inputs, magnitude: augment(inputs[0], magnitude, inputs[1], settings),
        prepare=lambda inputs: normalize(inputs[0]),
        velocity=velocity,
        lr_scale=0.7,
    )


def assert_close_to_differences(found: HyperGradient, loss, z: torch.Tensor, steps: dict[str, float]) -> None:
    for i, name in enumerate(SPACE.names):
        h = steps.get(name, 1e-5)
        above, below = z.clone(), z.clone()
        above[i] += h
        below[i] -= h
        with torch.no_grad():
            difference = float(loss(SPACE.to_native(above))) - float(loss(SPACE.to_native(below)))
        central = difference / (2 * h)
        bound = 1e-4 * abs(central) + 10 * EPSILON * abs(found.loss) / h
        assert abs(float(found.gradient[i]) - central) <= bound, name


@pytest.mark.parametrize(
    ("activation", "horizon", "rest", "psi", "steps"),
    [
        ("silu", 1, True, PSI, {}),
        ("relu", 1, True, SHORT, {"magnitude": 1e-8}),
        pytest.param("silu", 1, False, PSI, {}, marks=pytest.mark.slow),
        pytest.param("relu", 1, False, SHORT, {"magnitude": 1e-8}, marks=pytest.mark.slow),
        pytest.param("silu", 2, True, PSI, {}, marks=pytest.mark.slow),
    ],
)
def test_exact_gradient_of_every_hyper_parameter_is_the_central_difference(
    activation: str, horizon: int, rest: bool, psi: dict[str, float], steps: dict[str, float]
) -> None:
    loss, z = resnet_loss(activation, horizon, rest=rest), SPACE.to_search(psi)
    found = exact(loss, SPACE, z)
    assert set(found.methods.values()) == {"exact"}
    assert_close_to_differences(found, loss, z, steps)


@pytest.mark.parametrize(("activation", "steps"), [("silu", {}), ("relu", {"magnitude": 1e-8})])
def test_direct_gradient_of_every_hyper_parameter_is_the_central_difference(
    activation: str, steps: dict[str, float]
) -> None:
    loss, z = resnet_loss(activation, 1), SPACE.to_search(PSI)
    assert_close_to_differences(direct(loss, SPACE, z), loss.direct, z, steps)


@pytest.mark.parametrize(
    ("activation", "horizon"), [("relu", 1), pytest.param("silu", 2, marks=pytest.mark.slow)]
)
def test_lean_gradient_is_exact_but_for_the_magnitude_a_coarse_central_difference(
    activation: str, horizon: int
) -> None:
    loss, z = resnet_loss(activation, horizon), SPACE.to_search(PSI)
    found, reference = lean(loss, SPACE, z), exact(loss, SPACE, z)
    coarse = finite_difference(loss, SPACE, z, step_unit=0.05)
    for i, name in enumerate(SPACE.names):
        wanted = coarse.gradient[i] if name == "magnitude" else reference.gradient[i]
        # Sums over 270,000 weights in another order: rounding only.
        assert float(found.gradient[i]) == pytest.approx(float(wanted), rel=1e-9), name
    assert found.methods["magnitude"] == "finite-difference"


def test_lean_in_float32_stays_within_a_thousandth_of_float64() -> None:
    z = SPACE.to_search(SHORT)
    single = lean(resnet_loss("silu", 1, dtype=torch.float32), SPACE, z)
    double = lean(resnet_loss("silu", 1), SPACE, z)
    for i, name in enumerate(SPACE.names):
        # Weights before BatchNorm are scale-invariant: weight decay's sum cancels to 1e-5 of its terms.
        relative = 1e-1 if name == "weight_decay" else 1e-3
        # The magnitude's is a difference of two float32 losses of size 3 over 1: some 1e-6 of 1.
        wanted = pytest.approx(float(double.gradient[i]), rel=relative, abs=2e-6)
        assert float(single.gradient[i]) == wanted, name


def test_operations_without_a_derivative_contribute_none() -> None:
    settings = Augmentation(flip=False, operations=1, crop_padding=0, cutout=0)
    draws = draw(settings, 4, 8, 8, torch.Generator().manual_seed(0))
    for operation in ("solarize", "posterize"):
        only = draws._replace(operation=torch.full_like(draws.operation, OPERATIONS.index(operation)))
        magnitude = torch.tensor(5.3, dtype=torch.float64, requires_grad=True)
        images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
        total = augment(images, magnitude, only, settings).square().sum()
        gradient = (
            torch.autograd.grad(total, magnitude, allow_unused=True)[0] if total.requires_grad else None
        )
        assert gradient is None or float(gradient) == 0.0
