"""Scores of a fine-tuned encoder on the validation examples of its task."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.encoder import Encoder, class_logits
from galore_pretrain.text.labelled import validation_batches
from galore_pretrain.train.examples import EncodedExamples, ExampleInputs
from galore_pretrain.train.scores import score


@dataclass(frozen=True)
class Scores:
    """Holds the numbers of one evaluation on a task.

    ``loss`` is the mean over all validation examples. ``score`` is the one that GLUE's tables print: a task's first
    metric, and the mean over its validation splits if there are two. ``by_metric`` are all, each from 0, or -1, to 1.
    """

    loss: float
    score: float
    by_metric: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """Return the values under their keys in ``metrics.jsonl``."""
        named = {f"eval_{name}": value for name, value in self.by_metric.items()}
        return {"eval_loss": self.loss, "eval_score": self.score, **named}


class ScoreEvaluator:
    """Evaluates an encoder on all validation examples of its task."""

    def __init__(self, config: RunConfig, model: Encoder, inputs: ExampleInputs, device: torch.device) -> None:
        self._config = config
        self._model = model
        self._inputs = inputs
        self._device = device

    def evaluate(self) -> Scores:
        """Evaluate the model as it is now, in eval mode, then as it was."""
        was_training = self._model.training
        self._model.eval()
        task = self._inputs.task
        losses: list[Tensor] = []
        firsts: list[float] = []
        by_metric: dict[str, float] = {}
        for split, encoded in self._inputs.validation.items():
            predictions, of_rows = self._predict(encoded)
            losses.append(of_rows)
            found = score(task, predictions, encoded.examples.labels)
            firsts.append(found[task.metrics[0]])
            of_split = split.removeprefix("validation")  # "", "_matched", "_mismatched"
            by_metric |= {f"{name}{of_split}": value for name, value in found.items()}
        self._model.train(was_training)
        return Scores(float(torch.cat(losses).mean()), float(np.mean(firsts)), by_metric)

    @torch.no_grad()
    def _predict(self, encoded: EncodedExamples) -> tuple[np.ndarray, Tensor]:
        """Return what the model says of each example of a split, a class or a number, and the loss of each in fp64."""
        said: list[Tensor] = []
        losses: list[Tensor] = []
        all_labels = encoded.examples.labels
        pad_id = self._inputs.tokenizer.pad_id
        for batch in validation_batches(encoded.ids, all_labels, self._config.batch_size, pad_id):
            logits = class_logits(self._model, batch.input_ids.to(self._device)).double().cpu()
            labels = batch.labels
            if labels.is_floating_point():
                said.append(logits[:, 0])
                losses.append((logits[:, 0] - labels).square())
            else:
                said.append(logits.argmax(1))
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        return torch.cat(said).numpy(), torch.cat(losses)
