"""Text for language models: files or a data set of the hub, as tokens of a byte-level BPE."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.data import cache_folder, cache_writes
from optuna_ohgw.tasks.sources import load_hub, one_line

PARTS = ("train", "validation", "test")
_MODULES = {
    "train": ("argparse", "inspect", "typing", "tarfile"),
    "validation": ("difflib", "textwrap"),
    "test": ("pathlib", "shutil"),
}


def load_text(data: str, files: dict[str, str], column: str, limits: dict[str, int | None]) -> dict[str, str]:
    """Return the text of each part.

    Args:
        data: A folder of text files, ``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION`` on the hub, or
            ``python``: the sources of a few modules of Python's standard library.
        files: Names of the files of a folder, by part. If validation and test are one file, the first
            half is validation.
        column: Column of the text on the hub.
        limits: Characters of each part that are kept, from its start.

    Raises:
        UserError: In one line, with the file.
    """
    folder = Path(data).expanduser()
    if data == "python":
        texts = {part: "".join(map(_source_of, modules)) for part, modules in _MODULES.items()}
    elif folder.is_dir():
        texts = {part: _read(folder / files[part]) for part in PARTS}
        if files["validation"] == files["test"]:
            whole = texts["test"]
            middle = whole.rfind("\n", 0, len(whole) // 2 + 1) + 1 or len(whole) // 2
            texts |= {"validation": whole[:middle], "test": whole[middle:]}
    elif data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise UserError(
            f"task.data: folder {data!r} does not exist; give an existing folder of text files, or a data "
            "set of the hub as OWNER/NAME:CONFIGURATION"
        )
    else:
        texts = _from_hub(data, column)
    texts = {part: text[: limits.get(part)] for part, text in texts.items()}
    for part, text in texts.items():
        if not text.strip():
            raise UserError(f"task.data: the {part} part of {data} is empty; give another or a higher limit")
    return texts


def tokens_of(texts: dict[str, str], vocabulary: int) -> tuple[dict[str, Tensor], int]:
    """Return the tokens of each part (int64), and the size of the vocabulary.

    The BPE is trained on the training part and kept in the cache; every byte is a token, so nothing is
    unknown.

    Args:
        texts: Text by part.
        vocabulary: Most tokens that there may be, from 257.
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    digest = hashlib.sha256(texts["train"].encode() + f"|{vocabulary}".encode()).hexdigest()[:16]
    path = cache_folder() / f"bpe-{digest}.json"
    if path.is_file():
        try:
            known: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no class of its own
            raise UserError(
                f"task.vocabulary: {path} cannot be read ({one_line(error)}); delete it"
            ) from error
    else:
        known = ByteLevelBPETokenizer()
        known.train_from_iterator(
            texts["train"].splitlines(keepends=True),
            vocab_size=vocabulary,
            min_frequency=2,
            show_progress=False,
        )
        # A folder of its own: others may write the same now.
        with cache_writes(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            known.save(str(partial := Path(scratch) / path.name))
            partial.replace(path)
    encoded = {part: torch.tensor(known.encode(text).ids, dtype=torch.int64) for part, text in texts.items()}
    return encoded, int(known.get_vocab_size())


def _source_of(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _read(path: Path) -> str:
    if not path.is_file():
        beside = ", ".join(sorted(p.name for p in path.parent.glob("*.txt"))[:8]) or "no .txt file"
        raise UserError(
            f"task.data: {path.parent} has no file {path.name}, only {beside}; name it by "
            "--set task.train_file=FILE, task.validation_file or task.test_file"
        )
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"task.data: {path}, line {line} is not UTF-8; convert the file") from error


def _from_hub(data: str, column: str) -> dict[str, str]:
    name, _, configuration = data.partition(":")
    loaded = load_hub(name, configuration or None)
    texts = {}
    for part in PARTS:
        if part not in loaded:
            raise UserError(f"task.data: {data} has the parts {', '.join(map(str, loaded))} but no {part}")
        if column not in loaded[part].column_names:
            columns = ", ".join(loaded[part].column_names)
            raise UserError(
                f"task.data: the {part} part of {data} has no column {column!r}, only {columns}; name it by "
                "--set task.text_column=COLUMN"
            )
        rows = loaded[part][:][column]
        if (wrong := next((i for i, row in enumerate(rows) if not isinstance(row, str)), None)) is not None:
            raise UserError(
                f"task.data: the {part} part of {data}, row {wrong + 1}: column {column!r} has "
                f"{rows[wrong]!r}, no text; name another by --set task.text_column=COLUMN"
            )
        texts[part] = "".join(rows)
    return texts
