"""Documents that share a row without seeing each other: the mask of their attention."""

import math

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunks

_LINES = 512  # of the mask that are made at a time


# A token whose place in its document is k stands k tokens behind the first one. So the places tell where each token's
# document begins, and the token may attend to all from there to itself.
#
# The mask is added to the scores before the softmax. It is made once a micro-batch, in the model's dtype, and all
# layers keep this one for their backward pass. One of booleans would be turned into numbers by each layer, and kept as
# often.
def document_mask(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of attention: 0 where a token may attend to another, −∞ where not.

    ``places`` (rows × length, integers) has each token's place in its document, counted from 0. The mask is rows × 1 ×
    length × length in ``dtype``: of all heads alike, a line for each token that attends.
    """
    rows, length = places.shape
    tokens = torch.arange(length, device=places.device)
    firsts = tokens - places
    mask = torch.full((rows, length, length), -math.inf, dtype=dtype, device=places.device)
    for start, stop in chunks(mask, length, _LINES):
        may_attend = tokens >= firsts[:, start:stop, None]
        may_attend &= tokens <= tokens[start:stop, None]
        mask[:, start:stop].masked_fill_(may_attend, 0.0)
    return mask.unsqueeze(1)


def mask_bytes(rows: int, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of the mask of a micro-batch of so many ``rows``."""
    return rows * length * length * dtype.itemsize
