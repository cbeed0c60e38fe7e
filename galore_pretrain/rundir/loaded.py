"""What training left, loaded again: to be evaluated, exported, or to speak."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.recipes import reference_batch
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama import without_masks
from galore_pretrain.rundir import checkpoint
from galore_pretrain.text.batches import TokenRows, validation_rows
from galore_pretrain.text.hub import check_hub, first_line
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import Tokenizer, load_tokenizer
from galore_pretrain.train.build import model_for
from galore_pretrain.train.evaluate import Evaluation, evaluate
from galore_pretrain.train.inputs import architecture_for


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and how its text is read: as in the run that made it, or as told."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    config: RunConfig


def load(path: Path, given: Mapping[str, Any], device: torch.device) -> LoadedModel:
    """The model of a checkpoint, of a run's newest one, or of a Hugging Face folder, which says nothing of its text.

    ``given`` replaces fields of the run's config. InputError where ``path`` is none of these.
    """
    found = checkpoint.newest(path / "checkpoints", set_aside=False)
    if found is None and checkpoint.is_checkpoint(path):
        found = checkpoint.opened(path)
    if found is not None:
        saved = found.state["config"]
        known = dict(saved)
        if "data" in given and "eval_data" not in given:
            known["eval_data"] = None
        config = replace(RunConfig.of(known), **given)
        tokenizer = load_tokenizer(config.tokenizer)
        model = model_for(config, architecture_for(config, tokenizer), device, fresh=False)
        found.load(checkpoint.model_tensors(model), part="model.")
        return LoadedModel(model.eval(), tokenizer, config)
    if _architectures(path / "config.json") != ["LlamaForCausalLM"]:
        raise InputError(
            f"{path}: neither a run, a checkpoint (a folder with state.json) nor a folder of a LlamaForCausalLM"
        )
    values = {
        "model": str(path / "config.json"),
        "optim": "adamw",
        "data": "sample",
        "tokenizer": str(path),
        "steps": 1,
    }
    config, _ = resolve({**values, **given}, {})
    try:  # of safetensors alone: a pickle could execute code
        loaded = LlamaForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True).to(device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: its weights cannot be loaded ({first_line(error)})") from error
    return LoadedModel(without_masks(loaded).eval(), load_tokenizer(config.tokenizer), config)


def _architectures(file: Path) -> Any:
    try:
        return json.loads(file.read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return None


def perplexity(trained: LoadedModel, device: torch.device) -> Evaluation:
    """Loss and perplexities over the validation text, as a run finds them."""
    config = trained.config
    check_hub(config.data, config.tokenizer)
    rows = TokenRows(trained.tokenizer, config.layout, config.max_length)
    source = open_source(config.data, "validation", config.eval_data, config.bad_data)
    text = validation_rows(source, rows, config.eval_tokens)
    size, reference = config.batch_size, reference_batch(config)
    return evaluate(trained.model, text, batch_size=size, reference_batch=reference, device=device)


@torch.no_grad()
def continue_text(
    trained: LoadedModel, prompt: str, *, tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """``prompt`` and up to ``tokens`` tokens that the model sets behind it; ``temperature`` 0 takes the likeliest."""
    model, tokenizer = trained.model, trained.tokenizer
    ids = tokenizer.encode([prompt])[0].tolist() or [tokenizer.eos_id]  # what ends a document stands before the next
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(ids)} tokens; the model has {model.config.max_position_embeddings} positions"
        )
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    written = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=min(tokens, room),
        use_cache=True,
        do_sample=temperature > 0,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        **sampling,
    )
    return tokenizer.decode(written[0].tolist())
