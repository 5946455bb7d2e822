"""A validation error in one line: field, value and remedy in the words of a YAML file."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from optuna_ohgw.reading import shown
from optuna_ohgw.spec_kinds import TASKS
from optuna_ohgw.spec_parts import ChoiceSpec, RangeSpec

# pydantic's words, in those of a YAML file
_WANTED = {
    "a valid integer": "a whole number",
    "a valid integer, got a number with a fractional part": "a whole number",
    "a valid number": "a number",
    "a valid string": "text, in quotes if it looks like a number",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a mapping",
}


def explain(error: ValidationError, study: type[BaseModel]) -> str:
    """Return the first fault that is no unknown key, else the first unknown key; ``study`` knows the keys."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    tag = {"space": 2, "task": 1}.get(str(first["loc"][0])) if first["loc"] else None
    where = ".".join(" ".join(str(part).split()) for i, part in enumerate(first["loc"]) if i != tag)
    received = shown(first["input"])
    if first["type"] == "union_tag_invalid":
        known = [*(name for name in TASKS if name != "own"), "module:Class"]
        given = first["input"]
        if not isinstance(given, dict):
            return f"{where}: got {received}; give a mapping"
        name = given.get("name")
        return f"{where}.name: got {shown(name)}{nearest(str(name), known)}"
    if first["type"] == "extra_forbidden":
        known = _known_keys(study, first["loc"][:-1])
        return f"{where}: unknown key with value {received}{nearest(str(first['loc'][-1]), known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"{where}: is missing; add it"
    return f"{where}: got {received}; {remedy(message)}"


def remedy(message: str) -> str:
    """Return what to give, from a message of pydantic's on what should be."""
    subject, _, wanted = message.partition(" should ")
    wanted = wanted.removeprefix("be ")
    if subject in ("Tuple", "List"):
        return "give at least one"
    if subject == "String":
        return f"give text that {wanted.replace('match', 'matches', 1)}"
    number = "a number " if wanted.startswith(("greater", "less")) else ""
    return f"give {number}{_WANTED.get(wanted, wanted)}"


def _known_keys(study: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    model = study
    annotation: Any
    if len(location) == 3 and location[0] == "space":
        return list((RangeSpec if location[2] == "range" else ChoiceSpec).model_fields)
    if len(location) > 1 and location[0] == "task":
        model, location = TASKS[str(location[1])], location[2:]
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def nearest(name: str, known: Any) -> str:
    """Return a hint to the name that was meant, to be appended to a message."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else "; remove it"
