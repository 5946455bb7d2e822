from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec
from optuna_ohgw.tasks import image
from optuna_ohgw.tasks.data import ImageData
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images

PLAIN = AugmentationSpec(flip=False, crop_padding=0, operations=0, cutout=0)
CPU = torch.device("cpu")


def tagged(n: int, *, side: int = 3, channels: int = 1, pools: int = 3) -> ImageData:
    """Return data whose picture k of part p has its own pixels and the label (7 k + p) mod 5."""
    parts = []
    for part in range(pools):
        generator = torch.Generator().manual_seed(100 + part)
        size = (n, channels, side, side)
        parts.append(torch.randint(256, size, generator=generator, dtype=torch.uint8))
        parts.append((torch.arange(n) * 7 + part) % 5)
    return ImageData(*parts, classes=5)


def task_of(
    data: ImageData, batch_size: int, augmentation: AugmentationSpec = PLAIN, model: str = "mlp"
) -> ImageTask:
    spec = ImageSpec(data="digits", model=model, epochs=1, validation_images=1, augmentation=augmentation)
    return ImageTask(spec, data, model, batch_size)


def digits(model: str = "mlp", size: int | None = None, channels: int | None = None) -> ImageTask:
    spec = ImageSpec(
        data="digits",
        model=model,
        epochs=1,
        batch_size=32,
        validation_images=60,
        train_images=210,
        test_images=70,
        size=size,
        channels=channels,
        augmentation=AugmentationSpec(flip=False, crop_padding=1, operations=2, cutout=3),
    )
    return ImageTask(spec, split_images(spec, load_image_arrays(spec, None), 0, CPU), model, 32)


def pictures_of(task: ImageTask, seed: int, config_index: int, epoch: int) -> list[int]:
    """Return which training pictures an epoch shows, in order: found by their pixels."""
    known = {task.prepare(p[None]).numpy().tobytes(): k for k, p in enumerate(task.data.train_images)}
    assert len(known) == len(task.data.train_images)
    seen = []
    for inputs, target in task.epoch(seed, config_index, epoch, 0.0):
        rows = [known[p[None].numpy().tobytes()] for p in inputs]
        assert torch.equal(target, task.data.train_labels[rows])
        seen.extend(rows)
    return seen


class TestEpoch:
    @pytest.mark.parametrize("batch_size", [1, 4, 7, 40, 64])
    def test_every_picture_comes_once_with_its_label(self, batch_size: int) -> None:
        task = task_of(tagged(40), batch_size)
        seen = pictures_of(task, 0, 0, 0)
        if batch_size == 1:  # no network with BatchNorm could be trained, but nothing is lost
            assert task.batches_per_epoch == 40
        assert sorted(seen) == list(range(40))
        assert seen != list(range(40))

    @pytest.mark.parametrize(("n", "batch_size", "sizes"), [(13, 4, [4, 4, 4]), (14, 4, [4, 4, 4, 2])])
    def test_only_a_last_batch_of_one_picture_is_dropped(
        self, n: int, batch_size: int, sizes: list[int]
    ) -> None:
        task = task_of(tagged(n), batch_size)
        batches = list(task.epoch(0, 0, 0, 0.0))
        assert [len(target) for _, target in batches] == sizes
        assert task.batches_per_epoch == len(sizes)
        seen = pictures_of(task, 0, 0, 0)
        assert len(set(seen)) == len(seen) == sum(sizes)

    def test_the_order_depends_on_seed_configuration_and_epoch(self) -> None:
        task = task_of(tagged(40), 8)
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        orders = [tuple(pictures_of(task, *key)) for key in keys]
        assert len(set(orders)) == len(keys)

    def test_the_order_depends_on_nothing_else(self) -> None:
        order = pictures_of(task_of(tagged(40), 8), 0, 3, 2)
        torch.manual_seed(123)
        other = task_of(tagged(40), 5)
        other.initialize(9, 9)
        other.warm_batches(0, 3, 2)(0)
        list(other.epoch(0, 3, 1, 5.0))
        assert pictures_of(other, 0, 3, 2) == order

    def test_augmentation_draws_depend_on_seed_configuration_and_epoch_only(self) -> None:
        task = digits()
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        draws = [task._draws(*key)[1] for key in keys]
        for first, second in itertools.combinations(draws, 2):
            assert not torch.equal(first.operation, second.operation)
            assert not torch.equal(first.sign, second.sign)
            assert not torch.equal(first.crop, second.crop)
        torch.manual_seed(99)
        list(task.epoch(5, 5, 5, 3.0))
        again = task._draws(*keys[0])[1]
        assert all(torch.equal(a, b) for a, b in zip(draws[0], again, strict=True))

    def test_the_magnitude_changes_pictures_but_not_their_order(self) -> None:
        task = digits()
        weak, strong = (list(task.epoch(0, 0, 0, m)) for m in (0.0, 8.0))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(weak, strong, strict=True))
        assert any(not torch.equal(a[0], b[0]) for a, b in zip(weak, strong, strict=True))

    def test_batches_are_those_of_each_picture_augmented_by_its_own_draws(self) -> None:
        task = digits()
        order, draws = task._draws(0, 1, 2)
        for b, (inputs, target) in enumerate(task.epoch(0, 1, 2, 6.0)):
            for i in range(0, len(target), 11):
                place = b * 32 + i
                row = slice(place, place + 1)
                raw = image.RawImages(task.data.train_images[order[row]], draws.rows(row))
                alone = task.augment(raw, torch.tensor(6.0))
                # one picture in place of a batch: only the order of float32 sums can differ
                torch.testing.assert_close(inputs[i : i + 1], alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("model", "size", "channels"), [("mlp", None, None), ("resnet20", 16, 3)])
    def test_batches_do_not_depend_on_how_many_are_augmented_at_once(
        self, monkeypatch: pytest.MonkeyPatch, model: str, size: int | None, channels: int | None
    ) -> None:
        task = digits(model, size, channels)
        numel = task.data.train_images[0].numel() * task.batch_size
        runs = []
        for at_once in (1, 2, 3, 10**6):
            monkeypatch.setattr(image, "_CHUNK", {"cpu": numel * at_once})
            runs.append(list(task.epoch(0, 0, 0, 7.0)))
        for other in runs[1:]:
            for (inputs, target), (inputs_, target_) in zip(runs[0], other, strict=True):
                assert torch.equal(target, target_)
                # of pictures with a deviation of 1; the same up to the rounding of float32
                torch.testing.assert_close(inputs, inputs_, rtol=0.0, atol=1e-6)


class TestWarmBatches:
    def test_pictures_are_distinct_and_of_the_training_part(self) -> None:
        task = task_of(tagged(40), 16)
        known = {p.numpy().tobytes(): k for k, p in enumerate(task.data.train_images)}
        for position in range(10):
            raw, target = task.warm_batches(0, 0, 0)(position)
            rows = [known[p.numpy().tobytes()] for p in raw.images]
            assert len(set(rows)) == 16
            assert torch.equal(target, task.data.train_labels[rows])

    def test_a_batch_as_large_as_the_training_part_is_all_of_it(self) -> None:
        task = task_of(tagged(10), 16)
        raw, _ = task.warm_batches(0, 0, 0)(0)
        assert len({p.numpy().tobytes() for p in raw.images}) == 10

    def test_the_stream_depends_on_seed_configuration_rung_and_position_only(self) -> None:
        task = task_of(tagged(40), 16, AugmentationSpec(flip=True, crop_padding=1, cutout=0))
        keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
        batches = [task.warm_batches(*key[:3])(key[3]) for key in keys]
        for (first, _), (second, _) in itertools.combinations(batches, 2):
            assert not torch.equal(first.images, second.images)
            assert not torch.equal(first.draws.operation, second.draws.operation)
        torch.manual_seed(4)
        task.warm_batches(0, 0, 0)(7)
        list(task.epoch(0, 0, 0, 1.0))
        again, _ = task.warm_batches(0, 0, 0)(0)
        assert torch.equal(again.images, batches[0][0].images)
        assert all(torch.equal(a, b) for a, b in zip(again.draws, batches[0][0].draws, strict=True))

    def test_the_stream_is_not_that_of_training(self) -> None:
        task = task_of(tagged(40), 16)
        raw, _ = task.warm_batches(0, 0, 0)(0)
        first_batch = next(task.epoch(0, 0, 0, 0.0))[0]
        assert not torch.equal(task.prepare(raw), first_batch)

    def test_reading_it_leaves_training_and_the_global_generator_alone(self) -> None:
        task = task_of(tagged(40), 16)
        before, state = pictures_of(task, 0, 0, 0), torch.random.get_rng_state()
        for position in range(5):
            task.warm_batches(0, 0, 0)(position)
        assert pictures_of(task, 0, 0, 0) == before
        assert torch.equal(torch.random.get_rng_state(), state)


class TestEvaluate:
    @pytest.mark.parametrize("part", ["validation", "test"])
    @pytest.mark.parametrize("at_once", [1000, 17])
    def test_is_the_mean_over_single_pictures(
        self, monkeypatch: pytest.MonkeyPatch, part: str, at_once: int
    ) -> None:
        monkeypatch.setattr(image, "_EVALUATION_BATCH", at_once)
        task = digits("resnet20", 8, 3)  # BatchNorm: a network left in training mode would be seen
        network = task.initialize(0, 0)
        network.train()
        list(map(network, (inputs for inputs, _ in task.epoch(0, 0, 0, 0.0))))  # running statistics
        found = task.evaluate(part)
        images, labels = getattr(task.data, f"{part}_images"), getattr(task.data, f"{part}_labels")
        network.eval()
        losses, hits = [], []
        with torch.no_grad():
            for picture, label in zip(images, labels, strict=True):
                pixels = picture[None].double() / 255
                z = (pixels - pixels.mean()) / pixels.std(correction=0)
                output = network(z.float())[0].double()
                losses.append(float(torch.logsumexp(output, 0) - output[label]))
                hits.append(int(output.argmax()) == int(label))
        # float32 against float64, over batches of another size
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert found.metric == pytest.approx(np.mean(hits), abs=1e-6)

    def test_changes_neither_weights_nor_statistics(self) -> None:
        task = digits("resnet20", 8, 3)
        network = task.initialize(0, 0)
        before = {n: t.clone() for n, t in network.state_dict().items()}
        network.train()
        task.evaluate("validation")
        assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())

    def test_of_a_network_that_is_not_finite_is_not_finite(self) -> None:
        task = digits()
        for weight in task.initialize(0, 0).parameters():
            weight.data.fill_(torch.nan)
        assert np.isnan(task.evaluate("validation").loss)


class TestOrderDigest:
    @pytest.fixture
    def base(self) -> str:
        return digits().order_digest(0, 0)

    def test_is_the_same_for_another_task_of_the_same_data(self, base: str) -> None:
        torch.manual_seed(5)
        other = digits()
        other.initialize(3, 3)
        assert other.order_digest(0, 0) == base

    @pytest.mark.parametrize("key", [(1, 0), (0, 1)])
    def test_differs_by_seed_and_configuration(self, base: str, key: tuple[int, int]) -> None:
        assert digits().order_digest(*key) != base

    @pytest.mark.parametrize("part", ["order", "flip", "crop", "operation", "sign", "cutout"])
    def test_sees_the_order_and_every_draw(
        self, monkeypatch: pytest.MonkeyPatch, base: str, part: str
    ) -> None:
        task = digits()
        honest: Callable[..., tuple] = task._draws

        def tampered(*key: int) -> tuple:
            order, draws = honest(*key)
            if part == "order":
                order[[0, 1]] = order[[1, 0]]
                return order, draws
            changed = getattr(draws, part).clone()
            changed[-1] = ~changed[-1] if changed.dtype == torch.bool else changed[-1] + 1
            return order, draws._replace(**{part: changed})

        monkeypatch.setattr(task, "_draws", tampered)
        assert task.order_digest(0, 0) != base


class TestLosses:
    def test_label_smoothing_mixes_with_the_uniform_distribution(self) -> None:
        task = task_of(tagged(10), 5)
        output = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        target = torch.tensor([0, 1, 2, 3, 4, 0])
        soft = 0.7 * F.one_hot(target, 5) + 0.3 / 5
        expected = -(soft * output.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(task.training_loss(output, target, 0.3), expected)
        assert torch.equal(task.criterion(output, target), task.training_loss(output, target, 0.0))

    def test_initial_weights_depend_on_seed_and_configuration_only(self) -> None:
        def weights(seed: int, config_index: int, shift: int) -> torch.Tensor:
            torch.manual_seed(shift)
            network = digits().initialize(seed, config_index)
            return torch.cat([p.detach().flatten() for p in network.parameters()])

        assert torch.equal(weights(0, 0, 1), weights(0, 0, 2))
        assert not torch.equal(weights(0, 0, 1), weights(0, 1, 1))
        assert not torch.equal(weights(0, 0, 1), weights(1, 0, 1))
