"""A user's class that lacks something is told what, before anything is trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from optuna_ohgw.contract_check import check_contract
from optuna_ohgw.errors import UserError
from optuna_ohgw.spec import load_spec
from optuna_ohgw.tasks.contract import faults, load_class

WHOLE = """
import torch
from optuna_ohgw import Metric

class Line:
    metric = Metric("error", maximize=False, low=0.0)
    hyperparameters = {"lr": (0.0, 10.0)}
    batches_per_epoch = 2

    def __init__(self, *, seed, device, epochs, slope=1.0):
        self.slope = slope

    def build(self, seed):
        self.w = torch.randn(1, generator=torch.Generator().manual_seed(seed))

    def train(self, psi, epoch, seed, batches=None):
        for _ in range(batches or 2):
            self.w = self.w - psi["lr"] * (self.w - self.slope)
        return float((self.w - self.slope) ** 2)

    def evaluate(self, part):
        loss = float((self.w - self.slope) ** 2)
        return loss, loss

    def state_dict(self):
        return {"w": self.w}

    def load_state_dict(self, state):
        self.w = state["w"]
"""
STUDY = """
name: line
task: {name: "NAME:Line", epochs: 3, options: {slope: 2}}
space: {lr: {low: 0.01, high: 1.0, log: true}}
variations: [baseline, ohgw-1step]
seeds: 1
targets: [0.1]
budget: {trials: 2}
"""


ONCE = """
    def loss(self, psi, epoch, seed, horizon):
        def loss(p):
            weight = torch.ones((), dtype=torch.float64, requires_grad=True)
            hard = torch.nn.functional.hardsigmoid(weight * p["lr"])
            return torch.autograd.grad(hard, weight, create_graph=True)[0] ** 2

        return loss

"""
LOSS = """
    def loss(self, psi, epoch, seed, horizon):
        return lambda p: torch.ones(2)

"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function: changes of the class, overrides ↦ its spec; every class is a module of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def made(*changes, overrides=(), study=STUDY, text=WHOLE):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        name = f"line_{abs(hash((text, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "line.yaml").write_text(study.replace("NAME", name))
        load_class.cache_clear()
        return load_spec(tmp_path / "line.yaml", overrides)

    return made


def test_a_whole_class_passes_and_is_described(load):
    spec = load()
    assert (spec.metric.name, spec.metric.maximize) == ("error", False)
    assert check_contract(spec).endswith("Line, 3 epochs: 2 mini-batches an epoch, error (lower is better)")
    assert load(overrides=("task.options.slope=3", "space.slope.choices=[2, 3]")).choices


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("    metric = Metric", "    other = Metric", "metric is missing"),
        ("    hyperparameters = ", "    ranges = ", "hyperparameters is missing"),
        ("(0.0, 10.0)", "(None, 1.0)", r"hyperparameters\['lr'\] is \(None, 1.0\); give \(low, high\)"),
        ("(0.0, 10.0)", "(1.0, 0.0)", r"hyperparameters\['lr'\] is \(1.0, 0.0\); give \(low, high\)"),
        (
            "def train(self, psi, epoch, seed, batches=None)",
            "def train(self, psi)",
            r"train\(self, psi, epoch, seed, batches\) cannot be called so",
        ),
        ("def evaluate", "def score", r"evaluate\(self, part\) is missing"),
        ("def build", "def make", r"build\(self, seed\) is missing"),
        ("def state_dict", "def state", r"state_dict\(self\) is missing"),
        ("class Line:", "class Other:", "has no 'Line'; classes: Other"),
        ("import torch\n", "import torch\nimport no_such_thing\n", "needs 'no_such_thing', which is not"),
        ("import torch\n", "import torch\n1 / 0\n", "fails: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told_when_the_file_is_read(load, old, new, told):
    with pytest.raises(UserError, match=told) as caught:
        load((old, new))
    assert "\n" not in str(caught.value)
    assert "line.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("batches_per_epoch = 2", "batches_per_epoch = 0", "batches_per_epoch is 0; give a whole number"),
        ("    batches_per_epoch = 2\n", "", "has no attribute 'batches_per_epoch'"),
        ("slope=1.0", "steep=1.0", "task.options: .* cannot be made: .*slope"),
        ("self.slope = slope", "self.slope = {}[slope]", "task.options: .* cannot be made: KeyError: 2"),
        ("return loss, loss", "return loss", r"evaluate\('warm'\) fails"),
        ("return loss, loss", "return float('nan'), loss", "the metric of warm is nan"),
        ('return {"w": self.w}', 'return {"w": {self.w}}', "state_dict holds 'set'"),
        ("return loss, loss", "return loss, float('nan')", "the metric of warm is .*, the loss nan before"),
        ("return loss, loss", "return -1.0, loss", "the metric of warm is -1.0, outside of 0.0 to None"),
        ("return float((self.w - self.slope) ** 2)", "return None", "train fails: TypeError: float"),
        ("self.w = self.w - psi", "self.v = getattr(self, 'v', 0) + 1; self.w = self.v * self.w - psi",
         "state_dict fails: .*training on from a state differs"),
        ("self.w = self.w - psi", "self.w = self.w + DRAWN.random() - psi", "train must draw by the seed"),
        ("generator=torch.Generator().manual_seed(seed)", "generator=GENERATOR", "two calls with one seed"),
        ("    def state_dict", LOSS + "    def state_dict", "is no scalar"),
        ("    def state_dict", ONCE + "    def state_dict", r"gradient of loss fails: .* finite-difference$"),
        ('psi["lr"]', 'psi["rate"]', "train fails: KeyError: 'rate'"),
    ],
)  # fmt: skip
def test_what_fails_is_told_before_anything_is_made(load, old, new, told):
    spec = load(
        (old, new),
        (
            "class Line",
            "import random\nDRAWN = random.Random(0)\nGENERATOR = torch.Generator().manual_seed(0)\n"
            "\nclass Line",
        ),
    )
    with pytest.raises(UserError, match=told) as caught:
        check_contract(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "task={name: 'nowhere:Line', epochs: 3}",
            "task.name.*module 'nowhere' is neither in|module 'nowhere'",
        ),
        ("task={name: Line, epochs: 3}", r"task\.name: got \"Line\"; known: image, .*, module:Class"),
        ("task.epochs=0", "task.epochs"),
        ("task.slope=2", "task.slope: unknown key"),
        ("space.momentum=0.9", "space.momentum: unknown key"),
        ("space.lr.high=100", "space.lr: .* leaves 0 to 10"),
        ("space.width.choices=[1, 2]", "space.width: choices .*only slope can have any"),
        ("warm_start.freeze=[momentum]", "warm_start.freeze: 'momentum' is unknown"),
        ("warm_start.estimator=lean", "warm_start.estimator: 'lean' is of look-ahead losses"),
    ],
)
def test_bad_study_files_are_refused_in_a_line(load, override, told):
    with pytest.raises(UserError, match=told) as caught:
        load(overrides=(override,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "override", "told"),
    [
        ("wikitext2.yaml", "task.width=9", "task.width: 9 is no multiple of task.heads 2"),
        ("wikitext2.yaml", "task.context=5000", "task.context: the validation part has .* tokens, fewer"),
        ("cartpole.yaml", "task.minibatches=900", "task.minibatches: .* do not fill 900"),
    ],
)
def test_values_that_do_not_go_together_are_told_in_a_line(file, override, told):
    spec = load_spec(Path(__file__).parents[2] / "studies" / file, (override,), smoke=True)
    with pytest.raises(UserError, match=told) as caught:
        check_contract(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "module", "extra"),
    [
        ("wikitext2.yaml", "tokenizers", "text"),
        ("xgboost.yaml", "xgboost", "trees"),
        ("cartpole.yaml", "gymnasium", "rl"),
    ],
)
def test_a_package_that_is_missing_is_told_with_its_extra(monkeypatch, file, module, extra):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == module else known(n, *a))
    spec = load_spec(Path(__file__).parents[2] / "studies" / file, smoke=True)
    with pytest.raises(UserError, match=rf"needs {module}, which .*pip install 'optuna-ohgw\[{extra}\]'"):
        check_contract(spec)


def test_a_space_in_which_nothing_is_continuous_is_refused(load):
    with pytest.raises(UserError, match="space: nothing is searched; give low and high for some of lr"):
        load(study=STUDY.replace("{lr: {low: 0.01, high: 1.0, log: true}}", "{lr: 0.1}"))


def test_what_is_no_class_is_no_task():
    assert faults(print) == ["it is 'builtin_function_or_method', not a class"]


@pytest.mark.parametrize("file", ["imagenet.yaml", "cartpole.yaml", "uci.yaml"])
def test_tasks_of_this_package_are_not_evaluated_whole_before_a_run(monkeypatch, file):
    spec = load_spec(Path(__file__).parents[2] / "studies" / file, smoke=True)
    monkeypatch.setattr(load_class(spec.task.path), "evaluate", lambda self, part: 1 / 0)
    check_contract(spec)


def test_dropout_of_a_network_without_any_is_refused():
    path, searched = (
        Path(__file__).parents[2] / "studies/imagenet.yaml",
        "space.dropout={low: 0.0, high: 0.5}",
    )
    with pytest.raises(UserError, match=r"space.dropout: the network has no layer that drops"):
        check_contract(load_spec(path, (searched,), smoke=True))
    check_contract(load_spec(path, (searched, "task.model=vit_tiny_patch16_224"), smoke=True))
