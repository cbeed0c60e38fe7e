"""transformers' own Trainer with these optimizers: a loop by hand's losses, layerwise or not, resumed or not."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import default_data_collator

from galore_pretrain.optim import build_optimizer
from galore_pretrain.optim.galore import is_projected
from galore_pretrain.trainers import set_optimizer

pytest.importorskip("accelerate")
OPTIMS = ["galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"]
ROWS = {"galore_adamw_8bit": "galore_adamw8bit", "apollo_adamw": "apollo"}  # where the name is another one here
OPTIONS: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "scale": 0.25}
MICRO_BATCHES = 10  # of an epoch: with 4 an update, the last update has two
EPOCHS = 2


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of ids, of which some have few labels: a mean of means is another number."""

    def __len__(self) -> int:
        return 4 * MICRO_BATCHES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.arange(16).mul(1 + i % 3).add(i).remainder(60)
        labels = ids.clone()
        labels[: 1 + i % 12] = -100  # the first is no target, though older transformers count it
        return {"input_ids": ids, "labels": labels}


class Recorder:
    """Collates rows, and keeps the batches in the order in which the trainer took them."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: Any) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = default_data_collator(rows)
        self.batches.append({**batch})
        return batch

    def updates(self, micro_batches: int) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each update. An update ends with its epoch."""
        for start in range(0, len(self.batches), MICRO_BATCHES):
            epoch = self.batches[start : start + MICRO_BATCHES]
            for first in range(0, MICRO_BATCHES, micro_batches):
                yield epoch[first : first + micro_batches]


def mistral(dtype: torch.dtype = torch.float32) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    return MistralForCausalLM(MistralConfig(max_position_embeddings=32, **sizes, **heads)).to(dtype)


def trainer_for(
    folder: Path, optim: str = "galore_adamw", *, model: Any = None, recorder: Any = None, **changes: Any
) -> Trainer:
    values = {
        "output_dir": str(folder),
        "optim": optim,
        "optim_args": ", ".join(f"{name}={value}" for name, value in OPTIONS.items()),
        "optim_target_modules": ["attn", "mlp"],
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**values | changes)
    if model is None:
        model = mistral()
    return Trainer(model=model, args=arguments, train_dataset=Rows(), data_collator=recorder)


def trained(folder: Path, optim: str, *, resume: str | None = None, **changes: Any) -> Trainer:
    how = {name: changes.pop(name) for name in ("layerwise", "clip_norm") if name in changes}
    trainer = trainer_for(folder, optim, **changes)
    set_optimizer(trainer, **how)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach() for p in trainer.model.parameters()]  # type: ignore[union-attr]


def losses_by_hand(recorder: Recorder, row: str, micro_batches: int, clip: float) -> list[float]:
    model = mistral()
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    optimizer = build_optimizer(model, row, lr=0.01, weight_decay=0.1, undecayed=norms, seed=7, **OPTIONS)
    updates = list(recorder.updates(micro_batches))
    losses = []
    for number, batches in enumerate(updates):
        factor = number / 2 if number < 2 else (len(updates) - number) / (len(updates) - 2)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("optim", OPTIMS)
def test_losses_are_those_of_a_loop_by_hand(optim: str, micro_batches: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Schedule, clipping, sums, weight decay, seed: what the arguments say is what is done, without galore_torch."""
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    recorder = Recorder()
    trainer = trained(tmp_path, optim, recorder=recorder, gradient_accumulation_steps=micro_batches, max_grad_norm=0.5)
    assert len(recorder.batches) == EPOCHS * MICRO_BATCHES
    losses = logged(trainer, "loss")
    assert losses == pytest.approx(losses_by_hand(recorder, ROWS.get(optim, optim), micro_batches, 0.5), rel=1e-6)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("micro_batches", "clip"), [(1, 0.0), (1, 0.5), (4, 0.0)])
@pytest.mark.parametrize("optim", OPTIMS)
def test_layerwise_is_global(optim: str, micro_batches: int, clip: float, tmp_path: Path) -> None:
    """Accumulation included, which transformers refuses; the norm that was clipped is logged, and else none."""
    common = {"gradient_accumulation_steps": micro_batches, "max_grad_norm": clip}
    whole = trained(tmp_path / "global", optim, **common)
    layerwise = trained(tmp_path / "layerwise", optim, layerwise=True, **common)
    if micro_batches == 1 and not clip:  # the trainer's own norm is summed in another order
        assert logged(layerwise, "loss") == logged(whole, "loss")
    assert logged(layerwise, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    if clip:
        assert logged(layerwise, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-5)
        assert max(logged(whole, "grad_norm")) > clip
    else:
        assert not logged(layerwise, "grad_norm")


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast: bool, tmp_path: Path) -> None:
    """Weights in bf16, or in fp32 under the trainer's autocast; with the name that asks for layerwise updates."""
    results = []
    for optim in ("galore_adamw_8bit", "galore_adamw_8bit_layerwise"):
        model = mistral(torch.float32 if autocast else torch.bfloat16)
        results.append(trained(tmp_path / optim, optim, model=model, bf16=autocast, max_grad_norm=0.0))
    whole, layerwise = results
    assert logged(layerwise, "loss") == logged(whole, "loss")
    assert logged(whole, "loss")[-1] < logged(whole, "loss")[0] - 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(layerwise), strict=True))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("optim", OPTIMS)
def test_resumes_bit_for_bit(optim: str, layerwise: bool, tmp_path: Path) -> None:
    common = {"layerwise": layerwise, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    whole = trained(tmp_path / "whole", optim, save_strategy="steps", save_steps=2, **common)
    again = trained(tmp_path / "again", optim, resume=str(tmp_path / "whole" / "checkpoint-2"), **common)
    assert logged(again, "loss") == logged(whole, "loss")  # the first two are the checkpoint's
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_the_projected_norm_is_clipped_where_that_is_said(tmp_path: Path) -> None:
    common = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.1}
    whole = trained(tmp_path / "global", "galore_adamw", **common)
    layerwise = trained(tmp_path / "layerwise", "galore_adamw_layerwise", clip_norm="projected", **common)
    norm, projected = logged(whole, "grad_norm")[0], logged(layerwise, "grad_norm")[0]
    assert 0.1 < projected < norm  # of the same weights
    assert logged(layerwise, "loss")[-1] < logged(layerwise, "loss")[0] - 0.1


def test_skipped_tensors_are_logged(tmp_path: Path) -> None:
    model = mistral()
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    trainer = trained(tmp_path, "galore_adamw_layerwise", model=model, logging_steps=5)
    assert logged(trainer, "skipped_tensors") == [5] * (EPOCHS * MICRO_BATCHES // 5)
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.model.embed_tokens.weight, mistral().model.embed_tokens.weight)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Breaks the training off inside an update."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_a_training_that_is_broken_off_leaves_nothing_behind(tmp_path: Path) -> None:
    common = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "whole", "galore_adamw_layerwise", **common)
    trainer = trainer_for(tmp_path / "broken", "galore_adamw_layerwise", **common)
    set_optimizer(trainer)
    trainer.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(trainer), strict=True))

    batch = {name: value[None] for name, value in Rows()[0].items()}
    trainer.model(**batch).loss.backward()  # type: ignore[misc]
    assert all(p.grad is not None for p in trainer.model.parameters())  # type: ignore[union-attr]


def test_arguments_of_the_trainer_are_obeyed(tmp_path: Path) -> None:
    def groups(*, options: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
        trainer = trainer_for(tmp_path, **changes)
        set_optimizer(trainer, **options or {})
        return trainer.create_optimizer().param_groups

    matrices, rest, vectors = groups(adam_beta2=0.95, adam_epsilon=1e-6)
    assert (matrices["lr"], matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.1, 0.0)
    assert {name.split(".")[-2] for name in rest["param_names"]} == {"embed_tokens", "lm_head"}
    assert all("norm" in name for name in vectors["param_names"])
    assert matrices["betas"] == rest["betas"] == (0.9, 0.95)
    assert "eps=1e-06" in matrices["settings"]
    assert "rank=4" in matrices["settings"]

    (matrices, *_) = groups(optim_target_modules=r".*\.(q|k)_proj")
    assert {name.split(".")[-2] for name in matrices["param_names"]} == {"q_proj", "k_proj"}
    (matrices, *_) = groups(optim_target_modules="all-linear")
    assert "lm_head.weight" in matrices["param_names"]
    (matrices, *_) = groups(optim_target_modules=None)
    names = {f"{name}.weight" for name, module in mistral().named_modules() if is_projected(name, module)}
    assert set(matrices["param_names"]) == names
    (matrices, *_) = groups(options={"optim": "fira", "rank": 3, "basis": "svd"}, optim_args="scale=0.5")
    assert "Fira(" in matrices["settings"]
    assert "rank=3" in matrices["settings"]
    (matrices, *_) = groups(optim_args=None)
    assert "rank=128" in matrices["settings"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            {"layerwise": True},
            "of 4 micro-batches keep low-rank sums.*max_grad_norm=0",
        ),
        ({}, {"clip_norm": "projected"}, "leave it out"),
        ({}, {"optim": "adamw_layerwise", "clip_norm": "projected"}, "leave it out"),
        ({"max_grad_norm": 0.0}, {"layerwise": True, "clip_norm": "projected"}, "leave it out"),
        ({}, {"clip_norm": "half"}, "clip_norm 'half' is unknown; choose from full, projected"),
        ({}, {"rnk": 4}, "has no option rnk"),
        ({}, {"optim": "galore_adan"}, "did you mean galore_adam"),
        ({}, {"optim": "lora"}, "is a way to build a model"),
        ({"optim_args": "rank 4"}, {}, "optim_args has 'rank 4'; write NAME=VALUE"),
        ({"optim_args": "proj=random"}, {"optim": "apollo"}, "has no option proj"),
        ({"optim_target_modules": ["nothing"]}, {}, "no trained module of the model is one of the targets"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = trainer_for(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        set_optimizer(trainer, **options)


def test_each_training_of_a_new_model_has_a_new_optimizer(tmp_path: Path) -> None:
    """As in a search of hyper-parameters: the model, and what the arguments say, are taken when training begins."""

    def new_model() -> MistralForCausalLM:
        return mistral()

    results = []
    for layerwise, rates in ((True, (0.1, 0.01)), (False, (0.01,))):
        arguments = trainer_for(tmp_path, max_grad_norm=0.0).args
        trainer = Trainer(model_init=new_model, args=arguments, train_dataset=Rows())
        set_optimizer(trainer, layerwise=layerwise)
        for rate in rates:
            trainer.args.learning_rate = rate
            trainer.train()
        results.append(logged(trainer, "loss"))
    assert results[0] == results[1]


def test_a_trainer_has_one_optimizer(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    set_optimizer(trainer)
    with pytest.raises(ValueError, match="has an optimizer already"):
        set_optimizer(trainer)
    trainer = trainer_for(tmp_path)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has an optimizer already"):
        set_optimizer(trainer)


def test_transformers_that_takes_classes_alone_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_for(tmp_path)
    monkeypatch.delattr("transformers.trainer.is_optimizer_factory")
    with pytest.raises(ValueError, match=r"transformers .* update it to 5\.6"):
        set_optimizer(trainer)


def test_layerwise_updates_are_of_one_process(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers.training_args import ParallelMode

    trainer = trainer_for(tmp_path)
    for kind in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        monkeypatch.setattr(trainer, kind, True)
        with pytest.raises(ValueError, match="keep parameters flattened"):
            set_optimizer(trainer)
        monkeypatch.setattr(trainer, kind, False)
    for argument in ("fp16", "enable_jit_checkpoint", "auto_find_batch_size"):
        setattr(trainer.args, argument, True)
        with pytest.raises(ValueError, match=f"{argument}=True .* before that"):
            set_optimizer(trainer, layerwise=True)
        setattr(trainer.args, argument, False)
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="the trainer's mode is distributed"):
        set_optimizer(trainer, layerwise=True)


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor", "galore_adamw_layerwise"])
def test_reference_numerics_are_galore_torchs(optim: str, tmp_path: Path) -> None:
    """The trainer as transformers has it, with the authors' package, comes to the same losses.

    Layerwise, theirs clips nothing, and follows no schedule: accelerate's wrapper hides from it what it looks for.
    """
    pytest.importorskip("galore_torch")
    changes: dict[str, Any] = {"weight_decay": 0.0, "max_grad_norm": 0.5}
    if optim.endswith("layerwise"):
        changes |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    theirs = trainer_for(tmp_path / "theirs", optim, **changes)
    theirs.train()
    ours = trainer_for(tmp_path / "ours", optim, **changes)
    set_optimizer(ours, numerics="reference")
    ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-6)
