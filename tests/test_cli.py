"""The command line: exit codes, one line for a mistake, nothing half-made."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import optuna
import pytest
import sqlalchemy.exc
import torch
from typer.testing import CliRunner

from optuna_ohgw import data_check, device, opening, runner
from optuna_ohgw.cli import app, main
from optuna_ohgw.errors import UserError
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import load_spec

STUDY = """\
name: small
task: {data: digits, model: mlp, epochs: 1, batch_size: 64, validation_images: 100, train_images: 128}
space:
  lr: {low: 1.0e-3, high: 1.0, log: true}
variations: [asha-baseline, asha-ohgw-1step]
seeds: 1
targets: [0.5]
budget: {trials: 1}
execution: {threads: 1, device: cpu}
"""
CELL = "small/asha-baseline/seed-0000"
CALL = "from optuna_ohgw.cli import main; main()"
ONE = ("--set", "variations=[asha-baseline]")


def command(*arguments):
    """Return exit status, stdout and stderr of the command in this process."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["optuna-ohgw", *arguments]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def refused(*arguments):
    """Return the one line that tells of a mistake."""
    done = command(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    return done.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a working folder with ``study.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(STUDY)
    return tmp_path


def in_a_process(code, *arguments, **environment):
    """Return what came of Python code in a process that finds this package."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def held(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder, the result and the earlier refusals of a real run to the end."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("study.yaml").write_text(STUDY)
        refusals = [refused("run", "study.yaml", "--set", f"task.{c}") for c in ("model=mlpp", "data=./no")]
        made = held(folder)
        done = command("run", "study.yaml", *ONE)
    finally:
        os.chdir(before)
    return SimpleNamespace(folder=folder, done=done, refusals=refusals, made=made)


@pytest.fixture
def copy(finished, place):
    """Return a working folder with a copy of the finished run."""
    shutil.copytree(finished.folder / "runs", place / "runs")
    return place


def snapshot(url="sqlite:///runs/small/study.db"):
    """Return all that an Optuna storage holds of studies and trials."""
    storage = open_storage(url, create=False)
    return {
        s.study_name: (storage.get_study_user_attrs(s._study_id), storage.get_all_trials(s._study_id))
        for s in storage.get_all_studies()
    }


# help


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["run", "status", "bench"]),
        (["run"], ["STUDY", "--set", "--smoke", "--quiet", "--verbose"]),
        (["status"], ["STUDY", "--set", "--smoke", "--check-pairing"]),
        (["report"], ["STUDY", "--set", "--smoke", "--pdf"]),
        (["dashboard"], ["STUDY", "--set", "--smoke", "--port"]),
        (["compare"], ["STUDIES", "--smoke"]),
        (["bench"], ["--device", "--repeats"]),
    ],
)
def test_help_tells_arguments_and_options(arguments, parts):
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*arguments, "--help"])
    shown = click.unstyle(done.output)
    assert done.exit_code == 0
    assert all(part.lower() in shown.lower() for part in parts)


@pytest.mark.parametrize("name", [[], ["run"], ["status"], ["bench"]])
def test_help_imports_nothing_heavy(name):
    heavy = {"torch", "optuna", "pandas", "kornia", "datasets"}
    code = f"import atexit, sys; atexit.register(lambda: print('heavy:', {heavy} & set(sys.modules))); {CALL}"
    done = in_a_process(code, *name, "--help")
    assert done.returncode == 0
    assert "Usage" in click.unstyle(done.stdout)
    assert done.stdout.rstrip().endswith("heavy: set()")


@pytest.mark.parametrize(
    "arguments", [["fly"], ["run"], ["run", "a.yaml", "--fast"], ["bench", "--repeats", "1"]]
)
def test_wrong_usage_is_status_2_without_traceback(place, arguments):
    done = command(*arguments)
    assert done.status == 2
    assert "Usage" in click.unstyle(done.err)
    assert "Traceback" not in done.err


# mistakes before anything is made

# (changes, parts of the message: field, value, remedy)
MISTAKES = [
    (["task.epoch=3"], ["study.yaml: task.epoch", "3", "did you mean 'epochs'?"]),
    (["task.epochs=many"], ["study.yaml: task.epochs", '"many"', "give a whole number"]),
    (["variations=[asha-best]"], ["study.yaml: variations", "'asha-best'", "did you mean"]),
    (["space.lr.low=1"], ["study.yaml: space.lr", "1.0", "give low < high"]),
    (["space.lr.low=0"], ["study.yaml: space.lr", "0.0", "raise low"]),
    (["warm_start.eta_h=0"], ["study.yaml: warm_start.eta_h", "0", "greater than 0"]),
    (["seeds=[]"], ["study.yaml: seeds", "[]", "give a number of seeds"]),
    (["targets=[93]"], ["study.yaml: targets", "93.0", "give 0.93"]),
    (["seeds"], ['--set "seeds"', "write --set key.of.field=value"]),
    (["seeds=["], ['--set "seeds=["', "put it in quotes"]),
    (["seeds=!!python/object/apply:os.system [touch made]"], ["--set", "python/object", "put it in quotes"]),
    (["task.data=./missing"], ["task.data", "'./missing'", "give an existing folder"]),
    (["task.data=empty"], ["task.data", "empty", "train*.parquet"]),
    (["execution.device=cuda:99"], ["execution.device", "'cuda:99'", "use "]),
    (["output=study.yaml"], ["output", "study.yaml", "name another by --set output=FOLDER"]),
    (["output=study.yaml/below"], ["output", "study.yaml/below", "name another by --set output=FOLDER"]),
    (["storage=sqlite://"], ["storage", "sqlite://", "give sqlite:///FILE"]),
    (["storage=sqlite:///text.db"], ["storage", "text.db", "not a database", "--storage URL"]),
    (["storage=sqlite:///empty"], ["storage", "empty", "--storage URL"]),
    (["storage=nothing"], ["storage", "nothing", "--storage URL"]),
    (["storage=oracul://h/db"], ["storage", "h/db", "oracul", "--storage URL"]),
]


@pytest.mark.parametrize(("changes", "parts"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistake_is_one_line_and_leaves_nothing_behind(place, changes, parts):
    Path("empty").mkdir()
    Path("text.db").write_text("no database, but a text of more than sixteen bytes\n")
    before = held(place)
    message = refused("run", "study.yaml", *(part for change in changes for part in ("--set", change)))
    assert all(part in message for part in parts), message
    assert held(place) == before
    assert Path("text.db").read_text().startswith("no database")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- a\n", ["bad.yaml", "is a list", "write 'key: value' lines"]),
        ("a: [\n", ["bad.yaml", "is not valid YAML", "mend the syntax"]),
        ("a: !!python/object/apply:os.system [touch made]\n", ["bad.yaml", "python/object", "without tags"]),
        ("extends: gone.yaml\n", ["bad.yaml", "extends", '"gone.yaml"', "name a YAML file"]),
        ("extends: bad.yaml\n", ["bad.yaml", "extends", "leads back to itself", "name another"]),
        ('"a\\nb": 1\n', ["bad.yaml", "a b", "1", "known: name"]),
    ],
)
@pytest.mark.parametrize("name", ["run", "status"])
def test_file_that_is_no_study_is_one_line(place, name, text, parts):
    Path("bad.yaml").write_text(text)
    before = held(place)
    message = refused(name, "bad.yaml")
    assert all(part in message for part in parts), message
    assert held(place) == before


def test_missing_study_file_is_one_line(place):
    assert refused("run", "gone.yaml").startswith("gone.yaml: there is no such file; give ")


def test_folder_that_cannot_be_written_is_told_before_the_data_are_read(place, monkeypatch):
    """Permissions do not bind root, so the folder lies below a regular file."""

    def read(*_):
        raise AssertionError("the data were read first")

    monkeypatch.setattr(data_check, "load_image_arrays", read)
    assert refused("run", "study.yaml", "--set", "output=study.yaml/a/b").startswith(
        "output: study.yaml/a/b "
    )


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs the proc file system")
def test_folder_in_a_file_system_that_takes_no_folder_is_told(place):
    """No user, root included, can make a folder there."""
    assert "output: /proc/ohgw cannot be written" in refused(
        "run", "study.yaml", "--set", "output=/proc/ohgw"
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_folder_without_permission_is_told(place):
    Path("locked").mkdir(mode=0o555)
    assert "output: locked cannot be written" in refused("run", "study.yaml", "--set", "output=locked")


def test_data_folder_without_a_column_is_told_and_leaves_nothing(place):
    """In a process of its own, where ``datasets`` reads whether it may show progress bars."""
    import pyarrow
    import pyarrow.parquet

    Path("pictures").mkdir()
    for part in ("train", "test"):
        table = pyarrow.table({"image": ["x"] * 4, "label": [0, 1, 0, 1]})
        pyarrow.parquet.write_table(table, f"pictures/{part}-0.parquet")
    before = held(place)
    done = in_a_process(
        CALL,
        "run",
        "study.yaml",
        "--set",
        "task.data=pictures",
        HF_HOME=str(place.parent / "hf"),
        HF_HUB_OFFLINE="1",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: task.data: the train part of pictures has no column 'img', only image, label; "
        "name it by --set task.image_column=COLUMN\n"
    )
    assert held(place) == before


@pytest.mark.parametrize("change", ["task.model=mlpp", "space.model.choices=[mlp, mlpp]"])
def test_unknown_model_is_told_before_a_study_is_made(place, change):
    message = refused("run", "study.yaml", "--set", change)
    assert "task.model" in message
    assert "'mlpp' is unknown; give resnet20, mlp" in message
    assert not list(place.rglob("*.db"))
    assert not Path("runs/small/.run.lock").exists()


def test_model_that_cannot_take_the_pictures_is_told_before_a_study_is_made(place, monkeypatch):
    narrow = torch.nn.Linear(3, 10)
    monkeypatch.setattr(data_check, "build_model", lambda *_, **__: narrow)
    message = refused("run", "study.yaml")
    assert message.startswith("task.model: 'mlp' cannot take pictures of (1, 8, 8) (")
    assert message.endswith("give another model or another task.size")
    assert not list(place.rglob("*.db"))


def test_model_that_cannot_be_differentiated_twice_is_told_where_the_horizon_asks_for_it(place, monkeypatch):
    """At horizon 1 it can be trained and warmed."""
    hard = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Hardsigmoid())
    monkeypatch.setattr(data_check, "build_model", lambda *_, **__: hard)
    message = refused("run", "study.yaml", "--set", "warm_start.horizon=2")
    assert message.startswith("task.model: 'mlp' has a layer that cannot be differentiated twice (")
    assert message.endswith(
        "; set warm_start.horizon to 1 with the estimator lean, or the estimator finite-difference"
    )
    assert not list(place.rglob("*.db"))
    exact = "warm_start={horizon: 1, estimator: exact}"
    smoothed = "space.label_smoothing={low: 0.0, high: 0.3}"
    with pytest.raises(UserError, match="cannot be differentiated twice"):
        data_check.check_data(load_spec(place / "study.yaml", (exact, smoothed)))
    for settings in (
        ("warm_start.horizon=1", smoothed),
        ("warm_start={horizon: 2, estimator: finite-difference}",),
        ("warm_start={horizon: 2, estimator: direct}",),
        ("warm_start.horizon=2", "variations=[asha-baseline, asha-gaussian, asha-lr-grid]"),
    ):
        data_check.check_data(load_spec(place / "study.yaml", settings))


@pytest.mark.parametrize(
    ("name", "there", "part"),
    [
        ("cuda", 0, "is not available here; use auto or cpu"),
        ("cuda:2", 0, "is not available here; use auto or cpu"),
        ("cuda:2", 2, "is not among the 2 here; use cuda"),
        ("tpu", 2, "is unknown; use auto, cpu"),
        ("cuda:x", 2, "is unknown; use auto, cpu"),
    ],
)
def test_device_that_is_not_there_is_told(monkeypatch, name, there, part):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(UserError) as caught:
        device.check_device(name, "execution.device")
    assert str(caught.value).startswith(f"execution.device: {name!r} {part}")


@pytest.mark.parametrize(
    ("name", "there"), [("auto", 0), ("cpu", 0), ("cuda", 1), ("cuda:0", 1), ("cuda:1", 2)]
)
def test_device_that_is_there_is_taken(monkeypatch, name, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    device.check_device(name, "execution.device")


def test_bench_of_something_unknown_is_one_line():
    assert (
        refused("bench", "speed")
        == "bench: 'speed' is unknown; use one of warm-start, train, run, growth, decisions, workers"
    )


def test_bench_on_an_unknown_device_is_one_line():
    assert refused("bench", "--device", "tpu") == "--device: 'tpu' is unknown; use auto, cpu, cuda or cuda:N"


# storages


SECRET_URLS = [
    "postgresql+psycopg2://user:s3cret@127.0.0.1:1/db",
    "postgresql+nodriver://user:s3cret@127.0.0.1:1/db",
    "mysql+nodriver://user:s3%403cret@127.0.0.1:1/db?password=s3cret",
    "unknown://user:s3cret@127.0.0.1:1/db",
    "user:s3cret@127.0.0.1",
    "postgresql://user:s3cret@127.0.0.1:port/db",
]


@pytest.mark.parametrize("name", ["run", "status"])
@pytest.mark.parametrize("url", SECRET_URLS)
def test_storage_url_that_cannot_be_used_is_told_without_its_password(place, name, url):
    before = held(place)
    message = refused(name, "study.yaml", "--set", f"storage={url}")
    assert message.startswith("storage: ")
    assert "127.0.0.1" in message
    remedy = "pip install 'optuna-ohgw[postgresql]' and write postgresql+psycopg://..."
    assert message.endswith(remedy if "psycopg2" in url else "--storage URL")
    assert "3cret" not in message
    assert held(place) == before


@pytest.mark.parametrize("url", ["postgres://u@h/db", "study.db", "journal:///study.log"])
def test_what_is_no_storage_url_is_told_with_how_to_write_one(place, url):
    before = held(place)
    message = refused("run", "study.yaml", "--storage", url)
    assert message.endswith(
        "; name one like postgresql+psycopg://USER@HOST/NAME or sqlite:///FILE by --storage URL"
    )
    assert held(place) == before


@pytest.mark.parametrize("name", ["run", "status", "report", "doctor"])
def test_empty_storage_url_is_not_the_file_of_the_study(place, name):
    before = held(place)
    assert refused(name, "study.yaml", "--storage", "").startswith("--storage: is empty; give a URL")
    assert held(place) == before


@pytest.mark.parametrize(
    "change", ["storge=x://u:s3cret@h/d", "storage:x://u:s3cret@h/d", "storage={a: 'x://u:s3cret@h'}"]
)
def test_mistyped_storage_is_told_without_its_password(place, change):
    assert "s3cret" not in refused("run", "study.yaml", "--set", change)


def test_database_that_tells_its_url_over_several_lines_is_told_without_the_password(place, monkeypatch):
    def connect(url, **_):
        raise sqlalchemy.exc.OperationalError(f"cannot reach {url}\nat all", {}, Exception(f"{url}\nis off"))

    monkeypatch.setattr(opening, "RDBStorage", connect)
    message = refused("run", "study.yaml", "--set", "storage=postgresql://user:s3cret@127.0.0.1:1/db")
    assert "postgresql://user:***@127.0.0.1:1/db" in message
    assert "s3cret" not in message


def test_status_of_a_storage_without_the_study_shows_no_password(place, monkeypatch):
    """The storage is reached, but holds nothing: the message names its URL."""
    optuna.create_study(study_name="other", storage="sqlite:///other.db")
    other = optuna.storages.RDBStorage("sqlite:///other.db")
    monkeypatch.setattr(opening, "open_storage", lambda *_, **__: other)
    message = refused("status", "study.yaml", "--set", "storage=postgresql://user:s3cret@h/db")
    assert message.startswith("storage: postgresql://user:***@h/db holds no cell of 'small'; start it with ")


def test_unexpected_end_of_a_run_is_one_line_of_status_1(place, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("lost\nx://user:s3cret@h/db")

    monkeypatch.setattr(runner, "run", fail)
    done = command("run", "study.yaml")
    assert (done.status, done.out, done.err) == (1, "", "error: lost x://user:***@h/db\n")


def test_stop_by_hand_is_status_130_and_tells_how_to_go_on(place, monkeypatch):
    def stop(*_, **__):
        raise runner.Stopped

    monkeypatch.setattr(runner, "run", stop)
    done = command("run", "study.yaml")
    assert (done.status, done.out) == (130, "")
    assert done.err == "stopped; run the same command to continue\n"


@pytest.mark.parametrize("name", ["run", "status"])
def test_storage_of_another_optuna_schema_is_told_and_left(place, name):
    optuna.storages.RDBStorage("sqlite:///old.db")
    with contextlib.closing(sqlite3.connect("old.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
        database.commit()
    before = held(place), Path("old.db").read_bytes()
    message = refused(name, "study.yaml", "--set", "storage=sqlite:///old.db")
    assert message.startswith("storage: old.db cannot be used (")
    assert "optuna storage upgrade" in message
    assert (held(place), Path("old.db").read_bytes()) == before


@pytest.mark.parametrize("name", ["run", "status"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_study_of_the_same_name_that_is_not_ours_is_told_and_left(place, name, direction):
    study = optuna.create_study(study_name=CELL, storage="sqlite:///theirs.db", direction=direction)
    study.add_trial(optuna.trial.create_trial(value=0.0))
    before, files = snapshot("sqlite:///theirs.db"), held(place)
    message = refused(name, "study.yaml", "--set", "storage=sqlite:///theirs.db")
    assert message == (
        f"storage: study {CELL!r} exists but was not made by optuna-ohgw; "
        "name another by --set name=NAME or --set storage=URL"
    )
    assert snapshot("sqlite:///theirs.db") == before
    assert held(place) == files


def test_study_of_an_older_version_names_the_field_that_it_lacks(copy):
    storage = open_storage("sqlite:///runs/small/study.db", create=False)
    study = optuna.load_study(study_name=CELL, storage=storage)
    spec = study.user_attrs["spec"]
    del spec["task"]["label_noise"]
    study.set_user_attr("spec", spec)
    before = snapshot()
    message = refused("run", "study.yaml", *ONE)
    assert f"study {CELL!r} was made with task.label_noise = null, now 0.0; restore it" in message
    assert snapshot() == before


# a real run


def test_refused_calls_before_a_run_leave_nothing(finished):
    assert all(message.startswith("task.") for message in finished.refusals)
    assert finished.made == ["study.yaml"]


def test_run_of_a_finished_study_answers_at_once(copy):
    """Without torch, and without a report that would be the same; with one where it would not."""
    report = Path("runs/small/report/report.html")
    before = report.stat().st_mtime_ns
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {CALL}"
    done = in_a_process(code, "run", "study.yaml", *ONE)
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    assert first == "small is finished; nothing was left to do"
    assert last == "False"
    assert "  runs/small/report/report.html\n" in done.stdout
    assert report.stat().st_mtime_ns == before
    done = command("run", "study.yaml", *ONE, "--set", "targets=[0.3]")
    assert done.status == 0
    assert "small: medians over 1 paired seeds" in done.out
    assert report.stat().st_mtime_ns > before


def test_run_ends_with_its_table_and_the_way_on(finished):
    done = finished.done
    assert (done.status, done.err) == (0, "")
    assert "asha-baseline/seed-0000 done (1/1 cells)" in done.out
    assert "small: medians over 1 paired seeds" in done.out
    assert "optuna-ohgw status study.yaml --set 'variations=[asha-baseline]' --check-pairing\n" in done.out
    assert "optuna-ohgw dashboard study.yaml --set 'variations=[asha-baseline]'\n" in done.out
    assert "  runs/small/report/report.html\n" in done.out
    assert (finished.folder / "runs/small/report/report.html").exists()


def test_run_of_a_finished_study_says_so_and_changes_nothing(copy):
    before, files = snapshot(), held(copy)
    done = command("run", "study.yaml", *ONE)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("small is finished; nothing was left to do\n")
    assert "asha-baseline" in done.out
    assert snapshot() == before
    assert held(copy) == files


def test_quiet_run_of_a_finished_study_says_nothing(copy):
    done = command("run", "study.yaml", *ONE, "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")


def test_report_of_a_finished_study_writes_its_files_and_prints_them(copy):
    shutil.rmtree("runs/small/report")
    done = command("report", "study.yaml", *ONE)
    assert (done.status, done.err) == (0, "")
    assert "small: medians over 1 paired seeds" in done.out
    written = sorted(path.name for path in Path("runs/small/report").iterdir())
    assert written == ["report.html", "summary.json", "table.csv", "table.tex", "trials.parquet"]
    for name in written:
        assert f"runs/small/report/{name}\n" in done.out


@pytest.mark.parametrize("name", ["report", "dashboard"])
def test_report_and_dashboard_before_the_first_run_are_one_line_and_make_nothing(place, name):
    assert "does not exist; start the study with 'optuna-ohgw run' first" in refused(name, "study.yaml")
    assert held(place) == ["study.yaml"]


def test_dashboard_on_a_port_that_is_taken_is_one_line(copy):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("dashboard", "study.yaml", *ONE, "--port", str(port))
    assert line.startswith(f"--port: {port} on 127.0.0.1 cannot be used (")


def test_compare_shows_the_criteria_of_each_study(copy):
    Path("other.yaml").write_text(STUDY)
    done = command("compare", "study.yaml", "other.yaml")
    assert (done.status, done.err) == (0, "")
    assert "small" in done.out
    assert "asha-ohgw-1step: none of its 1 cells has begun." in done.out


def test_compare_of_one_study_is_one_line(place):
    assert refused("compare", "study.yaml") == "compare: got 1 study file; name two or more"


def test_status_counts_the_trials_of_each_cell(copy):
    before = snapshot()
    done = command("status", "study.yaml", *ONE)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[:3] == [
        "small: 1 cells: 1 done",
        "budget used 100.0%, ETA -",
        "trials: 1 complete",
    ]
    (row,) = [line.split() for line in done.out.splitlines() if "asha-baseline/seed-0000" in line]
    assert row[1:4] == ["done", "100%", "1"]
    assert all(0 <= float(value) <= 1 for value in row[4:6])
    assert snapshot() == before


def test_status_shows_the_cells_that_are_not_begun(copy):
    done = command("status", "study.yaml")
    (row,) = [line.split() for line in done.out.splitlines() if "asha-ohgw-1step/seed-0000" in line]
    assert row[1:] == ["waiting", "0%", "0", "-", "-"]


def test_status_as_json_is_one_object_and_imports_no_torch(copy):
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {CALL}"
    done = in_a_process(code, "status", "study.yaml", *ONE, "--json")
    told, heavy = done.stdout.splitlines()
    assert (done.returncode, done.stderr, heavy) == (0, "", "False")
    status = json.loads(told)
    assert status["counts"] == {"done": 1, "running": 0, "waiting": 0, "given up": 0}
    assert (status["study"], status["workers"], status["share"]) == ("small", [], 1.0)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_status_watches_until_the_study_is_done(copy, form):
    done = command("status", "study.yaml", *ONE, "--watch", *form)
    assert (done.status, done.err) == (0, "")
    assert done.out.count("small") == 1


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_status_as_json_holds_the_pairing_that_was_asked_for(copy, watch):
    done = command("status", "study.yaml", *ONE, "--json", "--check-pairing", *watch)
    assert (done.status, done.err) == (0, "")
    told = [json.loads(line) for line in done.out.splitlines()]
    assert len(told) == (2 if watch else 1)
    assert told[-1]["pairing"] == {
        "pairing": "paired",
        "trials": 1,
        "recomputed": 1,
        "faults": [],
        "intact": True,
    }


def test_status_before_the_first_run_is_one_line_and_makes_nothing(place):
    message = refused("status", "study.yaml")
    assert (
        message == "storage: runs/small/study.db does not exist; start the study with 'optuna-ohgw run' first"
    )
    assert held(place) == ["study.yaml"]


def test_status_of_another_study_in_the_same_storage_is_one_line(copy):
    message = refused(
        "status", "study.yaml", "--set", "name=other", "--set", "storage=sqlite:///runs/small/study.db"
    )
    assert message.startswith(
        "storage: sqlite:///runs/small/study.db holds no cell of 'other'; start it with "
    )


@pytest.mark.parametrize("name", ["run", "status"])
@pytest.mark.parametrize(
    ("change", "field", "before", "now"),
    [
        ("task.epochs=2", "task.epochs", "1", "2"),
        ("task.model=resnet20", "task.model", '"mlp"', '"resnet20"'),
        ("space.lr.high=0.5", "space.lr.high", "1.0", "0.5"),
        ("space.momentum=0.5", "space.momentum", "null", "0.5"),
        ("budget.trials=2", "budget.trials", "1", "2"),
        ("warm_start.every_rung=true", "warm_start.every_rung", "false", "true"),
    ],
)
def test_changed_study_is_refused_with_field_old_and_new_value(copy, name, change, field, before, now):
    kept, files = snapshot(), held(copy)
    message = refused(name, "study.yaml", *ONE, "--set", change)
    assert message == (
        f"storage: study {CELL!r} was made with {field} = {before}, now {now}; "
        "restore it, or use run --force-new-name for a new study"
    )
    assert snapshot() == kept
    assert held(copy) == files


def test_folder_of_a_study_of_another_name_is_refused_and_left(copy):
    weights = Path("runs/small/asha-baseline/seed-0000/best.safetensors")
    kept, files, before = snapshot(), held(copy), weights.read_bytes()
    message = refused("run", "study.yaml", *ONE, "--set", "name=other", "--set", "output=runs/small")
    assert message == "output: runs/small holds study 'small'; name another folder by --set output=FOLDER"
    assert (snapshot(), held(copy), weights.read_bytes()) == (kept, files, before)


@pytest.mark.parametrize("output", ["", "runs/small"])
def test_changed_study_may_go_on_as_a_new_one(copy, output):
    kept = snapshot()
    where = ("--set", f"output={output}") if output else ()
    changed = (*ONE, *where, "--set", "task.epochs=2", "--force-new-name")
    first, again = (command("run", "study.yaml", *changed) for _ in range(2))
    assert (first.status, first.err, again.status) == (0, "", 0)
    assert "small-2 is finished" in again.out  # it is found again
    assert "--set name=small-2" in again.out  # for the commands that look further
    assert snapshot() == kept
    (study,) = (n for n in snapshot("sqlite:///runs/small-2/study.db") if not n.endswith("/workers"))
    assert study == "small-2/asha-baseline/seed-0000"
    third = command("run", "study.yaml", *ONE, *where, "--set", "budget.trials=2", "--force-new-name", "-q")
    assert third.status == 0
    assert Path("runs/small-3/study.db").is_file()
    assert "small is finished" in command("run", "study.yaml", *ONE, *where, "--force-new-name").out
