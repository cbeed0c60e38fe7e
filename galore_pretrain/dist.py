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
    """The processes of a run, of which this one has number ``rank``.

    ``mesh`` is a ``DeviceMesh`` of replicas × shards, or of shards alone. ``group`` is for what one process does while
    the others wait, however long; they still notice if it ends. Alone, a process has neither.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values`` summed over the processes, in all of them, on the device where they were."""
        if self.size == 1:
            return values
        from torch import distributed

        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def total(self, *values: int) -> tuple[int, ...]:
        """Return each number summed over the processes."""
        if self.size == 1:
            return values
        from torch import distributed

        totals = torch.tensor(values, dtype=torch.int64, device=self.device)
        distributed.all_reduce(totals)
        return tuple(totals.tolist())

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes as one, joined along the first dimension, in all of them.

        ``tensor`` has one shape in all processes, and is on the host.
        """
        if self.size == 1:
            return tensor
        from torch import distributed

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor, group=self.group)
        return torch.cat(parts)

    def largest(self, *values: float) -> tuple[float, ...]:
        """Return the largest value of each number over the processes."""
        if self.size == 1:
            return values
        from torch import distributed

        maxima = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
        return tuple(maxima.tolist())

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the main process; return its result, or raise what it raised, in all.

        The main process alone prints the error.
        """
        # The others wait in the broadcast, for as long as the work takes, and it brings them the result or the error.
        # So none goes on with work that has failed, to wait for the main process in some later collective.
        if self.size == 1:
            return work()
        from torch import distributed

        answer: list[Any] = [None, None]  # the result, the error
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
        """Do ``work`` in every process; each returns its own result.

        What it raises in one is raised in all, and printed once. So is an InputError where ``alike``, a text made from
        the result, is not the same in all: what they read differs.
        """
        # All must take the same way out, or those that go on wait for the others in their next collective, until a
        # time limit. So each says in four numbers how its work went, and all get the largest of each number:
        #   failed       0, or size - rank where the work raised: the largest is that of the first process that did
        #   is_serious   1 where it raised anything but an InputError
        #   fingerprint  of the text, and its negative: the largest of both are opposite where all have the same
        # float64 holds all of these exactly. A process whose work went well raises, in place of an error of its own,
        # one that names the first that failed. Where one failure is serious, all end with the exit code of that, and
        # processes that have an InputError give theirs up.
        if self.size == 1:
            return work()
        from torch import distributed

        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(work())
        except Exception as raised:
            error = raised
        fingerprint = 0
        if result:
            fingerprint = zlib.crc32(alike(result[0]).encode())
        failed = 0
        if error is not None:
            failed = self.size - self.rank
        is_serious = not (error is None or isinstance(error, InputError))
        status = torch.tensor([failed, is_serious, fingerprint, -fingerprint], dtype=torch.float64)
        # By the group that waits long, since one process may have to wait for its text.
        distributed.all_reduce(status, distributed.ReduceOp.MAX, group=self.group)
        most_failed, any_serious, highest, minus_lowest = status.tolist()
        if most_failed:
            speaker = int(self.size - most_failed)
            if error is None or (any_serious and not is_serious):
                kind: type[RunError] = InputError
                if any_serious:
                    kind = TrainingFailedError
                error = kind(f"process {speaker} has failed")
            if isinstance(error, RunError):
                error.reported_by = speaker
                if is_serious:
                    error.reported_by = self.rank
            raise error
        if highest != -minus_lowest:
            raise InputError("the processes do not read the same text: give all hosts the same files", reported_by=0)
        return result[0]


ALONE = World()
"""The world of a run of one process."""


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """Join the processes that torchrun has started, if they are not joined yet; alone, this one is all of them.

    Raises InputError where they cannot be joined, and TrainingFailedError where another one has ended meanwhile.
    """
    size = config.processes.total
    if size == 1:
        yield ALONE
        return
    from torch import distributed

    try:
        rank = int(os.environ["RANK"])
        local_rank = int(os.environ["LOCAL_RANK"])
    except KeyError as error:
        raise InputError(f"WORLD_SIZE is {size}, and there is no {error}: let torchrun start the processes") from error
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {config.device}: each of {size} processes takes its own; use auto, cuda or cpu")
    kind = _kind(config)
    device = torch.device(kind, 0)
    if kind == "cuda":
        gpus = torch.cuda.device_count()
        if gpus < config.processes.here:
            raise InputError(f"torchrun started {config.processes.here} processes here, and there are {gpus} GPUs")
        device = torch.device(kind, local_rank)
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=config.distributed_timeout)
    is_new = not distributed.is_initialized()
    store = None
    if is_new:
        store = _join(timeout, device)
    try:
        mesh = _mesh(config, kind)
        group = distributed.new_group(backend="gloo", timeout=max(timeout, _PATIENCE))
        yield World(rank, size, device, mesh, group)
    except Exception as error:
        if _is_of_processes(error):
            raise TrainingFailedError(
                f"another process has ended, or not answered for --distributed-timeout {config.distributed_timeout} s; "
                "started again, the run goes on from its newest checkpoint",
                reported_by=min(rank, 1),  # by the first one, and by the second where the first is the one that ended
            ) from error
        has_reporter = isinstance(error, RunError) or isinstance(error.__cause__, RunError)
        if not has_reporter and store is not None:
            first = _first_to_fail(store, rank)
            if first != rank:
                raise error from ProcessFailedError(reported_by=first)
        raise
    if is_new:  # not after an error: it might wait for messages that never come
        distributed.destroy_process_group()


def _is_of_processes(error: Exception) -> bool:
    """Return whether a message between processes has failed; gloo raises plain RuntimeErrors."""
    from torch import distributed

    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return is_of_gloo or isinstance(error, distributed.DistError)


# A bug, or a method of the user's that raises, is met by all processes, or by one alone while the others wait for its
# messages. Which of both it is, none can ask. So each leaves its number with the store, which waits for nobody and
# keeps the first: that one prints its error for all.
def _first_to_fail(store: Any, rank: int) -> int:
    """Return the number of the process that was the first to fail: this one's, where no other has, or none can tell."""
    from torch import distributed

    try:
        return int(store.compare_set("first to fail", "", str(rank)))
    except distributed.DistError:  # the store has gone with the process that kept it
        return rank


def _kind(config: RunConfig) -> str:
    """Return the kind of device that every process has: cuda or cpu."""
    if config.device != "cpu" and torch.cuda.is_available():
        return "cuda"
    return "cpu"


def _mesh(config: RunConfig, kind: str) -> Any:
    """Return the mesh of the processes: replicas × shards, or shards alone."""
    from torch.distributed.device_mesh import init_device_mesh

    size = config.processes.total
    on_host = config.processes.here
    shards = {"full": size, "hybrid": on_host, "none": 1}[config.shard]
    if size % shards:
        raise InputError(f"--shard hybrid: {size} processes are not a multiple of the {on_host} on this host")
    if shards == size:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shards",))
    replicas = size // shards
    return init_device_mesh(kind, (replicas, shards), mesh_dim_names=("replicas", "shards"))


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


def _join(timeout: timedelta, device: torch.device) -> Any:
    """Make the process group, of nccl for GPUs and of gloo for CPUs, and return the store in which processes meet.

    ``init_process_group`` would do so by itself. The difference is that processes that torchrun starts once more do not
    find in the store what those before them left.
    """
    # torch 2.13 gives the processes of all starts on a host one store; of eight such starts, three hung or failed. So
    # the keys of each start get a prefix. On several hosts the number of restarts is each host's own, so that it can be
    # no common prefix; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a store for each start.
    from torch import distributed

    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"start {restarts}", store)
    backend = "gloo"
    device_id = None
    if device.type == "cuda":
        # NCCL that knows its GPU makes its communicators here, so that what is wrong with them is told here.
        backend = "nccl"
        device_id = device
    distributed.init_process_group(
        backend,
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=size,
        device_id=device_id,
    )
    return store
