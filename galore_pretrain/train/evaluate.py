"""Loss and perplexity over a fixed set of rows, in two conventions that are never mixed."""

import logging
import math
from dataclasses import dataclass

import torch

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.recipes import reference_batch
from galore_pretrain.dist import ALONE, World
from galore_pretrain.model.head import token_losses
from galore_pretrain.text.batches import Row, stack, validation_rows
from galore_pretrain.train.inputs import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """``loss``: nats a label token. ``perplexity``: exp(loss). ``tokens``: real tokens that were read.

    ``reference_perplexity`` is what the published code prints: the mean of batch means, divided by one batch too many
    (its counter starts at 1), exponentiated. It reads lower than the truth, by exp(loss / (n + 1)) for n batches.
    """

    loss: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    def metrics(self) -> dict[str, float]:
        """The values under the keys of ``metrics.jsonl``."""
        return {f"eval_{name}": value for name, value in vars(self).items()}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    rows: list[Row],
    *,
    batch_size: int,
    reference_batch: int,
    device: torch.device,
    world: World = ALONE,
) -> Evaluation:
    """Evaluate ``model`` (in eval mode, then as it was) on ``rows``, ``batch_size`` sequences at a time.

    ``reference_batch`` sequences make a batch of the published script; the numbers do not depend on ``batch_size``
    beyond rounding, nor on how many processes of a ``world`` share the rows.
    """
    was_training = model.training
    model.eval()
    # Of each row: the sum of its losses, how many they are. On the device, which is then waited for but once.
    found = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
    for start in range(0, len(rows), batch_size * world.size):
        first = start + world.rank * batch_size
        own = rows[first : first + batch_size]
        batch = stack(own or rows[:1])  # a process that has no more takes part all the same: it holds weights
        labels = batch.labels.to(device)
        losses = token_losses(model, batch.input_ids.to(device), labels)
        if own:
            found[:, first : first + len(own)] = torch.stack([losses.double(), (labels >= 0).double()]).sum(2)
    model.train(was_training)

    row_sums, row_counts = world.sum(found).cpu()
    loss = float(row_sums.sum() / row_counts.sum())
    means = [
        s.sum() / c.sum()
        for s, c in zip(row_sums.split(reference_batch), row_counts.split(reference_batch), strict=True)
    ]
    reference = float(torch.stack(means).sum()) / (len(means) + 1)
    tokens = sum(row.real for row in rows)
    return Evaluation(loss, _exp(loss), _exp(reference), tokens)


class Evaluator:
    """Evaluates a run's model on the same rows each time, which are read once, when first needed."""

    def __init__(
        self, config: RunConfig, model: torch.nn.Module, inputs: Inputs, device: torch.device, world: World
    ) -> None:
        self._config, self._model, self._inputs, self._device, self._world = config, model, inputs, device, world
        self._rows: list[Row] = []

    def evaluate(self) -> Evaluation:
        """The model as it is now."""
        config = self._config
        if not self._rows:
            self._rows = self._read()
        return evaluate(
            self._model,
            self._rows,
            batch_size=config.batch_size,
            reference_batch=reference_batch(config),
            device=self._device,
            world=self._world,
        )

    def _read(self) -> list[Row]:
        wanted = self._config.eval_tokens
        rows = validation_rows(self._inputs.validation, self._inputs.rows, wanted)
        if (found := sum(row.real for row in rows)) < wanted // 2:
            log.info("the validation text has %s tokens, fewer than --eval-tokens %s", f"{found:,}", f"{wanted:,}")
        return rows


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
