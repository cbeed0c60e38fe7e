"""Golden losses: one small text file a registry row. A change that moves them is a change of what is computed.

python tests/test_golden.py          # writes tests/golden/ROW.txt anew; explain the difference in docs/LOG.md
python tests/test_golden.py muon     # of these methods alone: for a new one
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from conftest import TINY
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama import build_model
from galore_pretrain.optim import REGISTRY, build_optimizer
from galore_pretrain.optim.execution import GlobalStep
from galore_pretrain.optim.methods import NUMERICS
from galore_pretrain.text.batches import TokenRows, TrainingData
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer
from galore_pretrain.train.schedule import Schedule
from prescribed import meant_for

GOLDEN = Path(__file__).parent / "golden"
STEPS = 20
RATES = {"sgd": 1.0, "scale": 0.001, "muon": 0.003}


def losses(row: str, numerics: str) -> list[float]:
    """The losses of twenty updates of the tiny model in fp32 on the sample, packed, a basis every five updates."""
    model = build_model(LlamaConfig(**TINY), dtype=torch.float32)
    options = meant_for(row, rank=8, update_proj_gap=5)
    optimizer = build_optimizer(model, row, lr=0.0, numerics=numerics, **options)
    schedule = Schedule(lr=RATES.get(row, 0.01), steps=STEPS, warmup_steps=2, numerics=numerics)
    data = iter(
        TrainingData(open_source("sample", "train"), TokenRows(load_tokenizer("sample"), "pack", 48), 4, seed=0)
    )
    values = []
    for step in range(STEPS):
        batch = next(data)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step) * group["lr_scale"]
        loss = mean_loss(model, batch.input_ids, batch.labels, batch.label_tokens)
        loss.backward()
        GlobalStep(optimizer, grad_clip=0.0).complete()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("row", REGISTRY)
def test_losses_are_golden(row: str, numerics: str) -> None:
    """Within 0.1 %, since another CPU rounds otherwise."""
    table = [line.split() for line in (GOLDEN / f"{row}.txt").read_text().splitlines() if not line.startswith("#")]
    column = 1 + NUMERICS.index(numerics)
    assert losses(row, numerics) == pytest.approx([float(entry[column]) for entry in table], rel=1e-3)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for row in sys.argv[1:] or REGISTRY:
        columns = zip(*(losses(row, numerics) for numerics in NUMERICS), strict=True)
        lines = [f"{step} {' '.join(f'{x:.6f}' for x in values)}" for step, values in enumerate(columns, 1)]
        (GOLDEN / f"{row}.txt").write_text("\n".join([f"# step {' '.join(NUMERICS)}", *lines]) + "\n")
