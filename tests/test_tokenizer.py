"""Tokenizers: ids, control tokens spelled by text, what an exported folder gives back, refusals."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Form
from transformers import AutoTokenizer, LlamaConfig

from families import HUGGING_FACE, RESERVED, SENTENCEPIECE, UNLIKE, make, write
from galore_pretrain.errors import InputError
from galore_pretrain.rundir.export import try_export
from galore_pretrain.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    begun,
    load_folder,
    load_tokenizer,
)
from pretrained import begin_texts

FRAGMENTS = [
    "the ",
    "quick",
    " fox",
    "qu",
    "aaa",
    "1984",
    "é",
    "e\u0301",
    "日本",
    "한글",
    "🙂",
    "👍🏽",
    "▁",
    "ﬁ",
    "½",
    "Ａ",
]
FRAGMENTS += [" ", "  ", "\n", "\t", "\u00a0", "’", "<", "</div>", "<sep>", "<sepa>", "<tool>", "<0x0A>", "x\0y"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", *RESERVED]
SPECIAL += ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ANY_TEXT = st.lists(st.sampled_from(FRAGMENTS + SPECIAL), max_size=8).map("".join)
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
    tokenizer.save(tmp_path, model_max_length=77, vocabulary=tokenizer.vocab_size)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported(TEXTS)["input_ids"] == encoded(tokenizer, TEXTS)  # a prompt must not end with </s>
    assert exported.eos_token_id == tokenizer.eos_id
    assert exported.model_max_length == 77


@pytest.mark.parametrize("sp_model", ["bpe"], indirect=True)
def test_a_marker_of_the_beginning_is_the_folders(sp_model: Path, tmp_path: Path) -> None:
    """Llama 2's: SentencePiece gives the ids. That a marker stands before them, only tokenizer.json says."""
    alone = load_tokenizer(str(sp_model))
    alone.save(tmp_path, model_max_length=77, vocabulary=alone.vocab_size)
    assert not load_tokenizer(str(tmp_path)).adds_bos
    begin_texts(str(tmp_path), 1)
    direct = load_tokenizer(str(tmp_path))
    assert type(direct) is SentencePieceTokenizer
    assert (direct.bos_id, direct.adds_bos, alone.adds_bos) == (1, True, False)
    tokenizer = begun(direct, "auto")
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = exported(text)["input_ids"] if text else []
        assert encoded(tokenizer, [text]) == [expected]
        assert encoded(tokenizer, [text], first=2)[0][:2] == expected[:2]
    (tmp_path / "kept").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "kept" / name).write_bytes(content)
    assert encoded(begun(load_folder(tmp_path / "kept", "kept"), "yes"), TEXTS) == encoded(tokenizer, TEXTS)


def test_hugging_face_folder(tmp_path: Path) -> None:
    source = load_tokenizer("sample")
    source.save(tmp_path, model_max_length=1024, vocabulary=1024)
    (tmp_path / "spiece.model").unlink()  # so that the folder is tokenizer.json alone
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (1024, 1)
    assert encoded(tokenizer, TEXTS) == encoded(source, TEXTS)
    assert 1 not in tokenizer.encode(["the end </s> the start"])[0]
    (tmp_path / "again").mkdir()
    tokenizer.save(tmp_path / "again", model_max_length=1024, vocabulary=1024)
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


# -- every family -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*SENTENCEPIECE, *HUGGING_FACE])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer, and what AutoTokenizer makes of its exported folder."""
    tokenizer = load_tokenizer(str(make(request.param, tmp_path_factory.mktemp("own"))))
    return tokenizer, exported(tokenizer, tmp_path_factory.mktemp("exported"))


def exported(tokenizer: Tokenizer, folder: Path, vocabulary: int = 1024) -> Any:
    architecture(vocabulary).save_pretrained(folder)
    tokenizer.save(folder, model_max_length=77, vocabulary=vocabulary)
    return AutoTokenizer.from_pretrained(folder)


def architecture(vocabulary: int = 1024) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=77)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_a_prompt_gets_the_ids_of_training(family: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, theirs = family
    assert theirs(text, verbose=False)["input_ids"] == encoded(tokenizer, [text])[0]


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_no_text_makes_a_special_token(family: tuple[Tokenizer, Any], text: str) -> None:
    """But the unknown one, where it is nothing else."""
    tokenizer, theirs = family
    special = {number for number, token in theirs.added_tokens_decoder.items() if token.special}
    assert len(special) >= 1
    if theirs.unk_token_id != theirs.eos_token_id:
        special -= {theirs.unk_token_id}
    ids = encoded(tokenizer, [text])[0]
    assert special.isdisjoint(ids)
    assert max(ids, default=0) < tokenizer.vocab_size


def test_the_trial_has_nothing_to_say_of_any_family(
    family: tuple[Tokenizer, Any], caplog: pytest.LogCaptureFixture
) -> None:
    try_export(architecture(), family[0], ["the quick brown fox\n\nnext"])
    assert caplog.messages == []


def test_an_exported_tokenizer_writes_the_same_text(family: tuple[Tokenizer, Any]) -> None:
    tokenizer, theirs = family
    ids = encoded(tokenizer, ["the quick brown fox jumps over the lazy dog"])[0]
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.model_max_length == 77


def test_an_exported_folder_is_read_by_sentencepiece_again(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make("unigram with the trainer's ids", tmp_path)))
    exported(tokenizer, tmp_path / "model")
    again = load_tokenizer(str(tmp_path / "model"))
    assert isinstance(again, SentencePieceTokenizer)
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", UNLIKE)
def test_a_model_that_transformers_has_no_like_of_is_told(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(make(name, tmp_path)))
    try_export(architecture(), tokenizer, [])
    why, consequence = caplog.messages
    assert "transformers has no like of" in why
    # By transformers 5.23 and by 5.0.
    wanted = ("AutoTokenizer will not take the exported folder", "AutoTokenizer will give")
    assert any(text in consequence for text in wanted)
    tokenizer.save(tmp_path, 77, 1024)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_text_of_the_run_that_gets_other_ids_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizers library loses the accent here."""
    tokenizer = load_tokenizer(str(make("BPE with bytes", tmp_path)))
    try_export(architecture(), tokenizer, ["plain", "①\u0301"])
    (message,) = caplog.messages
    assert "AutoTokenizer will give 1 of" in message
    caplog.clear()
    try_export(architecture(), tokenizer, ["plain " * 40 + "①\u0301"])
    (message,) = caplog.messages
    shown = re.search(r"behind '(.*)' come (.*), in training (.*)", message)
    assert shown is not None
    before, theirs, ours = shown.groups()
    assert before.endswith("plain plain 1")
    assert (theirs, ours) == ("[]", "['<0xCC>', '<0x81>']")


# -- special tokens ---------------------------------------------------------------------------------------------------


def words(folder: Path, vocabulary: list[str], **roles: str) -> Path:
    """Makes a tokenizer whose tokens are characters."""
    form = Form(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="?"))
    form.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    form.add_special_tokens(list(roles.values()))
    return write(form, folder, roles)


def test_a_special_token_between_other_text_is_spelled_by_the_export_too(tmp_path: Path) -> None:
    """At the beginning of a word it is part of a larger piece, so that it shows in the midst of one alone."""
    pieces = [*"▁</s>toxy", "<unk>", "▁<tool>", "<tool>"]
    form = Form(models.Unigram([(piece, -float(len(piece))) for piece in pieces], pieces.index("<unk>")))
    form.pre_tokenizer = pre_tokenizers.Metaspace()
    form.add_special_tokens(["</s>", "<tool>"])
    tokenizer = load_tokenizer(str(write(form, tmp_path, {"eos_token": "</s>", "unk_token": "<unk>"})))
    (tmp_path / "model").mkdir()
    tokenizer.save(tmp_path / "model", model_max_length=64, vocabulary=64)
    text = "x<tool>y"
    ids = encoded(tokenizer, [text])[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"] == ids


def test_a_special_token_of_normalized_text_is_spelled(tmp_path: Path) -> None:
    """The library takes those out of a text even where it is told to take none."""
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "</s>", *"▁</s>xy"])}
    form = Form(models.BPE(vocabulary, [], unk_token="<unk>"))
    form.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    form.add_special_tokens([AddedToken("</s>", normalized=True)])
    tokenizer = load_tokenizer(str(write(form, tmp_path, {"eos_token": "</s>", "unk_token": "<unk>"})))
    (tmp_path / "model").mkdir()
    tokenizer.save(tmp_path / "model", model_max_length=64, vocabulary=64)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("</s>", "x</s>y", "x </s> y"):
        ids = encoded(tokenizer, [text])[0]
        assert exported.convert_ids_to_tokens(ids) == list(("▁" + text).replace(" ", "▁"))
        assert exported(text)["input_ids"] == ids


@pytest.mark.parametrize("name", ["WordLevel", "WordPiece", "Unigram", "Llama-3"])
def test_an_exported_folder_is_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make(name, tmp_path)))
    (tmp_path / "model").mkdir()
    tokenizer.save(tmp_path / "model", model_max_length=64, vocabulary=1000)
    assert load_tokenizer(str(tmp_path / "model")).fingerprint == tokenizer.fingerprint


def test_a_control_piece_is_cut_where_no_piece_goes_across_wherever_it_stands(tmp_path: Path) -> None:
    """At the beginning of a word `▁<` is a piece, behind a bracket `(<|` is, and elsewhere `<|`."""
    lines = ["a<|b c<|d <e <f <g (<|h (<|i"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "own"), minloglevel=2, vocab_size=28,
        model_type="bpe", hard_vocab_limit=False, user_defined_symbols=["qu"], control_symbols=["<|eot|>"],
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path / "own.model"))
    tokenizer.save(tmp_path, model_max_length=64, vocabulary=64)
    assert encoded(tokenizer, ["(<|"]) == [[tokenizer.pieces()["▁(<|"]]]
    texts = ["a<|eot|>", "<|eot|>", "a <|eot|> b", "(<|eot|>"]
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == encoded(tokenizer, texts)


def test_a_symbol_of_the_user_wins_over_pieces_that_go_across_its_ends(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 1  # Unigram
    kinds = {"<unk>": 2, "</s>": 3, "<tool>": 4}
    scores = dict.fromkeys([*kinds, *"▁<tol>"], -1.0) | {"x": -3.0, "x<": -1.0}
    for name, score in scores.items():
        model.pieces.add(piece=name, score=score, type=kinds.get(name, 1))
    (tmp_path / "own.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(str(tmp_path / "own.model"))
    tokenizer.save(tmp_path, model_max_length=64, vocabulary=64)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.tokenize("x<tool>") == ["▁", "x", "<tool>"]
    assert exported("x<tool>")["input_ids"] == encoded(tokenizer, ["x<tool>"])[0]


def test_a_special_token_of_one_character_is_filtered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot be spelled by others, nor can the exported tokenizer filter: so it is told."""
    path = words(tmp_path / "own", ["?", "!", "a", "b", "<eos>"], eos_token="<eos>", pad_token="!", unk_token="?")
    tokenizer = load_tokenizer(str(path))
    assert encoded(tokenizer, ["a!b"]) == [[2, 0, 3]]
    try_export(architecture(), tokenizer, [])
    assert "AutoTokenizer will give" in caplog.text


def test_a_small_vocabulary_is_one(tmp_path: Path) -> None:
    path = words(tmp_path / "own", ["a", "b", "<eos>"], eos_token="<eos>")
    tokenizer = load_tokenizer(str(path))
    assert encoded(tokenizer, ["ab", ""]) == [[0, 1], []]
    with pytest.raises(InputError, match=r"a text cannot be written .* knows all characters"):
        tokenizer.encode(["abc"])
    try_export(architecture(), tokenizer, ["ab"])  # the probes have characters that the run need not have


@pytest.mark.parametrize("name", ["LlamaTokenizer", "T5Tokenizer", "GPT2Tokenizer"])
def test_a_folder_without_a_vocabulary_is_refused(name: str, tmp_path: Path) -> None:
    """transformers makes a tokenizer of nothing."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "</s>"}))
    with pytest.raises(InputError, match=r"is tokenizer\.json missing"):
        load_tokenizer(str(tmp_path))


def test_a_pad_token_beyond_the_models_vocabulary_is_left_out(tmp_path: Path) -> None:
    path = make("Unigram", tmp_path)
    form = Form.from_file(str(path / "tokenizer.json"))
    form.add_special_tokens(["<pad>"])
    config = json.loads((path / "tokenizer_config.json").read_text())
    write(form, path, config | {"pad_token": "<pad>"})
    tokenizer = load_tokenizer(str(path))
    beyond = form.token_to_id("<pad>")
    assert tokenizer.vocab_size == beyond
    theirs = exported(tokenizer, tmp_path / "small", vocabulary=beyond)
    assert (theirs.pad_token, len(theirs)) == (None, beyond)
    assert exported(tokenizer, tmp_path / "large").pad_token_id == beyond


# -- the fingerprint --------------------------------------------------------------------------------------------------


def merged(form: Form) -> None:
    content = json.loads(form.model.__getstate__())
    content["merges"] = content["merges"][:5]
    form.model = models.BPE(content["vocab"], [tuple(pair) for pair in content["merges"]])


def lower(form: Form) -> None:
    form.normalizer = normalizers.Lowercase()


def by_spaces(form: Form) -> None:
    form.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), form.pre_tokenizer])


def with_word(form: Form) -> None:
    form.add_tokens([AddedToken("fox", normalized=False)])


def with_mark(form: Form) -> None:
    form.add_special_tokens(["T"])


def without_template(form: Form) -> None:
    form.post_processor = processors.Sequence([])
    form.no_truncation()


@pytest.mark.parametrize("change", [merged, lower, by_spaces, with_word, with_mark])
def test_a_fingerprint_tells_what_changes_ids(change: Callable[[Form], None], tmp_path: Path) -> None:
    before, after = changed(change, tmp_path)
    assert encoded(before, ["The quick fox"]) != encoded(after, ["The quick fox"])
    assert before.fingerprint != after.fingerprint


def test_a_fingerprint_is_alike_where_ids_are(tmp_path: Path) -> None:
    before, after = changed(without_template, tmp_path)
    assert before.fingerprint == after.fingerprint


def test_the_fingerprint_of_old_checkpoints_is_of_the_vocabulary(tmp_path: Path) -> None:
    before, after = changed(lower, tmp_path)
    assert before.vocabulary_fingerprint == after.vocabulary_fingerprint != before.fingerprint
    own = load_tokenizer("sample")
    assert own.vocabulary_fingerprint == own.fingerprint  # of the whole file


def changed(change: Callable[[Form], None], folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer before and after its folder is changed."""
    path = make("GPT-2", folder)
    before = load_tokenizer(str(path))
    form = Form.from_file(str(path / "tokenizer.json"))
    change(form)
    form.save(str(path / "tokenizer.json"))
    return before, load_tokenizer(str(path))


# -- folders with two forms -------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A folder with tokenizer.model, and tokenizer.json of the same ids."""
    tokenizer = load_tokenizer(str(make("BPE of LLaMA", tmp_path)))
    exported(tokenizer, tmp_path / "both")
    assert (tmp_path / "both" / "tokenizer.model").exists()
    return tmp_path / "both"


def test_sentencepiece_reads_a_folder_where_the_ids_are_the_same(both: Path) -> None:
    assert isinstance(load_tokenizer(str(both)), SentencePieceTokenizer)


def test_added_tokens_of_a_folder_count(both: Path, caplog: pytest.LogCaptureFixture) -> None:
    form = Form.from_file(str(both / "tokenizer.json"))
    form.add_tokens([AddedToken("<turn>", normalized=False)])
    form.save(str(both / "tokenizer.json"))
    tokenizer = load_tokenizer(str(both))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert form.token_to_id("<turn>") in encoded(tokenizer, ["the <turn> fox"])[0]
    assert "those of transformers are used" in caplog.text


def test_a_folders_own_pieces_count(both: Path) -> None:
    """Also where the probes have none of them: here, a merge that only one piece needs."""
    content = json.loads((both / "tokenizer.json").read_text())
    last = content["model"]["merges"].pop()
    (both / "tokenizer.json").write_text(json.dumps(content))
    assert isinstance(load_tokenizer(str(both)), HuggingFaceTokenizer), last


def test_a_model_file_of_another_kind_is_passed_over(both: Path) -> None:
    (both / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's
    assert isinstance(load_tokenizer(str(both)), HuggingFaceTokenizer)


def test_a_folder_of_a_model_file_alone_is_sentencepieces(both: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(both / "tokenizer.model", tmp_path / "alone")
    assert isinstance(load_tokenizer(str(tmp_path / "alone")), SentencePieceTokenizer)


def test_a_model_file_whose_class_cannot_be_loaded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one with code of its own, which is not run."""
    shutil.copy(make("BPE", tmp_path), tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(load_tokenizer(str(tmp_path)), SentencePieceTokenizer)
    assert "is used by itself, without what tokenizer_config.json says" in caplog.text
