"""The files in ``studies/``: what they say, and that their light forms run."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from optuna_ohgw.cells import cells_of
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.spec import load_spec
from optuna_ohgw.tasks.models import build_model
from optuna_ohgw.variations import WARM_STARTS, base_of, eta_of

STUDIES = Path(__file__).parents[1] / "studies"
COLLECTION = "transfer.yaml"
FILES = sorted(path.name for path in STUDIES.glob("*.yaml") if path.name != COLLECTION)
FOUR = ("asha-baseline", "asha-random-warm", "asha-ohgw-1step", "asha-ohgw-3step")
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3)
NOT_SWEPT = [file for file in FILES if not file.endswith("eta_sweep.yaml")]
SWEPT = sorted(set(FILES) - set(NOT_SWEPT))
PICTURES = [f for f in FILES if f.startswith(("cifar", "digits", "smoke"))]
each_file = pytest.mark.parametrize("file", FILES)


def load(file, *overrides, smoke=False):
    return load_spec(STUDIES / file, overrides, smoke=smoke)


def test_there_are_studies_and_they_are_yaml():
    assert {"cifar10.yaml", "digits.yaml", "smoke.yaml"} <= set(FILES)
    assert SWEPT == ["cifar10_eta_sweep.yaml", "digits_eta_sweep.yaml"]
    assert [p.name for p in sorted(STUDIES.iterdir())] == sorted([*FILES, COLLECTION])


@each_file
def test_file_says_its_own_name(file):
    assert load(file).name == Path(file).stem.replace("_", "-")


@pytest.mark.parametrize("file", NOT_SWEPT)
def test_file_runs_all_four_variations_and_none_unknown(file):
    spec = load(file)
    prefix = f"{spec.scheduler.name}-"
    own = {v.removeprefix(prefix) for v in spec.variations}
    assert {v.removeprefix("asha-") for v in FOUR} <= own <= set(WARM_STARTS)


@each_file
def test_file_spells_its_variations_out(file):
    text = (STUDIES / file).read_text()
    if "extends: uci.yaml" in text or ("extends: cifar10.yaml" in text and "variations" not in text):
        text += (STUDIES / "uci.yaml").read_text()
    spec = load(file)
    assert all(name.removeprefix(f"{spec.scheduler.name}-") in text for name in spec.variations)


@pytest.mark.parametrize("file", SWEPT)
def test_sweep_runs_four_step_sizes_with_baseline_and_control_on_eight_seeds_of_its_own(file):
    spec = load(file)
    assert spec.variations[:2] == ("asha-baseline", "asha-random-warm")
    assert {base_of(v) for v in spec.variations[2:]} == {"asha-ohgw-1step"}
    assert tuple(eta_of(v) for v in spec.variations[2:]) == SWEEP
    assert spec.seeds == tuple(range(100, 108))
    main = load(file.replace("_eta_sweep", ""))
    assert not {*spec.seeds} & {*main.seeds, *main.pilot_seeds}
    assert main.warm_start.eta_h in SWEEP


@pytest.mark.parametrize("family", ["cifar10", "digits"])
def test_label_noise_is_a_tenth_and_its_seeds_are_eight_of_the_main_study(family):
    noisy, main = load(f"{family}_label_noise.yaml"), load(f"{family}.yaml")
    assert (noisy.task.label_noise, main.task.label_noise) == (0.1, 0.0)
    assert noisy.seeds == main.seeds[:8] == tuple(range(8))


@pytest.mark.parametrize(
    "file", [f for f in PICTURES if not f.startswith(("smoke", "cifar100", "cifar10_r", "cifar10_su"))]
)
def test_file_names_the_studies_beside_it(file):
    family = file.partition(".")[0].partition("_")[0]
    sides = [f"{family}{side}.yaml" for side in ("_bootstrap0", "_eta_sweep", "_label_noise")]
    expected = sides if file == f"{family}.yaml" else [f"{family}.yaml"]
    assert [Path(side) for side in load(file).beside] == [STUDIES / side for side in expected]
    assert all(Path(side).is_file() for side in load(file).beside)


@each_file
def test_light_form_is_the_same_study_but_shorter(file):
    full, light = load(file), load(file, smoke=True)
    assert light.variations == full.variations
    assert light.task.name == full.task.name
    assert light.metric == full.metric
    assert light.space == full.space
    assert light.sampler == full.sampler
    assert light.warm_start == full.warm_start
    assert light.scheduler.bootstrap_count == full.scheduler.bootstrap_count
    assert light.scheduler.reduction_factor == full.scheduler.reduction_factor
    assert light.name == f"{full.name}-smoke"
    assert light.task.epochs <= full.task.epochs
    assert light.scheduler.rungs(light.task.epochs), "no rung: a light run would not use the pruner"


@each_file
def test_light_form_needs_no_network_and_ends_soon(file):
    light = load(file, smoke=True)
    assert getattr(light.task, "data", "digits") in ("digits", "breast-cancer", "python")
    assert light.execution.workers == 1
    assert len(light.seeds) == 1
    assert light.budget.trials is not None
    assert light.budget.trials * light.task.epochs <= 12


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("cifar")])
def test_light_form_of_cifar_has_its_pictures_and_augmentation(file):
    full, light = load(file), load(file, smoke=True)
    assert light.task.augmentation == full.task.augmentation
    assert (light.task.size, light.task.channels) == (full.task.size or 32, 3)


@each_file
def test_pilot_seeds_are_none_of_the_seeds(file):
    for smoke in (False, True):
        spec = load(file, smoke=smoke)
        assert not set(spec.seeds) & set(spec.pilot_seeds)


@pytest.mark.parametrize("file", PICTURES)
def test_model_is_one_that_can_be_built(file):
    task = load(file).task
    build_model(task.model, channels=task.channels or 3, size=task.size or 32, classes=10)


def test_cifar10_is_the_experiment_that_was_agreed():
    spec = load("cifar10.yaml")
    assert spec.task.data == "uoft-cs/cifar10"
    assert spec.task.model == "resnet20"
    assert spec.task.epochs == 200
    assert spec.task.batch_size == 128
    assert spec.task.train_images is None
    assert spec.task.test_images is None
    assert spec.scheduler.reduction_factor == 4
    assert spec.scheduler.bootstrap_count == 2
    assert spec.variations == FOUR
    assert len(spec.seeds) == 32
    assert 0.93 in spec.targets
    assert spec.execution.workers == 4
    assert spec.budget.device_hours == 12
    assert spec.budget.trials is None


def _changed(base, other):
    one, two = base.model_dump(mode="json"), other.model_dump(mode="json")

    def differing(a, b, prefix=""):
        for key in a.keys() | b.keys():
            if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
                yield from differing(a[key], b[key], f"{prefix}{key}.")
            elif a.get(key) != b.get(key):
                yield f"{prefix}{key}"

    return set(differing(one, two))


SWEEP_FIELDS = {"name", "beside", "variations", "seeds", "pilot_seeds"}


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize(
    ("file", "base", "fields"),
    [
        ("cifar10_bootstrap0.yaml", "cifar10.yaml", {"name", "beside", "scheduler.bootstrap_count"}),
        ("digits_bootstrap0.yaml", "digits.yaml", {"name", "beside", "scheduler.bootstrap_count"}),
        ("cifar10_every_rung.yaml", "cifar10.yaml", {"name", "beside", "warm_start.every_rung"}),
        ("digits_rules.yaml", "digits.yaml", {"name", "beside", "variations"}),
        ("digits_eta_sweep.yaml", "digits.yaml", SWEEP_FIELDS),
        ("cifar10_eta_sweep.yaml", "cifar10.yaml", SWEEP_FIELDS),
        ("digits_label_noise.yaml", "digits.yaml", {"name", "beside", "task.label_noise"}),
    ],
)
def test_derived_file_differs_from_its_base_in_nothing_else(file, base, fields, smoke):
    assert _changed(load(base, smoke=smoke), load(file, smoke=smoke)) == fields


def test_cifar10_in_a_day_differs_in_budget_and_workers_alone():
    base, day = load("cifar10.yaml"), load("cifar10_day.yaml")
    budget, execution = (
        {"budget.mbu", "budget.device_hours"},
        {"execution.workers", "execution.cells_at_once"},
    )
    assert _changed(base, day) == {"name", "beside", *budget, *execution}
    assert day.budget.mbu == 2_500 * 352


@pytest.mark.parametrize("smoke", [False, True])
def test_noisy_cifar10_differs_in_noise_and_number_of_seeds(smoke):
    fields = {"name", "beside", "task.label_noise"} | (set() if smoke else {"seeds"})
    base, noisy = load("cifar10.yaml", smoke=smoke), load("cifar10_label_noise.yaml", smoke=smoke)
    assert _changed(base, noisy) == fields


@pytest.mark.parametrize("family", ["cifar10", "digits"])
def test_bootstrap_counts_are_two_and_none(family):
    assert load(f"{family}.yaml").scheduler.bootstrap_count == 2
    assert load(f"{family}_bootstrap0.yaml").scheduler.bootstrap_count == 0


def test_smoke_runs_every_variation_there_is():
    assert set(load("smoke.yaml").variations) == {f"asha-{w}" for w in WARM_STARTS}


def test_rules_bring_each_rule_with_its_random_control():
    variations = load("digits_rules.yaml").variations
    for rule in ("trust", "linesearch"):
        assert {f"asha-ohgw-{rule}", f"asha-random-{rule}"} <= set(variations)
    assert "asha-lr-grid" in variations


# The others differ from these in what the tests above compare.
RUN = ["smoke.yaml", "digits.yaml", "cifar10.yaml", "imagenet.yaml", "uci.yaml"]
RUN += ["mixed_space.yaml", "xgboost.yaml", "cartpole.yaml", "atari_pong.yaml", "wikitext103.yaml"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", RUN)
def test_light_form_runs_all_its_variations(file, tmp_path, environment):
    command = [sys.executable, "-c", "from optuna_ohgw.cli import main; main()", "run", str(STUDIES / file)]
    command += ["--smoke", "--quiet", "--set", f"output={tmp_path}", "--set", "execution.device=cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

    spec = load(file, f"output={tmp_path}", smoke=True)
    storage = open_storage(spec.storage_url, create=False)
    cells = cells_of(spec)
    assert {cell.variation for cell in cells} == set(spec.variations)
    studies = {s.study_name for s in storage.get_all_studies()}
    assert studies == {f"{spec.name}/workers", *(cell.name for cell in cells)}
    for cell in cells:
        study = optuna.load_study(study_name=cell.name, storage=storage)
        assert study.user_attrs["variation"] == cell.variation
        assert math.isfinite(study.user_attrs["final"]["test_metric"])
        assert study.direction == spec.metric.direction
        states = [t.state.name for t in study.get_trials()]
        assert len(states) == spec.budget.trials
        assert set(states) <= {"COMPLETE", "PRUNED"}
        assert len([*cell.folder(tmp_path).glob("best.*")]) == 1
    assert check_pairing(storage, spec).intact


@pytest.fixture
def environment(monkeypatch):
    """Return an environment without a network in which this package is found."""
    import os

    path = os.pathsep.join(filter(None, [str(STUDIES.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "COLUMNS": "100"}


@pytest.mark.parametrize("file", ["cifar100.yaml", "cifar10_resnet50.yaml"])
def test_other_pictures_keep_space_and_warm_start_of_cifar10(file):
    base, other = load("cifar10.yaml"), load(file)
    assert (other.space, other.warm_start) == (base.space, base.warm_start)


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize(
    ("file", "base", "fields"),
    [
        ("masked_gradient.yaml", "uci.yaml", {"name", "beside", "warm_start.freeze"}),
        ("frozen_discrete.yaml", "uci.yaml", {"name", "beside"}),
        ("batch_size.yaml", "uci.yaml", {"name", "beside", "space.batch_size"}),
        (
            "mixed_space.yaml",
            "frozen_discrete.yaml",
            {"name", "beside", "space.hidden", "space.layers", "space.activation", "space.batch_size"},
        ),
    ],
)
def test_ablations_differ_in_what_they_are_about(file, base, fields, smoke):
    assert _changed(load(base, smoke=smoke), load(file, smoke=smoke)) == fields


def test_no_task_has_a_step_size_of_its_own():
    assert {load(file).warm_start.eta_h for file in NOT_SWEPT} == {1e-3}
