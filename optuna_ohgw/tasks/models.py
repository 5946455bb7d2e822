"""Networks for the image tasks: the architecture first, the weights from a seed afterwards."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_ohgw.errors import UserError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
_OWN = ("resnet20", "mlp")
_MLP_WIDTH = 128
_SMALL_PIXELS = 64  # up to here a stem for pictures of 224 pixels would leave too little
_SMALL_PATCH = 4
_TIMM_CALL = "_ohgw_timm_call"


def build_model(
    name: str,
    *,
    channels: int,
    size: int,
    classes: int,
    activation: str = "relu",
) -> nn.Module:
    """Return a network ``[n, channels, size, size] -> [n, classes]`` (logits).

    Only the architecture is meant: call ``initialize`` for weights that depend on a seed. No
    weights are downloaded, no activation works in place, and the global random state is left
    as it was.

    Args:
        name: ``"resnet20"``: the network of He et al. (2016, arXiv:1512.03385, section 4.2) for
            CIFAR-10, with shortcuts of option A; 269,722 parameters for 3 channels and 10
            classes. ``"mlp"``: two hidden layers of 128 units, for pictures as small as digits.
            Anything else is a name of timm. For a ``size`` of at most 64 pixels, timm's ResNets
            get a 3x3 first convolution of stride 1 and no max pool, and transformers patches of
            4x4 pixels; other families come as they are.
        channels: Channels of a picture.
        size: Height and width of a picture, in pixels.
        classes: Number of classes.
        activation: ``"relu"`` or ``"silu"`` (smooth, for checks of gradients in float64);
            ``resnet20`` and ``mlp`` only.

    Raises:
        UserError: If timm does not know the name, or the values do not go together.
    """
    if activation not in _ACTIVATIONS:
        raise UserError(f"task.activation is {activation!r}; give one of {', '.join(_ACTIVATIONS)}")
    if name not in _OWN and activation != "relu":
        raise UserError(
            f"task.activation is {activation!r}, but {name} has an activation of its own; "
            f"take it out or give one of the models {', '.join(_OWN)}"
        )
    with torch.random.fork_rng(devices=[]):
        if name == "resnet20":
            return ResNet20(channels, classes, _ACTIVATIONS[activation])
        if name == "mlp":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * size * size, _MLP_WIDTH),
                _ACTIVATIONS[activation](),
                nn.Linear(_MLP_WIDTH, _MLP_WIDTH),
                _ACTIVATIONS[activation](),
                nn.Linear(_MLP_WIDTH, classes),
            )
        return _build_timm(_TimmCall(name, channels, size, classes))


def initialize(model: nn.Module, name: str, seed: int) -> None:
    """Draw the weights of a model from ``build_model`` anew, in place.

    ``resnet20``, ``mlp`` and timm's ResNets: He-normal weights for every convolution and linear
    layer, ``w ~ N(0, 2 / fan_in)`` (He et al. 2015, arXiv:1502.01852, equation 10), biases 0,
    normalization layers weight 1, bias 0 and running statistics reset. Anything else: timm's own
    initialization, as transformers differ in it from layer to layer; the model is built anew
    under a seeded copy of the random state and its weights are copied over.

    The weights depend on the seed and the architecture alone: they are drawn on the CPU in
    float32, so device and precision of the model do not shift them, and the global random state
    is neither read nor changed.

    Args:
        model: What ``build_model(name, ...)`` returned, perhaps moved or cast since.
        name: Its name.
        seed: Any integer that ``torch.Generator.manual_seed`` takes; 0 is valid.

    Raises:
        ValueError: If the model is not one that ``build_model`` made under this name.
    """
    call: _TimmCall | None = getattr(model, _TIMM_CALL, None)
    if (call is None) != (name in _OWN) or (call is not None and call.name != name):
        raise ValueError(f"the model was not made by build_model({name!r}, ...)")
    if call is None or _is_timm_resnet(model):
        _he_normal(model, seed)
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.load_state_dict(_build_timm(call).state_dict())


@torch.no_grad()
def _he_normal(model: nn.Module, seed: int) -> None:
    """Initialize every layer of a convolutional or fully connected network."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            drawn = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
            nn.init.kaiming_normal_(drawn, mode="fan_in", nonlinearity="relu", generator=generator)
            layer.weight.copy_(drawn)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            layer.reset_parameters()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(f"no rule to initialize a layer of type {type(layer).__name__}")


class ResNet20(nn.Module):
    """The 20-layer network of He et al. (2016) for CIFAR: 3 stages of 3 blocks, 16/32/64 wide."""

    def __init__(self, channels: int, classes: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.activation = activation()
        blocks: list[nn.Module] = []
        width_in = 16
        for width in (16, 32, 64):
            for _ in range(3):
                blocks.append(BasicBlock(width_in, width, activation))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[n, classes]`` of images ``[n, C, H, W]``."""
        hidden = self.blocks(self.activation(self.norm(self.conv(images))))
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al. 2016).

    Where the width grows, height and width of the map are halved; the shortcut then takes every
    second pixel and appends channels of zeros.
    """

    def __init__(self, width_in: int, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stride = 1 if width == width_in else 2
        self.added = width - width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation = activation()

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps ``[n, width, H / stride, W / stride]`` of ``[n, width_in, H, W]``."""
        residual = self.activation(self.norm1(self.conv1(maps)))
        residual = self.norm2(self.conv2(residual))
        shortcut = maps[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        out: Tensor = self.activation(residual + shortcut)
        return out


@dataclass(frozen=True)
class _TimmCall:
    """What it takes to build a model of timm once more."""

    name: str
    channels: int
    size: int
    classes: int


def _is_timm_resnet(model: nn.Module) -> bool:
    from timm.models.resnet import ResNet

    return isinstance(model, ResNet)


def _build_timm(call: _TimmCall) -> nn.Module:
    """Return a model of timm with a stem that suits the size, its weights as timm draws them."""
    import timm

    if not timm.is_model(call.name):
        near = difflib.get_close_matches(call.name, [*_OWN, *timm.list_models()], n=3)
        close = f" such as {' or '.join(near)}" if near else ""
        raise UserError(
            f"task.model {call.name!r} is unknown; give {', '.join(_OWN)} or a name of "
            f"timm.list_models(){close}"
        )
    small = call.size <= _SMALL_PIXELS
    options: dict[str, int] = {}
    defaults = timm.get_pretrained_cfg(call.name)
    if defaults and defaults.fixed_input_size and defaults.first_conv == "patch_embed.proj":
        options["img_size"] = call.size
        if small:
            options["patch_size"] = _SMALL_PATCH
    try:
        model: nn.Module = timm.create_model(
            call.name,
            pretrained=False,
            in_chans=call.channels,
            num_classes=call.classes,
            **options,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task.model {call.name} cannot be built for pictures of {call.size} pixels "
            f"({reason}); give another model or another task.size"
        ) from error
    if small and _is_timm_resnet(model):
        width = len(next(model.get_submodule("bn1").parameters()))
        stem = nn.Conv2d(call.channels, width, 3, padding=1, bias=False)
        model.set_submodule("conv1", stem)
        model.set_submodule("maxpool", nn.Identity())
    for layer in model.modules():
        if "inplace" in vars(layer):
            vars(layer)["inplace"] = False
    setattr(model, _TIMM_CALL, call)
    return model
