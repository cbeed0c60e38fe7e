"""Model, optimizer and execution of a run, from its config: what training does and what `plan` measures."""

import torch
from transformers import LlamaForCausalLM

from galore_pretrain.config import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.execution import Execution, GlobalStep, Layerwise
from galore_pretrain.optim import RuleOptimizer, build_optimizer


def device_of(config: RunConfig) -> torch.device:
    """The device of ``--device``; InputError where there is none."""
    name = config.device
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


def prepare(config: RunConfig, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """``model`` as it is trained."""
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def optimizer_for(config: RunConfig, model: torch.nn.Module) -> RuleOptimizer:
    """The optimizer of ``config.optim`` for ``model``, its state allocated; InputError where options do not fit it."""
    try:
        return build_optimizer(
            model,
            config.optim,
            lr=config.lr,
            rank=config.rank,
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
