"""A file that names several studies: each is called with the same changes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optuna_ohgw import cli, collection
from optuna_ohgw.errors import UserError

STUDIES = Path(__file__).parents[1] / "studies"
TRANSFER = STUDIES / "transfer.yaml"


def test_transfer_runs_one_step_size_on_five_tasks() -> None:
    members = collection.read_members(TRANSFER, [], smoke=False)
    assert [m.spec.task.name for m in members] == ["image", "tabular", "xgboost", "ppo", "language"]
    assert {m.spec.warm_start.eta_h for m in members} == {1e-3}
    assert {m.spec.variations for m in members} == {members[0].spec.variations}
    assert {m.spec.seeds for m in members} == {tuple(range(8))}
    assert len({m.spec.folder for m in members}) == 5


@pytest.mark.parametrize("smoke", [False, True])
def test_an_output_is_a_folder_for_all(smoke: bool) -> None:
    members = collection.read_members(TRANSFER, ["output=here", "seeds=2"], smoke=smoke)
    assert [m.spec.folder for m in members] == [Path("here") / m.spec.name for m in members]
    assert {m.spec.seeds for m in members} == {(0, 1)}


def test_the_light_form_is_one_seed_and_a_pilot_on_each_task() -> None:
    members = collection.read_members(TRANSFER, [], smoke=True)
    assert {(m.spec.seeds, m.spec.pilot_seeds) for m in members} == {((0,), (1000,))}
    assert {m.spec.warm_start.eta_h for m in members} == {1e-3}


@pytest.mark.parametrize(
    ("arguments", "position"),
    [
        (["run", str(TRANSFER), "--smoke"], 1),
        (["status", "--set", "seeds=1", str(TRANSFER)], 3),
        (["run", str(STUDIES / "digits.yaml")], None),
        (["compare", str(TRANSFER)], None),
        (["run", "nowhere.yaml"], None),
        ([], None),
    ],
)
def test_which_argument_is_a_collection(arguments: list[str], position: int | None) -> None:
    assert collection.position_of(arguments) == position


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("studies: []\n", "studies: got .*give a list of study files"),
        ("studies: digits.yaml\n", "studies: got .*give a list of study files"),
        ("studies: [nowhere.yaml]\n", "nowhere.yaml: there is no such file"),
        ("studies: [one.yaml, one.yaml]\n", "one, one has one twice"),
        ("studies: [one.yaml]\nseeds: 3\n", "seeds: unknown key with value 3"),
        ("studies: [one.yaml]\nset: seeds=3\n", "set: got .*give a list of 'dotted.key=value'"),
        ("studies: [one.yaml]\nset: [nothing]\n", "nothing"),
        ("studies: [one.yaml]\nset: [seeds=none]\n", "seeds: got"),
        ("studies: [other.yaml]\n", "other.yaml names studies itself"),
    ],
)
def test_bad_collections_are_refused_in_a_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "one.yaml").write_text(f"extends: {STUDIES / 'digits.yaml'}\nname: one\nbeside: []\n")
    (tmp_path / "other.yaml").write_text("studies: [one.yaml]\n")
    (tmp_path / "all.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        collection.read_members(tmp_path / "all.yaml", [], smoke=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("statuses", "status", "called"),
    [
        ([0] * 5, 0, 5),
        ([0, 1, 0, 2, 0], 1, 5),
        ([0, 137, 0, 0, 0], 137, 5),  # killed for memory
        ([0, 130, 0, 0, 0], 130, 2),
        ([2, 143, 0, 0, 0], 143, 2),
    ],
)
def test_one_that_fails_does_not_stop_the_others_but_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    statuses: list[int],
    status: int,
    called: int,
) -> None:
    calls: list[list[str]] = []

    def call(arguments: list[str]) -> int:
        calls.append(list(arguments))
        return statuses[len(calls) - 1]

    monkeypatch.setattr(collection, "_called", call)
    compared = []
    monkeypatch.setattr("optuna_ohgw.show.print_comparison", lambda found, console: compared.append(found))
    monkeypatch.setattr(cli, "_evidence", lambda path, overrides, smoke, url: path.name)
    monkeypatch.setattr(
        sys, "argv", ["optuna-ohgw", "run", "--set", "seeds=3", str(TRANSFER), "--smoke", "-q"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert len(calls) == called
    names = [Path(call[1]).name for call in calls]
    assert names == ["digits.yaml", "uci.yaml", "xgboost.yaml", "cartpole.yaml", "wikitext2.yaml"][:called]
    for call in calls:
        assert call[2:4] == ["--smoke", "-q"]
        assert "seeds=3" in call
        assert call.index("seeds=3") > call.index("seeds=8")  # what was typed last wins
    assert len(compared) == (status == 0)
    told = capsys.readouterr().err
    failed = [f"{Path(name).stem}-smoke" for name, s in zip(names, statuses, strict=False) if s]
    lines = [] if status in (0, 130, 143) else [f"not compared: {', '.join(failed)} did not end well"]
    assert [line.partition(" (")[0] for line in told.splitlines()] == lines


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getppid(), signal.SIGINT)", 130),  # it ends as if nothing were
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 143),  # told
    ],
)
def test_status_of_a_call_tells_what_ended_it(
    monkeypatch: pytest.MonkeyPatch, code: str, status: int
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(collection, "_CALL", code)
    assert collection._called([]) == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_no_password_is_in_the_command_of_a_call_or_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen"
    code = "import json, psutil, sys; own = json.load(sys.stdin); "
    code += f"open({str(seen)!r}, 'a').write(json.dumps([own, psutil.Process().cmdline()]) + chr(10))"
    monkeypatch.setattr(collection, "_CALL", code)
    url = "postgresql+psycopg://u:not-to-be-shown@h/d"
    (tmp_path / "two.yaml").write_text(f"studies: [{STUDIES / 'digits.yaml'}, {STUDIES / 'uci.yaml'}]\n")
    for given in (["--storage", url], [f"--storage={url}"], ["--set", f"storage={url}"]):
        arguments = ["status", str(tmp_path / "two.yaml"), *given]
        assert collection.call(arguments, lambda *_: None) == 0
    calls = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(calls) == 6
    assert all(any(url in word for word in own) for own, _ in calls)
    assert not any("not-to-be-shown" in word for _, command in calls for word in command)
    told = capfd.readouterr()
    assert "not-to-be-shown" not in told.out + told.err
    assert told.out.count("postgresql+psycopg://u:***@h/d") == 6


def test_a_new_name_is_for_one_study() -> None:
    with pytest.raises(UserError, match=r"^--force-new-name: .*yaml names several studies; run the one"):
        collection.call(["run", str(TRANSFER), "--force-new-name"], lambda *_: None)


def test_ctrl_c_between_studies_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collection, "read_members", interrupted)
    monkeypatch.setattr(sys, "argv", ["optuna-ohgw", "run", str(TRANSFER)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_a_bad_collection_is_status_2_a_line_and_nothing_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("all.yaml").write_text(f"studies: [{STUDIES / 'digits.yaml'}, nowhere.yaml]\n")
    monkeypatch.setattr(sys, "argv", ["optuna-ohgw", "run", "all.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["all.yaml"]


@pytest.mark.parametrize("name", ["compare", "dashboard", "replay"])
def test_commands_on_one_study_say_which_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    others = [str(STUDIES / "uci.yaml")] if name == "compare" else []
    monkeypatch.setattr(sys, "argv", ["optuna-ohgw", name, str(TRANSFER), *others])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert 'transfer.yaml: names several studies; give one of them, ["digits.yaml"' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_collection_runs_and_shows_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from optuna_ohgw.cli import main; main()"]
    more = ["--smoke", "--set", f"output={tmp_path}", "--set", "variations=[baseline, ohgw-1step]"]
    more += ["--set", "pilot_seeds=[]", "--set", "seeds=1"]
    (tmp_path / "two.yaml").write_text(
        f"name: two\nstudies: [{STUDIES / 'uci.yaml'}, {STUDIES / 'xgboost.yaml'}]\n"
    )
    done = subprocess.run(
        [*command, "run", str(tmp_path / "two.yaml"), *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "At least 15% sooner (asked in 75% of the studies):" in done.stdout
    for name in ("uci-smoke", "xgboost-smoke"):
        assert (tmp_path / name / "report" / "report.html").is_file()
    shown = subprocess.run(
        [*command, "status", str(tmp_path / "two.yaml"), *more, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(shown.stdout.splitlines()) == 2
