"""Model, optimizer and execution of a run, from its config: what training does and what `plan` measures."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galore_pretrain.config import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.execution import Execution, GlobalStep, Layerwise
from galore_pretrain.lowrank import Factors
from galore_pretrain.model import build_model
from galore_pretrain.optim import RuleOptimizer, build_optimizer
from galore_pretrain.optim.names import split


def device_of(config: RunConfig) -> torch.device:
    """The device of a run."""
    return device_named(config.device)


def device_named(name: str) -> torch.device:
    """The device that ``--device`` means; InputError where there is none."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device auto"
        )
    return device


def factors_of(config: RunConfig) -> Factors | None:
    """How the row factors the model's matrices, if it does."""
    name, _ = split(config.optim)
    if name is None:
        return None
    assert config.rank is not None
    low_rank = name == "low_rank"
    return Factors(
        config.rank,
        alpha=None if low_rank else config.lora_alpha,
        dropout=0.0 if low_rank else config.lora_dropout or 0.0,
        every=config.relora_every,
        seed=config.seed,
    )


def model_for(
    config: RunConfig, architecture: LlamaConfig, device: torch.device | str = "cpu", *, fresh: bool = True
) -> LlamaForCausalLM:
    """The model that a run begins with, on ``device``; on ``meta``, or if not ``fresh``, without its weights."""
    factors = factors_of(config)
    model = build_model(
        architecture,
        device=device,
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
        change=factors.apply if factors else None,
        fresh=fresh,
    )
    if factors and fresh and torch.device(device).type != "meta":
        factors.initialize(model, architecture.initializer_range)
    return model


def prepare(config: RunConfig, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """``model`` as it is trained."""
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def optimizer_for(config: RunConfig, model: torch.nn.Module) -> RuleOptimizer:
    """The optimizer of ``config.optim`` for ``model``, its state allocated; InputError where options do not fit it."""
    factors, row = split(config.optim)
    try:
        return build_optimizer(
            model,
            row,
            lr=config.lr,
            rank=None if factors else config.rank,
            update_proj_gap=config.update_proj_gap,
            scale=config.galore_scale,
            proj_type=config.proj_type,
            basis=config.basis,
            refresh=config.refresh,
            moments=config.moments,
            natural_history=config.natural_history,
            natural_damping=config.natural_damping,
            betas=config.betas,
            eps=config.eps,
            numerics=config.numerics,
            weight_decay=config.weight_decay,
            matrix_lr_scale=config.matrix_lr_scale,
            seed=config.seed,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def execution_for(config: RunConfig, optimizer: RuleOptimizer) -> Execution:
    """When that optimizer's updates run."""
    mode: type[Layerwise | GlobalStep] = Layerwise if config.layerwise else GlobalStep
    return mode(optimizer, config.grad_clip, projected=config.clip_norm == "projected")
