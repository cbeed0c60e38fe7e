"""Folders of small models with random weights, as transformers writes them, and transformers' own loop over rows."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import TINY
from galore_pretrain.text.sources import in_turn, open_source
from galore_pretrain.text.tokenizer import load_tokenizer

SMALL = TINY | {"initializer_range": 0.2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_folder(
    folder: Path,
    family: str = "Llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    tokenizer: str | None = "sample",
    **changes: Any,
) -> str:
    """A folder of this family's model with random weights, norms and biases too; with the sample's tokenizer."""
    config = getattr(transformers, f"{family}Config")(**(SMALL | changes))
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer is not None:
        load_tokenizer(tokenizer).save(folder, config.max_position_embeddings, config.vocab_size)
    return str(folder)


def begin_texts(folder: str, number: int = 0) -> None:
    """Have the folder's tokenizer begin each text with its token ``number``, as Llama 2's and 3's do with theirs."""
    file = Path(folder) / "tokenizer.json"
    form = tokenizers.Tokenizer.from_file(str(file))
    marker = form.id_to_token(number)
    form.post_processor = tokenizers.processors.TemplateProcessing(
        single=[marker, "$A"], pair=[marker, "$A", "$B:1"], special_tokens=[(marker, number)]
    )
    form.save(str(file))
    settings = Path(folder) / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": marker}))


def change_config(folder: str, **changes: Any) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def transformers_loss(folder: str | Path, tokens: int = 2000, length: int = 48) -> float:
    """The loss by transformers' own model, of the sample's validation documents, a row each, as a run lays them out.

    The markers are those that the folder's ``AutoTokenizer`` sets, and the end marker behind a document.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = load_tokenizer("sample")
    source = open_source("sample", "validation", None)
    total, count, read = 0.0, 0, 0
    for _, _, text in in_turn(source):
        if not text or text.isspace():
            continue
        ids = [*tokenizer(text)["input_ids"][: length - 1], plain.eos_id]
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]))
        total += float(output.loss) * (len(ids) - 1)
        count += len(ids) - 1
        read += len(ids)
        if read >= tokens:
            break
    return total / count
