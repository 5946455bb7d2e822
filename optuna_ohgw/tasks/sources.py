"""Where pictures come from: scikit-learn's digits, a folder of parquet files, or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optuna_ohgw.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    # Pictures, labels, and the row of each in its source.
    Part = tuple[Iterable[Picture], NDArray[np.int64], NDArray[np.int64]]
    Files = dict[str, list[Path]]
    Limits = dict[str, int | None]

FIXED_STATE = 0  # of the parts that no study seed may change
_DIGITS_TEST_FRACTION = 0.2
_HUB_TIMEOUT_S = 5.0


def stratified(
    labels: NDArray[np.int64], count: int, state: int, field: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sorted positions of a stratified draw of ``count`` labels, and of the others."""
    from sklearn.model_selection import train_test_split

    present, members = np.unique(labels, return_counts=True)
    if not len(present) <= count <= len(labels) - len(present) or members.min() < 2:
        raise UserError(
            f"{field} is {count}, but the draw is by class from {len(labels)} pictures of "
            f"{len(present)} classes, the rarest with {members.min()}; give a number from "
            f"{len(present)} to {len(labels) - len(present)}, at least 2 pictures a class"
        )
    drawn, others = train_test_split(
        np.arange(len(labels)), train_size=count, stratify=labels, random_state=state
    )
    return np.sort(drawn), np.sort(others)


def kept(labels: NDArray[np.int64], limit: int | None, part: str) -> NDArray[np.int64]:
    """Return the positions of the pictures that a limit keeps."""
    if limit is None or limit == len(labels):
        return np.arange(len(labels))
    return stratified(labels, limit, FIXED_STATE, f"task.{part}_images")[0]


def digits_parts(limits: Limits) -> tuple[dict[str, Part], int]:
    """Return the parts of scikit-learn's digits and their number of classes."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    count = round(_DIGITS_TEST_FRACTION * len(labels))
    test, train = stratified(labels, count, FIXED_STATE, "the test part of digits")
    parts: dict[str, Part] = {}
    for part, positions in (("train", train), ("test", test)):
        rows = positions[kept(labels[positions], limits[part], part)]
        parts[part] = [Image.fromarray(image) for image in images[rows]], labels[rows], rows
    return parts, len(digits.target_names)


def parquet_files(source: str) -> Files:
    """Return the parquet files of a folder by part; none if the source is an id of the hub."""
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        if not source or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(
                f"task.data: folder {source!r} does not exist; give an existing folder, a data "
                "set of the hub as OWNER/NAME, or digits"
            )
        return {}
    files = {part: sorted(folder.rglob(f"{part}*.parquet")) for part in ("train", "test")}
    for part, paths in files.items():
        if not paths:
            raise UserError(
                f"task.data: folder {source} holds no file {part}*.parquet; give a folder with "
                "train*.parquet and test*.parquet in the layout of CIFAR-10 on the hub"
            )
        parents = sorted({str(path.parent) for path in paths})
        if len(parents) > 1:
            raise UserError(
                f"task.data: folder {source} holds {part}*.parquet in several folders "
                f"({', '.join(parents)}); give one of them"
            )
    return files


def hub_layout_parts(
    source: str, files: Files, image_column: str, label_column: str, limits: Limits
) -> tuple[dict[str, Part], int]:
    """Return the parts of a folder or of a data set of the hub, and the number of classes."""
    loaded = _load_folder(source, files) if files else load_hub(source)
    parts: dict[str, Part] = {}
    highest = 0
    for part in ("train", "test"):
        if part not in loaded:
            raise UserError(
                f"task.data: {source} has the parts {', '.join(map(str, loaded))} but no {part}; "
                "give a folder with train*.parquet and test*.parquet by --set task.data=FOLDER"
            )
        rows = loaded[part]
        for field, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in rows.column_names:
                raise UserError(
                    f"task.data: the {part} part of {source} has no column {column!r}, only "
                    f"{', '.join(rows.column_names)}; name it by --set task.{field}=COLUMN"
                )
        labels = np.array([])
        if "int" in str(getattr(rows.features[label_column], "dtype", "")):
            labels = np.array(rows.select_columns(label_column)[:][label_column])
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UserError(
                f"task.data: column {label_column!r} of the {part} part of {source} must hold "
                "integers from 0; name another by --set task.label_column=COLUMN"
            )
        if part == "train" and len(np.unique(labels)) < 2:
            raise UserError(
                f"task.data: column {label_column!r} of the train part of {source} has one class only, "
                f"{labels[0]}; give pictures of two or more"
            )
        highest = max(highest, int(labels.max()))
        chosen = kept(labels, limits[part], part)
        pictures = _pictures(rows.select(chosen), image_column)
        parts[part] = pictures, labels[chosen].astype(np.int64), chosen
    return parts, highest + 1


def _pictures(rows: Any, column: str) -> Iterator[Picture]:
    """Yield the decoded pictures of a column, one at a time."""
    import datasets

    for row in rows.select_columns(column).cast_column(column, datasets.Image()):
        yield row[column]


def _load_folder(source: str, files: Files) -> Any:
    """Return the ``datasets.DatasetDict`` of parquet files."""
    import glob

    import datasets

    # datasets reads a path as a pattern
    patterns = {part: [glob.escape(str(path)) for path in paths] for part, paths in files.items()}
    try:
        return datasets.load_dataset("parquet", data_files=patterns)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"task.data: the parquet files of {source} cannot be read ({one_line(cause)}); "
            "give intact files whose parts have the same columns"
        ) from error


def load_hub(source: str, configuration: str | None = None) -> Any:
    """Return the ``datasets.DatasetDict`` of a data set of the hub.

    Asks the hub once first: ``load_dataset`` retries for half a minute where there is no
    network. ``HF_HUB_OFFLINE`` skips the question: only the local cache is read.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        if not datasets.config.HF_HUB_OFFLINE:
            HfApi().dataset_info(source, timeout=_HUB_TIMEOUT_S)
        named = () if configuration is None else (configuration,)
        return datasets.load_dataset(source, *named)
    except Exception as error:  # the HTTP library, and so its errors, differ by version
        raise UserError(
            f"task.data: {source!r} is no folder, and loading it from the hub failed "
            f"({one_line(error)}); give a folder in the same layout by --set task.data=FOLDER, "
            "or set HF_HUB_OFFLINE=1 if it was downloaded before"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
