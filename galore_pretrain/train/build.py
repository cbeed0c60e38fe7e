"""Model, optimizer and execution of a run, from its config: what training does and what `plan` measures."""

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.model.head import loss_methods
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.lowrank import Factors
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim import RuleOptimizer, build_optimizer, is_projected, sides, split
from galore_pretrain.train.execution import Execution, GlobalStep, Layerwise


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
    if device.type == "cuda" and device.index is not None:
        # Libraries that ask for the current device, as checkpoints written in the background do, would otherwise make
        # a second context of some 0.4 GiB on cuda:0.
        torch.cuda.set_device(device)
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
    config: RunConfig,
    architecture: LlamaConfig,
    device: torch.device | str = "cpu",
    *,
    fresh: bool = True,
    mesh: Any = None,
    position: TrainingPosition | None = None,
) -> LlamaForCausalLM:
    """The model that a run begins with, on ``device``; on ``meta``, or if not ``fresh``, without its weights. The
    processes of ``mesh`` share it. ``position`` is where its trainer will say that it is."""
    factors = factors_of(config)

    def change(model: LlamaForCausalLM) -> None:
        if factors:
            factors.apply(model, position)
        if mesh is not None:
            share_out(model, config, mesh)

    model = build_model(
        architecture,
        device=device,
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
        change=change,
        fresh=fresh,
    )
    if factors and fresh and torch.device(device).type != "meta":
        factors.initialize(model, architecture.initializer_range)
    return model


def prepare(config: RunConfig, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """``model`` as it is trained."""
    # By default, cuBLAS may add up the parts of a long product in bf16. The published numbers were made so.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = config.numerics == "reference"
    if config.activation_checkpointing:
        # No layer draws from torch's generators, so their state need not be kept and set again for each one.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    return model


def compile_layers(model: LlamaForCausalLM) -> None:
    """Have torch compile each decoder layer when it is first run: all share the code of one."""
    for decoder in model.model.layers:
        decoder.compile()


def optimizer_for(config: RunConfig, model: torch.nn.Module, mesh: Any = None) -> RuleOptimizer:
    """The optimizer of ``config.optim`` for ``model``, its state allocated; InputError where options do not fit it. The
    processes of ``mesh`` share it."""
    factors, row = split(config.optim)
    try:
        optimizer = build_optimizer(
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
    if mesh is not None and config.reduce == "projected":
        optimizer.sum_over_replicas(mesh)
    return optimizer


def execution_for(config: RunConfig, optimizer: RuleOptimizer) -> Execution:
    """When that optimizer's updates run."""
    mode: type[Layerwise | GlobalStep] = Layerwise if config.layerwise else GlobalStep
    return mode(optimizer, config.grad_clip, projected=config.clip_norm == "projected")


def share_out(model: LlamaForCausalLM, config: RunConfig, mesh: Any) -> None:
    """Give each process its part of every weight of ``model``, which is on ``meta``: `fully_shard` a layer at a time.

    A matrix that GaLore projects from the left is cut into columns where they can be dealt out evenly, all else into
    rows: so projecting and projecting back need nothing of other processes. Gradients are summed, not averaged: the
    loss is divided by the tokens of all. With ``--reduce projected``, each replica is shared out by itself, and knows
    nothing of the others.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    columns = {
        module.weight
        for name, module in model.named_modules()
        if "galore" in config.optim and is_projected(name, module) and _by_columns(module, config, mesh.size(-1))
    }
    options: dict[str, Any] = {
        "mesh": mesh["shards"] if config.reduce == "projected" else mesh,
        "shard_placement_fn": lambda p: Shard(1) if p in columns else Shard(0),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    for method in loss_methods:
        setattr(model, method.__name__, MethodType(method, model))
        register_fsdp_forward_method(model, method.__name__)


def _by_columns(module: nn.Module, config: RunConfig, shards: int) -> bool:
    m, n = module.weight.shape  # type: ignore[misc]
    left, right = sides(m, n, config.proj_type or "std")
    return left and not right and n % shards == 0
