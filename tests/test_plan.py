"""The plan: equal to what torch's allocator says of real updates, shortcuts and all; and the choices made from it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensorMode

from crossed import FULL
from galore_pretrain.cli import cli
from galore_pretrain.config.options import RunConfig, parse_bytes
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.meters import available_bytes
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.methods import METHODS
from galore_pretrain.optim.update import Step
from galore_pretrain.planning.budget import budget_of, left_on_card, source_of
from galore_pretrain.planning.choice import choose, lower_bound, memory_advice, upper_bound
from galore_pretrain.planning.fit import fitted, planned
from galore_pretrain.planning.plan import (
    OUTSIDE,
    Outline,
    Plan,
    heaviest_updates,
    make_heaviest_updates,
    measure,
    static_bytes,
)
from galore_pretrain.study import paper
from galore_pretrain.tensors.chunks import ChunkSample, chunks
from galore_pretrain.tensors.ledger import KINDS, Ledger, allocated_peak
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model
from prescribed import meant_for


def model_of(folder: Path, layers: int) -> str:
    """Wide enough for several pieces an update, and for the sizes to differ."""
    values = {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers, "num_attention_heads": 4,
        "vocab_size": 3000, "max_position_embeddings": 64,
    }  # fmt: skip
    path = folder / f"layers_{layers}.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """So many layers that what the allocator adds for itself weighs little."""
    return model_of(tmp_path_factory.mktemp("plan"), 5)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For plans that are compared with each other: two layers are equal, as all of more would be."""
    return model_of(tmp_path_factory.mktemp("plan"), 2)


def config_for(model: str, row: str, **given: Any) -> RunConfig:
    values = {"model": model, "optim": row, "data": "sample", "max_length": 64, "steps": 100, "total_batch_size": 4}
    values |= meant_for(row, rank=32, update_proj_gap=20)
    return resolve(values | given, dict.fromkeys(given, "flag"))[0]


def real_peak(config: RunConfig) -> int:
    """What torch's allocator gave out at most in the same updates, of real tensors."""

    def updates() -> None:
        model = model_for(config, load_model_config(config.model))
        optimizer = optimizer_for(config, set_up_model(config, model))
        execution, micro_batches = execution_for(config, optimizer), config.total_batch_size // config.batch_size
        make_heaviest_updates(config, model, optimizer, execution, micro_batches)

    return allocated_peak(updates)


OF_OTHERS = ("adam", "q_apollo", "q_apollo_mini", "natural_galore8bit", "low_rank_adamw8bit", "lora_adamw8bit")
"""Rows that are made of other rows' rules: they are planned in one way, all others in two."""
TWICE = [row for row in METHODS if FULL or row not in OF_OTHERS]
WAYS = itertools.cycle(itertools.product((False, True), (False, True), (4, 1, 2)))
CASES = [
    (row, mode, checkpointing, size, "float32", 0.0)
    for row, (mode, checkpointing, size) in zip([*METHODS, *TWICE], WAYS, strict=False)
] + [
    ("galore_adamw", True, True, 1, "bfloat16", 1.0),
    ("galore_adamw8bit", True, False, 4, "bfloat16", 1.0),
    ("adamw8bit", True, False, 2, "bfloat16", 1.0),
]


@pytest.mark.parametrize(("row", "layerwise", "checkpointing", "size", "dtype", "clip"), CASES)
def test_the_plan_is_what_the_allocator_says(
    row: str, layerwise: bool, checkpointing: bool, size: int, dtype: str, clip: float, small: str
) -> None:
    config = config_for(
        small,
        row,
        layerwise=layerwise,
        activation_checkpointing=checkpointing,
        batch_size=size,
        dtype=dtype,
        grad_clip=clip,
    )
    architecture = load_model_config(small)
    planned, static = measure(config, architecture), static_bytes(config, architecture)
    assert planned.peak_bytes == pytest.approx(real_peak(config), rel=0.03)
    assert sum(planned.parts.values()) == planned.peak_bytes
    assert lower_bound(config, architecture, static) <= planned.peak_bytes <= upper_bound(config, architecture, static)
    tables_of_rotations = 1024
    assert 0 <= planned.parts["weights"] - static.weights < tables_of_rotations


@pytest.mark.parametrize(("checkpointing", "size", "dtype"), [(False, 4, "float32"), (True, 2, "bfloat16")])
def test_products_by_int8_are_planned_with_their_codes(checkpointing: bool, size: int, dtype: str, small: str) -> None:
    config = config_for(small, "galore_adamw", layerwise=True, matmul="int8", grad_clip=0.0, dtype=dtype)
    config = replace(config, activation_checkpointing=checkpointing, batch_size=size)
    architecture = load_model_config(small)
    planned, static = measure(config, architecture), static_bytes(config, architecture)
    assert planned.peak_bytes == pytest.approx(real_peak(config), rel=0.03)
    assert lower_bound(config, architecture, static) <= planned.peak_bytes <= upper_bound(config, architecture, static)
    dense = measure(replace(config, matmul="dense"), architecture)
    assert planned.parts["activations"] == pytest.approx(dense.parts["activations"], rel=0.02)


@pytest.mark.parametrize("row", ["adamw", "galore_adamw8bit", "galore_adafactor", "natural_galore"])
@pytest.mark.parametrize(("layerwise", "size", "clip"), [(True, 1, 1.0), (False, 2, 0.0), (True, 4, 0.0)])
def test_the_shortcuts_change_nothing(row: str, layerwise: bool, size: int, clip: float, shallow: str) -> None:
    """Replaying equal updates and leaving out equal pieces: the same plan, but for a flag a tensor.

    An update leaves a byte that says whether it was skipped, and one that is replayed does not.
    """
    config = config_for(shallow, row, layerwise=layerwise, batch_size=size, grad_clip=clip, dtype="bfloat16")
    architecture = load_model_config(shallow)
    short, long = measure(config, architecture), measure(config, architecture, every_update=True)
    assert short.place == long.place
    assert 0 <= long.peak_bytes - short.peak_bytes < 100
    assert short.highs.keys() == long.highs.keys()
    for point, parts in long.highs.items():
        assert 0 <= sum(parts.values()) - sum(short.highs[point].values()) < 100, point
    for kind, size_of_kind in long.parts.items():
        assert kind == "temporaries" or short.parts[kind] == size_of_kind


def test_chunks_cover_everything_but_a_plan_s_tensors() -> None:
    """Of those, the second stands for all that are left out."""
    real = torch.zeros(22)
    assert list(chunks(real, 10, 4)) == [(0, 4), (4, 8), (8, 10)]
    mode = FakeTensorMode()
    mode.chunk_sample = sample = ChunkSample()  # type: ignore[attr-defined]
    with mode:
        fake = torch.zeros(22)
    repeats = [(start, stop, sample.repeats) for start, stop in chunks(fake, 22, 4)]
    assert repeats == [(0, 4, 1), (4, 8, 4), (20, 22, 1)]
    assert len(list(chunks(real, 22, 4))) == 6


def test_tied_weights_are_planned_once(small: str, tmp_path: Path) -> None:
    tied = tmp_path / "tied.json"
    tied.write_text(json.dumps(json.loads(Path(small).read_text()) | {"tie_word_embeddings": True}))
    config = config_for(str(tied), "adamw", layerwise=False, batch_size=4)
    planned = measure(config, load_model_config(str(tied)))
    assert planned.peak_bytes == pytest.approx(real_peak(config), rel=0.03)
    assert planned.parts["weights"] < measure(config_for(small, "adamw"), load_model_config(small)).parts["weights"]


def test_a_ledger_of_real_tensors() -> None:
    ledger = Ledger()
    with ledger:
        with ledger.kind("weights"):
            weight = torch.zeros(1000)
        ledger.point = "here"
        view = torch.ones(500).view(5, 100)
        ledger.assign(view, "sums")
        del view
        assert ledger.now == 4000
    assert (ledger.peak, ledger.point_of_peak, ledger.at_peak["weights"]) == (6000, "here", 4000)
    assert set(ledger.at_peak) == set(KINDS)
    assert weight.sum() == 0


def test_a_ledger_of_storages_that_are_resized() -> None:
    """As FSDP2 frees and fills a gathered weight, of which no operation tells: what torch's allocator says."""

    def work() -> None:
        gathered = torch.empty(1000)
        gathered.fill_(1)
        gathered.untyped_storage().resize_(0)
        first = torch.ones(600)
        gathered.untyped_storage().resize_(4000)
        torch._foreach_copy_([gathered], [torch.ones(1000)])  # returns nothing
        gathered.untyped_storage().resize_(0)
        torch.ones(500).add_(first[0])

    with Ledger(resizes=True) as ledger:
        work()
    assert ledger.peak == allocated_peak(work) == 2400 + 4000 + 4000
    with Ledger(resizes=True) as ledger:
        assert ledger.episode(work)["activations"] == 2400 + 4000 + 4000


GIB = 2**30


def chosen(model: str, budget: int, **given: Any) -> tuple[RunConfig, Plan | None]:
    values = {"model": model, "optim": "galore_adamw", "data": "sample", "max_length": 64, "rank": 32, "grad_clip": 1.0}
    values |= {"total_batch_size": 64, "steps": 100, "dtype": "float32", "memory_budget": budget + OUTSIDE} | given
    config, _ = resolve(values, dict.fromkeys(values, "flag"))
    choice = choose(config, budget_of(config))
    return choice.config, choice.plan


def how(config: RunConfig) -> tuple[bool, bool, int, str | None]:
    return config.layerwise, config.activation_checkpointing, config.batch_size, config.clip_norm


def test_the_budget_decides(small: str) -> None:
    """Plenty: nothing is searched. Less: what costs least arithmetic of what fits; another norm only where nothing that
    clips the full one does."""
    config, plan = chosen(small, 8 * GIB)
    assert plan is None
    assert how(config) == (False, False, 8, "full")
    assert config.undecided == {"layerwise", "activation_checkpointing", "batch_size", "clip_norm"}
    architecture = load_model_config(small)

    def peak(layerwise: bool, checkpointing: bool, size: int) -> int:
        changed = replace(config, layerwise=layerwise, activation_checkpointing=checkpointing, batch_size=size)
        return measure(replace(changed, clip_norm="projected" if layerwise else "full"), architecture).peak_bytes

    for expected in ((False, False, 4, "full"), (True, True, 2, "projected")):
        budget = peak(*expected[:3])
        config, plan = chosen(small, budget)
        assert how(config) == expected
        assert plan is not None
        assert (plan.config, plan.peak_bytes) == (config, budget)


def test_flags_stay_whatever_the_budget(small: str) -> None:
    config, plan = chosen(small, 10 * 2**20, layerwise=False, activation_checkpointing=False, batch_size=2)
    assert how(config) == (False, False, 2, "full")
    assert plan is not None
    assert plan.peak_bytes > 10 * 2**20
    config, _ = chosen(small, 8 * GIB, clip_norm="projected", layerwise=True)
    assert how(config)[0::3] == (True, "projected")
    config, plan = chosen(small, 30 * 2**20, numerics="reference", layerwise=False, activation_checkpointing=True)
    assert config.batch_size == 8  # on which that loss depends


def test_one_micro_batch_where_sums_are_what_does_not_fit(small: str) -> None:
    """Layerwise updates of one micro-batch, however large, keep no sums, and know the full norm."""
    given = {"total_batch_size": 16, "max_length": 8, "layerwise": True}
    architecture = load_model_config(small)
    config, _ = chosen(small, 8 * GIB, **given)
    whole = measure(replace(config, batch_size=16, activation_checkpointing=True, clip_norm="full"), architecture)
    parts = measure(replace(config, batch_size=1, activation_checkpointing=True, clip_norm="projected"), architecture)
    assert whole.peak_bytes < parts.peak_bytes
    config, _ = chosen(small, whole.peak_bytes, **given)
    assert how(config) == (True, True, 16, "full")


def test_what_helps_is_what_is_not_done_yet(small: str) -> None:
    config, _ = chosen(small, 8 * GIB)
    assert memory_advice(config).startswith(
        "--layerwise, --activation-checkpointing, a smaller --batch-size, a smaller --rank"
    )
    done = replace(config, layerwise=True, activation_checkpointing=True, batch_size=1, optim="galore_adamw8bit")
    assert memory_advice(done).startswith(
        "--total-batch-size 1 (one micro-batch an update keeps no sums), a smaller --rank"
    )
    assert "8-bit" not in memory_advice(done)


def test_the_least_peak_is_told_where_nothing_can_fit(small: str) -> None:
    config, plan = chosen(small, 2**20, grad_clip=0.0)
    assert how(config) == (True, True, 1, None)
    assert plan is not None


def test_an_enormous_gap_is_no_obstacle(small: str) -> None:
    config = config_for(small, "galore_adamw", update_proj_gap=10**9)
    optimizer = optimizer_for(config, build_model(load_model_config(small), device="meta"))
    assert len(heaviest_updates(config, optimizer)) == 2
    for gap, refresh in ((7, "together"), (7, "staggered"), (40, "staggered"), (1, "staggered")):
        rule = GaLore(Adam(), update_proj_gap=gap, refresh=refresh)
        for phase, count in itertools.product((0.0, 0.3, 0.99), range(1, 60)):
            due = rule.next_refresh(Step(count, phase=phase))
            later = [rule.next_refresh(Step(c, phase=phase)) == c for c in range(count, due + 1)]
            assert later == [False] * (due - count) + [True]
            assert due - count < max(gap, 5)


def test_a_budget_that_cannot_be_met_is_refused(shallow: str, tmp_path: Path) -> None:
    arguments = ["--model", shallow, "--data", "sample", "--max-length", "64", "--memory-budget", "1010MB"]
    arguments += ["--rank", "32", "--total-batch-size", "2"]
    with pytest.raises(InputError, match=r"smallest peak found is 0\.0\d GiB .*what helps"):
        CliRunner().invoke(cli, [*arguments, "--output", str(tmp_path)], standalone_mode=False, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_planning_from_the_command_line(shallow: str, tmp_path: Path) -> None:
    arguments = ["plan", "--model", shallow, "--max-length", "64", "--rank", "32", "--memory-budget", "24GiB"]
    answer = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert answer["fits"] is True
    assert answer["budget_bytes"] == 24 * GIB - 10**9
    parts = ("weights", "gradients", "optimizer", "activations", "temporary")
    assert sum(answer[f"{part}_bytes"] for part in parts) == answer["peak_bytes"]
    assert {"layerwise", "activation_checkpointing", "batch_size", "total_batch_size"} <= answer.keys()
    picture = tmp_path / "memory.png"
    text = (
        CliRunner()
        .invoke(
            cli, [*arguments, "--compare", "adamw,galore_adamw8bit", "--picture", str(picture)], catch_exceptions=False
        )
        .stdout
    )
    assert "galore_adamw8bit of rank 32, updates of" in text
    assert "fits into 23.07 GiB (--memory-budget 24.00 GiB less 0.93" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sizes_of_memory() -> None:
    assert parse_bytes("24GiB") == 24 * GIB
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5 mib") == 3 * 2**19
    assert parse_bytes("25769803776") == 24 * GIB  # as a run's own config.json has it
    for text in ("24G", "-1GB", "GiB"):
        with pytest.raises(ValueError, match="is not a size of memory"):
            parse_bytes(text)
    assert 2**28 < available_bytes(torch.device("cpu")) < 2**50


def test_the_papers_tables_by_its_own_rule() -> None:
    """All 20 cells of Table 2 and 40 of Table 6 within 0.011 G."""
    tables, rule = paper.printed(), paper.by_the_papers_rule()
    parts = {"memory_g": tables["table2"], "weights_g": tables["table6"], "optimizer_g": tables["table6"]}
    cells = [
        (a, b)
        for name, table in parts.items()
        for method in paper.PRINTED
        for a, b in zip(table[name][method], rule[name][method], strict=True)
    ]
    assert len(cells) == 60
    assert max(abs(a - b) for a, b in cells) <= 0.011


def test_exact_bytes_are_those_of_the_live_state() -> None:
    true = paper.exact()
    for method, row in (("full", "adamw"), ("galore", "galore_adamw")):
        config, _ = resolve({"model": "llama_60m", "optim": row, "data": "sample"}, {})
        model = build_model(load_model_config("llama_60m"), dtype=torch.bfloat16)
        optimizer = optimizer_for(config, model)
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
        assert true["optimizer_g"][method][0] == round(state / 1e9, 6)
        assert true["weights_g"][method][0] == round(sum(p.nbytes for p in model.parameters()) / 1e9, 6)
    answer = json.loads(CliRunner().invoke(cli, ["plan", "--paper", "--json"], catch_exceptions=False).stdout)
    assert answer == {"paper": paper.by_the_papers_rule(), "exact": true}


def test_7b_fits_a_card_of_24_gib() -> None:
    """The bare command's update of 512 sequences; and one of 16 at once, for which the published code needs 22.8 GB."""
    given = {"model": "llama_7b", "optim": "galore_adamw8bit", "rank": 1024, "memory_budget": 24 * GIB}
    config, _ = resolve(given, dict.fromkeys(given, "flag"))
    architecture = load_model_config("llama_7b")
    layerwise = replace(config, layerwise=True, activation_checkpointing=True, clip_norm="projected")
    assert config.total_batch_size == 512
    assert config.grad_clip > 0
    outline = Outline.of(config, architecture)
    parts = measure(replace(layerwise, batch_size=4), architecture, outline=outline)
    assert parts.peak_bytes <= 24 * GIB - OUTSIDE
    at_once = replace(layerwise, batch_size=16, total_batch_size=16, grad_clip=0.0, clip_norm=None)
    assert measure(at_once, architecture, outline=outline).peak_bytes <= 20 * GIB


def test_a_plan_is_the_same_whatever_the_callers_device_is(shallow: str) -> None:
    config = config_for(shallow, "adamw", device="cpu")
    architecture = load_model_config(shallow)
    planned = measure(config, architecture)
    with torch.device("meta"):
        assert measure(config, architecture).highs == planned.highs


def test_compiled_layers_hold_their_gradients_together(shallow: str) -> None:
    given = {"model": shallow, "optim": "adamw", "layerwise": True, "batch_size": 2, "total_batch_size": 2, "lr": 1e-3}
    given |= {"data": "sample", "dtype": "float32", "max_length": 32, "grad_clip": 0.0, "steps": 10}
    config, _ = resolve(given, {})
    architecture = load_model_config(shallow)
    plain = measure(config, architecture)
    compiled = measure(replace(config, compile=True), architecture)
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    matrices = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    assert compiled.peak_bytes - plain.peak_bytes == 4 * (matrices - hidden * max(hidden, inner))
    assert compiled.parts["gradients"] - plain.parts["gradients"] == compiled.peak_bytes - plain.peak_bytes
    assert sum(compiled.parts.values()) == compiled.peak_bytes
    after_backward = replace(config, compile=True, layerwise=False)
    assert (
        measure(after_backward, architecture).peak_bytes
        == measure(replace(config, layerwise=False), architecture).peak_bytes
    )


def test_a_plan_for_a_gpu_needs_none(shallow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model": shallow, "device": "cuda", "data": "sample", "total_batch_size": 64, "steps": 10, "rank": 4}
    config, _ = resolve(given, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA devices; to plan for one, say what the card has"):
        budget_of(config)
    card = replace(config, memory_budget=24 * 2**30)
    assert 22.1 < budget_of(card) / 2**30 < 22.2  # 23.64 less context, kernels, fragments and a desktop
    assert source_of(card).startswith("a card of 24 GB shows 23.64 GiB")
    # By README's plan: 22.02 GiB of tensors.
    plan = Plan(card, int(22.02 * 2**30), {}, "head and loss")
    left = left_on_card(plan, budget_of(card))
    assert "0.13 GiB   of the budget. On the card's 23.64, " in left
    assert "0.82 are left: a desktop takes 0.3 to 0.5" in left
    plan = planned(card, budget_of(card)).plan
    assert plan.config.batch_size == 64  # a GPU takes large micro-batches
    assert "planned for this CPU" not in plan.table(budget_of(card), "")


def on_host(model: str, **given: Any) -> RunConfig:
    """A run whose sums lie on the host of a card of 24 GiB."""
    values = {"device": "cuda", "memory_budget": 24 * GIB, "accumulate_on": "host", "batch_size": 1}
    return config_for(model, given.pop("row", "adamw"), **values | given)


@pytest.mark.parametrize("row", ["adamw", "galore_adamw"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_plan_of_sums_on_the_host_is_of_two_buffers(
    row: str, layerwise: bool, shallow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's bytes are those of the sums that lie there, and a field of their own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    architecture = load_model_config(shallow)
    options = {"refresh": "together"} if row == "galore_adamw" else {}
    config = on_host(shallow, row=row, layerwise=layerwise, grad_clip=0.0, **options)
    there, here = measure(config, architecture), measure(replace(config, accumulate_on="device"), architecture)
    model = build_model(architecture, device="meta", dtype=torch.bfloat16)
    sizes = [p.nbytes for p in model.parameters() if p.ndim > 1]
    assert sum(sizes) <= there.host_bytes < sum(sizes) + 512 * len(sizes)
    assert here.host_bytes == 0
    vectors = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    # At the peak, one gradient may exist that was not added yet.
    assert 2 * max(sizes) <= there.parts["gradients"] <= 3 * max(sizes) + vectors
    assert there.peak_bytes < here.peak_bytes
    assert sum(there.parts.values()) == there.peak_bytes
    answer = there.as_json(budget_of(config))
    assert (answer["host_bytes"], answer["accumulate_on"]) == (there.host_bytes, "host")
    assert "sums of full gradients, beside the peak" in there.table(budget_of(config), "")
    lowest = lower_bound(config, architecture, static_bytes(config, architecture))
    assert lowest <= there.peak_bytes


def test_low_rank_sums_stay_on_the_device(shallow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    architecture = load_model_config(shallow)
    config = on_host(shallow, row="galore_adamw", layerwise=True, grad_clip=0.0, refresh="staggered")
    there, here = measure(config, architecture), measure(replace(config, accumulate_on="device"), architecture)
    assert there.parts["sums"] == here.parts["sums"] > 0
    every = measure(replace(config, layerwise=False), architecture)
    assert 0 < there.host_bytes < every.host_bytes


def test_the_shortcuts_of_a_plan_know_sums_on_the_host(shallow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    architecture = load_model_config(shallow)
    for row, layerwise, clip in (("adamw", False, 1.0), ("galore_adamw8bit", True, 1.0), ("muon", True, 0.0)):
        config = on_host(shallow, row=row, layerwise=layerwise, grad_clip=clip)
        short, long = measure(config, architecture), measure(config, architecture, every_update=True)
        assert 0 <= long.peak_bytes - short.peak_bytes < 100
        assert short.host_bytes == long.host_bytes


def test_sums_that_the_host_has_no_room_for_are_refused(shallow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from galore_pretrain.planning import plan as planning

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = on_host(shallow, row="galore_adamw", layerwise=False, grad_clip=0.0)
    architecture = load_model_config(shallow)
    needed = measure(config, architecture).host_bytes
    outline = Outline.of(config, architecture)
    monkeypatch.setattr(planning, "host_budget", lambda: needed)
    assert fitted(config, outline, runs_as_before=False).plan is not None
    monkeypatch.setattr(planning, "host_budget", lambda: needed - 1)
    for as_before in (False, True):
        with pytest.raises(InputError, match=f"take {needed:,} bytes .* and {needed - 1:,} are to be had.*--layerwise"):
            fitted(config, outline, runs_as_before=as_before)
    plan = measure(config, architecture)
    assert plan.peak_bytes <= budget_of(config)
    assert plan.as_json(budget_of(config))["fits"] is False
    assert "does not fit" in plan.table(budget_of(config), "")


def test_sums_on_the_host_help_a_card(small: str) -> None:
    config = on_host(small, accumulate_on="device")
    assert "--accumulate-on host" in memory_advice(config)
    assert "--accumulate-on" not in memory_advice(replace(config, accumulate_on="host"))
    assert "--accumulate-on" not in memory_advice(replace(config, device="cpu"))
    assert "--accumulate-on" not in memory_advice(replace(config, batch_size=4))


def test_sums_on_the_host_need_a_card(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["plan", "--model", small, "--rank", "4", "--accumulate-on", "host", "--memory-budget", "24GiB"]
    with pytest.raises(InputError, match="no CUDA device, and a CPU's sums lie in its own memory"):
        CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)


def test_determinism_is_set_and_taken_back(build_tiny: Any) -> None:
    given = {"model": "llama_1m", "data": "sample", "steps": 10, "deterministic": True}
    config, _ = resolve(given, {})
    try:
        set_up_model(config, build_tiny())
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        set_up_model(replace(config, deterministic=False), build_tiny())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
