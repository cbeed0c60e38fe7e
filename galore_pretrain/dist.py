"""Several processes as one run: torchrun's process group, a mesh of it, and what they tell each other.

torch.distributed is imported where there are several processes, and nowhere else.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError, ProcessFailedError, RunError, TrainingFailedError

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)
"""How long processes wait for one that has to wait itself: for a checkpoint's checksums, a hub that is away, a plan."""


@dataclass(frozen=True)
class World:
    """The processes of a run, of which this one has number ``rank``. ``mesh``: replicas × shards, or shards alone.

    ``group`` is for what one process does while the others wait, however long; they still notice if it ends.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Returns ``values`` summed over the processes, in all of them."""
        if self.size == 1:
            return values
        from torch import distributed

        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def total(self, *values: int) -> tuple[int, ...]:
        """Returns each number summed over the processes."""
        if self.size == 1:
            return values
        from torch import distributed

        found = torch.tensor(values, dtype=torch.int64, device=self.device)
        distributed.all_reduce(found)
        return tuple(found.tolist())

    def gathered(self, tensor: Tensor) -> Tensor:
        """Returns what all processes have as one tensor, one after another. It has one shape in all, and is on the
        host."""
        if self.size == 1:
            return tensor
        from torch import distributed

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor, group=self.group)
        return torch.cat(parts)

    def largest(self, *values: float) -> tuple[float, ...]:
        """Returns the largest value of each number over the processes."""
        if self.size == 1:
            return values
        from torch import distributed

        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(found.tolist())

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """The main process does ``work``. All return its result, or raise what it raised, which that process prints."""
        if self.size == 1:
            return work()
        from torch import distributed

        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = work()
            except Exception as raised:
                answer[1] = raised
        distributed.broadcast_object_list(answer, group=self.group)
        result: T = answer[0]
        error: Exception | None = answer[1]
        if error is None:
            return result
        if isinstance(error, RunError):
            error.reported_by = 0
        elif not self.is_main:
            raise error from ProcessFailedError(reported_by=0)
        raise error

    def on_every_rank(self, work: Callable[[], T], alike: Callable[[T], str]) -> T:
        """All processes do ``work``, and each returns its own result.

        What it raises in one is raised in all, and printed once. So is an InputError where ``alike``, a text made from
        the result, is not the same in all: what they read differs.
        """
        if self.size == 1:
            return work()
        from torch import distributed

        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(work())
        except Exception as raised:
            error = raised
        fingerprint = zlib.crc32(alike(result[0]).encode()) if result else 0
        is_input = error is None or isinstance(error, InputError)
        failed = 0 if error is None else self.size - self.rank
        told = torch.tensor([failed, not is_input, fingerprint, -fingerprint], dtype=torch.float64)
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self.group)  # text may have to be waited for
        bad, worse, high, low = told.tolist()
        if bad:
            speaker = int(self.size - bad)  # the first that failed
            if error is None or (worse and is_input):  # all must take the same way out
                error = (TrainingFailedError if worse else InputError)(f"process {speaker} has failed")
            if isinstance(error, RunError):
                error.reported_by = speaker if is_input else self.rank
            raise error
        if high != -low:
            raise InputError("the processes do not read the same text: give all hosts the same files", reported_by=0)
        return result[0]


ALONE = World()


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """Join the processes that torchrun has started, if they are not joined yet; alone, this one is all of them."""
    size = config.processes.total
    if size == 1:
        yield ALONE
        return
    from torch import distributed

    try:
        rank, local = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK"))
    except KeyError as error:
        raise InputError(f"WORLD_SIZE is {size}, and there is no {error}: let torchrun start the processes") from error
    kind = _kind(config)
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {config.device}: each of {size} processes takes its own; use auto, cuda or cpu")
    if kind == "cuda":
        here, gpus = config.processes.here, torch.cuda.device_count()
        if gpus < here:
            raise InputError(f"torchrun started {here} processes here, and there are {gpus} GPUs")
        torch.cuda.set_device(local)
    timeout = timedelta(seconds=config.distributed_timeout)
    device = torch.device(kind, local if kind == "cuda" else 0)
    if is_new := not distributed.is_initialized():
        _join({"cuda": "nccl", "cpu": "gloo"}[kind], timeout, device)
    try:
        mesh, group = _mesh(config, kind), distributed.new_group(backend="gloo", timeout=max(timeout, _PATIENCE))
        yield World(rank, size, device, mesh, group)
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error).lower()):
            raise
        raise TrainingFailedError(
            f"another process has ended, or not answered for --distributed-timeout {config.distributed_timeout} s; "
            "started again, the run goes on from its newest checkpoint",
            reported_by=min(rank, 1),  # by the first one, and by the second where the first is the one that ended
        ) from error
    if is_new:  # not after an error: it might wait for messages that never come
        distributed.destroy_process_group()


def _kind(config: RunConfig) -> str:
    """The kind of device that every process has: cuda or cpu."""
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def _mesh(config: RunConfig, kind: str) -> Any:
    """The mesh of the processes: replicas × shards, or shards alone."""
    from torch.distributed.device_mesh import init_device_mesh

    size, here = config.processes.total, config.processes.here
    shards = {"full": size, "hybrid": here, "none": 1}[config.shard]
    if size % shards:
        raise InputError(f"--shard hybrid: {size} processes are not a multiple of the {here} on this host")
    if shards == size:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shards",))
    return init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("replicas", "shards"))


@contextmanager
def imagined(config: RunConfig) -> Iterator[Any]:
    """Yield the mesh of a run of as many processes as ``config`` names, none of which exists, for its plan."""
    if config.processes.total == 1:
        yield None
        return
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=config.processes.total, store=FakeStore())
    try:
        yield _mesh(config, _kind(config))
    finally:
        distributed.destroy_process_group()


def _join(backend: str, timeout: timedelta, device: torch.device) -> None:
    """Make the process group, as ``init_process_group`` does by itself but for one thing: processes that torchrun
    starts once more on a host do not find the addresses of those before them. torch 2.13 gives both one store (of eight
    such starts, three hung or failed).

    On several hosts the number of restarts is each host's own; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a store
    for each start.
    """
    from torch import distributed

    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # NCCL that knows its GPU makes its communicators here, so that what is wrong with them is told here.
    gpu = device if device.type == "cuda" else None
    distributed.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size, device_id=gpu)
