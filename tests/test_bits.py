"""Bits per byte: which bytes count, by hand; and where the text of a token ends, for every family of tokenizers."""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from families import HUGGING_FACE, SENTENCEPIECE, UNLIKE, make
from galore_pretrain.cli import cli
from galore_pretrain.study.report import as_json, ranking
from galore_pretrain.study.results import compare, find
from galore_pretrain.text.batches import Row, TokenRows, validation_rows
from galore_pretrain.text.sources import BadData, in_turn, open_source
from galore_pretrain.text.tokenizer import Begun, Ends, Ids, Tokenizer, load_tokenizer
from galore_pretrain.train.evaluate import Evaluation, evaluate

EOS = 256
BOS = 257
FRAGMENTS = ["the ", "quick", " fox", "aaa", "1984", "é", "e\u0301", "日本", "한글", "🙂", "👍🏽", "ﬁ", "½", "Ａ", "z̈̈"]
FRAGMENTS += [" ", "  ", "\n", "\t", "\u00a0", "’", "<", "</div>", "<tool>", "<s>", "<unk>", "<0x0A>", "[CLS]", "x\0y"]
ANY_TEXT = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)


class Bytes:
    """A tokenizer of one id a byte."""

    name, vocab_size, eos_id, bos_id, unknown_id, fingerprint = "bytes", 258, EOS, BOS, None, "-"

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        return np.arange(1, len(text.encode()) + 1)


class Pairs(Bytes):
    """A tokenizer of one id for two characters; white space alone has none."""

    vocab_size = 100

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        return [np.arange(len(self.byte_ends(text)), dtype=np.int32) for text in texts]

    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        parts = [text[i : i + 2] for i in range(0, len(text), 2)] if not text.isspace() else []
        return np.cumsum([len(part.encode()) for part in parts], dtype=np.int64)


class Lists:
    """A source of given documents."""

    def __init__(self, *documents: str) -> None:
        self._documents, self.shards, self.bad_data = documents, ["shard"], BadData()

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        return iter(list(enumerate(self._documents, 1))[start:])


class Uniform(torch.nn.Module):
    """A model to which all of so many tokens are equally likely."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._loss = math.log(vocabulary)

    def _token_losses(self, input_ids: torch.Tensor, labels: torch.Tensor, *more: Any) -> torch.Tensor:
        return (labels >= 0).float() * self._loss


def rows_of(tokenizer: Any, layout: str, length: int, *documents: str) -> list[Row]:
    return validation_rows(Lists(*documents), TokenRows(tokenizer, layout, length), 10**6)  # type: ignore[arg-type]


def bytes_of(rows: list[Row]) -> list[int]:
    counted = [row.label_bytes for row in rows]
    assert None not in counted
    return [count for count in counted if count is not None]


def evaluated(rows: list[Row], vocabulary: int) -> Evaluation:
    return evaluate(Uniform(vocabulary), rows, batch_size=2, reference_batch=None, device=torch.device("cpu"))


# -- which bytes count ------------------------------------------------------------------------------------------------


def test_pad_counts_what_it_keeps_but_for_the_first_token() -> None:
    """ "häuser" has 7 bytes. Whole, 6 are labels. Cut behind 3 tokens, it ends within the row, and 2 are."""
    assert bytes_of(rows_of(Bytes(), "pad", 16, "häuser", "a", " ", "")) == [6, 0]
    rows = rows_of(Bytes(), "pad", 4, "häuser", "ab")
    assert bytes_of(rows) == [2, 1]
    labels = 3 + 2  # the end marker is one of each row's
    assert evaluated(rows, 256).bits_per_byte == pytest.approx(8 * labels / 3)


def test_pack_counts_the_stretches_between_two_rows() -> None:
    """A row begins and ends inside a document, once inside a character."""
    rows = rows_of(Bytes(), "pack", 5, "häus", "ab", "cdefg", "ä")
    cut = "ä".encode()
    assert [row.labels.tolist() for row in rows] == [
        [*"äus".encode(), EOS],
        [*b"ab", EOS, *b"cd"],
        [*b"efg", EOS, cut[0]],
    ]
    assert bytes_of(rows) == [4, 4, 4]
    assert evaluated(rows, 256).bits_per_byte == pytest.approx(8 * 15 / 12)


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=6), st.integers(2, 40), st.sampled_from(["pad", "pack"]), st.booleans())
def test_of_bytes_each_label_that_is_no_marker_is_one(
    documents: list[str], length: int, layout: str, is_begun: bool
) -> None:
    tokenizer: Any = Begun(Bytes()) if is_begun else Bytes()  # type: ignore[arg-type]
    for row in rows_of(tokenizer, layout, length, *documents, "a" * 50):
        is_byte = (row.labels >= 0) & (row.labels < 256)
        assert row.label_bytes == is_byte.sum()


def test_bits_do_not_depend_on_the_tokens_where_the_text_is_as_likely() -> None:
    """A byte is 8 bits to a uniform model of bytes; two characters of log2(100) bits are 3.32 bits a byte."""
    text = "ab" * 40
    whole = rows_of(Begun(Bytes()), "pad", 200, text)  # type: ignore[arg-type]
    assert bytes_of(whole) == [80]
    assert evaluated(whole, 258).bits_per_byte == pytest.approx(math.log2(258) * 81 / 80)  # an end marker more
    pairs = rows_of(Begun(Pairs()), "pad", 200, text)  # type: ignore[arg-type]
    assert bytes_of(pairs) == [80]
    result = evaluated(pairs, 100)
    assert result.bits_per_byte == pytest.approx(math.log2(100) * 41 / 80)
    assert result.bits_per_byte == pytest.approx(result.loss * 41 / 80 / math.log(2))


def test_a_document_without_a_token_is_none() -> None:
    assert sum(bytes_of(rows_of(Pairs(), "pack", 2, "   ", "abcd", " \n", "efgh", "ij"))) == 8  # but "ab"
    assert sum(bytes_of(rows_of(Bytes(), "pack", 2, "   ", "a", "bcd"))) == 6  # of bytes, white space is one


def test_rows_of_no_bytes_have_no_bits() -> None:
    assert evaluated(rows_of(Bytes(), "pad", 8, "a"), 256).bits_per_byte is None
    assert "eval_bits_per_byte" not in evaluated(rows_of(Bytes(), "pad", 8, "a"), 256).metrics()


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_whole_documents_count_as_an_independent_sum(layout: str) -> None:
    """The sample by its pieces, whose text is written back by the tokenizer: all but the first token."""
    tokenizer = load_tokenizer("sample")
    texts = [" ".join(text.split()) for _, _, text in islice(in_turn(open_source("sample", "validation")), 200)]
    texts = [text for text in texts if text.isascii() and text and 2 not in tokenizer.encode([text])[0]][:40]
    assert len(texts) == 40
    rows = rows_of(tokenizer, layout, 100_000 if layout == "pad" else 64, *texts)
    if layout == "pad":
        first = [tokenizer.decode(ids[:1].tolist()) for ids in tokenizer.encode(texts)]
        assert bytes_of(rows) == [len(text) - len(token) for text, token in zip(texts, first, strict=True)]
        return
    sizes: list[int] = []
    for ids in tokenizer.encode(texts):
        written = [len(piece) for piece in pieces_of(tokenizer, ids)]
        sizes += [written[0] - 1, *written[1:], 0]  # without the space that SentencePiece begins with
    assert len(rows) == (len(sizes) - 1) // 64
    assert bytes_of(rows) == [sum(sizes[64 * i + 1 : 64 * i + 65]) for i in range(len(rows))]


# -- where tokens end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*SENTENCEPIECE, *UNLIKE, *HUGGING_FACE])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    return request.param, load_tokenizer(str(make(request.param, tmp_path_factory.mktemp("own"))))


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT, first=st.integers(1, 12))
def test_each_token_ends_somewhere(family: tuple[str, Tokenizer], text: str, first: int) -> None:
    _, tokenizer = family
    ends = tokenizer.byte_ends(text)
    assert len(ends) == len(tokenizer.encode([text])[0])
    assert (np.diff(ends, prepend=0) >= 0).all()
    assert not len(ends) or ends[-1] <= len(text.encode())
    beginning = tokenizer.byte_ends(text, first)
    assert len(beginning) >= min(first, len(ends))
    assert beginning[:first].tolist() == ends[:first].tolist()


@pytest.fixture(scope="module", params=["GPT-2", "Llama-3", "BPE of LLaMA"])
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    """A tokenizer that keeps a text as it is, and writes by bytes what has no piece."""
    return request.param, load_tokenizer(str(make(request.param, tmp_path_factory.mktemp("own"))))


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_a_token_ends_after_the_bytes_that_it_writes(exact: tuple[str, Tokenizer], text: str) -> None:
    """Also where a character is written by several tokens."""
    text = text.replace("<tool>", "")  # which is a token added to the folders, and not written in bytes
    name, tokenizer = exact
    pieces = pieces_of(tokenizer, tokenizer.encode([text])[0])
    if name == "BPE of LLaMA":
        sizes = [1 if re.fullmatch("<0x..>", piece) else len(piece.encode()) for piece in pieces]
        sizes[:1] = [size - 1 for size in sizes[:1]]  # without the space that SentencePiece begins with
    else:
        sizes = [len(piece) for piece in pieces]  # a character of its alphabet for each byte
    assert tokenizer.byte_ends(text).tolist() == np.cumsum(sizes, dtype=np.int64).tolist()


@cache
def vocabulary(tokenizer: Any) -> dict[int, str]:
    pieces = tokenizer.vocabulary if hasattr(tokenizer, "vocabulary") else tokenizer.pieces()
    return {number: piece for piece, number in pieces.items()}


def pieces_of(tokenizer: Tokenizer, ids: Ids) -> list[str]:
    """What the vocabulary calls each token, with spaces as spaces."""
    return [vocabulary(tokenizer)[int(number)].replace("▁", " ") for number in ids]


def test_a_character_of_several_tokens_is_cut_by_its_bytes(exact: tuple[str, Tokenizer]) -> None:
    _, tokenizer = exact
    assert tokenizer.byte_ends("a🙂b").tolist()[-6:] == [1, 2, 3, 4, 5, 6]


# -- where it is written ----------------------------------------------------------------------------------------------


def test_bits_stand_where_perplexity_does(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    tokenizer = load_tokenizer("sample")
    rows = validation_rows(open_source("sample", "validation"), TokenRows(tokenizer, "pad", 48), 2000)
    labels = sum(int((row.labels >= 0).sum()) for row in rows)
    expected = summary["eval_loss"] * labels / (math.log(2) * sum(bytes_of(rows)))
    assert summary["eval_bits_per_byte"] == last["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-9)
    answer = CliRunner().invoke(cli, ["eval", str(finished), "--json"], catch_exceptions=False)
    assert json.loads(answer.stdout)["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    told = CliRunner().invoke(cli, ["eval", str(finished)], catch_exceptions=False).stdout
    assert f"{expected:.4f} bits per byte" in told
    (comparison,) = compare(find([finished]))
    table = ranking(comparison)
    assert table.rows[0][table.columns.index("bits per byte")] == f"{expected:.4f}"
    (method,) = as_json([comparison])[0]["methods"].values()
    assert method["eval_bits_per_byte"] == summary["eval_bits_per_byte"]
