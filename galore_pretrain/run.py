"""The composition root: the only place where the parts of a run are chosen and joined."""

import errno
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.recipes import reference_batch
from galore_pretrain.dist import World, joined
from galore_pretrain.errors import TrainingFailedError
from galore_pretrain.meters import peak_memory_bytes, ran_out
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.planning.budget import fitted, ways_out
from galore_pretrain.planning.plan import Plan, Static, measure, static_bytes
from galore_pretrain.rundir.checkpoint import Saved
from galore_pretrain.rundir.directory import (
    check_shared,
    check_space,
    keep_rows,
    lock,
    log_config,
    write_config,
    write_summary,
)
from galore_pretrain.rundir.environment import describe_environment
from galore_pretrain.rundir.export import export
from galore_pretrain.rundir.resume import Saver, again, check_inputs, going_on, is_finished, restore
from galore_pretrain.rundir.totals import RunTotals
from galore_pretrain.signals import on_stop
from galore_pretrain.tensors.products import has_fast_bf16
from galore_pretrain.text.batches import Row, TrainingData, read_ahead, validation_rows
from galore_pretrain.train.build import (
    compile_layers,
    device_of,
    execution_for,
    factors_of,
    model_for,
    optimizer_for,
    prepare,
)
from galore_pretrain.train.evaluate import Evaluation, evaluate
from galore_pretrain.train.inputs import Inputs, open_inputs
from galore_pretrain.train.metrics import MetricLogger, open_loggers
from galore_pretrain.train.profile import Profile
from galore_pretrain.train.schedule import Schedule
from galore_pretrain.train.trainer import Trainer, TrainState, Unwatched, Watch

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
log = logging.getLogger(__name__)


def train(config: RunConfig, origins: Mapping[str, str], *, when_stuck: Callable[[], None] = lambda: None) -> int:
    """One run, from config to exported model; the exit code. What can be refused is refused before weights exist.

    ``when_stuck`` is called where something is left behind that Python's own exit would wait for.
    """
    started = time.monotonic()
    with joined(config) as world, ExitStack() as held:
        config, origins = world.from_main(lambda: (config, origins))  # its names hold the time
        output, schedule = Path(config.output), _schedule(config)
        world.from_main(lambda: held.enter_context(lock(output)))
        world.together(lambda: check_shared(output), lambda found: "")
        config, origins, found, kept = world.from_main(lambda: going_on(config, origins, output))
        if found and world.from_main(lambda: is_finished(output, found, schedule)):
            log.info("%s is finished; give another --output to train anew", output)
            return 0
        revision = found.state.get("revision") if found else None
        if world.size > 1:  # all read what the first one finds
            revision = world.from_main(lambda: open_inputs(config, revision).revision)
        inputs = world.together(lambda: open_inputs(config, revision), lambda found: str(found.fingerprints()))
        if found:
            check_inputs(config, found, inputs.fingerprints())
        optimizer_for(config, model_for(config, inputs.model, "meta"))  # whether its options fit, at no cost
        config, origins, planned = world.from_main(lambda: fitted(config, origins, world.mesh, kept=kept))
        log_config(config, origins)
        try:
            static = static_bytes(config, inputs.model)  # of all processes, in files
            world.from_main(lambda: check_space(output, static.weights + static.state, _checkpoints_at_most(config)))
            return _train(config, origins, inputs, found, planned, started, world, when_stuck)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            # Each process tells its own: in which of them it happens, the others do not know.
            message = _out_of_memory(planned, config, inputs, world)
            raise TrainingFailedError(message, reported_by=world.rank) from error
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_ROOM:
                raise
            raise TrainingFailedError(
                f"--output {output} cannot be written ({getattr(error, 'strerror', error)}); once it can be, "
                f"{again(config)} goes on"
            ) from error


def _train(
    config: RunConfig,
    origins: Mapping[str, str],
    inputs: Inputs,
    found: Saved | None,
    planned: Plan | None,
    started: float,
    world: World,
    when_stuck: Callable[[], None],
) -> int:
    """Build the parts, join them, and let them run."""
    output, schedule, device = Path(config.output), _schedule(config), device_of(config)
    position = TrainingPosition()
    model = model_for(config, inputs.model, device, fresh=found is None, mesh=world.mesh, position=position)
    optimizer = optimizer_for(config, prepare(config, model), world.mesh)
    if config.compile:
        compile_layers(model)
    execution = execution_for(config, optimizer)
    _log_assignment(config, device, optimizer, world)
    data = TrainingData(
        inputs.training, inputs.rows, config.total_batch_size, config.seed, rank=world.rank, size=world.size
    )
    state = TrainState()
    if found:
        world.together(lambda: restore(found, model, optimizer, state, data), lambda done: "")
    # Only now: what the folder holds may be of another method, and is refused then.
    environment = {"tokenizer_sha256": inputs.tokenizer.fingerprint, "processes": world.size}
    environment |= describe_environment(device)
    world.from_main(lambda: write_config(output, config, origins, environment))
    saved = found.state if found else {}
    own = found is not None and found.is_in(output / "checkpoints")
    loggers: list[MetricLogger] = []
    continued = saved if own else {}
    world.from_main(lambda: loggers.extend(open_loggers(config, output, state.step, state.tokens_seen, continued)))
    totals = RunTotals(device, inputs, loggers, saved, started)
    saver = Saver(config, model, optimizer, state, totals.state, found, world)
    factors = factors_of(config)
    watch: Watch = Unwatched()
    if config.profile and world.is_main:
        watch = Profile(config.profile, output / "profile", device)
    trainer = Trainer(
        model=model,
        batches=read_ahead(data, pin=device.type == "cuda"),
        optimizer=optimizer,
        execution=execution,
        schedule=schedule,
        after_update=partial(factors.after_update, model, optimizer) if factors else lambda step: None,
        evaluate=_evaluator(config, model, inputs, device, world),
        checkpoints=saver,
        keep_rows=partial(keep_rows, output, world),
        loggers=loggers,
        state=state,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        save_every=config.save_every,
        mean_of_means=config.numerics == "reference",
        max_loss=config.max_loss or math.inf,
        device=device,
        world=world,
        position=position,
        watch=watch,
    )
    with on_stop(trainer.stop):
        try:
            is_over = trainer.fit()
            saver.finish()
            if not is_over:
                log.info("stopped after update %d; %s goes on there", state.step, again(config))
                return 128 + (trainer.stop_signal or 0)
            reached = totals.peaks()  # exporting is not training
            export(output / "model", model, inputs.tokenizer, world)
            summary = _summary(
                state, static_bytes(config, inputs.model), reached, totals.seconds(), saver.stalled, world
            )
            world.from_main(
                lambda: write_summary(
                    output, summary | {"planned_peak_bytes": _planned_peak(planned, config, inputs, world)}
                )
            )
            return 0
        finally:
            saver.wait()
            have_ended = [logger.close() for logger in loggers]
            if not all(have_ended):
                when_stuck()


def _checkpoints_at_most(config: RunConfig) -> int:
    """How many are kept when the run is over."""
    updates = config.steps or (config.max_tokens or 0) // (config.total_batch_size * config.max_length)
    return config.keep + (updates // config.keep_every if config.keep_every else 0)


def _planned_peak(planned: Plan | None, config: RunConfig, inputs: Inputs, world: World) -> int | None:
    """Also of a run that needed no plan. It is over, and must not fail for this."""
    try:
        return (planned or measure(config, inputs.model, world.mesh)).peak_bytes
    except Exception as error:
        log.warning("its memory could not be planned: %s", error)
        return None


def _out_of_memory(planned: Plan | None, config: RunConfig, inputs: Inputs, world: World) -> str:
    peak, expected = peak_memory_bytes(device_of(config)), _planned_peak(planned, config, inputs, world)
    plan = "" if expected is None else f", {expected / 2**30:.2f} GiB were planned"
    return f"out of memory: {peak / 2**30:.2f} GiB was the peak so far{plan}; what helps: {ways_out(config, most=3)}"


def _log_assignment(config: RunConfig, device: torch.device, optimizer: RuleOptimizer, world: World) -> None:
    """What is trained, where, and what updates which tensors."""
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if world.size > 1:
        where = f"{world.size} processes (--shard {config.shard}), each on {where}"
    elif config.reduce == "projected":
        log.warning("--reduce projected: one process sums with nobody; it makes the updates layerwise, and no more")
    log.info("%s: %.1fM weights in %s on %s", config.model, total / 1e6, config.dtype, where)
    if config.dtype == "bfloat16" and not has_fast_bf16(device):
        log.warning("this CPU has no bfloat16 instructions: --dtype float32 would be several times as fast here")
    micro_batches = config.micro_batches
    if config.layerwise and not optimizer.projects and (micro_batches > 1 or config.grad_clip):
        why = f"the sum over {micro_batches} micro-batches" if micro_batches > 1 else "clipping"
        log.info("--layerwise saves no memory here: %s needs all gradients of %s", why, config.optim)
    for group in optimizer.param_groups:
        count, tensors = sum(p.numel() for p in group["params"]), len(group["params"])
        names = ", ".join(sorted({name.split(".")[-2] for name in group["param_names"]}))
        log.info(
            "%s updates %d tensors, %.1fM weights, with %.1f MiB of state: %s",
            optimizer.describe(group),
            tensors,
            count / 1e6,
            optimizer.state_bytes(group["params"]) / 2**20,
            names,
        )


def _schedule(config: RunConfig) -> Schedule:
    shared = {f.name: getattr(config, f.name) for f in fields(Schedule)}
    return Schedule(**shared)


def _evaluator(
    config: RunConfig, model: torch.nn.Module, inputs: Inputs, device: torch.device, world: World
) -> Callable[[], Evaluation]:
    """Evaluates on the same rows each time, which are read once, when first needed."""
    kept: list[Row] = []

    def evaluate_now() -> Evaluation:
        if not kept:
            kept[:] = validation_rows(inputs.validation, inputs.rows, config.eval_tokens)
            if (found := sum(row.real for row in kept)) < config.eval_tokens // 2:
                log.info(
                    "the validation text has %s tokens, fewer than --eval-tokens %s",
                    f"{found:,}",
                    f"{config.eval_tokens:,}",
                )
        size, reference = config.batch_size, reference_batch(config)
        return evaluate(model, kept, batch_size=size, reference_batch=reference, device=device, world=world)

    return evaluate_now


def _summary(
    state: TrainState,
    static: Static,
    peaks: tuple[int, int],
    wall_seconds: float,
    stall_seconds: float,
    world: World,
) -> dict[str, Any]:
    """Bytes of weights and state are those of the method, whoever shares them; peaks those of the largest process."""
    allocator, process = (int(peak) for peak in world.largest(*peaks))
    return {
        "steps": state.step,
        "tokens_seen": state.tokens_seen,
        **state.evaluation,
        "peak_memory_bytes": allocator,
        "process_peak_bytes": process,
        "weights_bytes": static.weights,
        "optimizer_bytes": static.state,
        "wall_seconds": wall_seconds,
        "checkpoint_stall_seconds": stall_seconds,
    }
