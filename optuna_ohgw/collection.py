"""Several studies in one file: the same changes laid over each, one after the other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna_ohgw.errors import UserError
from optuna_ohgw.reading import hide_passwords, read_file, read_override, shown

if TYPE_CHECKING:
    from optuna_ohgw.spec import StudySpec

COMMANDS = ("run", "status", "report", "doctor")
_KEYS = ("name", "studies", "set", "smoke")
_MARK = re.compile(r"^studies\s*:", re.MULTILINE)
# The arguments come by a pipe: ps shows those of a command, and a storage's URL may hold a password.
_CALL = "import json, sys; sys.argv[1:] = json.load(sys.stdin); from optuna_ohgw.cli import main; main()"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPED = [128 + number for number in _SIGNALS]


@dataclass(frozen=True)
class Member:
    """A study of a collection: its file, what is laid over it, and what comes of it."""

    path: Path
    overrides: tuple[str, ...]
    spec: StudySpec


def position_of(arguments: Sequence[str]) -> int | None:
    """Return where among a command's arguments a collection is named; None if none is."""
    if not arguments or arguments[0] not in COMMANDS:
        return None
    for i, argument in enumerate(arguments[1:], start=1):
        if Path(argument).suffix in (".yaml", ".yml") and _names_studies(Path(argument)):
            return i
    return None


def _names_studies(path: Path) -> bool:
    try:
        return path.is_file() and _MARK.search(path.read_text(errors="replace")) is not None
    except OSError:
        return False  # what reads it says so


def read_members(path: Path, given: Sequence[str], *, smoke: bool) -> list[Member]:
    """Return the studies of a collection, each read and found valid.

    Args:
        path: A file with ``name``, ``studies`` (files beside it), ``set`` (``dotted.key=value`` pairs) and
            ``smoke`` (further pairs, for the light forms alone).
        given: Further pairs, of the command line; an ``output`` is a folder for all of them.
        smoke: Whether their light forms are meant.

    Raises:
        UserError: In one line, if a key is unknown or a study is missing, named twice or refused.
    """
    from optuna_ohgw.spec import load_spec
    from optuna_ohgw.spec_errors import nearest

    data = read_file(path)
    for key, value in data.items():
        if key not in _KEYS:
            raise UserError(f"{path}: {key}: unknown key with value {shown(value)}{nearest(key, _KEYS)}")
    files, shared = _texts(path, data, "studies"), _texts(path, data, "set", needed=False)
    light = _texts(path, data, "smoke", needed=False)
    output, pairs = None, list[str]()
    for pair in (*shared, *(light if smoke else ()), *given):
        own = read_override(pair)
        if set(own) == {"output"}:
            output = str(own["output"])
        else:
            pairs.append(pair)
    members = list[Member]()
    for file in files:
        member = path.parent / file
        if _names_studies(member):
            raise UserError(f"{path}: studies: {file} names studies itself; name those")
        overrides = tuple(pairs)
        if output is not None:
            name = load_spec(member, overrides, smoke=smoke).name
            overrides = (*pairs, f"output={Path(output) / name}")
        members.append(Member(member, overrides, load_spec(member, overrides, smoke=smoke)))
    names = [member.spec.name for member in members]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: studies: {', '.join(names)} has one twice; name each once")
    return members


def call(arguments: list[str], compare: Callable[[list[Member], bool, str | None, bool], None]) -> int | None:
    """Call a command for each study where a collection is given; return the exit status, None without one.

    Args:
        arguments: Of the command line.
        compare: Called after a ``run`` in which nothing failed, with the members, whether their light
            forms are meant, the storage's URL and whether to be quiet.
    """
    position = position_of(arguments)
    if position is None or "--help" in arguments:
        return None
    path, smoke = Path(arguments[position]), "--smoke" in arguments
    if "--force-new-name" in arguments:
        raise UserError(f"--force-new-name: {path} names several studies; run the one that was changed alone")
    members = read_members(path, values_of(arguments, "--set"), smoke=smoke)
    status = call_each(members, arguments, position)
    if status == 0 and arguments[0] == "run" and len(members) > 1:
        given = values_of(arguments, "--storage")
        url = given[-1] if given else os.environ.get("OPTUNA_OHGW_STORAGE")
        compare(members, smoke, url, bool({"--quiet", "-q"} & set(arguments)))
    return status


def call_each(members: Sequence[Member], arguments: Sequence[str], position: int) -> int:
    """Call the command for every member, go on if one fails, and return the first exit status that is not 0.

    Ctrl-C and SIGTERM end the present one, as they end a run, and begin no other; the status tells of them.
    """
    status, failed = 0, list[str]()
    for member in members:
        others = [argument for i, argument in enumerate(arguments) if i not in (0, position)]
        own = [arguments[0], str(member.path), *_without_sets(others)]
        for pair in member.overrides:
            own += ["--set", pair]
        if "--json" not in own and "--quiet" not in own and "-q" not in own:
            sys.stdout.write(f"\n$ optuna-ohgw {hide_passwords(shlex.join(own))}\n")
            sys.stdout.flush()
        done = _called(own)
        if done in _STOPPED:
            return done
        status = status or done
        failed += [member.spec.name] if done else []
    if failed and arguments[0] == "run" and len(members) > 1:
        what = f"{', '.join(failed)} did not end well ({len(failed)} of {len(members)} studies)"
        sys.stderr.write(f"not compared: {what}; mend it and run the same command again\n")
    return status


def _called(arguments: Sequence[str]) -> int:
    came = list[int]()
    child: subprocess.Popen[bytes] | None = None

    def hear(number: int, _: Any) -> None:
        came.append(number)
        if child is not None and number == signal.SIGTERM:  # Ctrl-C the terminal sends to both
            child.send_signal(number)

    before = {number: signal.signal(number, hear) for number in _SIGNALS}
    try:
        named = arguments[:2]  # command and study, for whoever looks
        child = subprocess.Popen([sys.executable, "-c", _CALL, *named], stdin=subprocess.PIPE)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(json.dumps(arguments).encode())
        if came:  # before it was there to hear
            child.send_signal(came[0])
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        return 128 + came[0]
    return 128 - status if status < 0 else status


def values_of(arguments: Sequence[str], option: str) -> list[str]:
    """Return what an option that takes a value was given, each time that it was."""
    return [value for value, _ in _pairs(arguments, option) if value is not None]


def _without_sets(arguments: Sequence[str]) -> list[str]:
    return [
        argument for value, argument in _pairs(arguments, "--set") if value is None and argument != "--set"
    ]


def _pairs(arguments: Sequence[str], option: str) -> list[tuple[str | None, str]]:
    """Return (what the option was given here or None, argument) for each argument."""
    found, after = list[tuple[str | None, str]](), False
    for argument in arguments:
        joined = argument.startswith(f"{option}=")
        value = argument if after else argument.removeprefix(f"{option}=") if joined else None
        found.append((value, argument))
        after = argument == option and not after
    return found


def _texts(path: Path, data: dict[str, Any], key: str, *, needed: bool = True) -> list[str]:
    found = data.get(key, [])
    if not isinstance(found, list) or not all(isinstance(f, str) for f in found) or (needed and not found):
        what = "a list of study files" if needed else "a list of 'dotted.key=value'"
        raise UserError(f"{path}: {key}: got {shown(found)}; give {what}")
    return found
