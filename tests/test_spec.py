"""Study files to specs: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from optuna_ohgw.errors import UserError
from optuna_ohgw.reading import hide_passwords, merge, shown
from optuna_ohgw.spec import StudySpec, load_spec
from optuna_ohgw.spec_parts import RangeSpec, SchedulerSpec
from optuna_ohgw.spec_tasks import PICTURES
from optuna_ohgw.variations import WARM_STARTS, takes_eta

STUDY = """\
name: small
task: {data: digits, model: mlp, epochs: 9, validation_images: 100}
space:
  lr: {low: 1.0e-3, high: 1.0, log: true}
  momentum: 0.9
variations: [asha-baseline, asha-ohgw-1step]
seeds: 2
targets: [0.5]
budget: {trials: 4}
"""
REMEDIES = (
    r"; (give|add|did you mean|known: |remove|name|choose|raise|lower|keep|write|mend|put|plain YAML|only |"
    r"a ratio needs)"
)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Return a function that loads ``study.yaml`` of a working folder of its own."""
    monkeypatch.chdir(tmp_path)

    def load(*overrides, text=STUDY, smoke=False):
        Path("study.yaml").write_text(text)
        return load_spec(Path("study.yaml"), overrides, smoke=smoke)

    return load


def refusal(load, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert message.splitlines() == [message], "a message is one line"
    assert re.search(REMEDIES, message), f"no remedy in: {message}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


NO_ETA = (
    "",
    "x",
    "0",
    "0.0",
    "-1e-3",
    "+1e-3",
    ".inf",
    "inf",
    "nan",
    "1e999",
    "1_0",
    "1e-3@1e-3",
    " 1e-3",
    "1/2",
)
# (change, field named, value named): the first part of a message is the file.
REFUSED = [
    ("epocs=3", "epocs", "3"),
    ("task.epoch=3", "task.epoch", "3"),
    ("task.augmentation.flips=true", "task.augmentation.flips", "true"),
    ("space.lr.hi=1", "space.lr.hi", "1"),
    ("space.lrr=1", "space.lrr", "1"),
    ("space.model.choice=[mlp]", "space.model.choice", '["mlp"]'),
    ("smoke.seeds=3", "smoke", '{"seeds": 3}'),
    ("task.epochs=x", "task.epochs", '"x"'),
    ("task.epochs=1.5", "task.epochs", "1.5"),
    ("task.epochs='3'", "task.epochs", '"3"'),
    ("task.epochs=null", "task.epochs", "null"),
    ("task.epochs=0", "task.epochs", "0"),
    ("task.epochs.x=5", "task.epochs", '{"x": 5}'),
    ("task=3", "task", "3"),
    ("task.data=on", "task.data", "true"),
    ("task.channels=2", "task.channels", "2"),
    ("task.label_noise=1", "task.label_noise", "1"),
    ("name=5", "name", "5"),
    ("name=a/b", "name", '"a/b"'),
    ("name=..", "name", '".."'),
    ("output=", "output", "null"),
    ("storage=5", "storage", "5"),
    ("storage=sqlite://", "storage", "sqlite://"),
    ("storage='sqlite:///:memory:'", "storage", "sqlite:///:memory:"),
    ("variations=[asha-ohgw-2step]", "variations", "asha-ohgw-2step"),
    ("variations=[asha-ohgw-2step@1e-3]", "variations", "asha-ohgw-2step@1e-3"),
    ("variations=[asha-baseline@1e-3]", "variations", "asha-baseline@1e-3"),
    ("variations=[asha-ohgw-trust@1e-3]", "variations", "asha-ohgw-trust@1e-3"),
    *((f"variations=['asha-ohgw-1step@{eta}']", "variations", f"@{eta}") for eta in NO_ETA),
    ("variations=[asha-ohgw-1step@1e-4, asha-ohgw-1step@0.0001]", "variations", "asha-ohgw-1step@0.0001"),
    ("variations=[asha-ohgw-1step@1e-4, asha-ohgw-1step@1e-4]", "variations", "asha-ohgw-1step@1e-4"),
    ("variations=[asha-ohgw-1step, asha-ohgw-1step@1e-3]", "variations", "asha-ohgw-1step@1e-3"),
    ("variations=[]", "variations", "[]"),
    ("variations=asha-baseline", "variations", '"asha-baseline"'),
    ("variations.0=asha-baseline", "variations", '{"0": "asha-baseline"}'),
    ("variations=[asha-baseline, asha-baseline]", "variations", "asha-baseline"),
    ("space=3", "space", "3"),
    ("space.lr=0.1", "space.lr", "0.1"),
    ("space.lr=[1, 2]", "space.lr", "[1, 2]"),
    ("space.lr=null", "space.lr", "null"),
    ("space.lr.low=2", "space.lr", "2.0"),
    ("space.lr.low=1", "space.lr", "1.0"),
    ("space.lr.low=0", "space.lr", "0.0"),
    ("space.lr.low=-1", "space.lr", "-1.0"),
    ("space.lr={log: false, low: -0.1}", "space.lr", "-0.1"),
    ("space.lr.choices=[1]", "space.lr.low", "0.001"),
    ("space.weight_decay={choices: [1]}", "space.weight_decay", "[1]"),
    ("space.weight_decay=-0.1", "space.weight_decay", "-0.1"),
    ("space.momentum=1.0", "space.momentum", "1.0"),
    ("space.momentum={low: 0.5, high: 1}", "space.momentum", "1.0"),
    ("space.magnitude={low: 0, high: 11}", "space.magnitude", "11.0"),
    ("space.label_smoothing=1.1", "space.label_smoothing", "1.1"),
    ("space.momentum=true", "space.momentum", "true"),
    ("space.model=3", "space.model", "3.0"),
    ("space.model.choices=[]", "space.model.choices", "[]"),
    ("space.model.choices=[mlp, 1]", "space.model.choices", '["mlp", 1]'),
    ("space.model.choices=[mlp, mlp]", "space.model.choices", '["mlp", "mlp"]'),
    ("space.batch_size.choices=[a]", "space.batch_size.choices", '["a"]'),
    ("space.batch_size.choices=[8, 0]", "space.batch_size.choices", "[8, 0]"),
    ("sampler=grid", "sampler", '"grid"'),
    ("scheduler.name=median", "scheduler.name", '"median"'),
    ("scheduler.reduction_factor=1", "scheduler.reduction_factor", "1"),
    ("scheduler.min_resource=10", "scheduler.min_resource", "10"),
    ("warm_start.eta_h=0", "warm_start.eta_h", "0"),
    ("warm_start.eta_h=-1e-3", "warm_start.eta_h", "-0.001"),
    ("warm_start.eta_h=.nan", "warm_start.eta_h", "NaN"),
    ("warm_start.eta_h=.inf", "warm_start.eta_h", "Infinity"),
    ("warm_start.estimator=best", "warm_start.estimator", '"best"'),
    ("warm_start.freeze=[lrr]", "warm_start.freeze", "'lrr'"),
    ("warm_start.lengths=[]", "warm_start.lengths", "[]"),
    ("warm_start.lengths=[0]", "warm_start.lengths.0", "0"),
    ("warm_start.grid=[]", "warm_start.grid", "[]"),
    ("warm_start.snr_batches=1", "warm_start: snr_batches", "1"),
    ("warm_start.min_snr=2", "warm_start: snr_batches", "0"),
    ("warm_start.every_rung=1", "warm_start.every_rung", "1"),
    ("seeds=0", "seeds", "0"),
    ("seeds=-3", "seeds", "-3"),
    ("seeds=[]", "seeds", "[]"),
    ("seeds=null", "seeds", "null"),
    ("seeds=true", "seeds", "true"),
    ("seeds=1.0", "seeds", "1.0"),
    ("seeds=[0, -1]", "seeds.1", "-1"),
    ("seeds=[0, 0]", "seeds", "[0, 0]"),
    ("pilot_seeds=3", "pilot_seeds", "3"),
    ("pilot_seeds=[5, 5]", "pilot_seeds", "[5, 5]"),
    ("pilot_seeds=[1, 7]", "pilot_seeds", "[1]"),
    ("targets=[]", "targets", "[]"),
    ("targets=0.9", "targets", "0.9"),
    ("targets=[93]", "targets", "93.0"),
    ("targets=[1.01]", "targets", "1.01"),
    ("targets=[0]", "targets", "0.0"),
    ("targets=[93%]", "targets.0", '"93%"'),
    ("targets=[0.9, 0.9]", "targets", "[0.9, 0.9]"),
    ("budget.trials=0", "budget.trials", "0"),
    ("budget.trials=null", "budget", "no limit"),
    ("budget.hours=1", "budget.hours", "1"),
    ("budget.device_hours=-1", "budget.device_hours", "-1"),
    ("execution.workers=0", "execution.workers", "0"),
    ("execution.device=tpu", "execution.device", '"tpu"'),
    ("execution.device=cuda:x", "execution.device", '"cuda:x"'),
]


@pytest.mark.parametrize(("change", "field", "value"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_change_is_told_with_file_field_value_and_remedy(study, change, field, value):
    message = refusal(study, change)
    where, _, told = message.removeprefix("study.yaml: ").partition(" ")
    assert message.startswith("study.yaml: ")
    assert f"{where} {told}".startswith(field + (":" if ":" not in field else ""))
    assert value in message[len(field) :]


@pytest.mark.parametrize(("change", "field"), [row[:2] for row in REFUSED])
def test_refused_value_is_refused_in_a_smoke_section_too(study, change, field):
    key, _, yaml_value = change.partition("=")
    inner = yaml_value
    for part in reversed(key.split(".")):
        inner = f"{{{part}: {inner}}}"
    text = f"{STUDY}smoke: {inner}\n"
    assert field in refusal(study, text=text, smoke=True)


@pytest.mark.parametrize(
    ("change", "suggestion"),
    [
        ("task.epoch=3", "'epochs'"),
        ("space.weight_decays=1", "'weight_decay'"),
        ("storge=x", "'storage'"),
        ("variations=[asha-basline]", "'asha-baseline'"),
        ("variations=[asha-ohgw-1stp@1e-3]", "'asha-ohgw-1step'"),
        ("budget.trial=1", "'trials'"),
        ("space.lr.lows=1", "'low'"),
    ],
)
def test_unknown_name_brings_the_nearest_known_one(study, change, suggestion):
    assert f"did you mean {suggestion}?" in refusal(study, change)


def test_unknown_variation_far_from_all_brings_the_list_of_all(study):
    message = refusal(study, "variations=[zzz]")
    assert all(name in message for name in WARM_STARTS)


@pytest.mark.parametrize("line", ["name", "task", "space", "variations", "seeds", "targets", "budget"])
def test_missing_section_is_named(study, line):
    data = json.loads(study().model_dump_json())
    del data[line]
    assert refusal(study, text=json.dumps(data)) == f"study.yaml: {line}: is missing; add it"


def test_missing_name_is_named_in_the_smoke_form_too(study):
    text = STUDY.replace("name: small\n", "")
    assert refusal(study, text=text, smoke=True) == "study.yaml: name: is missing; add it"


def test_missing_learning_rate_is_named(study):
    assert "space.lr: is missing; give low and high" in refusal(
        study, text=STUDY.replace("lr:", "magnitude:")
    )


# (text of the file, part of the message)
NOT_A_STUDY = [
    ("", "is empty, not a mapping"),
    ("# only a comment\n", "is empty, not a mapping"),
    ("hello\n", "is a single value, not a mapping"),
    ("3\n", "is a single value, not a mapping"),
    ("null\n", "is a single value, not a mapping"),
    ("- a\n- b\n", "is a list, not a mapping"),
    ("{}\n", "not a mapping"),
    ("a: [1\n", "is not valid YAML"),
    ("\tname: x\n", "is not valid YAML"),
    ("a: 1\n---\nb: 2\n", "is not valid YAML"),
    ("a: *b\n", "is not valid YAML"),
    ("a: &a [*a]\n", "YAML"),
    ("a: ${b\n", "is not valid YAML (a: "),
    ("null: 3\n", "is not valid YAML"),
    ("a: \x01\n", "is not valid YAML"),
    ("name: x\nname: y\n", "found duplicate key name, line 2"),
    (
        "a: !!python/object/apply:os.system [touch made]\n",
        "python/object/apply:os.system', line 1; plain YAML",
    ),
    ("a: !!python/tuple [1, 2]\n", "python/tuple', line 1; plain YAML"),
    ("name: x\nb: !foo x\n", "'!foo', line 2; plain YAML"),
    ("a: {b: [!!python/object/apply:pathlib.Path [x]]}\n", "a.b.0: PosixPath('x')"),
    ("a: !!binary aGVsbG8=\n", "a: b'hello'"),
    ("a: !!timestamp 2020-01-01\n", "a: "),
]


@pytest.mark.parametrize(("text", "part"), NOT_A_STUDY, ids=[repr(row[0]) for row in NOT_A_STUDY])
def test_file_that_is_no_plain_mapping_is_told_in_one_line(study, text, part):
    message = refusal(study, text=text)
    assert message.startswith("study.yaml: ")
    assert part in message
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("path", "part"),
    [("missing.yaml", "there is no such file"), (".", "cannot be read"), ("study.yaml/x", "cannot be read")],
)
def test_path_that_is_no_file_is_told(study, path, part):
    study()
    message = refusal(load_spec, Path(path))
    assert message.startswith(f"{path}: ")
    assert part in message


def test_file_that_is_not_utf8_is_told(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xff\n")
    assert refusal(load_spec, path).startswith(f"{path}: cannot be read")


def test_key_and_value_of_several_lines_are_told_in_one(study):
    message = refusal(study, text=f'{STUDY}"a\\nb": "c\\nd"\n')
    assert message.startswith('study.yaml: a b: unknown key with value "c\\nd"')


def test_long_value_is_told_in_part(study):
    message = refusal(study, text=f"{STUDY}extra: {list(range(1000))}\n")
    assert len(message) < 400
    assert message.startswith("study.yaml: extra: unknown key with value [0, 1, 2")


# --set


@pytest.mark.parametrize(
    ("change", "read", "value"),
    [
        ("seeds=3", lambda s: s.seeds, (0, 1, 2)),
        ("seeds=[7, 3]", lambda s: s.seeds, (7, 3)),
        ("space.lr.low=1e-4", lambda s: s.space["lr"].low, 1e-4),
        ("warm_start.eta_h=1e-2", lambda s: s.warm_start.eta_h, 0.01),
        ("warm_start.eta_h=1", lambda s: s.warm_start.eta_h, 1.0),
        ("warm_start.every_rung=true", lambda s: s.warm_start.every_rung, True),
        ("warm_start.freeze=[lr, momentum]", lambda s: s.warm_start.freeze, ("lr", "momentum")),
        ("task.data=a=b", lambda s: s.task.data, "a=b"),
        ("task.data=/some/folder", lambda s: s.task.data, "/some/folder"),
        ("task.size=null", lambda s: s.task.size, None),
        ("task.augmentation={flip: false, cutout: 3}", lambda s: s.task.augmentation.cutout, 3),
        ("name='2024'", lambda s: s.name, "2024"),
        ("targets=[0.5, 1]", lambda s: s.targets, (0.5, 1.0)),
        ("space.momentum={low: 0.1, high: 0.2}", lambda s: s.space["momentum"], RangeSpec(low=0.1, high=0.2)),
        ("space.batch_size.choices=[8, 16]", lambda s: s.choices["batch_size"].choices, (8, 16)),
        ("execution.device=cuda:1", lambda s: s.execution.device, "cuda:1"),
        ("storage=sqlite:///a.db", lambda s: s.storage_url, "sqlite:///a.db"),
    ],
)
def test_set_reads_its_value_as_yaml(study, change, read, value):
    got = read(study(change))
    assert got == value
    assert type(got) is type(value)


def test_set_changes_what_it_names_and_nothing_else(study):
    before, after = study().model_dump(), study("task.augmentation.cutout=3").model_dump()
    assert after["task"]["augmentation"].pop("cutout") == 3
    assert before["task"]["augmentation"].pop("cutout") == 16
    assert before == after


def test_later_set_wins_and_both_win_over_smoke(study):
    text = f"{STUDY}smoke: {{seeds: 1, targets: [0.2]}}\n"
    spec = study("seeds=3", "seeds=4", text=text, smoke=True)
    assert (len(spec.seeds), spec.targets) == (4, (0.2,))


def test_set_of_a_number_replaces_a_range(study):
    spec = study("space.weight_decay={low: 0.1, high: 0.2}", "space.weight_decay=0.3")
    assert spec.constants["weight_decay"] == 0.3


def test_set_of_one_limit_keeps_the_other_limits(study):
    spec = study("budget.wall_hours=1")
    assert (spec.budget.trials, spec.budget.wall_hours) == (4, 1.0)


@pytest.mark.parametrize(
    ("pair", "part"),
    [
        ("seeds", "no '=' in it"),
        ("", "no '=' in it"),
        ("two\nlines", "no '=' in it"),
        ("=5", "a part of the key is empty"),
        ("task.=5", "a part of the key is empty"),
        (".x=5", "a part of the key is empty"),
        ("task..data=5", "a part of the key is empty"),
        ("seeds=[", "is no plain YAML"),
        ("seeds={", "is no plain YAML"),
        ("seeds=: :", "is no plain YAML"),
        ("task.data=${oc.env:HOME", "is no plain YAML"),
        ("task.data=!!python/object/apply:os.system [touch made]", "is no plain YAML"),
        ("task.data=\x1b[31mred", "is no plain YAML"),
    ],
)
def test_set_that_is_no_pair_is_told_with_the_option(study, pair, part):
    message = refusal(study, pair)
    assert message.startswith(f"--set {json.dumps(pair)}: ")
    assert part in message
    assert message.isprintable()
    assert not Path("made").exists()


def test_interpolation_is_not_resolved(study, monkeypatch):
    monkeypatch.setenv("OHGW_TEST", "revealed")
    assert study("task.data=${oc.env:OHGW_TEST}").task.data == "${oc.env:OHGW_TEST}"
    text = STUDY.replace("data: digits", "data: '${oc.env:OHGW_TEST}'")
    assert study(text=text).task.data == "${oc.env:OHGW_TEST}"


# extends


def test_extends_is_relative_to_the_file_that_names_it(study):
    study()
    Path("inner").mkdir()
    Path("inner/child.yaml").write_text("extends: ../study.yaml\nname: child\ntask: {epochs: 3}\n")
    Path("grandchild.yaml").write_text("extends: inner/child.yaml\nseeds: [5]\n")
    spec = load_spec(Path("grandchild.yaml"))
    assert (spec.name, spec.task.epochs, spec.task.model, spec.seeds) == ("child", 3, "mlp", (5,))


def test_extends_an_absolute_path(study):
    study()
    Path("child.yaml").write_text(f"extends: {Path('study.yaml').resolve()}\nname: child\n")
    assert load_spec(Path("child.yaml")) == study().model_copy(update={"name": "child"})


@pytest.mark.parametrize("base", ["missing.yaml", ".", "3", "[a.yaml]"])
def test_extends_of_no_file_names_the_file_the_field_and_the_value(study, base):
    message = refusal(study, text=f"extends: {base}\nname: x\n")
    assert message.startswith("study.yaml: extends: ")
    assert base.strip("[]") in message


@pytest.mark.parametrize("chain", [["study.yaml"], ["b.yaml", "study.yaml"], ["b.yaml", "./b.yaml"]])
def test_extends_loop_is_told(study, chain):
    for name, base in pairwise(chain):
        Path(name).write_text(f"extends: {base}\n")
    message = refusal(study, text=f"extends: {chain[0]}\n")
    assert "extends: " in message
    assert "leads back to itself" in message


def test_extends_a_bad_file_names_that_file(study):
    Path("base.yaml").write_text("- a\n")
    assert refusal(study, text="extends: base.yaml\n").startswith("base.yaml: is a list")


def test_extends_with_another_kind_of_value_names_the_field(study):
    study()
    Path("child.yaml").write_text("extends: study.yaml\ntargets: {a: 3}\n")
    assert 'child.yaml: targets: got {"a": 3}' in refusal(load_spec, Path("child.yaml"))


def test_smoke_sections_of_both_files_are_merged(study):
    study(text=f"{STUDY}smoke: {{seeds: 1, task: {{epochs: 2}}}}\n")
    Path("child.yaml").write_text("extends: study.yaml\nname: child\nsmoke: {task: {epochs: 3}}\n")
    spec = load_spec(Path("child.yaml"), smoke=True)
    assert (spec.name, spec.seeds, spec.task.epochs) == ("child-smoke", (0,), 3)


# smoke


def test_smoke_section_is_laid_over_the_file_only_if_asked(study):
    text = f"{STUDY}smoke: {{seeds: 1, task: {{epochs: 2}}, scheduler: {{min_resource: 2}}}}\n"
    assert study(text=text) == study()
    light = study(text=text, smoke=True)
    assert (light.name, light.seeds, light.task.epochs) == ("small-smoke", (0,), 2)
    assert light.task.model_copy(update={"epochs": 9}) == study().task


@pytest.mark.parametrize("section", ["", "smoke:\n", "smoke: {}\n"])
def test_smoke_form_without_changes_differs_in_its_name(study, section):
    light = study(text=STUDY + section, smoke=True)
    assert light == study().model_copy(update={"name": "small-smoke"})


@pytest.mark.parametrize("section", ["3", "[seeds]", "yes"])
def test_smoke_section_that_is_no_mapping_is_told(study, section):
    message = refusal(study, text=f"{STUDY}smoke: {section}\n", smoke=True)
    assert message.startswith("study.yaml: smoke: got ")


def test_name_given_by_hand_wins_over_the_smoke_name(study):
    assert study("name=mine", smoke=True).name == "mine"


# what a spec says


APART = ("variations=[asha-gaussian]", "seeds=[9]", "pilot_seeds=[77]", "targets=[0.1]", "output=elsewhere")
APART += ("beside=[a.yaml]", "tracking=mlflow")
APART += ("storage=sqlite:///other.db", "execution={workers: 3, device: cpu, threads: 2}")


@pytest.mark.parametrize("change", APART)
def test_identity_stays_with_what_changes_no_cell(study, change):
    assert study(change) != study()
    assert study(change).identity() == study().identity()


# One change of every other field there is; the test below sees that none is left out.
PART = {
    "name": "other",
    "task.data": "other",
    "task.model": "resnet20",
    "task.activation": "silu",
    "task.epochs": "10",
    "task.batch_size": "64",
    "task.validation_images": "99",
    "task.train_images": "99",
    "task.test_images": "99",
    "task.size": "16",
    "task.channels": "3",
    "task.label_noise": "0.1",
    "task.image_column": "image",
    "task.label_column": "fine_label",
    "task.augmentation.flip": "false",
    "task.augmentation.crop_padding": "1",
    "task.augmentation.operations": "1",
    "task.augmentation.cutout": "1",
    "space.lr.low": "0.01",
    "space.lr.high": "0.9",
    "space.lr.log": "false",
    "space.momentum": "0.8",
    "sampler": "tpe",
    "scheduler.min_resource": "2",
    "scheduler.reduction_factor": "3",
    "scheduler.bootstrap_count": "0",
    "warm_start.eta_h": "0.1",
    "warm_start.horizon": "2",
    "warm_start.estimator": "exact",
    "warm_start.radius": "0.3",
    "warm_start.lengths": "[0.1]",
    "warm_start.grid": "[0.1]",
    "warm_start.grid_horizon": "6",
    "warm_start.sigma": "0.02",
    "warm_start.freeze": "[lr]",
    "warm_start.snr_batches": "2",
    "warm_start.every_rung": "true",
    "budget.trials": "5",
    "budget.epochs": "5",
    "budget.mbu": "5",
    "budget.device_hours": "5",
    "budget.wall_hours": "5",
}
CHOOSE = (
    "scheduler={name: dyhpo, min_resource: 1, reduction_factor: 3}",
    "task.epochs=27",
    "variations=[baseline]",
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("budget={trials: null, epochs: 9}",),
            "budget.trials: is missing; dyhpo chooses among so many configurations",
        ),
        (("sampler=tpe",), "sampler: 'tpe' draws by what was seen, but dyhpo chooses among draws known"),
    ],
)
def test_a_scheduler_that_chooses_needs_its_configurations_beforehand(study, overrides, words):
    with pytest.raises(UserError, match=words):
        study(*CHOOSE, *overrides)


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        # Halving by 3, rounded up: 16 for 1 epoch, 6 for 2 more, 2 for 6 more, 1 for 18 more.
        (("budget={trials: 16}",), 16 + 12 + 12 + 18),
        (("budget={trials: 16, epochs: 40}",), 40),
        (("budget={trials: 16, mbu: 500}",), None),
        (("budget={trials: 16}", "scheduler.name=bohb"), None),
        (("budget={trials: 16, epochs: 40}", "scheduler.name=asha"), 40),
    ],
)
def test_epochs_in_all(study, overrides, epochs):
    assert study(*CHOOSE, *overrides).epochs_in_all == epochs


ONE_VALUE = {"task.name", "scheduler.name"}


@pytest.mark.parametrize("field", PART)
def test_identity_changes_with_all_else(study, field):
    assert study(f"{field}={PART[field]}").identity() != study().identity()


def test_identity_changes_with_the_least_ratio(study):
    two = "warm_start.snr_batches=2"
    assert study(two, "warm_start.min_snr=1").identity() != study(two).identity()


def test_no_field_is_left_out_of_the_two_tests_above(study):
    def keys(data, prefix=""):
        for key, value in data.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    apart = {change.partition("=")[0] for change in APART}
    left = {k for k in keys(study().model_dump(mode="json")) if k.split(".")[0] not in apart}
    assert left == set(PART) | ONE_VALUE | {"warm_start.min_snr"}


def test_identity_is_json_and_survives_it(study):
    assert json.loads(json.dumps(study().identity())) == study().identity()


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("seeds=[4, 2]", "pilot_seeds=[9]", "sampler=gp", "targets=[0.1, 1]"),
        ("space.model.choices=[mlp, resnet20]", "space.batch_size.choices=[8, 16]", "space.momentum=0"),
        ("warm_start={lengths: [0.1], grid: [-1e-3], freeze: [lr], snr_batches: 3, min_snr: 1.5}",),
        ("budget={trials: null, mbu: 1e9, device_hours: 0.1, wall_hours: 3}", "output=a b", "task.size=32"),
    ],
)
def test_round_trip_through_json_gives_an_equal_spec(study, changes):
    spec = study(*changes)
    assert StudySpec.model_validate_json(json.dumps(spec.model_dump(mode="json"))) == spec


def test_written_out_spec_loads_again(study):
    spec = study("space.lr.low=1e-7", "targets=[0.93]")
    assert study(text=json.dumps(spec.model_dump(mode="json"))) == spec


def test_constants_are_all_that_is_not_searched_and_zero_unless_named(study):
    assert study().constants == {
        "weight_decay": 0.0,
        "momentum": 0.9,
        "magnitude": 0.0,
        "label_smoothing": 0.0,
    }
    ranges = [f"space.{n}={{low: 0.1, high: 0.2}}" for n in PICTURES if n != "lr"]
    assert study(*ranges).constants == {}
    assert set(study(*ranges).ranges) == set(PICTURES)


def test_structure_is_no_constant_and_no_range(study):
    spec = study("space.batch_size.choices=[8, 16]")
    assert set(spec.choices) == {"batch_size"}
    assert set(spec.ranges) == {"lr"}
    assert "batch_size" not in spec.constants


@pytest.mark.parametrize("name", [n for n in PICTURES if n != "lr"])
def test_ends_of_the_limits_are_inside_but_for_momentum_one(study, name):
    low, high, _ = PICTURES[name]
    study(f"space.{name}={low}")
    top = {"momentum": 0.999999, "weight_decay": 1e9}.get(name, high)
    study(f"space.{name}={{low: {low}, high: {top}}}")


@pytest.mark.parametrize(
    ("least", "factor", "epochs", "rungs"),
    [
        (1, 4, 200, (1, 4, 16, 64)),
        (3, 3, 27, (3, 9)),
        (3, 3, 28, (3, 9, 27)),
        (1, 2, 2, (1,)),
        (1, 2, 1, ()),
        (5, 2, 5, ()),
        (5, 2, 6, (5,)),
        (1, 4, 4, (1,)),
        (1, 4, 5, (1, 4)),
    ],
)
def test_rungs_are_below_the_last_epoch(least, factor, epochs, rungs):
    assert SchedulerSpec(min_resource=least, reduction_factor=factor).rungs(epochs) == rungs


def test_count_of_seeds_and_their_list_are_the_same(study):
    assert study("seeds=3") == study("seeds=[0, 1, 2]")
    assert study("seeds=[0]") == study("seeds=1")


def test_folder_and_storage_follow_the_name_unless_given(study):
    assert study().folder == Path("runs/small")
    assert study().storage_url == "sqlite:///runs/small/study.db"
    assert study("output=here").storage_url == "sqlite:///here/study.db"
    assert study("output=here", "storage=sqlite:///x.db").storage_url == "sqlite:///x.db"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (lambda s: s, "name"),
        (lambda s: s.task, "epochs"),
        (lambda s: s.task.augmentation, "flip"),
        (lambda s: s.space["lr"], "low"),
        (lambda s: s.scheduler, "bootstrap_count"),
        (lambda s: s.warm_start, "eta_h"),
        (lambda s: s.budget, "trials"),
        (lambda s: s.execution, "workers"),
    ],
)
def test_specs_are_frozen(study, part, field):
    model = part(study())
    with pytest.raises(ValidationError, match="frozen"):
        setattr(model, field, getattr(model, field))


def test_every_variation_loads(study):
    assert study(f"variations={json.dumps(list(WARM_STARTS))}").variations == tuple(
        f"asha-{w}" for w in WARM_STARTS
    )


def test_variations_with_a_step_size_of_their_own_load(study):
    names = [f"asha-{v}@3e-4" for v in WARM_STARTS if takes_eta(v)]
    several = [*names, "asha-ohgw-1step", "asha-ohgw-1step@.003", "asha-baseline"]
    assert study(f"variations={json.dumps(several)}").variations == tuple(several)


def test_one_step_size_written_in_two_ways_is_told_with_both(study):
    message = refusal(study, "variations=[asha-ohgw-1step@1e-4, asha-ohgw-1step@0.00010]")
    assert "'asha-ohgw-1step@1e-4' and 'asha-ohgw-1step@0.00010' are the same with eta_h 0.0001" in message
    shared = "warm_start.eta_h=3e-4"
    assert "are the same" in refusal(study, shared, "variations=[asha-random-warm@3e-4, asha-random-warm]")
    study(shared, "variations=[asha-random-warm@1e-3, asha-random-warm]")


# reading


def test_merge_lays_mappings_over_each_other_and_replaces_all_else():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "f": 1}
    change = {"a": {"c": [3]}, "d": 2, "f": {"g": 1}, "h": None}
    assert merge(base, change) == {"a": {"b": 1, "c": [3]}, "d": 2, "f": {"g": 1}, "h": None}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "f": 1}, "its arguments stay as they were"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://user:secret@h/db", "postgresql://user:***@h/db"),
        ("x mysql+pymysql://user:se:c@ret@h/db y", "x mysql+pymysql://user:***@h/db y"),
        ("postgresql://:secret@h/db", "postgresql://:***@h/db"),
        ("postgresql://h/db?user=u&password=secret&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("postgresql://h/db?sslpassword=secret", "postgresql://h/db?sslpassword=***"),
        ("postgresql://h/db?password=it's\"a;b", "postgresql://h/db?password=***"),
        (
            "cannot use 'postgresql://h/db?password=s', why?",
            "cannot use 'postgresql://h/db?password=***', why?",
        ),
        ("(postgresql://h/db?password=s)", "(postgresql://h/db?password=***)"),
        ("host=h password='a b' user=u", "host=h password=*** user=u"),
        ("postgresql://u@server:secret@h/db", "postgresql://u@server:***@h/db"),
        ("postgresql://u:a%40b/c?d#e@h/db", "postgresql://u:***@h/db"),
        (
            "postgresql://u:o'n\"e@h/d and postgresql://v:two@h/d",
            "postgresql://u:***@h/d and postgresql://v:***@h/d",
        ),
        ("postgresql://user@h:5432/db", "postgresql://user@h:5432/db"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("https://h:80/a", "https://h:80/a"),
    ],
)
def test_passwords_of_urls_are_hidden_and_nothing_else_is(text, hidden):
    assert hide_passwords(text) == hidden


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("postgresql+psycopg://u:p@ssw0rd@h/db", "an '@'"),
        ("postgresql+psycopg://u:pass word@h/db", "a space"),
        ("postgresql+psycopg://h/db?password=pass word", "a space"),
    ],
)
def test_a_password_that_would_be_misread_is_refused_without_being_shown(study, url, fault):
    """It would be cut in two: the rest, shown as the host, is no password to whoever hides them."""
    with pytest.raises(UserError) as caught:
        study(f"storage={url}")
    assert str(caught.value).endswith(f"storage: holds {fault} unquoted; write %40 for '@', %20 for a space")
    assert not re.search("word|ss", str(caught.value))


def test_password_is_hidden_in_a_value_that_is_cut_short():
    assert "s3cret" not in shown(f"postgresql://user:{'s3cret' * 50}@h/db")


@pytest.mark.parametrize(
    "change", ["storge=postgresql://u:s3cret@h/d", "storage={url: 'x://u:s3cret@h'}", "x://u:s3cret@h"]
)
def test_no_message_shows_a_password(study, change):
    assert "s3cret" not in refusal(study, change)


# schedulers


def test_variations_may_leave_out_the_scheduler(study):
    short = "variations=[baseline, ohgw-1step@3e-4, asha-random-warm]"
    whole = ("asha-baseline", "asha-ohgw-1step@3e-4", "asha-random-warm")
    assert study(short).variations == whole
    assert study(short).identity() == study(f"variations={json.dumps(whole)}").identity()


def test_a_variation_of_another_scheduler_is_refused_with_the_remedy(study):
    message = refusal(study, "variations=[asha-promotion-baseline]")
    assert "'asha-promotion-baseline' is of another scheduler" in message
    assert "'asha'; write 'baseline'" in message


def test_reading_a_study_imports_nothing_heavy():
    studies = Path(__file__).parents[1] / "studies"
    files = [str(studies / f"{name}.yaml") for name in ("uci", "cartpole", "wikitext2")]
    heavy = {"torch", "pandas", "optuna", "xgboost", "gymnasium", "tokenizers", "sklearn"}
    code = (
        "import sys; from pathlib import Path; from optuna_ohgw.spec import load_spec\n"
        f"[load_spec(Path(file)) for file in {files}]\n"
        f"print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
