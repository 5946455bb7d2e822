"""Pictures for the image tasks: found, decoded once, cached, then split by seed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from optuna_ohgw.errors import UserError
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.tasks.sources import digits_parts, hub_layout_parts, one_line, parquet_files, stratified

if TYPE_CHECKING:
    from optuna_ohgw.tasks.sources import Files, Part

    Shape = tuple[int, ...] | None

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_CACHE_FORMAT = 1
CACHE = "OPTUNA_OHGW_CACHE"


@dataclass(frozen=True)
class ImageArrays:
    """Decoded pictures before the split: images ``[n, C, H, W]`` uint8, labels ``[n]`` int64.

    ``classes`` is that of the whole source; a label is at least 0 and below it.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: int


@dataclass(frozen=True)
class ImageData:
    """What a trial trains on: tensors on the device, images ``[n, C, H, W]`` uint8, labels int64.

    Images stay uint8 (0 to 255), a quarter of the memory of float32; the training loop scales
    one batch at a time. Only ``train_labels`` may carry label noise.
    """

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def channels(self) -> int:
        """Channels of a picture: 1 (gray) or 3 (RGB)."""
        return int(self.train_images.shape[1])

    @property
    def height(self) -> int:
        """Height of a picture in pixels."""
        return int(self.train_images.shape[2])

    @property
    def width(self) -> int:
        """Width of a picture in pixels."""
        return int(self.train_images.shape[3])


@contextmanager
def cache_writes(folder: Path) -> Iterator[None]:
    """Make a folder of a cache and write to it inside.

    Raises:
        UserError: If it cannot be made or written, with how to name another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"the cache {folder} cannot be written ({reason}); set {CACHE}=FOLDER") from error


def cache_folder() -> Path:
    """Return the folder of decoded pictures that all studies share.

    That of the environment variable ``OPTUNA_OHGW_CACHE``, else ``optuna-ohgw`` in the user's cache
    folder (``XDG_CACHE_HOME``, else ``~/.cache``).
    """
    if own := os.environ.get(CACHE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "optuna-ohgw"


def load_arrays(
    source: str,
    *,
    image_column: str = "img",
    label_column: str = "label",
    train_images: int | None = None,
    test_images: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    cache: Path | None = None,
) -> ImageArrays:
    """Return the decoded pictures of a source; the same on every call, whatever the study seed.

    Args:
        source: One of three kinds. ``"digits"``: the 1,797 gray 8x8 digits of scikit-learn (UCI,
            Alpaydin and Kaynak 1998), levels 0..16 scaled to 0..255, of which a fixed stratified
            20% is the test part. An existing folder: files ``train*.parquet`` and
            ``test*.parquet`` at any depth, in the layout of CIFAR-10 on the Hugging Face hub
            (Krizhevsky 2009). Anything else: a data set of the hub, by id.
        image_column: Column of the encoded pictures (folder and hub).
        label_column: Column of the integer labels, 0 to classes - 1 (folder and hub).
        train_images: How many training pictures to keep, drawn stratified by label with a fixed
            state, or all of them. Only these are decoded.
        test_images: The same for the test part.
        size: Height and width to resize to, in pixels: bilinear, with antialiasing when
            shrinking; a picture that is not square is stretched. None keeps the size.
        channels: 1 or 3. Gray becomes RGB by repetition, RGB becomes gray by the luma weights of
            ITU-R 601-2. None keeps what the first training picture has.
        cache: Folder to keep decoded arrays in, memory-mapped read-only on load; processes may
            share it. The key holds these arguments and the name, size and time of change of
            every file of a folder source. A hub source is not looked up again once cached:
            delete the folder to follow a new revision.

    Raises:
        UserError: If the source, a column or a number does not fit; without a network within
            seconds for a hub source.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"task.channels is {channels}; give 1 (gray) or 3 (RGB)")
    if size is not None and size < 1:
        raise UserError(f"task.size is {size}; give a positive number of pixels")
    files = {} if source == "digits" else parquet_files(source)
    limits = {"train": train_images, "test": test_images}

    def decode() -> ImageArrays:
        if source == "digits":
            parts, classes = digits_parts(limits)
        else:
            parts, classes = hub_layout_parts(source, files, image_column, label_column, limits)
        train = _stack("train", parts["train"], size, channels, None)
        test = _stack("test", parts["test"], size, train.shape[1], train.shape[1:])
        return ImageArrays(train, parts["train"][1], test, parts["test"][1], classes)

    if cache is None:
        return decode()
    arguments = [source, image_column, label_column, train_images, test_images, size, channels]
    folder = cache / f"arrays-{_fingerprint(arguments, files)}"
    if not folder.exists():
        # Decoded once, whoever waits.
        with cache_writes(cache), FileLock(cache / f".{folder.name}.lock"):
            if not folder.exists():
                _write(decode(), folder)
    return _read(folder)


def split(
    arrays: ImageArrays,
    *,
    validation_images: int,
    seed: int,
    label_noise: float = 0.0,
    device: torch.device | str,
) -> ImageData:
    """Return the data of a study: a validation part set apart by seed, labels perhaps noised.

    The validation part is stratified by label and disjoint from the training part; the test part
    is passed on as it is. Label noise is symmetric: exactly ``round(label_noise * n)`` of the
    ``n`` training labels each become another class, uniform over the ``classes - 1`` others.

    Args:
        arrays: What ``load_arrays`` returned.
        validation_images: Size of the validation part.
        seed: The study seed; the split and the noise use streams of their own.
        label_noise: Fraction of training labels to replace, 0 to 1.
        device: Where the tensors go.

    Raises:
        UserError: If a part would hold fewer pictures than classes, or a value is out of range.
    """
    if not 0.0 <= label_noise <= 1.0:
        raise UserError(f"task.label_noise is {label_noise}; give a fraction from 0 to 1")
    state = derive_seed(seed, Purpose.SPLIT) % 2**32
    field = "task.validation_images"
    validation, train = stratified(arrays.train_labels, validation_images, state, field)
    labels = arrays.train_labels[train]
    generator = np.random.default_rng(derive_seed(seed, Purpose.LABEL_NOISE))
    noised = generator.permutation(len(labels))[: round(label_noise * len(labels))]
    shift = generator.integers(1, arrays.classes, size=len(noised))
    labels[noised] = (labels[noised] + shift) % arrays.classes

    def tensor(array: NDArray[Any]) -> Tensor:
        # What an index chose is a copy already; a cached array is read-only, for which torch warns.
        return torch.from_numpy(array if array.flags.writeable else np.array(array)).to(device)

    return ImageData(
        train_images=tensor(arrays.train_images[train]),
        train_labels=tensor(labels),
        validation_images=tensor(arrays.train_images[validation]),
        validation_labels=tensor(arrays.train_labels[validation]),
        test_images=tensor(arrays.test_images),
        test_labels=tensor(arrays.test_labels),
        classes=arrays.classes,
    )


def _stack(name: str, part: Part, size: int | None, channels: int | None, shape: Shape) -> NDArray[np.uint8]:
    """Return ``[n, C, H, W]`` uint8 of pictures, all of the given shape or of the first's."""
    from PIL import Image

    arrays: list[NDArray[np.uint8]] = []
    pictures, _, rows = part
    try:
        for picture in pictures:
            channels = channels or (1 if picture.mode in ("1", "L", "LA") else 3)
            pixels = picture.convert("L" if channels == 1 else "RGB")
            if size is not None and pixels.size != (size, size):
                pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
            array = np.asarray(pixels, dtype=np.uint8)
            arrays.append(array[None] if channels == 1 else array.transpose(2, 0, 1))
            shape = shape or arrays[0].shape
            if arrays[-1].shape != shape:
                raise UserError(
                    f"task.data: row {rows[len(arrays) - 1] + 1} of the {name} part is "
                    f"{arrays[-1].shape} but the first is {shape}; give all one size by "
                    "--set task.size=PIXELS"
                )
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:  # all are Pillow's
        raise UserError(
            f"task.data: row {rows[len(arrays)] + 1} of the {name} part cannot be decoded "
            f"({one_line(error)}); repair it, or name another --set task.image_column=COLUMN"
        ) from error
    return np.stack(arrays)


def _fingerprint(arguments: list[Any], files: Files) -> str:
    """Return a key for the arguments and for the name, size and time of change of each file."""
    stats = [
        (part, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for part, paths in sorted(files.items())
        for path in paths
    ]
    text = json.dumps([_CACHE_FORMAT, arguments, stats])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _write(arrays: ImageArrays, folder: Path) -> None:
    """Write a cache entry as a whole: a reader sees all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as scratch:
        entry = Path(scratch) / folder.name
        entry.mkdir()
        for name in (*_ARRAYS, "classes"):
            np.save(entry / f"{name}.npy", getattr(arrays, name), allow_pickle=False)
        try:
            os.replace(entry, folder)
        except OSError:  # another process was first, and wrote the same
            if not folder.is_dir():
                raise


def _read(folder: Path) -> ImageArrays:
    """Return a cache entry, memory-mapped."""
    try:
        train_images, train_labels, test_images, test_labels = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
        )
        classes = int(np.load(folder / "classes.npy", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"task.cache: entry {folder} cannot be read ({one_line(error)}); delete that folder"
        ) from error
    return ImageArrays(train_images, train_labels, test_images, test_labels, classes)
