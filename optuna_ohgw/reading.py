"""YAML files and ``--set`` pairs to one plain mapping; what it means is not known here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna_ohgw.errors import UserError


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping of a YAML file, laid over the file that it names under ``extends``.

    Raises:
        UserError: If a file is missing, is no mapping of plain YAML or extends itself.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode) or not node.value:
            kind = {"sequence": "a list", "scalar": "a single value"}.get(getattr(node, "id", ""), "empty")
            raise UserError(
                f"{path}: is {kind}, not a mapping; write 'key: value' lines, starting with 'name:'"
            )
        data: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(text), resolve=False)  # type: ignore[assignment]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give the path of a study's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); give a readable YAML file") from None
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path}: {_first_line(error)}; plain YAML only, without tags or repeated keys"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML ({_first_line(error)}); mend the syntax") from None
    base = data.pop("extends", None)
    if base is None:
        return data
    seen = (*seen, path.resolve())
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f"{path}: extends: {shown(base)} is no file; name a YAML file, relative to this one")
    if (path.parent / base).resolve() in seen:
        raise UserError(f"{path}: extends: {shown(base)} leads back to itself; name another YAML file")
    return merge(read_file(path.parent / base, seen), data)


def read_override(pair: str) -> dict[str, Any]:
    """Return the nested mapping that ``dotted.key=value`` stands for; the value is YAML.

    Raises:
        UserError: If it is no such pair.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, _ = pair.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        problem = "a part of the key is empty" if equals else "no '=' in it"
        raise UserError(f"--set {shown(pair)}: {problem}; write --set key.of.field=value")
    try:
        change = OmegaConf.from_dotlist([pair])
        return OmegaConf.to_container(change, resolve=False)  # type: ignore[return-value]
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"--set {shown(pair)}: the value is no plain YAML ({_first_line(error)}); put it in quotes"
        ) from None


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return the base with the change laid over it: mappings merge, all else is replaced.

    A task of another name is replaced whole.
    """
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        if both and key == "task" and value.get("name", "image") != base[key].get("name", "image"):
            both = "name" not in value
        merged[key] = merge(base[key], value) if both else value
    return merged


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of all that is no mapping and no list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def shown(value: Any) -> str:
    """Return a value as YAML would have it, in one line and not endless."""
    text = hide_passwords(json.dumps(value, ensure_ascii=False, default=repr))
    return text if len(text) <= 120 else f"{text[:117]}..."


def hide_passwords(text: str) -> str:
    """Return a text with *** for every password in a URL."""
    text = re.sub(r"(://[^:/\s]*):\S*@", r"\1:***@", text)
    # A value ends before the punctuation of the text around it.
    value = r"""'[^']*'|"[^"]*"|[^&\s]*?(?=['")\]},;.]*(?:[&\s]|$))"""
    return re.sub(rf"(?i)(passw(?:or)?d=)(?:{value})", r"\1***", text)


def _first_line(error: Exception) -> str:
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if problem:
        return f"{problem}, line {mark.line + 1}" if mark else str(problem)
    key = getattr(error, "full_key", None)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{key}: {lines[0]}" if key else lines[0]
