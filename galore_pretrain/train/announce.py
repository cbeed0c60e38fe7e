"""Log lines at the start of training: what is trained, on which machine, and which rule updates which tensors."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.tasks import CHAT
from galore_pretrain.dist import World
from galore_pretrain.model.families import CausalLM
from galore_pretrain.optim import RuleOptimizer, describe
from galore_pretrain.tensors.products import has_fast_bf16
from galore_pretrain.text.sources import describe_text
from galore_pretrain.text.usable import TextShares, percent
from galore_pretrain.train.examples import ExampleInputs
from galore_pretrain.train.inputs import Inputs

log = logging.getLogger(__name__)
_MUCH = 0.25  # of a text's tokens


def announce(
    config: RunConfig,
    model: CausalLM,
    device: torch.device,
    inputs: Inputs | ExampleInputs,
    shares: TextShares | None,
    optimizer: RuleOptimizer,
    world: World,
) -> None:
    """Log what is trained, on what and where, and which rule updates which tensors; warn of useless options.

    ``shares`` are of text that cannot be used; None where the run reads examples.
    """
    if config.reduce == "projected" and world.size == 1:
        log.warning("--reduce projected: one process sums with nobody; it makes the updates layerwise, and no more")
    if isinstance(inputs, ExampleInputs):
        counts = ", ".join(f"{count:,} of {split}" for split, count in inputs.as_json().items())
        log.info("--task %s: examples of %s: %s", config.task, config.data, counts)
    elif world.is_main:
        eval_paths = [text.path for text in config.eval_texts]
        for line in describe_text(config.data, eval_paths, inputs.training, inputs.validation):
            log.info("%s", line)
    if shares is not None and world.is_main:
        _announce_shares(config, shares)
    hardware = _hardware(config, device, world)
    weights = _count(model.parameters())
    trained = _count(p for group in optimizer.param_groups if group["lr_scale"] for p in group["params"])
    told = f"{weights} weights"
    if trained != weights:
        told += f", {trained} of them trained,"
    dtype = config.dtype
    if config.weights == "int8":
        dtype = f"int8 and {dtype}"
    log.info("%s: %s in %s on %s", config.model, told, dtype, hardware)
    if config.dtype == "bfloat16" and not has_fast_bf16(device):
        log.warning("this CPU has no bfloat16 instructions: --dtype float32 would be several times as fast here")
    _say_where_layerwise_saves_nothing(config, optimizer)
    for group in optimizer.param_groups:
        _announce_group(group, optimizer)


def _count(params: Iterable[Tensor]) -> str:
    """Return how many weights ``params`` have, in words."""
    weights = sum(p.numel() for p in params)
    if weights < 100_000:
        return f"{weights:,}"
    return f"{weights / 1e6:,.1f}M"


def _announce_shares(config: RunConfig, shares: TextShares) -> None:
    """Log how much of the text cannot be used, and the way out where much of it is cut away."""
    way_out = ""
    if shares.cut > _MUCH and config.task == CHAT:
        way_out = " (a larger --max-length takes more)"
    elif shares.cut > _MUCH:
        way_out = " (--layout pack takes all)"
    log.info(
        "of %s tokens at the beginning of the text, %s are unknown to --tokenizer %s, and --layout %s cuts %s away%s; "
        "%s of its characters are control characters",
        f"{shares.tokens:,}",
        percent(shares.unknown),
        shares.tokenizer,
        config.layout,
        percent(shares.cut),
        way_out,
        percent(shares.control),
    )


def _hardware(config: RunConfig, device: torch.device, world: World) -> str:
    """Name the device of each process, and the number of processes where there are several."""
    threads = torch.get_num_threads()
    name = f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    if world.size == 1:
        return name
    return f"{world.size} processes (--shard {config.shard}), each on {name}"


def _say_where_layerwise_saves_nothing(config: RunConfig, optimizer: RuleOptimizer) -> None:
    """Log why layerwise updates save no memory, if they do not.

    A rule that projects keeps sums and clips norms in its small space. Any other one needs the full gradients for both.
    """
    if not config.layerwise or optimizer.projects:
        return
    if config.micro_batches > 1:
        reason = f"the sum over {config.micro_batches} micro-batches"
    elif config.grad_clip:
        reason = "clipping"
    else:
        return
    log.info("--layerwise saves no memory here: %s needs all gradients of %s", reason, config.optim)


def _announce_group(group: dict[str, Any], optimizer: RuleOptimizer) -> None:
    """Log the rule of one parameter group, the size of its state, and the kinds of modules it updates."""
    params = group["params"]
    # The part before ".weight" is the same in every decoder layer: q_proj, down_proj, input_layernorm.
    kinds = {name.split(".")[-2] for name in group["param_names"]}
    log.info(
        "%s updates %d tensors, %s weights, with %.1f MiB of state: %s",
        describe(optimizer.rule_of(params[0])),
        len(params),
        _count(params),
        optimizer.state_bytes(params) / 2**20,
        ", ".join(sorted(kinds)),
    )
