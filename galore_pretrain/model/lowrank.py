"""The paper's baselines: matrices that are trained through two thin factors. Which, and what happens between updates.

``low_rank``: W = BA (Kamalakara et al., arXiv 2209.13569). ``lora``: W = W₀ + (α/r) BA, with W₀ random and frozen (Hu
et al., arXiv 2106.09685). ``relora``: the same, where every so many updates BA becomes a part of W₀ and begins anew
(Lialin et al., arXiv 2307.05695). All linear layers of attention and MLP; the rest is trained in full.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from galore_pretrain.model.llama import draw
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim import is_projected
from galore_pretrain.tensors.chunks import chunk_elements, pieces
from galore_pretrain.tensors.rounding import mix
from galore_pretrain.tensors.shards import fill, is_shared, local, whole

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer


class FactoredLinear(nn.Module):
    """y = W₀x + ``scale`` · B A drop(x) + bias, with A (r × in) and B (out × r) trained and W₀ frozen, or absent."""

    weight: nn.Parameter | None

    def __init__(
        self,
        dense: nn.Linear,
        rank: int,
        *,
        scale: float,
        frozen: bool,
        dropout: "Dropout | None" = None,
    ) -> None:
        super().__init__()
        where = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self.weight = nn.Parameter(dense.weight.detach(), requires_grad=False) if frozen else None
        self.bias = dense.bias
        rank = min(rank, *dense.weight.shape)
        self.A = nn.Linear(dense.in_features, rank, bias=False, **where)
        self.B = nn.Linear(rank, dense.out_features, bias=False, **where)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        if self.dropout is not None and self.training:
            dropped, probability = self.dropout.mask(x)
            low, scale = self.A(x.masked_fill(dropped, 0)), scale / (1 - probability)
        else:
            low = self.A(x)
        y = F.linear(low if scale == 1.0 else low * scale, self.B.weight, self.bias)
        return y if self.weight is None else y + F.linear(x, self.weight)

    def dense(self) -> Tensor:
        """The matrix that it computes with outside of training: out × in, in the weights' dtype, on the CPU."""
        shape = self.B.out_features, self.A.in_features
        base = None if self.weight is None else whole(self.weight)
        return self._sum_into(torch.empty(shape, dtype=self.A.weight.dtype), base, whole(self.B.weight))

    def merge(self) -> None:
        """W₀ becomes what `dense` is; A and B are not touched. Where they are shared out, both W₀ and B are by rows."""
        assert self.weight is not None
        base = local(self.weight)
        self._sum_into(base, base, local(self.B.weight))

    @torch.no_grad()
    def _sum_into(self, target: Tensor, base: Tensor | None, b: Tensor) -> Tensor:
        """``base`` + ``scale`` · BA for rows of B, in fp32 a block at a time; ``target`` may be ``base`` itself."""
        a = whole(self.A.weight).float()
        for start, stop in pieces(len(target), max(1, chunk_elements(a.device) // target.shape[1])):
            rows = (b[start:stop].float() @ a).mul_(self.scale)
            target[start:stop] = rows if base is None else rows.add_(base[start:stop])
        return target


T = TypeVar("T", bound=Callable[..., Any])


def uncompiled(function: T) -> T:
    """``function``, which torch's compiler leaves as it is."""
    left_alone: T = torch.compiler.disable(function)
    return left_alone


@dataclass(frozen=True)
class Dropout:
    """Says what is dropped of the input of the layer ``name``, each element with (about) this ``probability``.

    That depends on the layer, on ``seed`` and on which rows of a run's text are at ``position``, and on nothing else:
    not on micro-batches, nor on how many processes share them, nor on whether a layer is computed once more for its
    activations.
    """

    name: str
    probability: float
    seed: int
    position: TrainingPosition

    # 16 bits decide for each element, which take a fifth of the time of torch's bernoulli_ on a CPU. Each row has a
    # stream of its own. A compiler has nothing to gain here, and would compile once for each layer.
    @uncompiled
    def mask(self, x: Tensor) -> tuple[Tensor, float]:
        """What is dropped of ``x`` (rows × tokens × features), bool and shaped as it; the probability in 16 bits."""
        size = x[0].numel()
        words = torch.empty(len(x), -(-size // 4), dtype=torch.int64, device=x.device)
        generator = torch.Generator(x.device)
        for i, row in enumerate(words, self.position.row):
            seed = mix(self.seed, self.name, self.position.update, i)
            row.random_(-(1 << 63), None, generator=generator.manual_seed(seed))
        least = min(round(self.probability * 65536), 65535) - 32768
        return (words.view(torch.int16)[:, :size] < least).view(x.shape), (least + 32768) / 65536


@dataclass(frozen=True)
class Factors:
    """How a model's matrices are factored, with ``rank`` r. ``alpha`` is LoRA's α; None means that there is no W₀.

    ``every`` is the number of updates between two of ReLoRA's merges; None means that there are none.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    every: int | None = None
    seed: int = 0

    def apply(self, model: nn.Module, position: TrainingPosition | None = None) -> None:
        """Put a `FactoredLinear` in the place of each matrix of ``model``, which may be on ``meta``.

        ``position`` is where the model's trainer will say that it is; by default, it stays at the first row.
        """
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        position = position or TrainingPosition()
        matrices = [(n, m) for n, m in model.named_modules() if is_projected(n, m)]
        if any(self.rank > min(module.weight.shape) for _, module in matrices):
            warnings.warn(
                f"rank {self.rank} exceeds the shorter side of some matrices, and is clipped to it there", stacklevel=2
            )
        for name, module in matrices:
            parent, _, leaf = name.rpartition(".")
            dropout = Dropout(name, self.dropout, self.seed, position) if self.dropout else None
            frozen = self.alpha is not None
            layer = FactoredLinear(module, self.rank, scale=scale, frozen=frozen, dropout=dropout)
            setattr(model.get_submodule(parent), leaf, layer)

    @torch.no_grad()
    def initialize(self, model: nn.Module, std: float) -> None:
        """Without W₀, the best approximation of rank r of the matrix that a full model would have begun with (spectral
        initialization, arXiv 2209.13569, §3.1); with it, A from U(−1/√in, 1/√in) and B zero, as LoRA's authors."""
        for name, layer in layers(model):
            if layer.weight is not None:
                self._begin(name, layer, 0)
                continue
            dense = torch.empty(layer.B.out_features, layer.A.in_features)
            draw(f"{name}.weight", dense, std, self.seed)
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            rank, root = layer.A.out_features, s.sqrt()
            fill(layer.A.weight, root[:rank, None] * vh[:rank])
            fill(layer.B.weight, u[:, :rank] * root[:rank])

    @torch.no_grad()
    def after_update(self, model: nn.Module, optimizer: "RuleOptimizer", step: int) -> None:
        """After update ``step`` (from 1): where it is time, BA becomes a part of W₀, and A, B and their moments begin
        anew. What the model computes stays the same."""
        if self.every is None or step % self.every:
            return
        for name, layer in layers(model):
            layer.merge()
            self._begin(name, layer, step)
            optimizer.reset([layer.A.weight, layer.B.weight])

    def _begin(self, name: str, layer: FactoredLinear, step: int) -> None:
        bound = 1 / math.sqrt(layer.A.in_features)
        generator = torch.Generator().manual_seed(mix(self.seed, name, step))
        fill(layer.A.weight, torch.empty(layer.A.weight.shape).uniform_(-bound, bound, generator=generator))
        local(layer.B.weight).zero_()


def layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """The factored layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            yield name, module


def dense_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """``model.state_dict()`` as that of a model without factors that computes the same; what is new is on the CPU.

    Processes that share a model must all call this; those that do not ``keep`` the result only give their parts.
    """
    state = dict(model.state_dict())
    gathered: dict[int, Tensor] = {}  # embeddings that are tied to the head stay one tensor
    for key, p in model.named_parameters(remove_duplicate=False):
        if is_shared(p):
            if id(p) not in gathered:
                found = whole(p)  # which all ask for
                gathered[id(p)] = found.cpu() if keep else torch.empty(0)
            state[key] = gathered[id(p)]
    for name, layer in layers(model):
        for part in ("A.weight", "B.weight"):
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = layer.dense()
    return state
