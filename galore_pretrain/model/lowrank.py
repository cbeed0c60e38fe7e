"""The paper's baselines: matrices that are trained through two thin factors.

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
from galore_pretrain.tensors.capability import runs_on
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.draws import dropout_mask
from galore_pretrain.tensors.rounding import derive_seed
from galore_pretrain.tensors.shards import fill, is_shared, local, whole

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer


# W₀ is out × in, A r × in and B out × r, stored in torch.nn.Linear's layout; x is rows × tokens × in. Forward goes
# through the thin middle, s (x Aᵀ) Bᵀ + x W₀ᵀ, and so never makes BA (out × in). The scale s is multiplied into the
# middle, rows × tokens × r, which is the smallest tensor on the way.
#
# Backward is autograd's, with g = dL/dy (rows × tokens × out): dB = s gᵀ (x Aᵀ), dA = s (g B)ᵀ x and dx = s g B A +
# g W₀. W₀ is frozen: no gradient of its size is made, and x is kept for A alone.
class FactoredLinear(nn.Module):
    """Computes y = W₀x + ``scale`` · B A drop(x) + bias, with A (r × in) and B (out × r) trained.

    W₀ (``weight``, out × in) is frozen, or absent. The rank r is clipped to the shorter side of ``dense``, the layer
    in whose place this one comes and whose weight becomes W₀.
    """

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
        device = dense.weight.device
        dtype = dense.weight.dtype
        self.weight = None
        if frozen:
            self.weight = nn.Parameter(dense.weight.detach(), requires_grad=False)
        self.bias = dense.bias
        rank = min(rank, *dense.weight.shape)
        self.A = nn.Linear(dense.in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, dense.out_features, bias=False, device=device, dtype=dtype)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return y (… × out) for ``x`` (… × in); with dropout, ``x`` is rows × tokens × in."""
        scale = self.scale
        if self.dropout is not None and self.training:
            dropped, probability = self.dropout.mask(x)
            low = self.A(x.masked_fill(dropped, 0))
            scale /= 1 - probability  # what is left makes up for what is dropped
        else:
            low = self.A(x)
        if scale != 1.0:
            low = low * scale
        y = F.linear(low, self.B.weight, self.bias)
        if self.weight is None:
            return y
        return y + F.linear(x, self.weight)

    def dense(self) -> Tensor:
        """Return the matrix that it computes with outside of training: out × in, in the weights' dtype, on the CPU."""
        base = None if self.weight is None else whole(self.weight)
        return dense_matrix(base, whole(self.A.weight), whole(self.B.weight), self.scale)

    # ReLoRA's merge: W₀ ← W₀ + s BA. Processes share W₀ and B out by rows, and row i of the sum needs row i of both and
    # all of A (r × in), which alone is gathered. Each process merges its own rows.
    def merge(self) -> None:
        """Make W₀ what `dense` is, in place. A and B are not touched."""
        assert self.weight is not None
        base = local(self.weight)
        _sum_into(base, base, whole(self.A.weight), local(self.B.weight), self.scale)


@torch.no_grad()
def _sum_into(target: Tensor, base: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Write ``base`` + ``scale`` · BA into ``target``, which may be ``base`` itself, and return it.

    ``b`` are rows of B (k × r), and ``target`` and ``base`` the same rows (k × in). The sum is made in fp32, a block of
    rows at a time, and rounded once.
    """
    a = a.float()
    width = target.shape[1]
    block_rows = max(1, chunk_elements(a.device) // width)
    for start, stop in chunks(target, len(target), block_rows):
        block = (b[start:stop].float() @ a).mul_(scale)
        if base is not None:
            block.add_(base[start:stop])
        target[start:stop] = block
    return target


def dense_matrix(base: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W₀ + ``scale`` · BA: out × in, in the dtype of B, on the CPU. ``base`` is W₀, None where there is none."""
    matrix = torch.empty(len(b), a.shape[1], dtype=b.dtype)
    return _sum_into(matrix, base, a, b, scale)


T = TypeVar("T", bound=Callable[..., Any])


def uncompiled(function: T) -> T:
    """Return ``function``, which torch's compiler leaves as it is."""
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

    # 16 random bits decide for each element whether it is dropped: as an int16 it is less than a limit, with the
    # probability (limit + 2¹⁵) / 2¹⁶. Four such numbers are cut from one random int64, which takes a fifth of the time
    # of torch's bernoulli_ on a CPU. Each row of x has a stream of its own, by its number in the update. A kernel makes
    # the numbers of all rows from their elements' places in the update.
    #
    # A compiler has nothing to gain here, and would compile once for each layer.
    @uncompiled
    def mask(self, x: Tensor) -> tuple[Tensor, float]:
        """Return what is dropped of ``x`` (rows × tokens × features), and the probability as 16 bits have it.

        The mask is bool, shaped as ``x``, and true where an element is dropped.
        """
        row_elements = x[0].numel()
        dropped_values = min(round(self.probability * 65536), 65535)  # of the 2¹⁶: never all of them
        probability = dropped_values / 65536
        if runs_on(x.device):
            seed = derive_seed(self.seed, self.name, self.position.update)
            return dropout_mask(x.detach(), self.position.row * row_elements, seed, dropped_values), probability
        row_words = -(-row_elements // 4)
        words = torch.empty(len(x), row_words, dtype=torch.int64, device=x.device)
        generator = torch.Generator(x.device)
        for row_number, row in enumerate(words, self.position.row):
            seed = derive_seed(self.seed, self.name, self.position.update, row_number)
            generator.manual_seed(seed)
            row.random_(-(1 << 63), None, generator=generator)
        limit = dropped_values - 32768
        numbers = words.view(torch.int16)[:, :row_elements]
        return (numbers < limit).view(x.shape), probability


@dataclass(frozen=True)
class Factors:
    """Says how a model's matrices are factored, with ``rank`` r. ``alpha`` is LoRA's α; None: there is no W₀.

    ``every`` is the number of updates between two of ReLoRA's merges; None means that there are none.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    every: int | None = None
    seed: int = 0

    @property
    def scale(self) -> float:
        """Return the factor on BA: LoRA's α/r, or 1 where there is no W₀."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def apply(self, model: nn.Module, position: TrainingPosition | None = None) -> None:
        """Put a `FactoredLinear` in the place of each matrix of ``model``, which may be on ``meta``.

        ``position`` is where the model's trainer will say that it is; by default, it stays at the first row.
        """
        has_base = self.alpha is not None
        if position is None:
            position = TrainingPosition()
        # A list, since the tree of modules that is walked is changed below.
        matrices = [(name, module) for name, module in model.named_modules() if is_projected(name, module)]
        if any(self.rank > min(module.weight.shape) for _, module in matrices):
            warnings.warn(
                f"rank {self.rank} exceeds the shorter side of some matrices, and is clipped to it there",
                stacklevel=2,
            )
        for name, module in matrices:
            parent_name, _, leaf = name.rpartition(".")
            dropout = None
            if self.dropout:
                dropout = Dropout(name, self.dropout, self.seed, position)
            layer = FactoredLinear(module, self.rank, scale=self.scale, frozen=has_base, dropout=dropout)
            parent = model.get_submodule(parent_name)
            setattr(parent, leaf, layer)

    # Spectral initialization: of the matrix W = U S Vᵀ that a full model would have begun with, B = U_r √S_r (out × r)
    # and A = √S_r V_rᵀ (r × in), so that BA is its best approximation of rank r and both factors are of the same size.
    @torch.no_grad()
    def initialize(self, model: nn.Module, first: "float | Callable[[str, Tensor], object]") -> None:
        """Make the first factors of all layers.

        Without W₀: spectral initialization (arXiv 2209.13569, §3.1) of the matrix that a full model would have begun
        with. ``first`` is the deviation of its fresh weights, or fills a tensor with those of a name. With W₀: A from
        U(−1/√in, 1/√in) and B zero, as LoRA's authors have it.
        """
        for name, layer in layers(model):
            if layer.weight is not None:
                self._begin(name, layer, 0)
                continue
            dense = torch.empty(layer.B.out_features, layer.A.in_features)
            if callable(first):
                first(f"{name}.weight", dense)
            else:
                draw(f"{name}.weight", dense, first, self.seed)
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            rank = layer.A.out_features
            root = s.sqrt()[:rank]
            fill(layer.A.weight, root[:, None] * vh[:rank])
            fill(layer.B.weight, u[:, :rank] * root)

    @torch.no_grad()
    def after_update(self, model: nn.Module, optimizer: "RuleOptimizer", step: int) -> None:
        """Merge BA into W₀ if that is due after update ``step`` (from 1), and begin anew with A, B and their moments.

        What the model computes stays the same, since B begins at zero.
        """
        if self.every is None or step % self.every:
            return
        for name, layer in layers(model):
            layer.merge()
            self._begin(name, layer, step)
            optimizer.reset([layer.A.weight, layer.B.weight])

    def _begin(self, name: str, layer: FactoredLinear, step: int) -> None:
        """Draw a fresh A and make B zero. ``step`` counts the updates before."""
        bound = 1 / math.sqrt(layer.A.in_features)
        seed = derive_seed(self.seed, name, step)
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.empty(layer.A.weight.shape)
        fresh.uniform_(-bound, bound, generator=generator)
        fill(layer.A.weight, fresh)
        local(layer.B.weight).zero_()


def layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """Yield the factored layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            yield name, module


def dense_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return ``model.state_dict()`` as that of a model without factors that computes the same; new tensors on the CPU.

    Processes that share a model must all call this; those that do not ``keep`` the result only give their parts.
    """
    state = dict(model.state_dict())
    gathered: dict[int, Tensor] = {}  # embeddings that are tied to the head stay one tensor
    for name, p in model.named_parameters(remove_duplicate=False):
        if not is_shared(p):
            continue
        if id(p) not in gathered:
            full = whole(p)  # which all ask for
            gathered[id(p)] = full.cpu() if keep else torch.empty(0)
        state[name] = gathered[id(p)]
    for name, layer in layers(model):
        del state[f"{name}.A.weight"]
        del state[f"{name}.B.weight"]
        state[f"{name}.weight"] = layer.dense()
    return state
