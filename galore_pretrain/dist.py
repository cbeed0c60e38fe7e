"""Several processes as one run: torchrun's process group, a mesh of it, and what they tell each other.

torch.distributed is imported where there are several processes, and nowhere else.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from galore_pretrain.config import RunConfig, processes
from galore_pretrain.errors import InputError, TrainingFailedError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, of which this one has number ``rank``. ``mesh``: replicas × shards, or shards alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the processes, on all of them."""
        if self.size == 1:
            return values
        from torch import distributed

        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each over the processes."""
        if self.size == 1:
            return values
        from torch import distributed

        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(found.tolist())

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the main process, which alone does it; what it raises is raised in all."""
        if self.size == 1:
            return work()
        from torch import distributed

        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        distributed.broadcast_object_list(told, device=self.device)
        if told[1] is not None:
            told[1].is_told = self.is_main  # by the process that it happened in
            raise told[1]
        return told[0]  # type: ignore[no-any-return]


ALONE = World()


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """The processes that torchrun has started, joined, if they are not yet; or this one alone."""
    size = processes()
    if size == 1:
        yield ALONE
        return
    from torch import distributed

    rank, local, locally = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    kind = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {config.device}: each of {size} processes takes its own; use auto, cuda or cpu")
    if kind == "cuda":
        if locally > torch.cuda.device_count():
            raise InputError(
                f"torchrun started {locally} processes here, and there are {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local)
    backend = {"cuda": "nccl", "cpu": "gloo"}[kind]
    if is_new := not distributed.is_initialized():
        _join(backend, timedelta(seconds=config.distributed_timeout))
    try:
        yield World(rank, size, torch.device(kind, local if kind == "cuda" else 0), _mesh(config, kind, locally))
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error).lower()):
            raise
        lost = TrainingFailedError(
            f"another process has ended, or not answered for --distributed-timeout {config.distributed_timeout} s; "
            "started again, the run goes on from its newest checkpoint"
        )
        lost.is_told = rank < 2  # type: ignore[attr-defined]  # by one, and by another where that is the one that ended
        raise lost from error
    finally:
        if is_new:
            distributed.destroy_process_group()


def _mesh(config: RunConfig, kind: str, on_a_host: int) -> Any:
    """Replicas × shards, or shards alone."""
    from torch.distributed.device_mesh import init_device_mesh

    size = processes()
    shards = {"full": size, "hybrid": on_a_host, "none": 1}[config.shard]
    if size % shards:
        raise InputError(f"--shard hybrid: {size} processes are not a multiple of the {on_a_host} on this host")
    if shards == size:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shards",))
    return init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("replicas", "shards"))


@contextmanager
def imagined(config: RunConfig, on_a_host: int) -> Iterator[Any]:
    """The mesh of a run of so many processes as `processes` says, none of which exists: for its plan."""
    if processes() == 1:
        yield None
        return
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=processes(), store=FakeStore())
    try:
        yield _mesh(config, "cuda" if config.device == "cuda" else "cpu", on_a_host)
    finally:
        distributed.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    """As ``init_process_group`` by itself, but that processes which torchrun starts once more on a host do not find the
    addresses of those before them: torch 2.13 gives both one store (of eight such starts, three hung or failed).

    On several hosts the number of restarts is each host's own; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a store
    for each start.
    """
    from torch import distributed

    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    distributed.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
