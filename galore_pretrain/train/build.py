"""Build a run's model, optimizer and execution from its config, for training and for `plan` alike."""

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn

from galore_pretrain.config.options import RunConfig, factors_by_module, optim_settings
from galore_pretrain.errors import InputError
from galore_pretrain.model.coded import code_matrices
from galore_pretrain.model.encoder import HEAD, build_encoder, class_loss, draws, is_encoder, take_encoder_weights
from galore_pretrain.model.families import Architecture, CausalLM, layers_of
from galore_pretrain.model.head import loss_methods, mean_loss
from galore_pretrain.model.initial import InitialWeights, take_weights
from galore_pretrain.model.int8 import multiply_by_int8
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.lowrank import Factors
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim import (
    OPTIONS,
    Execution,
    GlobalStep,
    HostSums,
    Layerwise,
    Method,
    RuleOptimizer,
    build_optimizer,
    is_projected,
    method,
    sides,
)
from galore_pretrain.tensors.transport import Transport, transport_of


def device_of(config: RunConfig) -> torch.device:
    """Return the device that a run's ``--device`` means; InputError where there is none."""
    return device_named(config.device)


def device_named(name: str) -> torch.device:
    """Return the device that ``name``, a value of ``--device``, means; InputError where there is none."""
    explicit = name
    if name == "auto":
        explicit = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(explicit)
    except RuntimeError as error:
        raise InputError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: this machine has {count} CUDA devices; use --device auto{built()}")
        if device.index is not None:
            # Libraries that ask for the current device, as checkpoints written in the background do, would otherwise
            # make a second context of some 0.4 GiB on cuda:0.
            torch.cuda.set_device(device)
    return device


def built() -> str:
    """Return, as a remark, that torch itself knows of no GPU; empty where it does."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f" (torch {torch.__version__} is built for CPUs alone)"
    return ""


def check_accumulation(config: RunConfig) -> None:
    """Raise InputError where sums are to lie on the host and are there already: on a CPU."""
    is_on_cpu = config.device == "auto" and not torch.cuda.is_available()
    if config.accumulate_on == "host" and is_on_cpu:
        raise InputError(
            "--accumulate-on host: this machine has no CUDA device, and a CPU's sums lie in its own memory already; "
            "leave it out, or plan for a card with --device cuda"
        )


def factors_of(config: RunConfig) -> Factors | None:
    """Return how the method factors the model's matrices; None where it trains them as they are."""
    if not method(config.optim).factors_updated_by:
        return None
    assert config.rank is not None
    return Factors(
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout or 0.0,
        every=config.relora_every,
        seed=config.seed,
    )


def model_for(
    config: RunConfig,
    architecture: Architecture,
    device: torch.device | str = "cpu",
    *,
    fresh: bool = True,
    weights: InitialWeights | None = None,
    mesh: Any = None,
    position: TrainingPosition | None = None,
) -> CausalLM:
    """Build the model that a run begins with, on ``device``, in the run's dtype.

    On ``meta``, or if not ``fresh``, its weights are not initialized: a checkpoint's are loaded into them. Fresh ones
    are drawn, or read from ``weights``. The processes of ``mesh`` share them. ``position`` is where the trainer will
    write which rows a forward pass is of; layers with random numbers of their own read it.
    """
    factors = factors_of(config)

    # Called while the model is still on meta, so neither the dense matrices that factors replace nor the weights of
    # other processes ever take memory.
    def change(model: CausalLM) -> None:
        if factors:
            factors.apply(model, position)
            if config.task is not None and factors.alpha is not None:
                _freeze_all_but_factors(model)
        by_int8 = config.matmul == "int8"
        if config.weights == "int8":
            group = None if config.weight_group == "row" else int(config.weight_group)
            code_matrices(model, group, by_int8)
        elif by_int8:
            multiply_by_int8(model)
        if mesh is not None:
            share_out(model, config, mesh)

    if is_encoder(architecture):
        encoder = build_encoder(architecture, device=device, dtype=getattr(torch, config.dtype), change=change)
        if weights is not None and torch.device(device).type != "meta":
            take_encoder_weights(encoder, weights, factors, config.seed)
        return encoder
    model = build_model(
        architecture,
        device=device,
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
        change=change,
        fresh=fresh and weights is None,
    )
    if not fresh or torch.device(device).type == "meta":
        return model
    if weights is not None:
        take_weights(model, weights, factors)
    elif factors:
        factors.initialize(model, architecture.initializer_range)
    return model


# Fine-tuning by LoRA leaves a model as it is, but for what is added to its matrices: so its authors have it. In
# pretraining, embeddings and norms begin from nothing, and GaLore's paper trains them beside the factors.
def _freeze_all_but_factors(model: CausalLM) -> None:
    """Have only the factors of ``model`` trained, and a new head where it has one."""
    trained = ("A.weight", "B.weight")
    for name, p in model.named_parameters():
        if not (name.endswith(trained) or name.startswith(HEAD)):
            p.requires_grad_(False)


Loss: TypeAlias = Callable[[Any, torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor]
"""Takes a model, rows of ids, their labels, what to divide by, and the places of tokens in their documents where these
are apart; returns what the rows contribute to an update's loss."""


def loss_of(architecture: Architecture) -> Loss:
    """Return the loss by which a model of this architecture is trained: of each next token, or of each row's label."""
    return class_loss if is_encoder(architecture) else mean_loss


def set_up_model(config: RunConfig, model: CausalLM) -> CausalLM:
    """Set ``model`` and torch up for training, and return the model."""
    # By default, cuBLAS may add up the parts of a long product in bf16. The published numbers were made so.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = config.numerics == "reference"
    _set_determinism(config.deterministic)
    if config.activation_checkpointing:
        # A decoder's layers draw nothing from torch's generators, so their state need not be kept and set again for
        # each one; and fake tensors have none.
        is_fake = torch._guards.detect_fake_mode() is not None
        options = {"use_reentrant": False, "preserve_rng_state": draws(model) and not is_fake}
        model.gradient_checkpointing_enable(options)
    model.train()
    return model


# FlashAttention adds up a gradient by atomic operations unless it is told not to. Attention in fp32 has another kernel,
# which knows no other way: without it, torch's plain products are taken, which keep a row's scores.
def _set_determinism(wanted: bool) -> None:
    """Have torch take deterministic kernels or not; on a CPU all are. It raises where an operation has none."""
    torch.use_deterministic_algorithms(wanted)
    # All memory is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_mem_efficient_sdp(not wanted)


def compile_layers(model: CausalLM) -> None:
    """Have torch compile each decoder layer when it first runs. All layers share the code compiled for one."""
    for layer in layers_of(model):
        layer.compile()


def optimizer_for(config: RunConfig, model: torch.nn.Module, mesh: Any = None) -> RuleOptimizer:
    """Build the optimizer of ``config.optim`` for ``model``, its state allocated. The processes of ``mesh`` share it.

    Raises InputError where the options do not fit the model.
    """
    # A method that factors the matrices, such as LoRA, leaves the factors to another method.
    updater = method(method(config.optim).updater)
    method_options = {OPTIONS[flag].argument: getattr(config, flag) for flag in updater.options}
    method_options |= _own_options(config, updater)
    if config.rank_by_module:
        method_options["rank_by_module"] = factors_by_module(config.rank_by_module)
    try:
        optimizer = build_optimizer(
            model,
            updater.name,
            lr=config.lr,
            numerics=config.numerics,
            weight_decay=config.weight_decay,
            matrix_lr_scale=config.matrix_lr_scale,
            seed=config.seed,
            **method_options,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    if mesh is not None and config.reduce == "projected":
        optimizer.sum_over_replicas(mesh)
    optimizer.allocate()
    return optimizer


def _own_options(config: RunConfig, updater: Method) -> dict[str, Any]:
    """Return what ``--optim-option`` sets; InputError for what is set by another flag."""
    settings = optim_settings(config.optim_option)
    flags = {OPTIONS[flag].argument: flag for flag in updater.options}
    flags |= {name: name for name in signature(build_optimizer).parameters}
    for key in settings:
        if key in flags:
            raise InputError(f"--optim-option {key}: it has a flag, --{flags[key].replace('_', '-')}")
    return settings


def execution_for(config: RunConfig, optimizer: RuleOptimizer, *, transport: Transport | None = None) -> Execution:
    """Build what runs the updates of ``optimizer``: during the backward pass if layerwise, or else all after it.

    ``transport`` moves sums of gradients that lie on the host; by default what the device has for that.
    """
    execution: type[Layerwise | GlobalStep] = GlobalStep
    if config.layerwise:
        execution = Layerwise
    host_sums: HostSums | None = None
    if config.accumulate_on == "host":
        first = next(iter(optimizer.slots))
        host_sums = HostSums(transport or transport_of(first))
    projected = config.clip_norm == "projected"
    return execution(optimizer, config.grad_clip, projected=projected, host_sums=host_sums)


def share_out(model: CausalLM, config: RunConfig, mesh: Any) -> None:
    """Give each process its part of every weight of ``model``, which is on ``meta``: `fully_shard` a layer at a time.

    A matrix that GaLore projects from the left is cut into columns where they can be dealt out evenly, all else into
    rows: so projecting and projecting back need nothing of other processes. Gradients are summed, not averaged: the
    loss is divided by the tokens of all. With ``--reduce projected``, each replica is shared out by itself, and knows
    nothing of the others.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    by_columns = _weights_cut_by_columns(model, config, shards=mesh.size(-1))

    def placement(p: nn.Parameter) -> Shard:
        return Shard(1) if p in by_columns else Shard(0)

    options: dict[str, Any] = {
        "mesh": mesh["shards"] if config.reduce == "projected" else mesh,
        "shard_placement_fn": placement,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    # FSDP2 gathers a module's weights only around methods that it knows. The losses read the head's weight without
    # calling the head, so they become methods of the model.
    for loss in loss_methods:
        setattr(model, loss.__name__, MethodType(loss, model))
        register_fsdp_forward_method(model, loss.__name__)


def _weights_cut_by_columns(model: nn.Module, config: RunConfig, shards: int) -> set[nn.Parameter]:
    """Find the weights whose columns, not rows, are dealt out to ``shards`` processes."""
    entry = method(config.optim)
    if not (entry.projects or entry.has_low_rank):
        return set()
    weights = set()
    for name, module in model.named_modules():
        if is_projected(name, module) and _by_columns(module, config, shards):
            weights.add(module.weight)
    return weights


def _by_columns(module: nn.Module, config: RunConfig, shards: int) -> bool:
    """Return whether a weight of m × n is projected from the left alone, and its n columns can be dealt out evenly."""
    m, n = module.weight.shape  # type: ignore[misc]
    left, right = sides(m, n, config.proj_type or "std")
    return left and not right and n % shards == 0
