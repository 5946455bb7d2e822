"""Pictures on disk: the crop depends on seed and number alone; bad files are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.pictures import Pictures


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 6)):
        for label, name in enumerate(("n01", "n02")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for i in range(count):
                size = 40 + 3 * (i % 5), 48
                shade = rng.integers(0, 60, (*size, 3)) + 180 * label
                Image.fromarray(shade.astype(np.uint8)).save(place / f"{i}.jpg")
    return tmp_path


def task(folder, **options):
    known = {"model": "mlp", "validation_images": 8, "size": 16, "batch_size": 8, "decoders": 2}
    return Pictures(seed=0, device=torch.device("cpu"), epochs=3, data=str(folder), **{**known, **options})


def test_an_epoch_is_the_same_whoever_decodes_and_another_seed_differs(folder):
    epochs = []
    for decoders, seed in ((1, 5), (3, 5), (1, 6)):
        batch = task(folder, decoders=decoders).epoch_batches(seed)
        epochs.append([batch(i) for i in range(5)])
    for (x, y), (other_x, other_y) in zip(epochs[0], epochs[1], strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    assert not torch.equal(epochs[0][0][0], epochs[2][0][0])
    assert epochs[0][0][0].shape == (8, 3, 16, 16)


def test_it_learns_what_is_easy(folder):
    own = task(folder)
    own.build(0)
    psi = {"lr": 0.05, "momentum": 0.9}
    for epoch in range(3):
        own.train(psi, epoch, epoch)
    assert own.evaluate("test")[0] == 1.0
    assert own.trivial() == ("majority class", 0.5)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda f: (f / "train" / "n01" / "3.jpg").write_bytes(b"nothing"), "train/n01/3.jpg is no picture"),
        (lambda f: (f / "val" / "n03").mkdir(), "has the class 'n03', which train has not"),
        (lambda f: (f / "train" / "n03").mkdir(), "train/n03 is a class without a picture"),
        (lambda f: (f / "train" / "n01" / "a.txt").touch(), "train/n01/a.txt is no picture"),
    ],
)
def test_bad_pictures_are_told_with_the_file(folder, break_it, told):
    break_it(folder)

    def read():
        own = task(folder, validation_images=2)
        batch = own.epoch_batches(0)
        return [batch(i) for i in range(own.batches_per_epoch)]

    with pytest.raises(UserError, match=told):
        read()


def test_a_part_of_the_test_pictures_is_drawn_by_class(folder):
    part = task(folder, test_images=4).parts["test"]
    assert sorted(part.labels[row] for row in part.rows) == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"task\.test_images is 1, but the draw is by class"):
        task(folder, test_images=1)


class Rows:
    """A part of the hub whose pictures must not be decoded to know their labels."""

    column_names = ("image", "label")

    def select_columns(self, column):
        return Columns(column)

    def __getitem__(self, number):
        assert number == 3, "all pictures were decoded"
        return {"image": None}


class Columns:
    def __init__(self, column):
        assert column == "label"

    def __getitem__(self, every):
        return {"label": [0, 1] * 20}


def test_labels_of_the_hub_are_read_without_its_pictures(monkeypatch):
    rows = Rows()
    monkeypatch.setattr("optuna_ohgw.tasks.pictures.load_hub", lambda data: {"train": rows, "test": rows})
    own = task("some/one")
    assert own.classes == 2
    with pytest.raises(UserError, match="row 4: column 'image' is no picture"):
        own.parts["test"].read(3)


@pytest.mark.parametrize("data", ["nowhere", "./nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_told(data):
    with pytest.raises(UserError, match="does not exist; give one with train/CLASS"):
        task(data)


def test_an_empty_folder_is_told(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="has 0 classes and 0 pictures"):
        task(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ([0, 1] * 20, [0, -1], "the test part of some/one, row 2: column 'label' has -1, no integer from 0"),
        ([0, 1, None] * 20, [0, 1], "the train part of some/one, row 3: column 'label' has None"),
        (["a", "b"] * 20, [0, 1], "row 1: column 'label' has 'a', no integer"),
        ([1] * 20, [1], "the train part of some/one has one class only, 1"),
        ([0, 1] * 20, [], "the test part of some/one has no row"),
    ],
)
def test_labels_of_the_hub_that_are_none_are_told(monkeypatch, train, test, told):
    datasets = pytest.importorskip("datasets")
    parts = {"train": train, "test": test}
    loaded = {p: datasets.Dataset.from_dict({"image": [0] * len(v), "label": v}) for p, v in parts.items()}
    monkeypatch.setattr("optuna_ohgw.tasks.pictures.load_hub", lambda data: loaded)
    with pytest.raises(UserError, match=told):
        task("some/one")


def test_digits_are_written_once_and_a_cache_that_takes_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTUNA_OHGW_CACHE", str(tmp_path / "cache"))
    first = task("digits", validation_images=20)
    assert len(first.parts["train"].rows) + len(first.parts["validation"].rows) > 1000
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["digits-pictures"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPTUNA_OHGW_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*OPTUNA_OHGW_CACHE=FOLDER"):
        task("digits", validation_images=20)
