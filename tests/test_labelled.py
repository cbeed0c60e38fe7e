"""Labelled texts as rows of tokens and as updates: their order, how they are padded, resumed, shared by processes."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RobertaForMaskedLM, RobertaTokenizer

from galore_pretrain.errors import InputError
from galore_pretrain.text.batches import IGNORE, Batch, read_ahead
from galore_pretrain.text.glue import Examples
from galore_pretrain.text.labelled import ExampleBatches, encode, load_pair_tokenizer, validation_batches
from galore_pretrain.text.tokenizer import Ids
from roberta import TINY_ROBERTA, make_roberta

PAD = 1


def examples_of(*texts: tuple[str, ...]) -> Examples:
    return Examples(list(texts), np.zeros(len(texts), np.int64), "-")


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_roberta(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_pair_tokenizer(folder, "--model tiny")


def test_the_small_roberta_is_one(folder: Path) -> None:
    model = RobertaForMaskedLM.from_pretrained(folder)
    assert model.config.pad_token_id == PAD
    assert model.config.hidden_size == TINY_ROBERTA["hidden_size"]
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_two_texts_are_joined_as_roberta_joins_them(tokenizer: Any) -> None:
    encoded = encode(examples_of(("the small bird", "likes paint"), ("a", "")), tokenizer, 64)
    assert [ids.dtype for ids in encoded] == [np.int32, np.int32]
    assert tokenizer.decode(encoded[0]) == "<s>the small bird</s></s>likes paint</s>"
    assert tokenizer.decode(encoded[1]) == "<s>a</s></s></s>"
    (single,) = encode(examples_of(("the small bird",)), tokenizer, 64)
    assert tokenizer.decode(single) == "<s>the small bird</s>"
    plain = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.post_processor = tokenizers.processors.Sequence([])
    assert single.tolist() == [0, *plain.encode("the small bird").ids, 2]


def test_the_longer_text_is_cut_first(tokenizer: Any) -> None:
    (whole,) = encode(examples_of(("the old table walks", "a")), tokenizer, 64)
    words = len(whole) - 5
    (cut,) = encode(examples_of(("the old table walks", "a")), tokenizer, len(whole) - 1)
    assert cut.tolist() == [*whole[:words], *whole[words + 1 :]]
    (single,) = encode(examples_of(("the old table walks",)), tokenizer, 4)
    assert single.tolist() == [*whole[:3], 2]
    with pytest.raises(InputError, match="--max-length 4: leaves no room for text beside 4 markers"):
        encode(examples_of(("a", "b")), tokenizer, 4)


def test_many_texts_are_encoded_as_each_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(" ".join(["bird"] * (i % 7)), "x" * i) for i in range(23)]
    whole = encode(examples_of(*texts), tokenizer, 16)
    monkeypatch.setattr("galore_pretrain.text.labelled._TOKENIZE", 5)
    again = encode(examples_of(*texts), tokenizer, 16)
    for text, a, b in zip(texts, whole, again, strict=True):
        (alone,) = tokenizer([text[0]], [text[1]], truncation=True, max_length=16)["input_ids"]
        assert a.tolist() == b.tolist() == alone


def test_a_text_that_spells_the_padding_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"writes \('a <pad> b',\)… with its padding token, '<pad>'; take it out"):
        encode(examples_of(("fine",), ("a <pad> b",)), tokenizer, 64)


def test_a_folder_of_vocabulary_and_merges_is_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """As RoBERTa was published first."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    other = load_pair_tokenizer(tmp_path, "--model old")
    assert isinstance(other, RobertaTokenizer)
    texts = examples_of(("the small bird", "likes paint"), ("zürich", "日本 </div>"))
    for a, b in zip(encode(texts, tokenizer, 64), encode(texts, other, 64), strict=True):
        assert a.tolist() == b.tolist()


def test_what_is_no_tokenizer_of_pairs_is_told(folder: Path, tmp_path: Path) -> None:
    def refused(**files: str | None) -> str:
        copied = tmp_path / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(folder, copied)
        (copied / "own.py").write_text("raise SystemExit('executed')")
        for name, content in files.items():
            file = copied / f"{name}.json"
            if content is None:
                file.unlink()
            else:
                file.write_text(content)
        with pytest.raises(InputError) as error:
            load_pair_tokenizer(copied, "--model tiny")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(tokenizer=None).startswith("--model tiny: its tokenizer has no tokens but special ones")
    assert refused(tokenizer="{").startswith("--model tiny: its tokenizer cannot be loaded (")
    bare = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    assert refused(tokenizer_config=bare).startswith("--model tiny: its tokenizer has no padding token; name one in")
    code = json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"})
    refused(tokenizer_config=code)  # and not executed


# -- updates ----------------------------------------------------------------------------------------------------------


def rows_of(count: int, seed: int = 0) -> list[Ids]:
    """Rows of 3 to 9 ids, of which the first tells which row it is."""
    rng = np.random.default_rng(seed)
    return [np.array([100 + i, *rng.integers(4, 99, rng.integers(2, 9))], np.int32) for i in range(count)]


def epoch(batches: ExampleBatches) -> list[Batch]:
    return list(islice(batches, batches.updates_an_epoch))


def numbers(batch: Batch) -> list[int]:
    return [int(row[0]) - 100 for row, label in zip(batch.input_ids, batch.labels, strict=True) if label != IGNORE]


def test_an_epoch_is_all_rows_in_a_new_order_and_ends_with_what_is_left() -> None:
    rows, labels = rows_of(11), np.arange(11)
    batches = ExampleBatches(rows, labels, 4, seed=7, pad_id=PAD)
    assert batches.updates_an_epoch == 3
    taken = list(islice(batches, 6))
    for number in range(2):
        order = np.random.default_rng([7, number]).permutation(11).tolist()
        of_epoch = taken[3 * number : 3 * number + 3]
        assert [numbers(batch) for batch in of_epoch] == [order[:4], order[4:8], order[8:]]
        assert [batch.labels.tolist() for batch in of_epoch] == [order[:4], order[4:8], order[8:]]
        assert [batch.state for batch in of_epoch] == [{"epoch": number, "taken": taken} for taken in (4, 8, 11)]
    assert [numbers(batch) for batch in taken[:3]] != [numbers(batch) for batch in taken[3:]]
    assert epoch(ExampleBatches(rows, labels, 4, 8, PAD))[0].labels.tolist() != taken[0].labels.tolist()


def test_rows_are_padded_to_the_longest_of_their_update_as_transformers_pads_them(tokenizer: Any) -> None:
    rows = rows_of(11)
    for batch in epoch(ExampleBatches(rows, np.zeros(11, np.int64), 4, 0, PAD)):
        of_batch = [rows[i].tolist() for i in numbers(batch)]
        padded = tokenizer.pad({"input_ids": of_batch}, return_tensors="pt")
        assert batch.input_ids.dtype == torch.int64
        assert torch.equal(batch.input_ids, padded["input_ids"])
        assert torch.equal(batch.input_ids != PAD, padded["attention_mask"].bool())
        assert batch.tokens == sum(map(len, of_batch)) == int(padded["attention_mask"].sum())
        assert batch.label_tokens == len(of_batch)


@pytest.mark.parametrize(
    ("labels", "dtype"), [(np.int64([1, 0, 2]), torch.int64), (np.float32([0.5, 5, 2.6]), torch.float32)]
)
def test_labels_are_classes_or_scores(labels: Any, dtype: torch.dtype) -> None:
    (batch,) = epoch(ExampleBatches(rows_of(3), labels, 3, 0, PAD))
    assert batch.labels.dtype == dtype
    assert batch.labels.shape == (3,)
    assert batch.labels.tolist() == labels[numbers(batch)].tolist()
    (fixed,) = validation_batches(rows_of(3), labels, 8, PAD)
    assert fixed.labels.dtype == dtype
    assert fixed.labels.tolist() == labels.tolist()


def same(a: Batch, b: Batch) -> bool:
    alike = torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
    return alike and (a.tokens, a.state, a.check) == (b.tokens, b.state, b.check)


@settings(max_examples=30)
@given(st.data(), st.integers(1, 12), st.integers(1, 14), st.integers(1, 3))
def test_a_resumed_run_goes_on_anywhere(data: st.DataObject, count: int, sequences: int, size: int) -> None:
    rows, labels = rows_of(count), np.arange(count)

    def batches() -> ExampleBatches:
        return ExampleBatches(rows, labels, sequences, 3, PAD, size - 1, size)

    whole = list(islice(batches(), 9))
    cut = data.draw(st.integers(0, 7))
    again = batches()
    again.load_state_dict(json.loads(json.dumps(whole[cut].state)))
    rest = list(islice(again, 8 - cut))
    assert all(same(a, b) for a, b in zip(whole[cut + 1 :], rest, strict=True))


@settings(max_examples=30)
@given(st.integers(1, 13), st.integers(1, 3), st.integers(2, 5))
def test_processes_share_the_rows_of_one(count: int, part: int, size: int) -> None:
    """All have as many rows, as long; what is filled up is no row of padding, and counts for nothing."""
    rows, labels = rows_of(count), np.arange(count).astype(np.float32)
    sequences = part * size
    alone = epoch(ExampleBatches(rows, labels, sequences, 3, PAD))
    shared = [epoch(ExampleBatches(rows, labels, sequences, 3, PAD, rank, size)) for rank in range(size)]
    for i, whole in enumerate(alone):
        parts = [batches[i] for batches in shared]
        assert [n for batch in parts for n in numbers(batch)] == numbers(whole)
        assert len({batch.input_ids.shape for batch in parts}) == 1
        joined = torch.cat([batch.input_ids for batch in parts])
        assert torch.equal(joined[: len(whole.input_ids)], whole.input_ids)  # at the places that the trainer numbers
        assert (joined != PAD).any(1).all()
        assert sum(batch.tokens for batch in parts) == whole.tokens
        assert sum(batch.label_tokens for batch in parts) == whole.label_tokens
        assert {batch.fingerprint for batch in parts} == {parts[0].fingerprint}
        assert parts[0].state == whole.state


def test_processes_that_read_other_rows_or_labels_notice() -> None:
    rows, labels = rows_of(4), np.arange(4)
    others = [*rows[:3], rows[3] + 1]
    found = set()
    for own_rows, own_labels in ((rows, labels), (others, labels), (rows, labels[::-1].copy())):
        (batch,) = epoch(ExampleBatches(own_rows, own_labels, 4, 0, PAD, 0, 2))
        found.add(batch.fingerprint)
    assert len(found) == 3


def test_they_are_read_ahead_like_any_other() -> None:
    batches = ExampleBatches(rows_of(5), np.arange(5), 4, 0, PAD, 1, 4)
    assert batches.updates_an_epoch == 2
    ahead = read_ahead(batches, pin=False)
    assert all(same(a, b) for a, b in zip(islice(ahead, 6), batches, strict=False))
    ahead.close()


def test_validation_keeps_the_order() -> None:
    rows, labels = rows_of(11), np.arange(11)
    batches = validation_batches(rows, labels, 4, PAD)
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [number for batch in batches for number in numbers(batch)] == list(range(11))
    for start, batch in zip(range(0, 11, 4), batches, strict=True):
        lengths = [len(row) for row in rows[start : start + 4]]
        assert batch.input_ids.shape == (len(lengths), max(lengths))
        assert (batch.input_ids != PAD).sum(1).tolist() == lengths
        assert batch.tokens == sum(lengths)
