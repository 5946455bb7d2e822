from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from optuna_ohgw.bench.fused import fused_epoch
from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
from optuna_ohgw.training import TrainState, initial_state, train_epoch

PSI = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "magnitude": 3.0, "label_smoothing": 0.1}
OWN: tuple[dict[str, float], ...] = (
    {},
    {"lr": 0.2, "momentum": 0.3},
    {"label_smoothing": 0.0, "magnitude": 9.0},
)


class Doubles(ImageTask):
    """A task in float64, so that rounding does not grow to what a wrong formula gives."""

    def epoch(self, seed, config_index, epoch, magnitude):  # type: ignore[no-untyped-def]
        for images, labels in super().epoch(seed, config_index, epoch, magnitude):
            yield images.double(), labels


@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_each_trial_is_trained_as_it_would_be_alone(model: str) -> None:
    spec = ImageSpec(
        data="digits",
        model=model,
        epochs=3,
        batch_size=16,
        train_images=80,
        validation_images=32,
        test_images=40,
        size=8,
        channels=3 if model == "resnet20" else 1,
        augmentation=AugmentationSpec(crop_padding=1, cutout=3),
    )
    data = split_images(spec, load_image_arrays(spec, None), 0, torch.device("cpu"))
    task = Doubles(spec, data, model, spec.batch_size)
    states = []
    for index, own in enumerate(OWN):
        state = replace(initial_state(task, 0, index, 3), psi={**PSI, **own}, epoch=1)
        tensors = [
            {n: t.double() for n, t in g.items()} for g in (state.weights, state.buffers, state.velocity)
        ]
        states.append(replace(state, **dict(zip(("weights", "buffers", "velocity"), tensors, strict=True))))
    task.network().double()

    fused = fused_epoch(task, states).unstack()

    for got, state in zip(fused, states, strict=True):
        want: TrainState = train_epoch(task, state)[0]
        for name, tensor in want.tensors().items():
            torch.testing.assert_close(got.tensors()[name].to(tensor.dtype), tensor, rtol=1e-9, atol=1e-9)
