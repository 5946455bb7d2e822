from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.models import build_model, initialize

VIT = "vit_tiny_patch16_224"
SMALL_RESNET, SMALL_VIT = "test_resnet", "test_vit"  # of timm's own tests: the same classes


def built(name: str, seed: int | None = 0, *, channels: int = 3, size: int = 32) -> nn.Module:
    model = build_model(name, channels=channels, size=size, classes=10)
    if seed is not None:
        initialize(model, name, seed)
    return model


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resnet20_has_the_published_size() -> None:
    """0.27 million in table 6 of He et al. (2016); 269,722 counted with BatchNorm and option A."""
    assert parameter_count(built("resnet20")) == 269_722


def test_mlp_size_by_hand() -> None:
    model = built("mlp", channels=1, size=8)
    assert parameter_count(model) == (64 + 1) * 128 + (128 + 1) * 128 + (128 + 1) * 10
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_resnet20_halves_the_map_twice() -> None:
    model = built("resnet20").eval()
    maps = torch.randn(2, 16, 32, 32)
    shapes = []
    for block in model.blocks:
        maps = block(maps)
        shapes.append(tuple(maps.shape[1:]))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("index", range(9))
def test_shortcut_alone_subsamples_and_pads(index: int) -> None:
    """With the last scale at zero the residual vanishes; ReLU keeps the nonnegative input."""
    block = built("resnet20").blocks[index]
    nn.init.zeros_(block.norm2.weight)
    maps = torch.rand(2, block.conv1.in_channels, 8, 8)
    out = block(maps)
    if index in (3, 6):
        width = maps.shape[1]
        assert out.shape == (2, 2 * width, 4, 4)
        assert torch.equal(out[:, :width], maps[:, :, ::2, ::2])
        assert out[:, width:].count_nonzero() == 0
    else:
        assert torch.equal(out, maps)
    assert all(name.startswith(("conv", "norm")) for name, _ in block.named_parameters())


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("resnet20", 3, 32), ("mlp", 1, 8), (SMALL_RESNET, 3, 32), (SMALL_VIT, 3, 32)],
)
def test_weights_depend_on_the_seed_alone(name: str, channels: int, size: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(name, 0, channels=channels, size=size)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = built(name, 1, channels=channels, size=size)
    with torch.no_grad():
        second(torch.randn(4, channels, size, size))  # moves the running statistics
    for parameter in second.parameters():
        assert parameter.requires_grad
    weights = [p for p in second.parameters() if p.dim() > 1]
    others = [p for p in first.parameters() if p.dim() > 1]
    assert not any(torch.equal(p, q) for p, q in zip(weights, others, strict=True) if p.any())
    pointers = [parameter.data_ptr() for parameter in second.parameters()]
    initialize(second, name, 0)
    assert_same_state(first, second)
    assert pointers == [parameter.data_ptr() for parameter in second.parameters()]


@pytest.mark.parametrize("name", ["resnet20", SMALL_VIT])
def test_precision_does_not_shift_the_weights(name: str) -> None:
    single = built(name, 3)
    double = built(name, None).double()
    initialize(double, name, 3)
    assert all(parameter.dtype == torch.float64 for parameter in double.parameters())
    assert_same_state(single.double(), double)


@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("mlp", 8), (SMALL_RESNET, 32)])
def test_weights_are_he_normal(name: str, size: int) -> None:
    """The variance of n normal draws has relative deviation sqrt(2 / n), the mean 1 / sqrt(n)."""
    layers = 0
    for layer in built(name, 11, size=size).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach().double()
            fan_in, n = weight[0].numel(), weight.numel()
            ratio = weight.square().mean().item() * fan_in / 2
            assert abs(ratio - 1) < 5 * (2 / n) ** 0.5
            assert abs(weight.mean().item()) < 5 * (2 / fan_in / n) ** 0.5
            layers += 1
            if layer.bias is not None:
                assert not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm2d):
            assert torch.all(layer.weight == 1)
            assert not layer.bias.any()
            assert not layer.running_mean.any()
            assert torch.all(layer.running_var == 1)
    assert layers >= 3


def test_timm_resnet_keeps_small_pictures_large() -> None:
    model = built("resnet50")
    # as published for 1,000 classes and a 7x7 stem, less 990 classes and 40 weights a filter
    assert parameter_count(model) == 25_557_032 - 990 * (2048 + 1) - 64 * 3 * (49 - 9)
    with torch.no_grad():
        maps = model.eval().forward_features(torch.randn(1, 3, 32, 32))
        assert maps.shape == (1, 2048, 4, 4)
        assert model.forward_head(maps).shape == (1, 10)


def test_timm_resnet_of_large_pictures_is_untouched() -> None:
    model = build_model("resnet18", channels=3, size=96, classes=10)
    assert model.conv1.kernel_size == (7, 7)
    assert isinstance(model.maxpool, nn.MaxPool2d)


def test_timm_transformer_has_patches_of_four() -> None:
    model = built(VIT)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 1 + 8 * 8, 192)
    assert model.patch_embed.proj.in_channels == 3
    gray = build_model(VIT, channels=1, size=96, classes=10)
    assert gray.patch_embed.proj.kernel_size == (16, 16)
    assert gray(torch.zeros(1, 1, 96, 96)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet20", "mlp", SMALL_RESNET, SMALL_VIT])
def test_nothing_works_in_place(name: str) -> None:
    assert not any(getattr(layer, "inplace", False) for layer in built(name, None).modules())


@pytest.mark.parametrize(("name", "size"), [("resnet20", 4), ("mlp", 4)])
def test_silu_is_twice_differentiable_through_functional_call(name: str, size: int) -> None:
    """Central differences of PyTorch in float64, with respect to the weights of one layer."""
    model = build_model(name, channels=1, size=size, classes=3, activation="silu")
    initialize(model, name, 0)
    model.double()
    key = "head.weight" if name == "resnet20" else "3.weight"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, size, size, dtype=torch.float64, generator=generator)
    first = "conv.weight" if name == "resnet20" else "1.weight"
    state = {n: p.detach() for n, p in model.named_parameters()}

    def loss(a: Tensor, b: Tensor) -> Tensor:
        weights = {**state, first: a, key: b}
        logits: Tensor = torch.func.functional_call(model, weights, (images,))
        return logits.square().mean()

    inputs = (state[first].clone().requires_grad_(), state[key].clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


def test_unknown_names_come_with_close_ones() -> None:
    with pytest.raises(UserError, match=r"'resnet_50' is unknown.*resnet50"):
        built("resnet_50")
    with pytest.raises(UserError, match=f"'vit_tinny_patch16_224' is unknown.*{VIT}"):
        built("vit_tinny_patch16_224")
    with pytest.raises(UserError, match="'hf-hub:some/model' is unknown"):
        built("hf-hub:some/model")


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"task\.activation is 'tanh'; give one of relu, silu"):
        build_model("mlp", channels=1, size=8, classes=10, activation="tanh")
    with pytest.raises(UserError, match=r"task\.activation is 'silu', but resnet18"):
        build_model("resnet18", channels=3, size=32, classes=10, activation="silu")
    with pytest.raises(UserError, match="hiera_tiny_224 cannot be built for pictures of 32 pixels"):
        built("hiera_tiny_224")


def test_initialize_wants_the_name_it_was_built_by() -> None:
    with pytest.raises(ValueError, match="not made by build_model"):
        initialize(built(SMALL_RESNET), "resnet34", 0)
    with pytest.raises(ValueError, match="not made by build_model"):
        initialize(nn.Linear(2, 2), "resnet18", 0)


def test_own_models_do_not_import_timm() -> None:
    code = (
        "import sys\n"
        "from optuna_ohgw.tasks.models import build_model, initialize\n"
        "initialize(build_model('resnet20', channels=3, size=32, classes=10), 'resnet20', 0)\n"
        "assert 'timm' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=True)
