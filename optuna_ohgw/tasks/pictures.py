"""Pictures that do not fit in memory: a folder in the layout of ImageNet, decoded by threads."""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor, nn

from optuna_ohgw.errors import UserError
from optuna_ohgw.metric import ACCURACY
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.tasks.data import cache_folder, cache_writes
from optuna_ohgw.tasks.models import build_model
from optuna_ohgw.tasks.network import Batches, NetworkTask
from optuna_ohgw.tasks.sources import kept, load_hub, stratified

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MARGIN = 256 / 224
_WARM = 256
_AHEAD = 2  # mini-batches
_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


class Pictures(NetworkTask):
    """Classification of pictures on disk; see ``NetworkTask`` and, for the options, ``PicturesSpec``.

    Training crops and flips at random, evaluation crops the middle, as ImageNet is trained in
    torchvision's references. A picture's crop depends on the seed of the epoch and its own number alone,
    whoever decodes it.
    """

    metric = ACCURACY
    hyperparameters = {"lr": (0.0, 1.0)}  # noqa: RUF012 - a study's are those of PicturesSpec

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        epochs: int,
        data: str,
        model: str,
        validation_images: int,
        size: int = 224,
        batch_size: int = 128,
        batches: int | None = None,
        test_images: int | None = None,
        decoders: int = 4,
        image_column: str = "image",
        label_column: str = "label",
        optimizer: str = "sgd",
    ) -> None:
        super().__init__(optimizer, device, epochs)
        read, labels, tests = _source(data, image_column, label_column)
        state = derive_seed(seed, Purpose.SPLIT) % 2**32
        validation, train = stratified(labels[0], validation_images, state, "task.validation_images")
        chosen = kept(labels[1], test_images, "test").tolist()
        self.parts = {
            "train": Part(read, train.tolist(), labels[0].tolist(), size),
            "validation": Part(read, validation.tolist(), labels[0].tolist(), size),
            "test": Part(tests, chosen, labels[1].tolist(), size),
        }
        self.classes = int(max(labels[0].max(), labels[1].max())) + 1
        self.model, self.size, self.decoders = model, size, decoders
        self.batch_size = min(batch_size, len(train))
        whole = len(train) // self.batch_size
        self.batches_per_epoch = min(batches or whole, whole)
        self.network = nn.Identity()

    def make_network(self) -> nn.Module:
        """Return the network with new weights."""
        # build_model keeps the generator as it was, so that its weights come from the given seed.
        from optuna_ohgw.tasks.models import initialize

        made = build_model(self.model, channels=3, size=self.size, classes=self.classes)
        initialize(made, self.model, int(torch.randint(2**62, ())))
        return made.to(memory_format=torch.channels_last)

    def order(self, seed: int) -> Tensor:
        """Return the pictures of an epoch, in order."""
        rows = torch.randperm(len(self.parts["train"].rows), generator=torch.Generator().manual_seed(seed))
        return rows[: self.batches_per_epoch * self.batch_size]

    def epoch_batches(self, seed: int) -> Batches:
        """Return position ↦ pictures ``[B, 3, S, S]`` and labels, to be asked for in order."""
        loader = iter(self._loader(self.parts["train"], self.order(seed).tolist(), self.batch_size, seed))
        return lambda position: next(loader)

    def warm_batches(self, seed: int) -> Batches:
        """Return position ↦ a mini-batch of distinct training pictures."""
        count = len(self.parts["train"].rows)
        known: dict[int, tuple[Tensor, Tensor]] = {}

        def batch(position: int) -> tuple[Tensor, Tensor]:
            if position not in known:
                generator = torch.Generator().manual_seed(seed + position)
                rows = torch.randperm(count, generator=generator)[: self.batch_size].tolist()
                known[position] = next(
                    self._loader(self.parts["train"], rows, self.batch_size, seed + position)
                )
            return known[position]

        return batch

    def evaluate(self, part: str) -> tuple[float, float]:
        """Return accuracy and cross-entropy (nats) on a part; ``warm``: on some training pictures."""
        own = self.parts["train" if part == "warm" else part]
        rows = list(range(len(own.rows)))[: _WARM if part == "warm" else None]
        total, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.network.eval()
        with torch.inference_mode():
            for inputs, target in self._loader(own, rows, self.batch_size, None):
                self.stop()
                output = self.network(inputs)
                total += F.cross_entropy(output, target, reduction="sum")
                correct += (output.argmax(1) == target).sum()
        return float(correct) / len(rows), float(total) / len(rows)

    def trivial(self) -> tuple[str, float]:
        """Return the validation accuracy of always saying one class, the most frequent."""
        own = self.parts["validation"]
        counts = torch.tensor([own.labels[row] for row in own.rows]).bincount()
        return "majority class", float(counts.max() / counts.sum())

    def _loader(
        self, part: Part, rows: list[int], size: int, seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield mini-batches, the next ones being decoded by threads while one is trained on."""
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        with ThreadPoolExecutor(max(1, self.decoders)) as pool:
            ahead = deque[list[Future[tuple[Tensor, int]]]]()
            try:
                for i in range(len(batches)):
                    while len(ahead) < _AHEAD and i + len(ahead) < len(batches):
                        ahead.append(
                            [pool.submit(part.picture, row, seed) for row in batches[i + len(ahead)]]
                        )
                    pictures, labels = zip(*(future.result() for future in ahead.popleft()), strict=True)
                    inputs = torch.stack(pictures).to(self.device, memory_format=torch.channels_last)
                    yield inputs, torch.tensor(labels, device=self.device)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


class Part:
    """Pictures of a part.

    Args:
        read: Number ↦ decoded picture.
        rows: Numbers of the part.
        labels: Of all pictures, by number.
        size: Pixels of a side.
    """

    def __init__(self, read: Callable[[int], Any], rows: list[int], labels: list[int], size: int) -> None:
        self.read, self.rows, self.labels, self.size = read, rows, labels, size

    def picture(self, row: int, seed: int | None) -> tuple[Tensor, int]:
        """Return a picture ``[3, S, S]`` and its label; seed None: not cropped at random."""
        number = self.rows[row]
        picture = self.read(number)
        if seed is None:
            picture = TF.center_crop(TF.resize(picture, [round(self.size * _MARGIN)]), [self.size] * 2)
        else:
            rng = np.random.default_rng(derive_seed(seed, Purpose.AUGMENT, number))
            picture = TF.resized_crop(picture, *_crop(rng, *picture.size), [self.size] * 2)
            picture = TF.hflip(picture) if rng.random() < 0.5 else picture
        return TF.normalize(TF.to_tensor(picture), _MEAN, _DEVIATION), self.labels[number]


def _crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Return top, left, height, width of 8 to 100% of the area, 3:4 to 4:3 (Szegedy et al. 2015)."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


class _Files:
    """Number ↦ decoded picture of a list of files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __call__(self, number: int) -> Any:
        from PIL import Image

        path = self.paths[number]
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except Exception as error:  # what a decoder raises on broken bytes differs by format
            raise UserError(
                f"task.data: {path} is no picture that can be decoded; mend or remove it"
            ) from error


class _Rows:
    """Number ↦ decoded picture of a data set of the hub."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    def __call__(self, number: int) -> Any:
        try:
            return self.rows[number][self.column].convert("RGB")
        except Exception as error:
            raise UserError(
                f"task.data: row {number + 1}: column {self.column!r} is no picture that can be decoded"
            ) from error


def _source(data: str, image_column: str, label_column: str) -> tuple[Any, tuple[Any, Any], Any]:
    """Return what reads training pictures, the labels of training and test part, what reads test ones."""
    folder = _digits() if data == "digits" else Path(data).expanduser()
    if folder.is_dir():
        train, classes = _folder(folder / "train", None)
        held = "val" if (folder / "val").is_dir() else "test"
        test, _ = _folder(folder / held, classes)
        labels = tuple(np.array([label for _, label in part], dtype=np.int64) for part in (train, test))
        return _Files([p for p, _ in train]), (labels[0], labels[1]), _Files([p for p, _ in test])
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise UserError(
            f"task.data: folder {data!r} does not exist; give one with train/CLASS/*.jpg and "
            "val/CLASS/*.jpg, or a data set of the hub as OWNER/NAME"
        )
    loaded = load_hub(data)
    held = "validation" if "validation" in loaded else "test"
    for part in ("train", held):
        for column in (image_column, label_column):
            if part not in loaded or column not in loaded[part].column_names:
                raise UserError(f"task.data: {data} has no part {part!r} with a column {column!r}")
    labels = tuple(_labels(loaded[part], label_column, f"{part} part of {data}") for part in ("train", held))
    return _Rows(loaded["train"], image_column), (labels[0], labels[1]), _Rows(loaded[held], image_column)


def _labels(rows: Any, column: str, where: str) -> Any:
    """Return a column of labels, no picture being decoded for it."""
    found = rows.select_columns(column)[:][column]
    wrong = next((i for i, v in enumerate(found) if not isinstance(v, int) or v < 0), None)
    if wrong is not None:
        raise UserError(
            f"task.data: the {where}, row {wrong + 1}: column {column!r} has {found[wrong]!r}, no integer "
            "from 0; name another by --set task.label_column=COLUMN"
        )
    if not found or (where.startswith("train") and len(set(found)) < 2):
        what = f"one class only, {found[0]}" if found else "no row"
        raise UserError(f"task.data: the {where} has {what}; give pictures of two classes or more")
    return np.array(found, dtype=np.int64)


def _folder(folder: Path, classes: list[str] | None) -> tuple[list[tuple[Path, int]], list[str]]:
    if not folder.is_dir():
        raise UserError(f"task.data: folder {folder} does not exist; give train/CLASS and val/CLASS")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = found if classes is None else classes
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(f"task.data: {folder} has the class {unknown[0]!r}, which train has not")
    files = []
    for label, name in enumerate(classes):
        own = [p for p in sorted((folder / name).rglob("*")) if p.is_file() and not p.name.startswith(".")]
        if other := [path for path in own if path.suffix.lower() not in _SUFFIXES]:
            raise UserError(
                f"task.data: {other[0]} is no picture ({', '.join(sorted(_SUFFIXES))}); remove it"
            )
        if not own and name in found:
            raise UserError(f"task.data: {folder / name} is a class without a picture; fill or remove it")
        files += [(path, label) for path in own]
    if len(classes) < 2 or not files:
        raise UserError(
            f"task.data: {folder} has {len(classes)} classes and {len(files)} pictures; give CLASS/*.jpg"
        )
    return files, classes


def _digits() -> Path:
    """Return a folder of scikit-learn's digits in ImageNet's layout, made in the cache the first time."""
    from optuna_ohgw.tasks.sources import digits_parts

    folder = cache_folder() / "digits-pictures"
    if folder.is_dir():
        return folder
    parts = digits_parts({"train": None, "test": None})[0]
    with (
        cache_writes(folder.parent),
        tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as scratch,
    ):
        made = Path(scratch) / folder.name
        for part, (pictures, labels, _) in parts.items():
            for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                path = made / ("train" if part == "train" else "val") / str(label) / f"{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # else another was faster
    return folder
