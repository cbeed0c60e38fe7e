"""The composition root: where the parts of a run are made and joined.

A run has three phases. `prepare` opens what it reads, finds the checkpoint that it goes on from and fits its updates to
the memory: what can be refused is refused there, before weights exist. `assemble` builds the parts and joins them to a
trainer. When that has trained, `conclude` exports the model and writes the summary.
"""

import errno
import json
import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.resolve import AS_BEFORE, FIT, with_epochs
from galore_pretrain.config.tasks import GLUE
from galore_pretrain.dist import World, joined
from galore_pretrain.errors import TrainingFailedError
from galore_pretrain.meters import peak_memory_bytes, ran_out
from galore_pretrain.model.encoder import check_encoder_weights, is_encoder, seed_dropout
from galore_pretrain.model.initial import InitialWeights, check_weights
from galore_pretrain.model.int8 import check_int8
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.planning.cards import known_card
from galore_pretrain.planning.choice import memory_advice
from galore_pretrain.planning.fit import fitted, host_advice
from galore_pretrain.planning.plan import Outline, Plan, measure
from galore_pretrain.planning.work import peak_tokens_per_second
from galore_pretrain.rundir.checkpoint import Saved
from galore_pretrain.rundir.directory import RunDirectory, log_config
from galore_pretrain.rundir.environment import describe_environment
from galore_pretrain.rundir.export import export, try_export
from galore_pretrain.rundir.initial import open_weights
from galore_pretrain.rundir.resume import (
    Saver,
    check_inputs,
    check_model,
    is_finished,
    resolve_resume,
    restore,
    resume_hint,
    tokenizer_files,
)
from galore_pretrain.rundir.totals import RunTotals
from galore_pretrain.signals import Ending, on_stop
from galore_pretrain.tensors.transport import NotLockedError
from galore_pretrain.text.batches import Batch, TrainingData, read_ahead
from galore_pretrain.text.hub import download_model, is_hub_id, read_at
from galore_pretrain.text.labelled import ExampleBatches
from galore_pretrain.text.usable import TextShares
from galore_pretrain.train import build
from galore_pretrain.train.announce import announce
from galore_pretrain.train.build import (
    check_accumulation,
    device_of,
    execution_for,
    factors_of,
    model_for,
    optimizer_for,
)
from galore_pretrain.train.evaluate import Evaluator
from galore_pretrain.train.examples import ExampleInputs, open_examples
from galore_pretrain.train.inputs import Inputs, check_text, open_inputs
from galore_pretrain.train.metrics import MetricLogger, open_loggers
from galore_pretrain.train.profile import Profile
from galore_pretrain.train.schedule import schedule_of
from galore_pretrain.train.scoring import ScoreEvaluator
from galore_pretrain.train.trainer import NoWatch, Trainer, TrainState, Watch

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that is known of a run before its weights exist.

    ``tokenizer`` are the tokenizer's files, by name. ``shares`` are of the text that cannot be used;
    None where the run reads examples. ``saved`` is the
    checkpoint that the run goes on from. ``weights`` are what a new run begins from; None where they are drawn.
    ``init_revision`` is the commit of a model of the hub that the run begins from; None where it begins from none.
    ``plan`` is the plan of its updates, where fitting them to the memory took one. ``outline`` is of the whole run,
    ``part`` of this process's share of it.
    """

    config: RunConfig
    origins: Mapping[str, str]
    world: World
    directory: RunDirectory
    inputs: Inputs | ExampleInputs
    tokenizer: Mapping[str, bytes]
    shares: TextShares | None
    saved: Saved | None
    weights: InitialWeights | None
    init_revision: str | None
    outline: Outline
    part: Outline
    plan: Plan | None


@dataclass(frozen=True)
class Assembled:
    """The parts of a run that are used once more when its training is over.

    ``batches`` are read by a thread, which has to end before Python does.
    """

    trainer: Trainer
    batches: Generator[Batch, None, None]
    saver: Saver
    totals: RunTotals


def train(config: RunConfig, origins: Mapping[str, str], ending: Ending | None = None) -> int:
    """Make one run, from config to exported model, and return the exit code.

    ``ending`` is told of a signal, and where Python's own exit would wait for something that is left behind.
    """
    started = time.monotonic()
    with joined(config) as world:
        # The default --output holds the time, so all take that of the first.
        config, origins = world.on_rank_zero(lambda: (config, origins))
        directory = RunDirectory(Path(config.output), world)
        with directory.locked():
            prepared = prepare(config, origins, directory, world)
            if prepared is None:
                return 0
            with _failures_explained(prepared):
                static = prepared.outline.static  # bytes of the whole run, as its checkpoints will have them
                directory.check_space(prepared.config, static.weights + static.state)
                return _train_to_end(prepared, assemble(prepared, started), ending or Ending())


def prepare(config: RunConfig, origins: Mapping[str, str], directory: RunDirectory, world: World) -> Prepared | None:
    """Open and check everything that a run needs before its weights; None where the run is finished already."""
    output = directory.path
    device = device_of(config)  # refuses what this machine has not, for which only a plan can be made
    check_accumulation(config)
    if config.matmul == "int8":
        check_int8(device)
    resumption = world.on_rank_zero(lambda: resolve_resume(config, output))
    config, saved = resumption.config, resumption.saved
    init_revision = _pinned(config, saved, world)
    if saved and world.on_rank_zero(lambda: is_finished(output, saved, config)):
        world.on_rank_zero(lambda: check_model(config, saved))
        log.info("%s is finished; give another --output to train anew", output)
        return None

    revision = saved.state.get("revision") if saved else None
    if world.size > 1:  # all read what the first one finds
        revision = world.on_rank_zero(lambda: opened(config, revision).revision)
    inputs = world.on_every_rank(lambda: opened(config, revision), lambda found: str(found.fingerprints()))
    config, told = _as_inputs_tell(config, inputs)
    origins = {**origins, **told}
    if saved:
        check_inputs(config, saved, inputs.fingerprints(saved.format))
    shares = None
    if isinstance(inputs, Inputs):
        text = inputs
        shares = world.on_rank_zero(lambda: check_text(config, text, is_new=saved is None))
        world.on_rank_zero(lambda: try_export(text.model, text.tokenizer, text.first_texts()))
    tokenizer = world.on_rank_zero(lambda: tokenizer_files(saved, inputs.tokenizer))

    weights = None
    if config.init is not None and saved is None:
        weights = world.on_every_rank(
            lambda: initial_weights(config, inputs), lambda opened: str(sorted(opened.shapes().items()))
        )

    outline = part = Outline.of(config, inputs.model)
    if world.mesh is not None:
        part = Outline.of(config, inputs.model, world.mesh)
    runs_as_before = resumption.runs_as_before
    choice = world.on_rank_zero(lambda: fitted(config, part, world.mesh, runs_as_before=runs_as_before))
    config = choice.config
    if config.taken != resumption.config.taken:  # state and weights may be others now
        outline = part = Outline.of(config, inputs.model)
        if world.mesh is not None:
            part = Outline.of(config, inputs.model, world.mesh)
    origins = {**origins, **dict.fromkeys(resumption.restored, AS_BEFORE)}
    origins |= {name: FIT for name, _, _ in config.taken}
    log_config(config, origins)
    if weights is not None and config.task is None and origins["lr"].startswith("recipe"):
        log.warning(
            "--lr %g is of training from new weights; weights that are trained mostly want a lower one", config.lr
        )
    return Prepared(
        config=config,
        origins=origins,
        world=world,
        directory=directory,
        inputs=inputs,
        tokenizer=tokenizer,
        shares=shares,
        saved=saved,
        weights=weights,
        init_revision=init_revision,
        outline=outline,
        part=part,
        plan=choice.plan,
    )


# The model, the tokenizer and the weights of a repository belong together. Of a run that goes on, and of all processes,
# they are those that it began with, whatever the newest are by now.
def _pinned(config: RunConfig, saved: Saved | None, world: World) -> str | None:
    """Have ``--init`` read at one commit of the hub, and return it; None where it is not of the hub, or not known."""
    place = config.init
    if place is None or not is_hub_id(place):
        return None
    commit: str | None = None
    if saved is None:
        commit = world.on_rank_zero(lambda: download_model(place, "config.json").parent.name)
    elif saved.state["config"].get("init") == place:
        commit = saved.state.get("init_revision")
    if commit is not None:
        read_at(place, commit)
    return commit


def _as_inputs_tell(config: RunConfig, inputs: Inputs | ExampleInputs) -> tuple[RunConfig, dict[str, str]]:
    """Return the config with what is known when the inputs are open, and the origins of that."""
    origins: dict[str, str] = {}
    if config.bos == "auto" and isinstance(inputs, Inputs):
        config = replace(config, bos=inputs.bos)
        if config.init is not None:
            origins["bos"] = f"tokenizer {config.tokenizer}"
    if config.epochs is not None and config.steps is None:
        config, of_epochs = with_epochs(config, inputs.updates_an_epoch(config.total_batch_size))
        origins |= of_epochs
    return config, origins


def opened(config: RunConfig, revision: str | None) -> Inputs | ExampleInputs:
    """Open what the run reads: examples where it is a task of GLUE, text where it is anything else."""
    if config.task in GLUE:
        return open_examples(config, revision)
    return open_inputs(config, revision)


def initial_weights(config: RunConfig, inputs: Inputs | ExampleInputs) -> InitialWeights:
    """Open the weights that ``--init`` names. InputError where they are not those of the run's model."""
    assert config.init is not None
    weights = open_weights(config.init)
    if isinstance(inputs, ExampleInputs):
        check_encoder_weights(weights, inputs.model)
    else:
        check_weights(weights, inputs.model)
    return weights


def assemble(prepared: Prepared, started: float) -> Assembled:
    """Build the parts of a run, put back what a checkpoint holds, and join them."""
    config, saved = prepared.config, prepared.saved
    world, directory, inputs = prepared.world, prepared.directory, prepared.inputs
    device = device_of(config)
    position = TrainingPosition()
    state = TrainState()

    model = model_for(
        config,
        inputs.model,
        device,
        fresh=saved is None,
        weights=prepared.weights,
        mesh=world.mesh,
        position=position,
    )
    optimizer = optimizer_for(config, build.set_up_model(config, model), world.mesh)
    if config.compile:
        build.compile_layers(model)
    execution = execution_for(config, optimizer)
    announce(config, model, device, inputs, prepared.shares, optimizer, world)

    evaluator: Evaluator | ScoreEvaluator
    data: TrainingData | ExampleBatches
    if isinstance(inputs, ExampleInputs):
        seed_dropout(config.seed)
        data = inputs.batches(config)
        evaluator = ScoreEvaluator(config, model, inputs, device)
        about_text: Mapping[str, Any] = inputs.as_json()
    else:
        assert prepared.shares is not None
        sequences = config.total_batch_size
        data = TrainingData(inputs.training, inputs.rows, sequences, config.seed, rank=world.rank, size=world.size)
        evaluator = Evaluator(config, model, inputs, device, world)
        about_text = prepared.shares.as_json()
    if saved:
        world.on_every_rank(lambda: restore(saved, model, optimizer, state, data), lambda done: "")
    # Only now: what the folder holds may be of another method, and is refused then.
    environment = {"tokenizer_sha256": inputs.tokenizer.fingerprint, "processes": world.size}
    if inputs.method is not None:
        environment["method_sha256"] = inputs.method
    if prepared.init_revision is not None:
        environment["init_revision"] = prepared.init_revision
    text = {"text": about_text}
    directory.write_config(config, prepared.origins, text | environment | describe_environment(device))

    loggers = _loggers(prepared, state)
    totals = RunTotals(device, inputs, prepared.init_revision, loggers, saved.state if saved else {}, started)
    saver = Saver(config, model, optimizer, state, totals.state, prepared.tokenizer, saved, world)
    updates = max(0, config.steps - state.step) if config.steps else None  # else tokens are counted
    batches = read_ahead(islice(data, updates), pin=device.type == "cuda")  # and nothing after the last
    factors = factors_of(config)
    after_update = partial(factors.after_update, model, optimizer) if factors else lambda step: None
    watch: Watch = NoWatch()
    if config.profile and world.is_main:
        watch = Profile(config.profile, directory.path / "profile", device, optimizer)
    trainer = Trainer(
        model=model,
        batches=batches,
        optimizer=optimizer,
        execution=execution,
        schedule=schedule_of(config.values()),
        after_update=after_update,
        evaluate=evaluator.evaluate,
        checkpoints=saver,
        keep_rows=directory.keep_rows,
        loggers=loggers,
        state=state,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        save_every=config.save_every,
        mean_of_means=config.numerics == "reference",
        max_loss=config.max_loss or math.inf,
        device=device,
        loss=build.loss_of(inputs.model),
        world=world,
        position=position,
        watch=watch,
        evaluates_first=config.init is not None and config.task not in GLUE,  # a task's head is new
        peak_tokens_per_second=_peak_tokens_per_second(prepared, device),
    )
    return Assembled(trainer, batches, saver, totals)


def _train_to_end(prepared: Prepared, assembled: Assembled, ending: Ending) -> int:
    """Train to the end of the schedule, or to a signal, and return the exit code."""
    trainer, saver = assembled.trainer, assembled.saver

    def stop(number: int) -> None:
        ending.is_asked_for = True
        trainer.stop(number)

    with on_stop(stop):
        try:
            with closing(assembled.batches):
                is_over = trainer.fit()
            saver.finish()
            if not is_over:
                log.info("stopped after update %d; %s goes on there", trainer.state.step, resume_hint(prepared.config))
                return 128 + (trainer.stop_signal or 0)
            conclude(prepared, assembled)
            return 0
        finally:
            saver.wait()
            have_ended = [logger.close() for logger in trainer.loggers]
            if not all(have_ended):
                ending.at_once = True


def conclude(prepared: Prepared, assembled: Assembled) -> None:
    """Export the model and write the summary of a run whose training is over.

    Bytes of weights and state are those of the method, whoever shares them; peaks those of the largest process.
    """
    world, directory, config = prepared.world, prepared.directory, prepared.config
    trainer, state = assembled.trainer, assembled.trainer.state
    peaks = assembled.totals.peaks()  # before the export, which is not training
    export(directory.model, trainer.model, prepared.inputs.tokenizer, world)
    static = prepared.outline.static
    allocator_peak, process_peak = world.largest(*peaks)
    summary: dict[str, Any] = {
        "steps": state.step,
        "tokens_seen": state.tokens_seen,
        **state.evaluation,
        "peak_memory_bytes": int(allocator_peak),
        "process_peak_bytes": int(process_peak),
        "weights_bytes": static.weights,
        "optimizer_bytes": static.state,
        "wall_seconds": assembled.totals.seconds(),
        "checkpoint_stall_seconds": assembled.saver.stalled,
        "planned_peak_bytes": world.on_rank_zero(lambda: _planned_peak(prepared)),
    }
    if config.task in GLUE:
        summary |= world.on_rank_zero(lambda: {"task": config.task, **best_scores(directory.path)})
    directory.write_summary(summary)


# The paper does not say whether its table has an epoch's best or the last: so both are told.
def best_scores(folder: Path) -> dict[str, float]:
    """Return the best score among a run's evaluations, and the update after which it was seen first."""
    best: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        score = metrics.get("eval_score")
        if score is not None and score > best.get("best_eval_score", -math.inf):
            best = {"best_eval_score": score, "best_step": metrics["step"]}
    return best


@contextmanager
def _failures_explained(prepared: Prepared) -> Iterator[None]:
    """Turn memory that ran out and a disk that is full into errors of one line, with what helps."""
    config = prepared.config
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        if isinstance(error, NotLockedError):  # which is of the host, and no peak tells of it
            told = f"--accumulate-on {config.accumulate_on}: {error}; what helps: {host_advice(config)}"
        else:
            told = _out_of_memory(prepared)
        # Each process tells its own: in which of them it happens, the others do not know.
        raise TrainingFailedError(told, reported_by=prepared.world.rank) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_ROOM:
            raise
        why = getattr(error, "strerror", error)
        raise TrainingFailedError(
            f"--output {config.output} cannot be written ({why}); once it can be, {resume_hint(config)} goes on"
        ) from error


def _out_of_memory(prepared: Prepared) -> str:
    config = prepared.config
    peak = peak_memory_bytes(device_of(config))
    planned = _planned_peak(prepared)
    text = f"out of memory: {peak / 2**30:.2f} GiB was the peak so far"
    if planned is not None:
        text += f", {planned / 2**30:.2f} GiB were planned"
    return f"{text}; what helps: {memory_advice(config, most=3)}"


# Fitting the updates to the memory mostly takes no plan, and training needs none. So this one is made last: it would
# keep the first update waiting.
def _planned_peak(prepared: Prepared) -> int | None:
    """Return the peak of the run's plan in bytes; None where it cannot be planned: no reason for a run to fail."""
    if prepared.plan:
        return prepared.plan.peak_bytes
    try:
        plan = measure(prepared.config, prepared.inputs.model, prepared.world.mesh, outline=prepared.part)
        return plan.peak_bytes
    except Exception as error:
        log.warning("its memory could not be planned: %s", error)
        return None


def _peak_tokens_per_second(prepared: Prepared, device: torch.device) -> float | None:
    """Return the tokens/s at which the model FLOP utilization is 1; None on a CPU, and on a card that no table has."""
    if device.type != "cuda" or is_encoder(prepared.inputs.model):  # whose products no formula here counts
        return None
    card = known_card(torch.cuda.get_device_name(device))
    if card is None:
        return None
    return peak_tokens_per_second(card, prepared.config, prepared.inputs.model)


def _loggers(prepared: Prepared, state: TrainState) -> list[MetricLogger]:
    """Open the loggers of the run; there are none in other processes than the main one."""
    config, directory, saved = prepared.config, prepared.directory, prepared.saved
    logged = {}  # what the loggers themselves have saved
    if saved and saved.is_in(directory.checkpoints):
        logged = saved.state
    loggers: list[MetricLogger] = []
    prepared.world.on_rank_zero(
        lambda: loggers.extend(open_loggers(config, directory.path, state.step, state.tokens_seen, logged))
    )
    return loggers
