from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.data import CACHE, ImageArrays, cache_folder, load_arrays, split
from optuna_ohgw.tasks.sources import kept

LAYOUTS = {
    "hub": "plain_text/{part}-00000-of-00001.parquet",
    "flat": "{part}.parquet",
}


@pytest.fixture(autouse=True)
def _no_network_and_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write_parquet(
    path: Path, images: np.ndarray, labels: np.ndarray, columns: tuple[str, str] = ("img", "label")
) -> None:
    """Write images [n, H, W, 3] or [n, H, W] as PNG, which loses nothing."""
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pictures = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({columns[0]: pictures, columns[1]: pa.array(labels, pa.int64())})
    pq.write_table(table, path)


def write_folder(
    folder: Path, layout: str = "flat", *, seed: int = 0, shape: tuple[int, ...] = (6, 6, 3)
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write 20 training and 10 test pictures of 5 classes; return what was written."""
    rng = np.random.default_rng(seed)
    written = {}
    for part, count in (("train", 20), ("test", 10)):
        images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        labels = rng.permutation(np.arange(count) % 5)
        write_parquet(folder / LAYOUTS[layout].format(part=part), images, labels)
        written[part] = images, labels
    return written


def tagged(train: int = 300, test: int = 60, classes: int = 6) -> ImageArrays:
    """Return arrays whose pictures carry their own number, the test part from 10,000 on."""

    def images(start: int, count: int) -> np.ndarray:
        numbers = np.arange(start, start + count, dtype="<u2")
        return numbers.view(np.uint8).reshape(count, 1, 1, 2)

    labels = np.random.default_rng(7).permutation(np.arange(train + test) % classes)
    parts = images(0, train), labels[:train], images(10_000, test), labels[train:]
    return ImageArrays(*parts, classes=classes)


def tags(images: torch.Tensor) -> list[int]:
    return np.ascontiguousarray(images.numpy()).view("<u2").reshape(-1).tolist()


def assert_same(first: ImageArrays, second: ImageArrays) -> None:
    for name in ("train_images", "train_labels", "test_images", "test_labels", "classes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_digits_are_all_of_them_scaled_and_stratified() -> None:
    arrays = load_arrays("digits")
    digits = load_digits()
    assert arrays.classes == 10
    assert arrays.train_images.dtype == np.uint8
    assert arrays.train_labels.dtype == np.int64
    assert arrays.train_images.shape == (1438, 1, 8, 8)
    assert arrays.test_images.shape == (359, 1, 8, 8)
    both = np.concatenate([arrays.train_images, arrays.test_images])[:, 0]
    levels = np.rint(both * (16 / 255)).reshape(len(both), -1)  # 256 levels tell 17 apart
    assert sorted(map(tuple, levels)) == sorted(map(tuple, digits.data))
    assert both.max() == 255
    share = np.bincount(arrays.test_labels) / np.bincount(digits.target)
    np.testing.assert_allclose(share, 0.2, atol=1 / 170)  # one picture of the rarest class


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_gives_back_what_was_written(tmp_path: Path, layout: str) -> None:
    written = write_folder(tmp_path / "data [1]*", layout)  # no pattern, though it looks like one
    arrays = load_arrays(str(tmp_path / "data [1]*"))
    np.testing.assert_array_equal(arrays.train_images, written["train"][0].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arrays.train_labels, written["train"][1])
    np.testing.assert_array_equal(arrays.test_images, written["test"][0].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arrays.test_labels, written["test"][1])
    assert arrays.classes == 5


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    images = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((2, 2), np.uint8)
    labels = np.arange(8) % 2
    for shard in (1, 0):
        rows = slice(4 * shard, 4 * shard + 4)
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", images[rows], labels[rows])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", images, labels)
    assert load_arrays(str(tmp_path)).train_images[:, 0, 0, 0].tolist() == list(range(8))


def test_limits_keep_a_stratified_part_and_decode_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_folder(tmp_path)
    decoded = []
    original = datasets.Image.decode_example

    def counting(self: datasets.Image, value: dict, **kwargs: object) -> Image.Image:
        decoded.append(value)
        return original(self, value, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", counting)
    arrays = load_arrays(str(tmp_path), train_images=10, test_images=5)
    assert len(decoded) == 15
    assert np.bincount(arrays.train_labels).tolist() == [2] * 5
    assert np.bincount(arrays.test_labels).tolist() == [1] * 5
    pictures, labels = written["train"]
    keys = [picture.transpose(2, 0, 1).tobytes() for picture in pictures]
    known = dict(zip(keys, labels, strict=True))
    assert [known[image.tobytes()] for image in arrays.train_images] == arrays.train_labels.tolist()
    assert len({image.tobytes() for image in arrays.train_images}) == 10
    everything = load_arrays(str(tmp_path), train_images=20)
    np.testing.assert_array_equal(everything.train_labels, labels)


def test_resize_and_channels_of_flat_pictures_are_exact(tmp_path: Path) -> None:
    """One colour per picture: no interpolation changes it, and the luma has a known weight."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]], dtype=np.uint8)
    images = np.tile(colours[:, None, None, :], (1, 6, 6, 1))
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, np.array([0, 0, 1, 1]))
    coloured = load_arrays(str(tmp_path), size=4)
    assert coloured.train_images.shape == (4, 3, 4, 4)
    flat = colours[:, :, None, None] * np.ones((4, 4))
    np.testing.assert_array_equal(coloured.train_images, flat)
    gray = load_arrays(str(tmp_path), size=9, channels=1)
    assert gray.test_images.shape == (4, 1, 9, 9)
    luma = colours @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(gray.test_images[:, 0, 4, 4], luma, atol=1)  # rounding of Pillow


def test_gray_becomes_three_equal_channels() -> None:
    arrays = load_arrays("digits", size=32, channels=3, train_images=50, test_images=20)
    assert arrays.train_images.shape == (50, 3, 32, 32)
    assert arrays.test_images.shape == (20, 3, 32, 32)
    assert np.ptp(arrays.train_images, axis=1).max() == 0


def test_pictures_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_parquet(tmp_path / "test.parquet", np.zeros((10, 5, 7, 3), np.uint8), np.arange(10) % 5)
    with pytest.raises(UserError, match=r"row 1 of the test part is \(3, 5, 7\).*--set task\.size"):
        load_arrays(str(tmp_path))
    assert load_arrays(str(tmp_path), size=6).test_images.shape == (10, 3, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_column": "image"}, ["'image'", "img, label", "--set task.image_column"]),
        ({"label_column": "fine"}, ["'fine'", "img, label", "--set task.label_column"]),
        ({"label_column": "img"}, ["'img'", "integers from 0", "--set task.label_column"]),
        ({"image_column": "label"}, ["cannot be decoded", "--set task.image_column"]),
        ({"train_images": 21}, ["task.train_images is 21", "20 pictures", "5 to 15"]),
        ({"test_images": 2}, ["task.test_images is 2", "5 to 5"]),
        ({"channels": 2}, ["task.channels is 2", "1 (gray) or 3 (RGB)"]),
        ({"size": 0}, ["task.size is 0"]),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: dict, words: list[str]) -> None:
    write_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        load_arrays(str(tmp_path), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    if "column" in "".join(arguments) and "decoded" not in message:
        assert str(tmp_path) in message


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\*\.parquet"):
        load_arrays(str(tmp_path))
    write_folder(tmp_path / "a", "hub")
    write_folder(tmp_path / "b", "hub")
    with pytest.raises(UserError, match=r"in several folders .* give one of them"):
        load_arrays(str(tmp_path))
    (tmp_path / "b" / LAYOUTS["hub"].format(part="test")).unlink()
    with pytest.raises(UserError, match=r"no file test\*\.parquet"):
        load_arrays(str(tmp_path / "b"))
    (tmp_path / "a" / LAYOUTS["hub"].format(part="test")).write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot be read"):
        load_arrays(str(tmp_path / "a"))


@pytest.mark.parametrize("source", ["./gone", "/gone/for/good", "~/gone-for-good", "a/b/c", ""])
def test_missing_folder(source: str) -> None:
    with pytest.raises(UserError, match=f"folder '{source}' does not exist"):
        load_arrays(source)


def test_hub_without_network_says_what_to_do(tmp_path: Path) -> None:
    """A process of its own, as the variable is read when the libraries are imported."""
    code = (
        "from optuna_ohgw.errors import UserError\n"
        "from optuna_ohgw.tasks.data import load_arrays\n"
        "try: load_arrays('some-one/some-set')\n"
        "except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert "'some-one/some-set'" in lines[0]
    assert "--set task.data=FOLDER" in lines[0]
    assert "Traceback" not in done.stderr


def test_hub_is_asked_once_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub out of reach must not reach the retries of load_dataset."""

    def unreachable(*_: object, timeout: float, **__: object) -> None:
        assert timeout <= 10
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked again"))
    remedy = r"some-one/some-set.*first line\);.*task\.data=FOLDER"
    with pytest.raises(UserError, match=remedy) as caught:
        load_arrays("some-one/some-set")
    assert "\n" not in str(caught.value)


def test_hub_part_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_folder(tmp_path)
    train = datasets.load_dataset("parquet", data_files={"train": str(tmp_path / "train.parquet")})
    monkeypatch.setattr(datasets, "load_dataset", lambda _: train)
    with pytest.raises(UserError, match="has the parts train but no test"):
        load_arrays("some-one/some-set")


def test_cache_is_read_and_follows_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_folder(data)
    plain = load_arrays(str(data))
    first = load_arrays(str(data), cache=cache)
    assert_same(first, plain)

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("read again"))
        second = load_arrays(str(data), cache=cache)
    assert isinstance(second.train_images, np.memmap)
    assert not second.train_images.flags.writeable
    assert_same(second, plain)

    before = (data / "train.parquet").stat()
    changed = write_folder(data, seed=1)
    later = before.st_mtime_ns + 10**9
    os.utime(data / "train.parquet", ns=(later, later))
    os.utime(data / "test.parquet", ns=(later, later))
    third = load_arrays(str(data), cache=cache)
    np.testing.assert_array_equal(third.train_images, changed["train"][0].transpose(0, 3, 1, 2))
    assert len(list(cache.glob("arrays-*"))) == 2


def test_cache_keeps_arguments_apart(tmp_path: Path) -> None:
    small = load_arrays("digits", cache=tmp_path)
    large = load_arrays("digits", cache=tmp_path, size=16)
    few = load_arrays("digits", cache=tmp_path, train_images=100)
    assert small.train_images.shape == (1438, 1, 8, 8)
    assert large.train_images.shape == (1438, 1, 16, 16)
    assert few.train_images.shape == (100, 1, 8, 8)
    assert_same(load_arrays("digits", cache=tmp_path), small)


def test_cache_is_shared_by_writers_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(load_arrays, "digits", cache=tmp_path) for _ in range(4)]
        results = [call.result() for call in calls]
    for result in results:
        assert_same(result, results[0])
    assert len(list(tmp_path.glob("arrays-*"))) == 1


def test_broken_cache_entry_says_what_to_delete(tmp_path: Path) -> None:
    load_arrays("digits", cache=tmp_path)
    (entry,) = tmp_path.glob("arrays-*")
    (entry / "train_images.npy").write_bytes(b"")
    with pytest.raises(UserError, match=f"{entry.name} cannot be read.*delete that folder"):
        load_arrays("digits", cache=tmp_path)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_split_is_disjoint_complete_and_stratified(seed: int) -> None:
    arrays = tagged()
    data = split(arrays, validation_images=60, seed=seed, device="cpu")
    train, validation = tags(data.train_images), tags(data.validation_images)
    assert len(validation) == 60
    assert sorted(train + validation) == list(range(300))
    assert tags(data.test_images) == list(range(10_000, 10_060))
    assert data.train_labels.tolist() == arrays.train_labels[train].tolist()
    assert data.validation_labels.tolist() == arrays.train_labels[validation].tolist()
    assert data.test_labels.tolist() == arrays.test_labels.tolist()
    expected = np.bincount(arrays.train_labels) * 60 / 300
    assert np.abs(np.bincount(data.validation_labels) - expected).max() < 1
    assert (data.channels, data.height, data.width, data.classes) == (1, 1, 2, 6)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64


def test_split_depends_on_the_seed_alone() -> None:
    arguments = {"validation_images": 60, "label_noise": 0.2, "device": "cpu"}
    first, again, other = (split(tagged(), seed=seed, **arguments) for seed in (3, 3, 4))
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.train_labels, again.train_labels)
    assert tags(first.validation_images) != tags(other.validation_images)
    assert torch.equal(first.test_images, other.test_images)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 1.0])
def test_label_noise_is_exact_and_in_training_only(fraction: float) -> None:
    arrays = tagged()
    clean = split(arrays, validation_images=63, seed=5, device="cpu")
    noisy = split(arrays, validation_images=63, seed=5, label_noise=fraction, device="cpu")
    changed = noisy.train_labels != clean.train_labels
    assert int(changed.sum()) == round(fraction * 237)
    assert noisy.train_labels.min() >= 0
    assert noisy.train_labels.max() < 6
    untouched = "train_images validation_images validation_labels test_images test_labels"
    for name in untouched.split():
        assert torch.equal(getattr(noisy, name), getattr(clean, name))
    assert arrays.train_labels.tolist() == tagged().train_labels.tolist()


def test_label_noise_is_uniform_over_the_other_classes() -> None:
    arrays = tagged(train=60_000, classes=4)
    clean = split(arrays, validation_images=4, seed=0, device="cpu")
    noisy = split(arrays, validation_images=4, seed=0, label_noise=0.5, device="cpu")
    pairs = torch.bincount(clean.train_labels * 4 + noisy.train_labels, minlength=16).reshape(4, 4)
    wrong = pairs[~torch.eye(4, dtype=torch.bool)].double()
    expected = 29_998 / 12
    # 12 counts; the position drawn and the class drawn both vary: below binomial, so 5 sigma hold
    assert (wrong - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("count", [0, 5, 295, 300, 301])
def test_validation_part_that_does_not_fit(count: int) -> None:
    with pytest.raises(UserError, match=f"task.validation_images is {count}, .* from 6 to 294"):
        split(tagged(), validation_images=count, seed=0, device="cpu")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_label_noise_out_of_range(fraction: float) -> None:
    with pytest.raises(UserError, match=r"task\.label_noise is"):
        split(tagged(), validation_images=60, seed=0, label_noise=fraction, device="cpu")


def test_split_of_cached_arrays_warns_of_nothing(tmp_path: Path) -> None:
    arrays = load_arrays("digits", cache=tmp_path)
    data = split(arrays, validation_images=200, seed=0, device="cpu")
    data.train_images.zero_()
    assert arrays.train_images.max() == 255


def test_the_cache_is_shared_by_all_studies_and_where_the_user_says(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(CACHE)
    assert cache_folder() == tmp_path / "home" / ".cache" / "optuna-ohgw"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "optuna-ohgw"
    monkeypatch.setenv(CACHE, "~/own")
    assert cache_folder() == tmp_path / "home" / "own"


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot be written .*; set {CACHE}=FOLDER"):
        load_arrays("digits", cache=tmp_path / "file")


def test_training_pictures_of_one_class_are_refused(tmp_path: Path) -> None:
    images = np.zeros((20, 6, 6, 3), dtype=np.uint8)
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, np.full(20, 3))
    with pytest.raises(UserError, match=r"'label' of the train part of .* has one class only, 3"):
        load_arrays(str(tmp_path))


def test_a_picture_that_cannot_be_decoded_is_told_with_its_row(tmp_path: Path) -> None:
    """Of the file, not of those that a limit keeps."""
    write_folder(tmp_path)
    (path,) = tmp_path.glob("train*.parquet")
    table = pq.read_table(path)
    rows = table.column("img").to_pylist()
    for broken in rows[1:]:
        broken["bytes"] = b"no picture"
    labels = table.column("label").to_pylist()
    pq.write_table(table.set_column(0, "img", pa.array(rows, table.schema.field("img").type)), path)
    with pytest.raises(UserError, match=r"row (\d+) of the train part cannot be decoded") as caught:
        load_arrays(str(tmp_path), train_images=5)
    (told,) = re.findall(r"row (\d+)", str(caught.value))
    kept_rows = kept(np.array(labels), 5, "train")
    assert int(told) == next(row for row in kept_rows if row > 0) + 1 > 1
