"""What a run says of itself when it begins to train: what is trained, where, and what updates which tensors."""

import logging

import torch

from galore_pretrain.config.options import RunConfig
from galore_pretrain.dist import World
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.tensors.products import has_fast_bf16

log = logging.getLogger(__name__)


def announce(config: RunConfig, device: torch.device, optimizer: RuleOptimizer, world: World) -> None:
    """Log what is trained, where, and what updates which tensors; warn of what a user would not want so."""
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if world.size > 1:
        where = f"{world.size} processes (--shard {config.shard}), each on {where}"
    elif config.reduce == "projected":
        log.warning("--reduce projected: one process sums with nobody; it makes the updates layerwise, and no more")
    log.info("%s: %.1fM weights in %s on %s", config.model, total / 1e6, config.dtype, where)
    if config.dtype == "bfloat16" and not has_fast_bf16(device):
        log.warning("this CPU has no bfloat16 instructions: --dtype float32 would be several times as fast here")
    micro_batches = config.micro_batches
    if config.layerwise and not optimizer.projects and (micro_batches > 1 or config.grad_clip):
        why = f"the sum over {micro_batches} micro-batches" if micro_batches > 1 else "clipping"
        log.info("--layerwise saves no memory here: %s needs all gradients of %s", why, config.optim)
    for group in optimizer.param_groups:
        params = group["params"]
        names = sorted({name.split(".")[-2] for name in group["param_names"]})
        log.info(
            "%s updates %d tensors, %.1fM weights, with %.1f MiB of state: %s",
            optimizer.describe(group),
            len(params),
            sum(p.numel() for p in params) / 1e6,
            optimizer.state_bytes(params) / 2**20,
            ", ".join(names),
        )
