"""Tokenizers: ids, control tokens spelled by text, what an exported folder gives back, refusals."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from galore_pretrain.errors import InputError
from galore_pretrain.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["Fellow-citizens of the Senate: hello!", "a  b\n\nc", "", "naïve “quotes”"]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def sp_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sp") / request.param
    byte_fallback = request.param == "bpe"  # as LLaMA's
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog it's 1984 zürich café"] * 50),
        model_prefix=str(prefix), vocab_size=330 if byte_fallback else 60, model_type=request.param, minloglevel=2,
        hard_vocab_limit=False, byte_fallback=byte_fallback, remove_extra_whitespaces=not byte_fallback,
        pad_id=-1 if byte_fallback else 0, bos_id=1 if byte_fallback else -1, eos_id=2 if byte_fallback else 1,
        unk_id=0 if byte_fallback else 2, normalization_rule_name="identity" if byte_fallback else "nmt_nfkc",
    )  # fmt: skip
    return prefix.with_suffix(".model")


def encoded(tokenizer: Tokenizer, texts: list[str], first: int | None = None) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode(texts, first)]


def test_sample_is_shipped() -> None:
    tokenizer = load_tokenizer("sample")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (1024, 1)
    ids = encoded(tokenizer, TEXTS)
    assert [len(i) > 0 for i in ids] == [True, True, False, True]
    assert encoded(tokenizer, ["</s>"]) != [[1]]


def test_saved_folder_gives_the_same_ids(sp_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sp_model))
    tokenizer.save(tmp_path, model_max_length=77)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported(TEXTS)["input_ids"] == encoded(tokenizer, TEXTS)  # a prompt must not end with </s>
    assert exported.eos_token_id == tokenizer.eos_id
    assert exported.model_max_length == 77


def test_hugging_face_folder(tmp_path: Path) -> None:
    source = load_tokenizer("sample")
    source.save(tmp_path, model_max_length=1024)
    (tmp_path / "spiece.model").unlink()  # so that the folder is tokenizer.json alone
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (1024, 1)
    assert encoded(tokenizer, TEXTS) == encoded(source, TEXTS)
    assert 1 not in tokenizer.encode(["the end </s> the start"])[0]
    (tmp_path / "again").mkdir()
    tokenizer.save(tmp_path / "again", model_max_length=1024)
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("hello")["input_ids"]


@pytest.mark.parametrize("name", ["nothing", "./a/b", "no.such.model"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_tokenizer(name)


def test_unfit_files(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_text("not a model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "a.model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="--tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["t5", "some/repository"])
def test_offline_names_the_way_on(name: str) -> None:
    with pytest.raises(InputError, match="--tokenizer sample, or with --tokenizer PATH"):
        load_tokenizer(name)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("the quick brown  \n\t.é\u0301\u200b12ß’ﬁ"), max_size=400), first=st.integers(1, 12)
)
def test_the_first_ids_of_a_text_need_not_all_of_it(sp_model: Path, text: str, first: int) -> None:
    tokenizer = load_tokenizer(str(sp_model))
    (whole,), (begun,) = encoded(tokenizer, [text]), encoded(tokenizer, [text], first)
    assert begun[:first] == whole[:first]
    assert len(begun) >= min(first, len(whole))


def test_long_texts_are_not_tokenized_whole_where_their_beginning_is_enough() -> None:
    tokenizer = load_tokenizer("sample")
    ids = encoded(tokenizer, ["the state of the union " * 1000, "short", "x" * 5000], 20)
    assert 20 <= len(ids[0]) < 200
    assert ids[1:] == encoded(tokenizer, ["short", "x" * 5000])
