"""Tiny tokenizers of every family, each as it is published: the file or folder that ``--tokenizer`` names."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog, it's 1984: zürich café aaaa aaa </div> a<sep>b 日本"] * 50
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "unigram with the trainer's ids": {"vocab_size": 64},
    "unigram with T5's ids": {"vocab_size": 64, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "unigram with bytes": {"vocab_size": 330, "byte_fallback": True},
    "unigram with symbols": {"vocab_size": 70, "user_defined_symbols": ["<sep>", "<sepa>", "qu"]},
    "BPE": {"vocab_size": 90, "model_type": "bpe"},
    "BPE with bytes": {"vocab_size": 350, "model_type": "bpe", "byte_fallback": True},
    "BPE of LLaMA": {
        "vocab_size": 350,
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "split_digits": True,
    },
    "BPE without a first space": {"vocab_size": 90, "model_type": "bpe", "add_dummy_prefix": False},
    "BPE with symbols": {"vocab_size": 90, "model_type": "bpe", "user_defined_symbols": ["<sep>", "<sepa>", "qu"]},
    "identity without extra spaces": {"vocab_size": 64, "normalization_rule_name": "identity"},
    "characters": {"vocab_size": 64, "model_type": "char"},
}
"""What tells the models from the trainer's defaults."""
UNLIKE: dict[str, dict[str, Any]] = {
    "words": {"vocab_size": 15, "model_type": "word"},
    "spaces behind words": {"vocab_size": 64, "treat_whitespace_as_suffix": True},
}
"""The same, of models that transformers has no like of."""
RESERVED = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
HUGGING_FACE = ("GPT-2", "Llama-3", "WordPiece", "Unigram", "WordLevel")


def make(family: str, folder: Path) -> Path:
    """Make the tokenizer of a family in ``folder``."""
    flags = (SENTENCEPIECE | UNLIKE).get(family)
    if flags is None:
        return hugging_face(family, folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "own"), minloglevel=2, hard_vocab_limit=False, **flags
    )
    return folder / "own.model"


def hugging_face(family: str, folder: Path) -> Path:
    """Make a folder with tokenizer.json, and templates that add markers."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if family == "GPT-2":  # one token in every role
        form = Tokenizer(models.BPE())
        form.pre_tokenizer, form.decoder = byte_level, decoders.ByteLevel()
        special = ["<|endoftext|>"]
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    elif family == "Llama-3":  # special tokens without a role
        form = Tokenizer(models.BPE(ignore_merges=True))
        words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        form.pre_tokenizer, form.decoder = pre_tokenizers.Sequence([words, byte_level]), decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED]
        roles = {"bos_token": special[0], "eos_token": special[1]}
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet)
    elif family == "WordPiece":
        form = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        form.normalizer, form.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        form.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    elif family == "Unigram":  # whose special tokens are pieces as any other
        form = Tokenizer(models.Unigram())
        form.normalizer, form.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        form.decoder = decoders.Metaspace()
        special = ["<s>", "</s>", "<unk>"]
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>")
    else:
        form = Tokenizer(models.WordLevel(unk_token="<unk>"))
        form.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = ["<s>", "</s>", "<unk>"]
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=special)
    form.train_from_iterator(CORPUS, trainer)
    form.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    form.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    ends = [(roles[role], form.token_to_id(roles[role])) for role in ("bos_token", "eos_token")]
    form.post_processor = processors.TemplateProcessing(f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    form.enable_truncation(8)  # as those have that were published with their last call's settings
    return write(form, folder, roles)


def write(form: Tokenizer, folder: Path, roles: dict[str, str]) -> Path:
    """Write a tokenizer's folder."""
    folder.mkdir(exist_ok=True)
    form.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
