"""A small RoBERTa with random weights and a byte-level BPE tokenizer of its own, as transformers writes them; GLUE."""

from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import RobertaConfig, RobertaTokenizer

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""Special tokens with RoBERTa's ids; in its own vocabulary, ``<mask>`` is the last."""
TINY_ROBERTA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,  # of which the first two are padding's
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
VOCABULARY = 640


def load_script(name: str) -> Any:
    """A script of this repository as a module."""
    file = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    place = spec_from_file_location(name, file)
    assert place is not None
    assert place.loader is not None
    module = module_from_spec(place)
    place.loader.exec_module(module)
    return module


make_glue = load_script("make_glue")


def glue_texts() -> list[str]:
    """Every word of `make_glue`'s texts, each at the beginning of a text and behind a space."""
    words = [*make_glue.WORDS, *(word for markers in make_glue.MARKERS.values() for word in markers)]
    return [f"{word} {word}" for word in words] * 4


def make_tokenizer(folder: Path, texts: Iterable[str] | None = None) -> RobertaTokenizer:
    """Write a byte-level BPE tokenizer of RoBERTa's kind, in which each word of ``texts`` is a token or few."""
    form = Tokenizer(models.BPE())
    form.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    form.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    form.train_from_iterator(glue_texts() if texts is None else texts, trainer)
    form.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "tokenizer.json"
    form.save(str(plain))
    tokenizer = RobertaTokenizer.from_pretrained(str(folder), model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_roberta(
    folder: Path,
    kind: str = "RobertaForMaskedLM",
    *,
    texts: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> str:
    """A folder of a RoBERTa of this class of transformers with random weights, and of its tokenizer.

    By default it is what RoBERTa is published as, with the head of its pretraining, and knows `make_glue`'s words.
    """
    tokenizer = make_tokenizer(folder, texts)
    config = RobertaConfig(**{"vocab_size": len(tokenizer), **TINY_ROBERTA, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    model.to(dtype).save_pretrained(folder)
    return str(folder)
