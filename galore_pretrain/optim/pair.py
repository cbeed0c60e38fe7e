"""Two processes make the updates of each method that is checked: what they come to must be what one comes to."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.execution import Layerwise
from galore_pretrain.optim.own import told
from galore_pretrain.optim.trial import (
    SHAPES,
    CheckFailedError,
    NotCheckedError,
    Placing,
    Subject,
    Trial,
    gradients,
    has_codes,
    load_subject,
)
from galore_pretrain.tensors.shards import whole

_BY_COLUMNS = ("mlp.wide.weight",)  # parameters that are shared out by columns; the others are by rows
_SHARDS_BOUND = 2e-4
_REPLICAS_BOUND = 1e-3
_CODES_BOUND = 0.2
_STEPS = 5
_SKIPPED_AT = 2
_SKIPPED = "norm.weight"


class Pair:
    """Tells what came of each of ``subjects`` in two processes, which are started once for all, when first asked.

    A process that waits for the other for more than ``patience`` seconds gives the method up.
    """

    def __init__(self, subjects: Sequence[Subject], patience: float = 30.0) -> None:
        self._subjects = list(subjects)
        self._patience = patience
        self._outcomes: dict[Subject, list[dict[str, str]]] | None = None

    def check(self, subject: Subject) -> str:
        """Return what two processes held of a method. Raises what they raised, CheckFailedError or NotCheckedError."""
        if self._outcomes is None:
            self._outcomes = _outcomes(self._subjects, self._patience)
        outcomes = self._outcomes[subject]
        reasons = [outcome["why"] for outcome in outcomes]
        reason = reasons[0]
        if reasons[0] != reasons[1]:
            reason = f"process 0: {reasons[0]}; process 1: {reasons[1]}"
        statuses = {outcome["status"] for outcome in outcomes}
        if "failed" in statuses:
            raise CheckFailedError(reason)
        if "not checked" in statuses:
            raise NotCheckedError(reason)
        return reason


def _outcomes(subjects: Sequence[Subject], patience: float) -> dict[Subject, list[dict[str, str]]]:
    """Start two processes, and return what each of them says of each of ``subjects``."""
    from torch import multiprocessing

    found: dict[Subject, list[dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as name, _one_thread_each():
        folder = Path(name)
        (folder / "subjects.json").write_text(json.dumps([asdict(subject) for subject in subjects]))
        ending = "the processes did not end"
        try:
            multiprocessing.spawn(_work, args=(name, patience), nprocs=2)
        except Exception as error:  # whatever a process ended by
            ending = " ".join(str(error).split())
        for number, subject in enumerate(subjects):
            found[subject] = []
            for rank in range(2):
                file = _file(folder, rank, number)
                outcome = {"status": "failed", "why": f"process {rank} says nothing of it: {ending}"}
                if file.exists():
                    outcome = json.loads(file.read_text())
                found[subject].append(outcome)
    return found


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that are started here compute with one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _file(folder: Path, rank: int, number: int) -> Path:
    """Return the file in which a process says what came of subject ``number``."""
    return folder / f"{number}_of_{rank}.json"


# Each method has a group of processes of its own. One that raises in one process alone leaves the other waiting, or
# taking messages that are meant for the next method.
def _work(rank: int, name: str, patience: float) -> None:
    """Be process ``rank`` of two: check all subjects, in the same order in both."""
    from torch import distributed

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    folder = Path(name)
    store = distributed.FileStore(str(folder / "store"), 2)
    for number, values in enumerate(json.loads((folder / "subjects.json").read_text())):
        own_store = distributed.PrefixStore(str(number), store)
        timeout = timedelta(seconds=patience)
        distributed.init_process_group("gloo", store=own_store, rank=rank, world_size=2, timeout=timeout)
        try:
            subject = load_subject(values["name"], values["numerics"], dict(values["options"]))
            outcome = {"status": "ok", "why": _check(subject)}
        except NotCheckedError as error:
            outcome = {"status": "not checked", "why": str(error)}
        except CheckFailedError as error:
            outcome = {"status": "failed", "why": str(error)}
        except Exception as error:  # whatever a method raises
            outcome = {"status": "failed", "why": told(error)}
        _file(folder, rank, number).write_text(json.dumps(outcome))
        distributed.destroy_process_group()


def _check(subject: Subject) -> str:
    """Check a method over parts of tensors, and over replicas; return what was held."""
    from torch.distributed.device_mesh import init_device_mesh

    shards = init_device_mesh("cpu", (2,), mesh_dim_names=("shards",))
    place = _placing(shards)
    try:
        subject.build(torch.float32, place=place)
    except ValueError as error:
        raise NotCheckedError(f"refused for several processes: {error}") from error
    _check_shards(subject, place)
    replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    _check_replicas(subject, replicas)
    return f"parts to {_SHARDS_BOUND:g} of the way, replicas to {_REPLICAS_BOUND:g}"


def _placing(mesh: Any) -> Placing:
    """Return what shares a tensor out over the processes of ``mesh``."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def place(name: str, value: Tensor) -> Tensor:
        dim = int(name in _BY_COLUMNS)
        return distribute_tensor(value, mesh, [Shard(dim)], src_data_rank=None)

    return place


# One element of one tensor is not finite, in the part of one process alone: both must skip the tensor.
def _check_shards(subject: Subject, place: Placing) -> None:
    """Check that two processes, which have a part of each tensor each, come to what one comes to."""
    alone = subject.build(torch.float32)
    together = subject.build(torch.float32, place=place)
    for trial in (alone, together):
        for number in range(1, _STEPS + 1):
            grads = gradients(number)
            if number == _SKIPPED_AT:
                grads[_SKIPPED][0] = torch.nan
            trial.step(grads)
    skipped = [trial.optimizer.read_skips().skipped for trial in (alone, together)]
    if skipped != [1, 1]:
        raise CheckFailedError(
            f"{_SKIPPED}: one gradient was not finite, in one process's part; {skipped[0]} and {skipped[1]} updates "
            "were skipped by one process and by two; likely the rule looks whether its part is finite by itself"
        )
    _require_near(
        alone,
        together,
        _SHARDS_BOUND,
        "by two processes with a part each",
        "likely the rule takes a norm, a mean or a product over its part for one over the whole tensor: ask the step "
        "for sums (Step.total, Step.mean), or leave scope at WHOLE",
    )


def _check_replicas(subject: Subject, mesh: Any) -> None:
    """Check that two processes, with a whole copy of each tensor, come to what one comes to by the summed gradients."""
    alone = subject.build(torch.float32)
    together = subject.build(torch.float32, place=_placing(mesh["shards"]))
    together.optimizer.sum_over_replicas(mesh)
    rank = mesh.get_local_rank(0)
    by_one = Layerwise(alone.optimizer)
    by_two = Layerwise(together.optimizer)
    for number in range(1, _STEPS + 1):
        sums: list[Mapping[str, Tensor]] = []
        for first, second in zip(_of_replica(0, number), _of_replica(1, number), strict=True):
            sums.append({name: first[name] + second[name] for name in SHAPES})
        alone.update(by_one, sums)
    for number in range(1, _STEPS + 1):
        together.update(by_two, _of_replica(rank, number))
    _require_near(
        alone,
        together,
        _REPLICAS_BOUND,
        "by two processes with a copy each",
        "likely `compress` is not linear, so that a sum of compressed gradients is not the sum compressed",
    )


def _of_replica(replica: int, number: int) -> list[dict[str, Tensor]]:
    """Return the gradients of a replica's two micro-batches of update ``number``."""
    return [gradients(1000 * replica + 100 * micro_batch + number) for micro_batch in range(2)]


def _require_near(alone: Trial, together: Trial, bound: float, where: str, likely: str) -> None:
    """Raise CheckFailedError where a weight is further apart than ``bound`` of its way, by the largest elements."""
    for name, p in alone.params.items():
        limit = bound
        if has_codes(alone.optimizer.tensors(p)):
            limit = _CODES_BOUND
        apart = float((p.detach() - whole(together.params[name])).abs().max())
        way = float((p.detach() - alone.before[name]).abs().max())
        if not apart <= limit * way:
            raise CheckFailedError(
                f"{name} {where}: {apart:.2g} apart after a way of {way:.2g} (largest elements), and {limit:g} of it "
                f"is allowed; {likely}"
            )
