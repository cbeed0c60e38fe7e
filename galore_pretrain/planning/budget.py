"""How much memory the tensors of a run may take: what a machine or a card leaves to them."""

import torch

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.meters import available_bytes
from galore_pretrain.planning.cards import Card
from galore_pretrain.planning.plan import OUTSIDE, Plan, is_on_gpu
from galore_pretrain.train.build import device_of

_CONTEXT = 2**29  # CUDA's context and loaded kernels: 0.46 to 0.49 GiB in reports of 4090s, 0.5 on an H200
_WORKSPACES = 3 * 2**30 // 10  # of cuBLAS and attention, and what the allocator leaves between tensors
OUTSIDE_CARD = 1_600_000_000
"""Bytes of all that a card shows which tensors do not get: CUDA's context and loaded kernels, workspaces and fragments,
and a desktop (0.3 to 0.5 GiB) with some room."""
OUTSIDE_FREE = 700_000_000
"""Bytes of what is free on a card once CUDA's context exists which tensors do not get: kernels that are loaded later
(0.25 GiB), workspaces and fragments (0.3 GiB)."""
OUTSIDE_SHARED = 900_000_000
"""Bytes of each card more that tensors do not get where several processes share a run: 0.4 GiB of NCCL for a pair of
communicators, and 0.4 that FSDP2's side streams keep from the others, since each has memory of its own. Estimated by
reading their sources (0.2 to 0.4 and 0.3 to 0.5); no run on several GPUs has measured it."""

_GIB = 2**30
_SHOWN = {
    24: 23.64,  # RTX 4090: ali-vilab/VGen issue 104
    16: 15.70,
    12: 11.76,
    10: 9.78,
    8: 7.76,  # RTX 3070: sshan-zhao/GASDA issue 19; 7.78 in others
}
"""GiB that CUDA shows of cards by what they are sold with; users' reports of RTX 4090, 4080, 3060, 3080 and 3070."""


def budget_of(config: RunConfig, card: Card | None = None) -> int:
    """Return the bytes that tensors may take: of ``--memory-budget``, or of what the device has free now.

    A GPU gives no more than it shows and has free, whatever ``--memory-budget`` says. ``card`` is one of the table that
    is planned for instead of this machine's; all of its memory is free.
    """
    if is_on_gpu(config):
        free, total = _free_and_total(config, card)
        names_card = card is None and _sold_with(config.memory_budget) is not None
        asked = total
        if config.memory_budget is not None and not names_card:
            asked = config.memory_budget
        return min(min(asked, total) - OUTSIDE_CARD, free - OUTSIDE_FREE) - _outside_shared(config)
    device = device_of(config)
    if config.memory_budget is not None:
        return config.memory_budget - OUTSIDE
    return available_bytes(device) // config.processes.here - OUTSIDE


def _outside_shared(config: RunConfig) -> int:
    """Return the bytes of a card that several processes take beside tensors, and one alone does not."""
    return OUTSIDE_SHARED if config.processes.total > 1 else 0


def budgets_of_cards() -> dict[str, int]:
    """Return the bytes that tensors may take of each card that a budget can name, by what it is sold with."""
    return {f"{sold} GB": int(_SHOWN[sold] * _GIB) - OUTSIDE_CARD for sold in sorted(_SHOWN)}


def _free_and_total(config: RunConfig, card: Card | None) -> tuple[int, int]:
    """Return the bytes that a card has free, and all that it shows; InputError where nothing says which card it is."""
    if card is not None:
        return card.memory_bytes, card.memory_bytes
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(device_of(config))
    if config.memory_budget is None:
        raise InputError(
            f"--device {config.device}: this machine has no CUDA devices; to plan for one, say what the card has, such "
            "as --memory-budget 24GiB"
        )
    sold = _sold_with(config.memory_budget)
    total = config.memory_budget
    if sold is not None:
        total = int(_SHOWN[sold] * _GIB)
    return total, total


# A card is sold with 12 GB, and users write that as 12GB or as 12GiB. Of a card that is here, a budget is a bound.
def _sold_with(size: int | None) -> int | None:
    """Return the gigabytes of the card that a budget of ``size`` bytes names; None where it names none."""
    if torch.cuda.is_available():
        return None
    for sold in _SHOWN:
        if size in (sold * _GIB, sold * 10**9):
            return sold
    return None


def source_of(config: RunConfig, card: Card | None = None) -> str:
    """Return where `budget_of` comes from, in words."""
    parts = []
    sold = _sold_with(config.memory_budget)
    if config.memory_budget is not None and (sold is None or card is not None or not is_on_gpu(config)):
        parts.append(f"--memory-budget {config.memory_budget / 2**30:.2f} GiB")
    if is_on_gpu(config):
        free, total = _free_and_total(config, card)
        if card is not None:
            parts.append(f"{card.devices[0]} shows {total / 2**30:.2f} GiB")
            parts.append(f"less {OUTSIDE_CARD / 2**30:.2f} for what is no tensor")
        elif torch.cuda.is_available():
            parts.append(f"{device_of(config)} shows {total / 2**30:.2f} GiB and has {free / 2**30:.2f} free")
            parts.append(f"less {OUTSIDE_CARD / 2**30:.2f} and {OUTSIDE_FREE / 2**30:.2f} for what is no tensor")
        else:
            if sold is not None:
                parts.append(f"a card of {sold} GB shows {total / _GIB:.2f} GiB")
            parts.append(f"less {OUTSIDE_CARD / 2**30:.2f} for what is no tensor")
        if config.processes.total > 1:
            parts.append(f"less {OUTSIDE_SHARED / 2**30:.2f} for NCCL and FSDP2")
        return ", ".join(parts)
    less = f"less {OUTSIDE / 2**30:.2f} for what is no tensor"
    if parts:
        return f"{parts[0]} {less}"
    here = config.processes.here
    share = f"1/{here} of " if here > 1 else ""
    return f"{share}what this machine has free now, {less}"


def left_on_card(plan: Plan, budget: int, card: Card | None = None) -> str:
    """Return what a plan leaves of a card, in words: beside its tensors, and beside what CUDA takes."""
    _, total = _free_and_total(plan.config, card)
    left = (budget - plan.peak_bytes) / _GIB
    shared = _outside_shared(plan.config)
    unplanned = (total - plan.peak_bytes - _CONTEXT - _WORKSPACES - shared) / _GIB
    of_shared = f", NCCL and FSDP2 ({shared / _GIB:.1f})" if shared else ""
    return (
        f"{'left':<13}{left:8.2f} GiB   of the budget. On the card's {total / _GIB:.2f}, beside CUDA's context and "
        f"kernels ({_CONTEXT / _GIB:.1f}), workspaces and fragments ({_WORKSPACES / _GIB:.1f}){of_shared}, "
        f"{unplanned:.2f} are left: a desktop takes 0.3 to 0.5"
    )
