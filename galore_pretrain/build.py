"""Model, optimizer and execution of a run, from its config: what training does and what `plan` measures."""

import torch
from transformers import LlamaForCausalLM

from galore_pretrain.config import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.execution import Execution, GlobalStep, Layerwise
from galore_pretrain.optim import RuleOptimizer, build_optimizer


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
