"""Text, tokens and the Transformer that reads them."""

from __future__ import annotations

import math

import pytest
import torch

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.language import Language, Transformer
from optuna_ohgw.tasks.text import load_text, tokens_of

FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
NONE: dict[str, int | None] = {}


@pytest.fixture
def folder(tmp_path):
    for name in FILES.values():
        (tmp_path / name).write_text(f"{name} the cat sat on the mat\n" * 200, encoding="utf-8")
    return tmp_path


def test_tokens_give_the_text_back_and_the_vocabulary_is_cached(folder):
    texts = load_text(str(folder), FILES, "text", NONE)
    texts["test"] = "ünïcode, unseen before 🙂\n"
    tokens, size = tokens_of(texts, 300)
    assert size <= 300
    again, _ = tokens_of(texts, 300)
    from tokenizers import Tokenizer

    from optuna_ohgw.tasks.data import cache_folder

    (path,) = [
        p for p in cache_folder().glob("bpe-*.json") if Tokenizer.from_file(str(p)).get_vocab_size() == size
    ][:1]
    known = Tokenizer.from_file(str(path))
    assert known.decode(known.encode(texts["test"]).ids) == texts["test"]
    assert all(torch.equal(tokens[p], again[p]) for p in texts)


def test_one_file_for_validation_and_test_is_halved_at_a_line(folder):
    texts = load_text(str(folder), {**FILES, "validation": "test.txt"}, "text", NONE)
    whole = (folder / "test.txt").read_text()
    assert texts["validation"] + texts["test"] == whole
    assert texts["validation"].endswith("\n")
    assert abs(len(texts["validation"]) - len(texts["test"])) < 60


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda f: (f / "valid.txt").unlink(), "has no file valid.txt, only test.txt, train.txt"),
        (lambda f: (f / "train.txt").write_bytes(b"a\nb\n\xff\xfe\n"), "train.txt, line 3 is not UTF-8"),
        (lambda f: (f / "test.txt").write_text("\n"), "the test part of .* is empty"),
    ],
)
def test_bad_text_is_told_in_a_line(folder, break_it, told):
    break_it(folder)
    with pytest.raises(UserError, match=told) as caught:
        load_text(str(folder), FILES, "text", NONE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["nowhere", "./nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_told(data):
    with pytest.raises(UserError, match="does not exist; give an existing folder of text files"):
        load_text(data, FILES, "text", NONE)


def test_no_token_sees_those_that_follow():
    torch.manual_seed(0)
    model = Transformer(50, 8, 16, 2, 4).eval()
    tokens = torch.randint(50, (3, 8))
    with torch.no_grad():
        before = model(tokens).view(3, 8, 50)
        tokens[:, 5] = (tokens[:, 5] + 1) % 50
        after = model(tokens).view(3, 8, 50)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=2).all()


def test_the_form_with_second_derivatives_is_the_same():
    torch.manual_seed(0)
    model = Transformer(50, 8, 16, 1, 4)
    tokens = torch.randint(50, (3, 8))
    plain = model(tokens)
    model.twice = True
    torch.testing.assert_close(model(tokens), plain)


def task(folder, **options):
    sizes = {"vocabulary": 300, "context": 8, "width": 16, "layers": 1, "heads": 2, "batch_size": 4}
    return Language(seed=0, device=torch.device("cpu"), epochs=2, data=str(folder), **{**sizes, **options})


def test_perplexity_is_of_every_token_once(folder):
    own = task(folder)
    own.build(0)
    metric, loss = own.evaluate("validation")
    assert metric == pytest.approx(math.exp(loss))
    assert metric == pytest.approx(own.vocabulary, rel=0.2)  # knows nothing yet
    windows = own.windows["validation"]
    with torch.no_grad():
        logits = own.network.eval()(windows[:, :-1])
        wanted = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    name, trivial = own.trivial()
    assert name == "unigram"
    assert 1 < trivial < own.vocabulary


def test_sizes_that_do_not_go_together_are_refused(folder):
    with pytest.raises(ValueError, match=r"task\.width: 16 is no multiple of task\.heads 3"):
        task(folder, heads=3)
    with pytest.raises(
        ValueError, match=r"task\.context: the train part has .* fewer than a window of 99999"
    ):
        task(folder, context=99999)


@pytest.mark.parametrize("row", [None, 3])
def test_a_row_of_the_hub_that_is_no_text_is_told(monkeypatch, row):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [row] if row else ["a", row]})
    loaded = dict.fromkeys(("train", "validation", "test"), rows)
    monkeypatch.setattr("optuna_ohgw.tasks.text.load_hub", lambda *named: loaded)
    with pytest.raises(UserError, match=rf"the train part of a/b, row \d: column 'text' has {row}, no text"):
        load_text("a/b", {}, "text", {})


def test_a_cache_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    texts = dict.fromkeys(("train", "validation", "test"), "some text\n" * 50)
    monkeypatch.setenv("OPTUNA_OHGW_CACHE", str(tmp_path / "cache"))
    tokens_of(texts, 260)
    (known,) = (tmp_path / "cache").iterdir()
    known.write_text("{")
    with pytest.raises(UserError, match=r"bpe-.* cannot be read .*; delete it"):
        tokens_of(texts, 260)
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPTUNA_OHGW_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*OPTUNA_OHGW_CACHE=FOLDER"):
        tokens_of(texts, 260)
