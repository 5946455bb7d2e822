"""The examples of docs/tasks.md: a whole task of the user's own, and the lines in other loops."""

from __future__ import annotations

import re
from pathlib import Path

import optuna
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from optuna_ohgw import OhgwSampler
from optuna_ohgw.cli import app
from optuna_ohgw.contract_check import check_contract
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import load_spec
from optuna_ohgw.tasks.contract import load_class

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()


def block(kind: str) -> str:
    (found,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def wine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_task.py").write_text(block("python"))
    (tmp_path / "wine.yaml").write_text(block("yaml"))
    load_class.cache_clear()
    return tmp_path / "wine.yaml"


def test_a_whole_task_is_at_most_sixty_lines():
    assert len(block("python").splitlines()) <= 60


def test_the_example_fulfils_the_contract(wine):
    assert "4 mini-batches an epoch, accuracy (higher is better)" in check_contract(load_spec(wine))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_is_a_study_that_runs_and_learns(wine, capfd):
    result = CliRunner().invoke(app, ["run", str(wine), "--quiet", "--set", "execution.threads=1"])
    assert result.exit_code == 0, result.output
    checked = CliRunner().invoke(app, ["status", str(wine), "--check-pairing"])
    assert "pairing (paired): intact; 32 trials compared, 32 recomputed" in checked.output
    spec = load_spec(wine)
    studies = optuna.get_all_study_summaries(open_storage(spec.storage_url, create=False))
    finals = [s.user_attrs["final"] for s in studies if "final" in s.user_attrs]
    assert len(finals) == 8
    assert min(final["test_metric"] for final in finals) > 0.6  # a third is chance
    trained = [t for s in studies if "ohgw-1step" in s.study_name for t in _trials(spec, s.study_name)]
    record = trained[0].user_attrs["ohgw"][0]
    assert set(record["methods"]) == {"lr", "weight_decay"}
    assert {t.params["width"] for t in trained} <= {8, 16}


def _trials(spec, name):
    return optuna.load_study(study_name=name, storage=open_storage(spec.storage_url, create=False)).trials


@pytest.mark.parametrize("kind", ["python lightning", "python transformers"])
def test_other_loops_need_at_most_twenty_lines(kind):
    added = [line for line in block(kind).splitlines() if line.endswith("# +")]
    assert 5 <= len(added) <= 20


def _study():
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2, bootstrap_count=0)
    return optuna.create_study(
        direction="maximize", sampler=OhgwSampler(optuna.samplers.RandomSampler(seed=0)), pruner=pruner
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_lines_in_a_lightning_module_warm_its_optimizer(tmp_path):
    lightning = pytest.importorskip("lightning")
    names: dict[str, object] = {}
    exec(compile(block("python lightning"), "<lightning>", "exec"), names)
    data = torch.utils.data.TensorDataset(torch.randn(64, 5), torch.randint(3, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    study, rates = _study(), []

    def objective(trial):
        torch.manual_seed(0)
        module = names["Classifier"](nn.Linear(5, 3), trial)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet
        )
        try:
            trainer.fit(module, loader, loader)
        finally:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        return float(trainer.callback_metrics["accuracy"])

    study.optimize(objective, n_trials=3)
    for trial, rate in zip(study.trials, rates, strict=True):
        record = trial.user_attrs["ohgw"][0]
        assert rate == record["trained"]["lr"] == trial.params["lr"] != record["suggested"]["lr"]
        assert record["rule"] == "raw"
        assert trial.intermediate_values


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_lines_in_a_trainer_warm_its_optimizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names: dict[str, object] = {}
    exec(compile(block("python transformers"), "<transformers>", "exec"), names)
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": torch.tensor(i % 2)} for i in range(32)]
    study, rates = _study(), []

    def objective(trial):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.BertConfig(vocab_size=20, num_labels=2, **sizes)
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[names["WarmStart"](trial)]
        )
        try:
            trainer.train()
        finally:
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        return -trainer.evaluate()["eval_loss"]

    study.optimize(objective, n_trials=2)
    for trial, rate in zip(study.trials, rates, strict=True):
        record = trial.user_attrs["ohgw"][0]
        assert rate == record["trained"]["lr"] == trial.params["lr"] != record["suggested"]["lr"]
        assert set(record["methods"].values()) == {"lean"}
