"""The part `documents`: packed documents that are kept apart, against each of them by itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from galore_pretrain.check.part import Part
from galore_pretrain.check.updates import random_rows
from galore_pretrain.model.families import CausalLM
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config

_LENGTH = 128
_STARTS = ((0, 1, 40, 97), (0, 64))
"""Where the documents of two rows begin: one has a token alone."""
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""How far gradients may be apart, of their length: in bf16, those of six documents are rounded one after another."""
_OTHERWISE = 3.0  # times its bound: so far apart at least are gradients where documents see each other


@dataclass(frozen=True)
class _Piece:
    """Is a part of a row to be run: tokens (1 or more rows × length + 1), and the places of all but the last one."""

    tokens: Tensor
    places: Tensor | None = None


# What a fault in the mask would do is measured too: without any, the gradients are others, far beyond the bound.
def documents(part: Part) -> None:
    """Check that a pass over packed documents has the loss and the gradients of a pass over each of them."""
    tokens = random_rows(len(_STARTS), _LENGTH + 1, part.device)
    for dtype, bound in _BOUNDS.items():
        model = _model(part.device, dtype)
        name = str(dtype).removeprefix("torch.")
        loss, gradient = _passes(model, _one_by_one(tokens))
        packed_loss, packed = _passes(model, [_Piece(tokens, _places(part.device))])
        _, joined = _passes(model, [_Piece(tokens)])
        part.check_below(f"{name}: loss of packed documents, from each by itself", abs(packed_loss / loss - 1), bound)
        part.check_below(f"{name}: gradients of packed documents, from each by itself", _apart(packed, gradient), bound)
        distance = _apart(joined, gradient)
        least = _OTHERWISE * bound
        told = f"{name}: gradients of documents that see each other, from each by itself"
        part.check(told, distance, f"at least {least:.3g}", distance >= least)


def _model(device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Build a small model in which two heads share their keys, with weights that are the same on every device."""
    architecture = load_model_config("llama_1m")
    architecture.num_key_value_heads = architecture.num_attention_heads // 2
    return build_model(architecture, device=device, dtype=dtype, seed=0)


def _places(device: torch.device) -> Tensor:
    """Return each token's place in its document (rows × length)."""
    rows: list[list[int]] = []
    for starts in _STARTS:
        ends = (*starts[1:], _LENGTH)
        rows.append([place for start, end in zip(starts, ends, strict=True) for place in range(end - start)])
    return torch.tensor(rows, device=device)


def _one_by_one(tokens: Tensor) -> list[_Piece]:
    """Return each document, with the token that follows it."""
    pieces: list[_Piece] = []
    for row, starts in zip(tokens, _STARTS, strict=True):
        ends = (*starts[1:], _LENGTH)
        pieces += [_Piece(row[None, start : end + 1]) for start, end in zip(starts, ends, strict=True)]
    return pieces


def _passes(model: CausalLM, pieces: list[_Piece]) -> tuple[float, Tensor]:
    """Return the sum of the losses of ``pieces`` and of their gradients, all in one vector of fp64."""
    model.zero_grad()
    total = 0.0
    for piece in pieces:
        inputs, labels = piece.tokens[:, :-1], piece.tokens[:, 1:]
        loss = mean_loss(model, inputs, labels, len(_STARTS) * _LENGTH, piece.places)
        loss.backward()
        total += loss.item()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)


def _apart(one: Tensor, other: Tensor) -> float:
    """Return how far two vectors are apart, of the length of ``other``."""
    return float((one - other).norm() / other.norm())
