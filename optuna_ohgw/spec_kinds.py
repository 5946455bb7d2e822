"""Task sections by their names: images, replays, this package's other tasks, and the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from optuna_ohgw.metric import MEAN_RETURN, PERPLEXITY, Metric
from optuna_ohgw.spec_parts import Spec
from optuna_ohgw.spec_tasks import COMMON, ImageSpec, Limits, ReplaySpec, TrainingSpec
from optuna_ohgw.tasks.contract import load_class

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
_BELOW_1 = Limits(0.0, 1.0, open=True)
_FROM_0 = COMMON["lr"]
_SHARE = Limits(0.0, 1.0)


class ContractSpec(TrainingSpec):
    """A task behind the contract that a user's own has, see ``tasks.contract``."""

    implementation: ClassVar[str] = ""
    needs: ClassVar[tuple[str, str] | None] = None

    @property
    def path(self) -> str:
        """Module and class of the task, as ``module:Class``."""
        return self.implementation

    @property
    def options(self) -> dict[str, Any]:
        """What the class is called with, structural parameters included."""
        return self.model_dump(exclude={"name", "epochs"})


class OwnSpec(ContractSpec):
    """A task of the user's: ``name`` is ``module:Class``, ``options`` go to its constructor."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    given: Annotated[dict[str, Any], Field(alias="options", default_factory=dict)]

    @model_validator(mode="after")
    def _check(self) -> OwnSpec:
        load_class(self.name)
        return self

    @property
    def path(self) -> str:
        """The name."""
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """What the class is called with."""
        return dict(self.given)

    @property
    def metric(self) -> Metric:
        """What the class says."""
        found: Metric = load_class(self.name).metric
        return found

    @property
    def limits(self) -> Mapping[str, Limits]:
        """What the class says."""
        return {n: Limits(*ends) for n, ends in load_class(self.name).hyperparameters.items()}

    @property
    def structure(self) -> dict[str, Any]:
        """The options, any of which may have choices."""
        return {n: v for n, v in self.given.items() if isinstance(v, str | int)}

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        return f"{self.name}, {self.epochs} epochs"


class _Updated(ContractSpec):
    """A network trained by a choice of optimisers."""

    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "sgd"

    @property
    def limits(self) -> Mapping[str, Limits]:
        """Those of the optimiser, the rate's schedule, dropout and label smoothing."""
        adam = self.optimizer in ("adam", "adamw")
        own = {"beta1": _BELOW_1, "beta2": _BELOW_1} if adam else {"momentum": COMMON["momentum"]}
        shared = {name: COMMON[name] for name in ("lr", "weight_decay", "label_smoothing")}
        return {**shared, **own, "dropout": _BELOW_1, "warm_up": _BELOW_1, "final_rate": _SHARE}

    @property
    def defaults(self) -> Mapping[str, float]:
        """PyTorch's betas."""
        return {"beta1": 0.9, "beta2": 0.999} if self.optimizer in ("adam", "adamw") else {}

    @property
    def required(self) -> str | None:
        """The learning rate."""
        return "lr"


class TabularSpec(_Updated):
    """Classification of the rows of a table by a multilayer perceptron."""

    implementation: ClassVar[str] = "optuna_ohgw.tasks.tabular:Tabular"
    structural: ClassVar[tuple[str, ...]] = ("hidden", "layers", "batch_size", "activation")
    name: Literal["tabular"]
    data: str
    target: str | None = None
    hidden: PositiveInt = 64
    layers: Annotated[int, Field(ge=0)] = 2
    activation: Literal["relu", "tanh", "silu"] = "relu"
    batch_size: PositiveInt = 32
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        size = f"{self.layers}x{self.hidden}"
        return f"{size} perceptron on {self.data} by {self.optimizer}, {self.epochs} epochs"


class BoostingSpec(ContractSpec):
    """Classification of the rows of a table by boosted trees; an epoch is ``rounds`` boosting rounds."""

    implementation: ClassVar[str] = "optuna_ohgw.tasks.boosting:Boosting"
    needs: ClassVar[tuple[str, str] | None] = ("xgboost", "trees")
    structural: ClassVar[tuple[str, ...]] = ("max_depth", "grow_policy", "max_bin")
    name: Literal["xgboost"]
    data: str
    target: str | None = None
    rounds: PositiveInt = 1
    max_depth: PositiveInt = 6
    grow_policy: Literal["depthwise", "lossguide"] = "depthwise"
    max_bin: Annotated[int, Field(ge=2)] = 256
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    @property
    def limits(self) -> Mapping[str, Limits]:
        """XGBoost's own names, but ``lr`` for eta."""
        shares = {"subsample": _SHARE, "colsample_bytree": _SHARE}
        penalties = dict.fromkeys(("reg_lambda", "reg_alpha", "gamma", "min_child_weight"), _FROM_0)
        return {"lr": _SHARE, **penalties, **shares, "max_delta_step": _FROM_0}

    @property
    def defaults(self) -> Mapping[str, float]:
        """XGBoost's."""
        return {
            "lr": 0.3,
            "reg_lambda": 1.0,
            "min_child_weight": 1.0,
            "subsample": 1.0,
            "colsample_bytree": 1.0,
        }

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        return f"boosted trees on {self.data}, {self.epochs} x {self.rounds} rounds"


class LanguageSpec(_Updated):
    """Language modelling: a small Transformer on byte-level BPE tokens."""

    implementation: ClassVar[str] = "optuna_ohgw.tasks.language:Language"
    needs: ClassVar[tuple[str, str] | None] = ("tokenizers", "text")
    structural: ClassVar[tuple[str, ...]] = ("width", "layers", "heads", "batch_size")
    name: Literal["language"]
    data: str
    vocabulary: Annotated[int, Field(ge=257)] = 2048
    context: PositiveInt = 64
    width: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    batch_size: PositiveInt = 16
    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "adamw"
    batches: PositiveInt | None = None
    train_characters: PositiveInt | None = None
    evaluation_characters: PositiveInt | None = None
    train_file: str = "train.txt"
    validation_file: str = "valid.txt"
    test_file: str = "test.txt"
    text_column: str = "text"

    @property
    def metric(self) -> Metric:
        """Perplexity of a token."""
        return PERPLEXITY

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        size = f"{self.layers}x{self.width} Transformer"
        return f"{size} on {self.data} by {self.optimizer}, {self.epochs} epochs"


class PicturesSpec(_Updated):
    """Classification of pictures that stay on disk, as ImageNet's."""

    implementation: ClassVar[str] = "optuna_ohgw.tasks.pictures:Pictures"
    structural: ClassVar[tuple[str, ...]] = ("model", "batch_size")
    name: Literal["pictures"]
    data: str
    model: str
    validation_images: PositiveInt
    size: PositiveInt = 224
    batch_size: PositiveInt = 128
    batches: PositiveInt | None = None
    test_images: PositiveInt | None = None
    decoders: Annotated[int, Field(ge=0)] = 4
    image_column: str = "image"
    label_column: str = "label"

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        return f"{self.model} on {self.data} at {self.size} pixels by {self.optimizer}, {self.epochs} epochs"


class PpoSpec(ContractSpec):
    """Reinforcement learning by PPO; an epoch is ``steps`` steps in each environment."""

    implementation: ClassVar[str] = "optuna_ohgw.tasks.ppo:Ppo"
    needs: ClassVar[tuple[str, str] | None] = ("gymnasium", "rl")
    structural: ClassVar[tuple[str, ...]] = ("hidden", "environments", "steps", "minibatches", "passes")
    name: Literal["ppo"]
    environment: str
    environments: PositiveInt = 8
    steps: PositiveInt = 128
    rollouts: PositiveInt = 1
    minibatches: PositiveInt = 4
    passes: PositiveInt = 4
    hidden: PositiveInt = 64
    episodes: PositiveInt = 20
    episode_steps: PositiveInt | None = None

    @property
    def metric(self) -> Metric:
        """The mean return of episodes."""
        return MEAN_RETURN

    @property
    def limits(self) -> Mapping[str, Limits]:
        """PPO's."""
        coefficients = dict.fromkeys(("entropy", "value", "clip"), _FROM_0)
        return {"lr": _FROM_0, **coefficients, "gae_lambda": _SHARE, "gamma": _BELOW_1}

    @property
    def defaults(self) -> Mapping[str, float]:
        """Those of Schulman et al. (2017), table 3, and its Atari entropy bonus."""
        return {"entropy": 0.01, "value": 0.5, "clip": 0.2, "gae_lambda": 0.95, "gamma": 0.99}

    @property
    def required(self) -> str | None:
        """The learning rate."""
        return "lr"

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        return f"PPO on {self.environment}, {self.epochs} epochs of {self.environments} x {self.steps} steps"


def _task_kind(value: Any) -> str:
    name = value.get("name", "image") if isinstance(value, dict) else getattr(value, "name", None)
    return "own" if isinstance(name, str) and ":" in name else str(name)


TASKS: dict[str, type[Spec]] = {
    "image": ImageSpec,
    "pictures": PicturesSpec,
    "tabular": TabularSpec,
    "xgboost": BoostingSpec,
    "language": LanguageSpec,
    "ppo": PpoSpec,
    "replay": ReplaySpec,
    "own": OwnSpec,
}
Task = Annotated[
    Annotated[ImageSpec, Tag("image")]
    | Annotated[PicturesSpec, Tag("pictures")]
    | Annotated[TabularSpec, Tag("tabular")]
    | Annotated[BoostingSpec, Tag("xgboost")]
    | Annotated[LanguageSpec, Tag("language")]
    | Annotated[PpoSpec, Tag("ppo")]
    | Annotated[ReplaySpec, Tag("replay")]
    | Annotated[OwnSpec, Tag("own")],
    Discriminator(_task_kind),
]
