"""Plans a deep model's memory from the plans of three layers and of four: in a second or two, where all take many."""

import copy
import re
from collections.abc import Mapping

from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.encoder import is_encoder
from galore_pretrain.model.families import Architecture
from galore_pretrain.planning.plan import Outline, Plan, heaviest_updates, host_budget, is_on_gpu, measure
from galore_pretrain.tensors.ledger import KINDS

_LAYER = re.compile(r"(layer |layers\.)(\d+)")
_FIRST, _SECOND, _LAST = "first", "second", "last"
_Parts = Mapping[str, int]


# What an update holds at one place, such as the loss or the backward pass of the last layer, grows with each further
# layer by the same bytes: those of its weights and state, and of what waits for it or because of it. In the backward
# pass that depends on which layer the place is in, and again by the same bytes from one layer to the next. So the most
# is held in the first layer, the second, the last, or outside of them, and two small plans tell how it
# grows there. (In a model of two layers, the second is the last.)
#
#     bytes(L) = bytes(3) + (L - 3) · (bytes(4) - bytes(3))
#
# This is exact where no bases are due, or all at once. Where they are due in turn, the heaviest update of a small model
# renews those of other matrices than that of the whole one, and `uncertain_bytes` bounds what that changes. Where
# processes share a model out, where activations are not checkpointed, where updates are made after the backward pass,
# and on a CPU, all layers are measured.
def measure_by_layers(config: RunConfig, architecture: Architecture, outline: Outline) -> Plan:
    """Return what `measure` does, ``highs`` left out. ``outline`` is of the whole model."""
    layers = architecture.num_hidden_layers
    is_checkpointed = config.activation_checkpointing  # without, what a place holds need not grow evenly
    is_plain = is_on_gpu(config) and is_checkpointed  # a CPU's tables of random bits grow by updates, not by layers
    if is_encoder(architecture):  # whose layers have other names
        is_plain = False
    if layers <= 4 or not (is_plain and config.layerwise) or config.compile or config.processes.total > 1:
        return measure(config, architecture, outline=outline)
    small_plans = []
    for count in (3, 4):
        smaller = copy.deepcopy(architecture)
        smaller.num_hidden_layers = count
        small_plans.append(measure(config, smaller, outline=Outline.of(config, smaller)))
    three, four = small_plans

    at_three, at_four = _by_place(three, 3), _by_place(four, 4)
    best: dict[str, int] = {}
    best_place = ""
    for place in at_three.keys() & at_four.keys():
        parts = {kind: _extended(at_three[place][kind], at_four[place][kind], layers) for kind in KINDS}
        if sum(parts.values()) > sum(best.values()):
            best = parts
            best_place = place
    return Plan(
        config,
        sum(best.values()),
        best,
        _in_words(best_place, layers),
        host_bytes=_extended(three.host_bytes, four.host_bytes, layers),
        host_budget=host_budget(),
    )


def _extended(at_three: int, at_four: int, layers: int) -> int:
    """Return the bytes of so many layers, from those of three and of four."""
    return at_three + (layers - 3) * (at_four - at_three)


# A matrix with a basis due keeps its whole gradient where others keep a low-rank sum, and a decomposition takes two
# copies in fp32 beside.
def uncertain_bytes(config: RunConfig, outline: Outline) -> int:
    """Return by how many bytes `measure_by_layers` may be wrong; 0 where it is exact."""
    optimizer = outline.optimizer
    count = heaviest_updates(config, optimizer)[0]
    matrices = [p for p in optimizer.state if optimizer.next_due(p, 2) is not None]
    due = [p for p in matrices if optimizer.next_due(p, count) == count]
    if len(due) == len(matrices):
        return 0
    return 3 * 4 * sum(p.numel() for p in due)


def _by_place(plan: Plan, layers: int) -> dict[str, _Parts]:
    """Return the parts of the most that was held at each place, which is told from the first layer or from the last."""
    found: dict[str, _Parts] = {}
    for point, parts in plan.highs.items():
        match = _LAYER.search(point)
        if match is None:
            found[point] = parts
            continue
        number = int(match[2])
        if number == 0:
            found[_LAYER.sub(rf"\g<1>{_FIRST}", point)] = parts
        if number == 1:  # after which the first layer is recomputed; before the first there is none
            found[_LAYER.sub(rf"\g<1>{_SECOND}", point)] = parts
        if number == layers - 1:
            found[_LAYER.sub(rf"\g<1>{_LAST}", point)] = parts
    return found


def _in_words(place: str, layers: int) -> str:
    """Return a place as `measure` names it, by the number of its layer."""
    for word, number in ((_FIRST, 0), (_SECOND, 1), (_LAST, layers - 1)):
        place = place.replace(f"layer {word}", f"layer {number}").replace(f"layers.{word}", f"layers.{number}")
    return place
