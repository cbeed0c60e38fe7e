"""Loss and perplexity over a fixed set of rows, in two conventions that are never mixed."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.recipes import reference_batch
from galore_pretrain.dist import ALONE, World
from galore_pretrain.model.head import token_losses
from galore_pretrain.text.batches import Row, stack, validation_rows
from galore_pretrain.text.sources import DocumentSource
from galore_pretrain.train.inputs import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Holds the numbers of one evaluation.

    ``loss``: nats per label token. ``perplexity``: exp(loss). ``tokens``: real tokens that were read, without padding.

    ``bits_per_byte``: the sum of all losses in bits, over the bytes of the text that the labels are of, in UTF-8. It
    can be compared between tokenizers. None where nobody has counted the bytes, or there are none.

    ``further`` are the evaluations of the texts beside the first one, by their names.

    ``reference_perplexity`` is what the published code prints: the mean of batch means, divided by one batch too many
    (its counter starts at 1), exponentiated. It reads lower than the truth, by exp(loss / (n + 1)) for n batches. None
    where nothing says how many sequences such a batch has.
    """

    loss: float
    perplexity: float
    reference_perplexity: float | None
    tokens: int
    bits_per_byte: float | None = None
    further: Mapping[str, "Evaluation"] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return the values under their keys in ``metrics.jsonl``; what is None has no key.

        Those of a further text have its name, as in ``eval_NAME_loss``. It has no reference perplexity.
        """
        metrics = self._of_text("eval")
        if self.reference_perplexity is not None:
            metrics["eval_reference_perplexity"] = self.reference_perplexity
        for name, evaluation in self.further.items():
            metrics |= evaluation._of_text(f"eval_{name}")
        return metrics

    def _of_text(self, prefix: str) -> dict[str, float]:
        """Return the values that every text has, under keys that begin so."""
        metrics: dict[str, float] = {f"{prefix}_loss": self.loss, f"{prefix}_perplexity": self.perplexity}
        if self.bits_per_byte is not None:
            metrics[f"{prefix}_bits_per_byte"] = self.bits_per_byte
        metrics[f"{prefix}_tokens"] = self.tokens
        return metrics


# Every label token weighs the same: the loss is Σ losses / Σ tokens over all rows, never a mean of means, in which the
# tokens of a short row would weigh more. So each row leaves two numbers, the sum of its losses and the number of its
# label tokens, in its column of one fp64 tensor of 2 × rows. Rows are dealt to the processes a batch at a time: process
# r takes batches r, r + size, and so on, and leaves zeros in the columns of the others, so that one sum over the
# processes completes the tensor. It stays on the device until then: a GPU is waited for once. The published number, a
# mean of batch means, is made from the same row sums afterwards, whatever batch size was run.
@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    rows: list[Row],
    *,
    batch_size: int,
    reference_batch: int | None,
    device: torch.device,
    world: World = ALONE,
) -> Evaluation:
    """Evaluate ``model`` (in eval mode, then as it was) on ``rows``, ``batch_size`` sequences at a time.

    ``reference_batch`` sequences make a batch of the published script; the numbers do not depend on ``batch_size``
    beyond rounding, nor on how many processes of a ``world`` share the rows.
    """
    was_training = model.training
    model.eval()
    sums_and_counts = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
    for start in range(0, len(rows), batch_size * world.size):
        first = start + world.rank * batch_size
        share = rows[first : first + batch_size]
        # A process without rows of its own runs one all the same: it holds weights that the others gather.
        batch = stack(share or rows[:1])
        input_ids = batch.input_ids.to(device)
        labels = batch.labels.to(device)
        places = None if batch.places is None else batch.places.to(device)
        losses = token_losses(model, input_ids, labels, places)
        if share:
            is_label = labels >= 0
            by_token = torch.stack([losses.double(), is_label.double()])  # 2 × rows of the batch × length
            sums_and_counts[:, first : first + len(share)] = by_token.sum(2)
    model.train(was_training)

    row_sums, row_counts = world.sum(sums_and_counts).cpu()
    total_loss = float(row_sums.sum())
    loss = float(row_sums.sum() / row_counts.sum())
    reference_perplexity = None
    if reference_batch is not None:
        reference_loss = _reference_loss(row_sums.split(reference_batch), row_counts.split(reference_batch))
        reference_perplexity = _exp(reference_loss)
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        reference_perplexity=reference_perplexity,
        tokens=sum(row.real for row in rows),
        bits_per_byte=_bits_per_byte(total_loss, rows),
    )


def _bits_per_byte(total_loss: float, rows: Sequence[Row]) -> float | None:
    """Compute the bits for a byte of the labels' text from the sum of all losses, in nats."""
    label_bytes = 0
    for row in rows:
        if row.label_bytes is None:
            return None
        label_bytes += row.label_bytes
    if not label_bytes:
        return None
    return total_loss / (math.log(2) * label_bytes)


def _reference_loss(batch_sums: Sequence[Tensor], batch_counts: Sequence[Tensor]) -> float:
    """Compute the published code's loss: the sum of the n batch means, divided by n + 1.

    Each tensor holds the sums of losses, or the label tokens, of the rows of one batch.
    """
    means = []
    for sums, counts in zip(batch_sums, batch_counts, strict=True):
        means.append(sums.sum() / counts.sum())
    return float(torch.stack(means).sum()) / (len(means) + 1)


class Evaluator:
    """Evaluates a run's model, always on the same rows, which are read when they are first needed."""

    def __init__(
        self, config: RunConfig, model: torch.nn.Module, inputs: Inputs, device: torch.device, world: World
    ) -> None:
        self._config = config
        self._model = model
        self._inputs = inputs
        self._device = device
        self._world = world
        self._rows: list[Row] = []
        self._further: dict[str, list[Row]] = {}

    def evaluate(self) -> Evaluation:
        """Evaluate the model as it is now."""
        if not self._rows:
            self._rows = self._read(self._inputs.validation, "the validation text")
            for name, source in self._inputs.further.items():
                self._further[name] = self._read(source, f"--eval-data {name}")
        return replace(
            self._evaluate(self._rows),
            further={name: self._evaluate(rows) for name, rows in self._further.items()},
        )

    def _evaluate(self, rows: list[Row]) -> Evaluation:
        """Evaluate the model on the rows of one text."""
        return evaluate(
            self._model,
            rows,
            batch_size=self._config.batch_size,
            reference_batch=reference_batch(self._config),
            device=self._device,
            world=self._world,
        )

    def _read(self, source: DocumentSource, called: str) -> list[Row]:
        """Read the rows of a text, ``--eval-tokens`` real tokens or all that there are. A log line has what it is."""
        wanted = self._config.eval_tokens
        rows = validation_rows(source, self._inputs.rows, wanted)
        tokens = sum(row.real for row in rows)
        if tokens < wanted // 2:
            log.info("%s has %s tokens, fewer than --eval-tokens %s", called, f"{tokens:,}", f"{wanted:,}")
        return rows


def _exp(loss: float) -> float:
    """Compute exp(loss), or infinity where Python's own would raise OverflowError."""
    if loss < 700:
        return math.exp(loss)
    return math.inf
