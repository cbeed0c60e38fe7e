"""Seconds and days before the run: the table of cards, the counted work against a hand's count, ranges, and MFU."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from galore_pretrain import run
from galore_pretrain.cli import cli
from galore_pretrain.config.options import Processes, RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.budget import budget_of, source_of
from galore_pretrain.planning.cards import CARDS, Card, card_here, card_named, known_card
from galore_pretrain.planning.duration import BEST, WORST, Duration
from galore_pretrain.planning.work import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    PARTS,
    REFRESH,
    UPDATE,
    Work,
    WorkCounter,
    _counts,
    count_work,
    model_flops_per_token,
    peak_tokens_per_second,
)
from prescribed import meant_for
from test_trainer import build

GIB = 2**30
_60M_FLOPS = 6 * (8 * (4 * 512 * 512 + 3 * 512 * 1376) + 32_000 * 512) + 12 * 8 * 512 * 256


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    values = {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": 500, "max_position_embeddings": 32,
    }  # fmt: skip
    path: Path = tmp_path_factory.mktemp("time") / "small.json"
    path.write_text(json.dumps(values))
    return str(path)


def config_for(model: str, row: str, processes: Processes | None = None, **given: Any) -> RunConfig:
    values = {"model": model, "optim": row, "data": "sample", "max_length": 32, "steps": 100, "total_batch_size": 4}
    values |= {"device": "cuda", "memory_budget": 24 * GIB, "batch_size": 4, "grad_clip": 1.0}
    values |= meant_for(row, rank=8, update_proj_gap=20)
    values |= given
    return resolve(values, dict.fromkeys(values, "flag"), processes or Processes())[0]


def test_a_card_is_found_by_its_short_name_and_by_cudas() -> None:
    for name in ("4090", "RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "nvidia geforce rtx 4090"):
        assert card_named(name).name == "4090"
    assert card_named("NVIDIA H100 80GB HBM3").name == card_named("H100").name == "h100"
    assert card_named("NVIDIA H100 PCIe").name == card_named("h100-pcie").name == "h100-pcie"
    for card in CARDS:
        assert [known_card(name) for name in (card.name, *card.devices)] == [card] * (1 + len(card.devices))
    for other in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ):
        assert known_card(other) is None


def test_an_unknown_card_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--time 9090: not in the table of cards, which has 3060, 3090, .*b200"):
        card_named("9090")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no CUDA devices; name a card: 3060, 3090, .*b200"):
        card_here("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert card_here("cuda").name == "l4"


def test_geforce_rates_are_those_of_their_multiprocessors() -> None:
    """512 FLOP a clock and multiprocessor in bf16, half of it in fp32."""
    clocks = {"3060": 28 * 1.777, "3090": 82 * 1.695, "4080": 76 * 2.505, "4090": 128 * 2.52, "5090": 170 * 2.407}
    for name, clock in clocks.items():
        card = card_named(name)
        assert card.bf16 == pytest.approx(clock * 512 / 1000, rel=0.01)
        assert card.fp32 == pytest.approx(card.bf16 / 2, rel=0.01)
    assert card_named("4090").peak(torch.float64) == pytest.approx(82.6e12 / 64)


def test_the_models_flops_are_palms_and_what_torch_counts() -> None:
    """Forward, a third of 6N + 12LHQT, is what torch's own counter finds of transformers' model, and what we count."""
    architecture = load_model_config("llama_60m")
    assert model_flops_per_token(architecture, 256) == _60M_FLOPS
    model = build_model(architecture, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 256, dtype=torch.long, device="meta"))
    forward = 2 * 256 * _60M_FLOPS / 3
    assert counter.get_total_flops() == forward
    work = count_work(config_for("llama_60m", "adamw", max_length=256, batch_size=2, total_batch_size=2))
    assert sum(work[EVALUATION].flops.values()) == forward
    # Attention's backward pass makes five products where the definition has four: it computes the scores again.
    again = 2 * 8 * 256 * 256 * 512 * 2
    assert sum(work[FORWARD].flops.values()) + sum(work[BACKWARD].flops.values()) == 3 * forward + again


def test_grouped_keys_and_a_tied_head_count_as_what_multiplies(tmp_path: Path) -> None:
    values = {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    path = tmp_path / "grouped.json"
    path.write_text(json.dumps(values))
    architecture = load_model_config(str(path))
    model = build_model(architecture, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 32, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() == 32 * model_flops_per_token(architecture, 32) / 3


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ("adamw", {}),
        ("galore_adamw8bit", {"layerwise": True, "activation_checkpointing": True, "dtype": "bfloat16"}),
    ],
)
def test_what_is_extrapolated_is_what_the_whole_model_takes(row: str, given: dict[str, Any], small: str) -> None:
    config = config_for(small, row, total_batch_size=12, **given)
    whole = replace(config, refresh="together") if config.update_proj_gap else config
    counts = _counts(whole, load_model_config(small), 3, None)
    work = count_work(config)
    exact = {part: Work.of(counts, part) for part in (*PARTS, EVALUATION, REFRESH)}
    for part, done in exact.items():
        assert work[part].flops == pytest.approx(done.flops)
    for kind in ("launches", "other_bytes", "product_bytes"):
        assert getattr(work[EVALUATION], kind) == getattr(exact[EVALUATION], kind)
        # Sums wait for so many MB: of small models, they are made in another part of the update.
        found = sum(getattr(work[part], kind) for part in PARTS)
        assert found == pytest.approx(sum(getattr(exact[part], kind) for part in PARTS), rel=0.01)


def test_parts_of_an_update_are_told_apart(small: str) -> None:
    """Layerwise updates happen in the backward pass, whose own work is no other for it; recomputing is backward's."""
    given = {"dtype": "bfloat16", "grad_clip": 0.0}
    plain = count_work(config_for(small, "galore_adamw", **given))
    layerwise = count_work(config_for(small, "galore_adamw", layerwise=True, **given))
    for part in PARTS:
        assert layerwise[part].flops == plain[part].flops
    checkpointed = count_work(config_for(small, "galore_adamw", activation_checkpointing=True, **given))
    assert checkpointed[FORWARD].flops == plain[FORWARD].flops
    assert checkpointed[BACKWARD].flops[torch.bfloat16] > plain[BACKWARD].flops[torch.bfloat16]
    # Per matrix of m × n, PᵀG and P times a direction: 2mnr each.
    matrices = 4 * 64 * 64 + 3 * 64 * 176
    assert plain[UPDATE].flops[torch.bfloat16] == 4 * 4 * 8 * matrices
    assert plain[REFRESH].decomposing > 0
    adamw = count_work(config_for(small, "adamw"))
    assert adamw[REFRESH] == Work(dict.fromkeys(adamw[REFRESH].flops, 0.0), 0.0, 0.0, 0.0, 0.0)


def test_bytes_and_launches_of_single_operations() -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    wide, thin = torch.ones(30, 20), torch.ones(20, 10)
    cases: list[tuple[Callable[[], Any], str, float, int]] = [
        (lambda: a + b, "other_bytes", 12_000, 1),
        (lambda: a.add_(b), "other_bytes", 12_000, 1),
        (lambda: a.copy_(b), "other_bytes", 8_000, 1),
        (a.zero_, "other_bytes", 4_000, 1),
        (lambda: a.view(10, 100)[3:], "other_bytes", 0, 0),
        (lambda: wide @ thin, "product_bytes", 4 * (600 + 200 + 300), 1),
        (lambda: torch.mm(wide, thin, out=torch.empty(30, 10)), "product_bytes", 4 * (600 + 200 + 300), 1),
    ]
    for work, kind, size, launches in cases:
        counter = WorkCounter()
        with counter:
            work()
        done = Work.of(counter.take(), FORWARD)
        assert (getattr(done, kind), done.launches) == (size, launches)
    counter = WorkCounter()
    with counter:
        torch.linalg.qr(torch.eye(30, 20))
    assert Work.of(counter.take(), FORWARD).decomposing == pytest.approx(4 * 30 * 400 - 4 * 8000 / 3)


def made_up(config: RunConfig, card: Card, messages: dict[str, float] | None = None) -> Duration:
    """Forward: a peak's second of products; backward: the bytes of a second; an update: 10,000 launches."""
    nothing = Work({}, 0.0, 0.0, 0.0, 0.0)
    work = {
        FORWARD: replace(nothing, flops={torch.bfloat16: card.bf16 * 1e12}, product_bytes=card.bandwidth * 1e8),
        BACKWARD: replace(nothing, other_bytes=card.bandwidth * 1e9),
        UPDATE: replace(nothing, launches=10_000.0),
        REFRESH: replace(nothing, decomposing=20e12),
        EVALUATION: replace(nothing, other_bytes=card.bandwidth * 1e9),
    }
    return Duration(config, card, work, messages or {}, peak_rate=1000.0)


def test_seconds_by_hand(small: str) -> None:
    config = config_for(small, "galore_adamw", dtype="bfloat16", eval_every=30, eval_tokens=300)
    duration = made_up(config, card_named("4090"))
    at_best = 1 / BEST.products + 1 / BEST.bandwidth + 20e12 / BEST.decomposing / 20
    by_parts = 1 / WORST.products + 1 / WORST.bandwidth + 10_000 * WORST.launch + 20e12 / WORST.decomposing / 20
    assert duration.seconds() == pytest.approx((at_best, by_parts))
    assert duration.bound_by() == ("products", "products")
    assert duration.updates() == 100
    assert duration.evaluations() == 4  # after 30, 60, 90 and the last
    evaluation = (3 / BEST.bandwidth, 3 / WORST.bandwidth)  # micro-batches of 128 tokens
    assert duration.evaluation_seconds() == pytest.approx(evaluation)
    of_three = replace(duration, config=replace(config, eval_data=("a", "b", "c")))
    assert of_three.evaluation_seconds() == pytest.approx([3 * seconds for seconds in evaluation])
    days = [(100 * update + 4 * one) / 86_400 for update, one in zip((at_best, by_parts), evaluation, strict=True)]
    assert duration.days() == pytest.approx(days)
    assert duration.rate() == pytest.approx((128 / by_parts, 128 / at_best))
    assert duration.mfu() == pytest.approx((0.128 / by_parts, 0.128 / at_best))
    answer = duration.as_json()
    assert answer["is_measured"] is False
    assert answer["days"] == pytest.approx(days)
    assert "from a table of cards and the counted work, not measured" in duration.table()
    shared = made_up(config, card_named("4090"), {"links": 100.0})
    assert shared.seconds() == pytest.approx((100.0, 100.0 + by_parts))
    assert shared.bound_by() == ("links", "links")
    by_tokens = replace(config, steps=None, max_tokens=1000)
    assert made_up(by_tokens, card_named("4090")).updates() == 8


@pytest.mark.parametrize(("row", "dtype"), [("adamw", "float32"), ("galore_adamw8bit", "bfloat16")])
def test_ranges_are_ordered_and_better_cards_are_no_slower(row: str, dtype: str, small: str) -> None:
    config = config_for(small, row, dtype=dtype, eval_tokens=1000)
    work = count_work(config)
    architecture = load_model_config(small)
    for card in CARDS:
        duration = Duration(config, card, work, {}, peak_tokens_per_second(card, config, architecture))
        for least, most in (duration.seconds(), duration.rate(), duration.mfu(), duration.days()):
            assert 0 < least < most
        assert duration.mfu().most < 1
        better = replace(card, bf16=2 * card.bf16, fp32=2 * card.fp32, bandwidth=2 * card.bandwidth)
        assert replace(duration, card=better).seconds() <= duration.seconds()


def test_the_time_of_processes_counts_their_cards_together(small: str) -> None:
    one = config_for(small, "adamw", dtype="bfloat16")
    four = config_for(small, "adamw", Processes(4, 4), batch_size=1, dtype="bfloat16")
    architecture = load_model_config(small)
    card = card_named("h100")
    assert peak_tokens_per_second(card, one, architecture) * model_flops_per_token(architecture, 32) == 989e12
    assert peak_tokens_per_second(card, four, architecture) == 4 * peak_tokens_per_second(card, one, architecture)
    in_fp32 = config_for(small, "adamw", dtype="float32")
    assert peak_tokens_per_second(card, in_fp32, architecture) < peak_tokens_per_second(card, one, architecture) / 10


def test_a_named_card_is_what_is_planned_for(small: str) -> None:
    arguments = ["plan", "--model", small, "--max-length", "32", "--rank", "8", "--steps", "50", "--time", "4090"]
    arguments += ["--total-batch-size", "8", "--eval-tokens", "1000"]
    answer = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert answer["budget_bytes"] == card_named("4090").memory_bytes - 1_600_000_000
    assert answer["time"]["card"] == "4090"
    assert answer["time"]["updates"] == 50
    assert answer["time"]["seconds_per_update"][0] < answer["time"]["seconds_per_update"][1]
    text = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "planned for this CPU" not in text
    assert "NVIDIA GeForce RTX 4090 shows 23.64 GiB, less 1.49" in text
    assert "not measured" in text
    less = json.loads(
        CliRunner().invoke(cli, [*arguments, "--json", "--memory-budget", "10GiB"], catch_exceptions=False).stdout
    )
    assert less["budget_bytes"] == 10 * GIB - 1_600_000_000
    shared = [*arguments, "--json", "--gpus-per-node", "2", "--link", "450G"]
    two = json.loads(CliRunner().invoke(cli, shared, catch_exceptions=False).stdout)
    assert two["time"]["seconds_of"]["links"][0] == two["update"]["seconds_at_least"]["links"] > 0


def test_a_named_card_is_planned_for_where_there_is_another(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    config = replace(config_for(small, "adamw"), memory_budget=None)
    card = card_named("h200")
    assert budget_of(config, card) == card.memory_bytes - 1_600_000_000
    assert source_of(config, card).startswith("NVIDIA H200 shows 139.80 GiB, less 1.49")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "9090"], "not in the table of cards, which has 3060"),
        (["--time", "4090", "--device", "cpu"], "its table is of GPUs, and --device is cpu"),
        (["--time", "4090", "--gpus-per-node", "2"], "give --link"),
        (["--time", "4090", "--nodes", "2"], "give --network"),
        (["--time", "--seed", "1"], "no CUDA devices; name a card"),
        (["--time"], "no CUDA devices; name a card"),
    ],
)
def test_a_time_that_cannot_be_told_is_refused(
    flags: list[str], message: str, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(cli, ["plan", "--model", small, *flags], standalone_mode=False, catch_exceptions=False)


@pytest.mark.parametrize("peak", [None, 1e6])
def test_mfu_is_the_rate_over_the_peaks(peak: float | None, build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    trainer, lines, _ = build(build_tiny(), 3, layerwise=False)
    trainer.peak_tokens_per_second = peak
    assert trainer.fit()
    for line in islice(lines.lines, 3):
        assert ("mfu" in line) == (peak is not None)
        if peak is not None:
            assert line["mfu"] == line["tokens_per_second"] / peak


def test_a_run_knows_its_cards_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """None on a CPU, and on a card that the table does not have."""
    config = config_for("llama_60m", "adamw", max_length=256, dtype="bfloat16")
    prepared: Any = SimpleNamespace(config=config, inputs=SimpleNamespace(model=load_model_config("llama_60m")))
    names = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA GeForce GTX 1080"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    assert run._peak_tokens_per_second(prepared, torch.device("cuda:0")) == pytest.approx(989e12 / _60M_FLOPS)
    assert run._peak_tokens_per_second(prepared, torch.device("cuda:1")) is None
    assert run._peak_tokens_per_second(prepared, torch.device("cpu")) is None


def test_products_of_integers_are_counted_as_such() -> None:
    """A card multiplies 8-bit integers faster, by its own peak; what quantizing reads and writes comes on top."""
    dense, int8 = (count_work(config_for("llama_9m", "adamw", matmul=matmul)) for matmul in ("dense", "int8"))
    assert torch.int8 not in dense[FORWARD].flops
    moved = int8[FORWARD].flops[torch.int8]
    assert moved > 0
    assert sum(int8[FORWARD].flops.values()) == pytest.approx(sum(dense[FORWARD].flops.values()), rel=0.01)
    assert int8[FORWARD].other_bytes > dense[FORWARD].other_bytes
    assert all(card.peak(torch.int8) >= 2 * card.peak(torch.bfloat16) for card in CARDS)
