"""Both perplexities, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from galore_pretrain.model.head import token_losses
from galore_pretrain.text.batches import TokenRows, validation_rows
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer
from galore_pretrain.train.evaluate import evaluate


def test_both_conventions(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    rows = validation_rows(open_source("sample", "validation"), TokenRows(load_tokenizer("sample"), "pad", 48), 900)
    model = build_tiny().train()
    result = evaluate(model, rows, batch_size=3, reference_batch=4, device=torch.device("cpu"))
    assert model.training

    sums, counts = [], []
    for row in rows:
        losses = token_losses(model, torch.tensor(row.input_ids[None]).long(), torch.tensor(row.labels[None]).long())
        sums.append(losses.sum().item())
        counts.append(int((row.labels >= 0).sum()))
    assert result.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    means = [sum(sums[i : i + 4]) / sum(counts[i : i + 4]) for i in range(0, len(rows), 4)]
    assert result.reference_perplexity == pytest.approx(math.exp(sum(means) / (len(means) + 1)), rel=1e-4)
    assert result.tokens == sum(row.real for row in rows) >= 900

    other = evaluate(model.eval(), rows, batch_size=len(rows), reference_batch=4, device=torch.device("cpu"))
    assert other.loss == pytest.approx(result.loss, rel=1e-6)
    assert not model.training
