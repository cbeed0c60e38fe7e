"""TRL's SFTTrainer with these optimizers: the example of Hugging Face's page on GaLore, on a tiny Mistral."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import pages
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.trainers import set_optimizer

trl = pytest.importorskip("trl")
LINE = "the film was a long and very dull story of two old men who never laugh but for one good scene"
WORDS = LINE.split()
TEXTS = [" ".join(WORDS[(i + j * (1 + i % 3)) % len(WORDS)] for j in range(8 + i % 9)) for i in range(40)]


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "</s>", "<pad>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 24}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    return MistralForCausalLM(MistralConfig(max_position_embeddings=32, **sizes, **heads))


def trained(folder: Path, optim: str, *, resume: str | None = None, **changes: Any) -> Any:
    """The example, with today's arguments: all that was SFTTrainer's own is in SFTConfig."""
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "optim": optim,
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=4, update_proj_gap=3, scale=0.10",
        "dataset_text_field": "text",
        "max_length": 24,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    trainer = trl.SFTTrainer(
        model=mistral(),
        args=trl.SFTConfig(**values | changes),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
    )
    set_optimizer(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_what_the_page_on_python_shows_trains(tmp_path: Path) -> None:
    """As it stands there, but for the length, and on a CPU."""
    shorter = {"output_dir": str(tmp_path), "max_steps": 2, "max_length": 24, "use_cpu": True, "bf16": False}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    names: dict[str, Any] = {
        "SFTConfig": lambda **values: trl.SFTConfig(**values | shorter | quiet),
        "SFTTrainer": trl.SFTTrainer,
        "model": mistral(),
        "tokenizer": tokenizer(),
        "dataset": Dataset.from_dict({"text": TEXTS}),
    }
    exec(pages.code("docs/python.md", "python")[3], names)
    assert names["trainer"].state.global_step == 2
    assert isinstance(names["trainer"].optimizer.optimizer, RuleOptimizer)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_the_example(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains without galore_torch, and layerwise with accumulation as it does without."""
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    common = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "packing": packing}
    whole = trained(tmp_path / "whole", "galore_adamw", **common)
    layerwise = trained(tmp_path / "layerwise", "galore_adamw_layerwise", **common)
    assert losses(whole)[-1] < losses(whole)[0] - 0.2
    assert losses(layerwise) == pytest.approx(losses(whole), rel=1e-6)
    assert len(losses(whole)) == 8


def test_layerwise_in_8_bits_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Theirs of this name cannot: its state is not in the checkpoint."""
    common = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0}
    optim = "galore_adamw_8bit_layerwise"
    whole = trained(tmp_path / "whole", optim, save_strategy="steps", save_steps=4, **common)
    again = trained(tmp_path / "again", optim, resume=str(tmp_path / "whole" / "checkpoint-4"), **common)
    assert losses(again) == losses(whole)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
