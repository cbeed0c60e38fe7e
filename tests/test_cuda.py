"""What is asked of a GPU, checked on a machine that has none: stand-ins record it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from galore_pretrain import run
from galore_pretrain.config.options import Processes
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import TrainingFailedError
from galore_pretrain.optim import moments
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.moments import Blockwise8bit
from galore_pretrain.optim.update import Step
from galore_pretrain.planning import budget, choice
from galore_pretrain.planning.plan import Plan
from galore_pretrain.rundir import export
from galore_pretrain.tensors import transport
from galore_pretrain.tensors.transport import AtOnce, NotLockedError, SideStream, transport_of
from galore_pretrain.text.tokenizer import load_tokenizer
from galore_pretrain.train import build

GIB = 2**30


class Stream:
    """Writes down which stream was made to wait for which."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("call", ["quantize_blockwise", "optimizer_update_8bit_blockwise"])
def test_bitsandbytes_runs_between_two_waits(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the two takes a stream: they launch on the default one, whichever is the current one."""
    events: list[str] = []
    streams = (Stream("current", events), Stream("default", events))
    monkeypatch.setattr(moments, "current_and_default_stream", lambda device: streams)
    original: Callable[..., Any] = getattr(functional, call)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append(call)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, call, recorded)
    store, step, grad = Blockwise8bit(), Step(1), torch.randn(64, 80)
    state = Adam(store=store).init(grad)
    if call == "quantize_blockwise":
        store.write(state, "exp_avg", grad, step)
    else:
        store.fused_adam(grad, state, step, (0.9, 0.999), 1e-8, always=True)
    assert events == ["default waits for current", call, "current waits for default"]


def test_nothing_waits_where_there_is_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moments.current_and_default_stream(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 7)
    assert moments.current_and_default_stream(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    assert moments.current_and_default_stream(torch.device("cuda")) == (7, 0)


def config_of(**given: Any) -> tuple[Any, dict[str, str]]:
    given = {"model": "llama_60m", "optim": "galore_adamw", "data": "sample", "steps": 100} | given
    return resolve(given, dict.fromkeys(given, "flag"))


def card(monkeypatch: pytest.MonkeyPatch, free: float, total: float) -> None:
    """The run is on a GPU that shows so many GiB."""
    monkeypatch.setattr(budget, "device_of", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), int(total * GIB)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("asked", "free", "total", "expected"),
    [
        (24, 23.2, 23.64, 23.64 * GIB - 1.6e9),  # a card sold with 24 GB shows less
        (16, 23.2, 23.64, 16 * GIB - 1.6e9),
        (None, 23.2, 23.64, 23.64 * GIB - 1.6e9),
        (24, 12, 23.64, 12 * GIB - 0.7e9),  # another program has the rest
    ],
)
def test_a_card_gives_no_more_than_it_shows(
    asked: int | None, free: float, total: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = config_of(memory_budget=asked and asked * GIB)
    card(monkeypatch, free, total)
    assert budget.budget_of(config) == pytest.approx(expected, abs=2)
    assert f"shows {total:.2f} GiB and has {free:.2f} free" in budget.source_of(config)


def test_several_processes_leave_room_for_their_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's buffers, and what FSDP2's side streams reserve, are in no plan of tensors."""
    config, _ = config_of(memory_budget=None)
    eight = replace(config, processes=Processes(8, 8))
    for free in (79, 60):
        card(monkeypatch, free, 80)
        assert budget.budget_of(config) - budget.budget_of(eight) == budget.OUTSIDE_SHARED
    assert budget.source_of(eight).endswith("less 0.84 for NCCL and FSDP2")
    assert "NCCL" not in budget.source_of(config)
    plan = Plan(eight, 60 * GIB, {}, "head and loss")
    assert "NCCL and FSDP2 (0.8), 18.36 are left" in budget.left_on_card(plan, 70 * GIB)


def test_micro_batches_on_a_card_are_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room, as many rows as keep a GPU from waiting for Python, and the whole update where it can be."""
    for total, sizes in ((512, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]), (96, [1, 2, 4, 8, 16, 32, 96]), (15, [1, 15])):
        config, _ = config_of(total_batch_size=total, numerics="sound", grad_clip=0.0)
        with monkeypatch.context() as patched:
            card(patched, 79, 80)
            assert choice._sizes(config) == sizes
            plain = [c for c in choice.candidates(config) if not c.layerwise]
            costs = {c.batch_size: choice._cost(c) for c in plain if not c.activation_checkpointing}
            assert min(costs, key=lambda size: costs[size]) == max(sizes)
            assert costs[1] > costs[max(sizes)]
        with monkeypatch.context() as patched:  # the machine of this test may have a card of its own
            patched.setattr(torch.cuda, "is_available", lambda: False)
            assert max(choice._sizes(config)[:-1]) <= 8


def test_one_of_several_cards_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a checkpoint written in the background makes a second context, on the first card."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert build.device_named("cuda:1") == torch.device("cuda:1")
    assert build.device_named("cuda") == torch.device("cuda")
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("numerics", ["sound", "reference"])
def test_long_products_are_added_up_in_fp32(numerics: str, build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    config, _ = config_of(numerics=numerics)
    build.set_up_model(config, build_tiny())
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == (numerics == "reference")


def test_a_model_is_exported_in_shards(
    tmp_path: Path, build_tiny: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard's tensors are in host memory together; the published limit of 50 GB means all of 7B."""
    assert export._SHARD_SIZE == "1GB"
    monkeypatch.setattr(export, "_SHARD_SIZE", "50KB")
    model = build_tiny()
    export.export(tmp_path / "model", model, load_tokenizer("sample"))
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


class CopyStream:
    """Writes down what a stream is asked for."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def record_event(self) -> str:
        self.events.append(f"{self.name} records")
        return f"an event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for {event}")

    def synchronize(self) -> None:
        self.events.append(f"the host waits for {self.name}")


@pytest.fixture
def side_stream(monkeypatch: pytest.MonkeyPatch) -> tuple[SideStream, list[str], list[Any]]:
    """A side stream of no card, what its streams are asked for, and what is asked of CUDA's runtime."""
    events: list[str] = []
    calls: list[Any] = []

    def register(address: int, size: int, flags: int) -> int:
        calls.append(("lock", address, size, flags))
        return 2 if size > 1000 else 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda at: calls.append(("unlock", at)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: CopyStream("side", events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: CopyStream("computing", events))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return SideStream(torch.device("cuda:0")), events, calls


def test_each_stream_waits_for_the_other(side_stream: Any) -> None:
    stream, events, _ = side_stream
    stream.await_used(stream.used())
    stream.await_moved(stream.moved())
    stream.synchronize()
    assert events == [
        "computing records",
        "side waits for an event of computing",
        "side records",
        "computing waits for an event of side",
        "the host waits for side",
    ]


def test_page_locked_memory_is_as_large_as_asked_and_given_back(side_stream: Any) -> None:
    """Torch's own would be the next power of two; it is unlocked only when no copy uses it."""
    stream, events, calls = side_stream
    memory = stream.host_memory(700)
    address = memory.data_ptr()
    assert calls == [("lock", address, 700, 0)]
    del memory
    assert calls[1:] == [("unlock", address)]
    assert events == ["the host waits for side"]
    with pytest.raises(NotLockedError, match="could not be page-locked: CUDA error 2") as raised:
        stream.host_memory(2000)
    prepared: Any = SimpleNamespace(
        config=config_of(accumulate_on="host", layerwise=False)[0], world=SimpleNamespace(rank=0)
    )
    with pytest.raises(TrainingFailedError) as told, run._failures_explained(prepared):
        raise raised.value
    assert str(told.value) == (
        "--accumulate-on host: 0.00 GiB of the host's memory could not be page-locked: CUDA error 2; what helps: "
        "--layerwise, whose sums are low-rank ones but for a few, --accumulate-on device"
    )


def test_a_device_has_its_transport(side_stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(transport_of(torch.zeros(1)), AtOnce)
    on_card: Any = SimpleNamespace(device=torch.device("cuda:0"))
    assert isinstance(transport_of(on_card), SideStream)
    monkeypatch.setattr(transport, "FakeTensor", SimpleNamespace)  # as in a plan on a machine with a card
    assert isinstance(transport_of(on_card), AtOnce)
