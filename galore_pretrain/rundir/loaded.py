"""Load what training left, to evaluate it, export it, or have it continue a text."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from galore_pretrain.config.options import RunConfig, eval_text_seen_from, text_seen_from, texts_of
from galore_pretrain.config.recipes import reference_batch
from galore_pretrain.config.resolve import check_bounds, check_documents, resolve
from galore_pretrain.config.tasks import CHAT, GLUE
from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.model.families import FAMILIES, Architecture, CausalLM, Family, architecture_of, positions_of
from galore_pretrain.model.llama import without_masks
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.rundir import checkpoint
from galore_pretrain.text.batches import TokenRows, validation_rows
from galore_pretrain.text.chat import ChatRows, template_of
from galore_pretrain.text.cloze import cloze_items
from galore_pretrain.text.hub import check_hub, first_line
from galore_pretrain.text.sources import DocumentSource, LocalFiles, first_documents, in_turn
from galore_pretrain.text.tokenizer import Begun, Tokenizer, begun, load_folder, load_tokenizer
from galore_pretrain.train.build import model_for
from galore_pretrain.train.cloze import ClozeScore, score_cloze
from galore_pretrain.train.evaluate import Evaluation, evaluate
from galore_pretrain.train.inputs import (
    VALIDATION_TEXT,
    check_length,
    check_vocabulary,
    fit_together,
    further_key,
    measured,
    open_validation,
    rows_for,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Holds a model in evaluation mode, its tokenizer, and the config that says how its text is read.

    The config is that of the run that made the model, but for the fields that were replaced when it was loaded.
    ``reference_batch`` sequences made a batch of the published script's evaluation; None where no run tells how many.
    ``revision`` is the commit of the run's text on the hub, and ``fingerprints`` are what the run's checkpoint holds of
    what it reads: None, and empty, where another text was named.
    """

    model: CausalLM
    tokenizer: Tokenizer
    config: RunConfig
    reference_batch: int | None = None
    revision: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)


# A file that a run is given is training text, of which a part is held out. One that a trained model is given is all of
# it for evaluation.
def _evaluating(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields to replace, with a file that is named as the text as the validation text."""
    data = overrides.get("data")
    if isinstance(data, str) and "eval_data" not in overrides and Path(data).is_file():
        return {**overrides, "eval_data": data}
    return {**overrides}


def load(path: Path, overrides: Mapping[str, Any], device: torch.device, *, with_template: bool = False) -> LoadedModel:
    """Load the model of a run's newest checkpoint, of a checkpoint, or of a Hugging Face folder.

    ``overrides`` replaces fields of the run's config. A Hugging Face folder says nothing of its text, so for one they
    are added to defaults. ``with_template``: a folder's tokenizer is one that knows its chat template. Raises
    InputError where ``path`` is none of these.
    """
    check_bounds(overrides)
    if not path.exists():
        raise InputError(f"{path}: is not there; {did_you_mean(str(path))}give a run, a checkpoint or a model's folder")
    overrides = _evaluating(overrides)
    saved = checkpoint.newest(path / "checkpoints", set_aside=False)
    if saved is None and checkpoint.is_checkpoint(path):
        saved = checkpoint.opened(path)
    if saved is not None:
        return _load_checkpoint(saved, overrides, device)
    architectures = _architectures(path / "config.json")
    for family in FAMILIES.values():
        if architectures == [family.class_name]:
            return _load_hugging_face(path, family, overrides, device, with_template=with_template)
    known = ", ".join(family.class_name for family in FAMILIES.values())
    raise InputError(f"{path}: neither a run, a checkpoint (a folder with state.json) nor a folder of one of {known}")


# What a run is stands in its checkpoint: paths of its config may name other files by now, or none. Only its text is
# elsewhere, and is known again by its commit or its fingerprint.
def _load_checkpoint(saved: checkpoint.Saved, overrides: Mapping[str, Any], device: torch.device) -> LoadedModel:
    """Load the model of a checkpoint, whatever version wrote it."""
    task = saved.state["config"].get("task")
    if task in GLUE:
        raise InputError(
            f"{saved.folder} is of --task {task}: its model labels sentences, and neither predicts nor continues text; "
            "a run that has ended has its scores in summary.json, and the model in model/, for transformers' "
            "AutoModelForSequenceClassification"
        )
    if overrides.get("bos") == "auto":  # which is what the run has
        overrides = {name: value for name, value in overrides.items() if name != "bos"}
    config = replace(RunConfig.of(_fields(saved, overrides)), **overrides)
    check_documents(config.layout, overrides.get("documents", "joined"))
    if config.layout == "pad":  # which the run's own need not have been
        config = replace(config, documents="joined")
    if "tokenizer" in overrides:
        tokenizer = load_tokenizer(config.tokenizer)
        _warn_of_tokenizer(tokenizer, saved.state.get("inputs", {}).get("tokenizer"))
    else:
        tokenizer = _saved_tokenizer(saved, config)
    if config.bos == "yes":  # a run's config says yes or no; an older one says nothing, and has no marker
        tokenizer = begun(tokenizer, config.bos)
    architecture = _saved_architecture(saved, config)
    fit_together(config, architecture, tokenizer)
    model = model_for(config, architecture, device, fresh=False)
    saved.load(checkpoint.model_tensors(model), part="model.")
    loaded = LoadedModel(model.eval(), tokenizer, config, reference_batch(config))
    if "data" in overrides or "eval_data" in overrides:
        return loaded
    return replace(loaded, revision=saved.state.get("revision"), fingerprints=saved.state.get("inputs", {}))


def _warn_of_tokenizer(tokenizer: Tokenizer, trained_with: str | None) -> None:
    """Log a warning where a tokenizer's fingerprint is not that of the one that a model was trained with, if known."""
    if trained_with not in (None, tokenizer.fingerprint, tokenizer.vocabulary_fingerprint):
        log.warning(
            "--tokenizer %s is another one than the model was trained with: to the model, its ids are other words",
            tokenizer.name,
        )


def _fields(saved: checkpoint.Saved, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a checkpoint's run, its texts as they are seen from here."""
    fields = dict(saved.state["config"])
    if "data" in overrides:
        # The run's validation text and key belong to the run's data.
        fields["eval_data"] = None
        fields.pop("text_key", None)
        return fields
    folder = Path(saved.state.get("folder", ""))
    texts = [text_seen_from(folder, text) for text in texts_of(fields["data"])]
    fields["data"] = texts if len(texts) > 1 else texts[0]
    if fields.get("eval_data") is not None:
        fields["eval_data"] = tuple(eval_text_seen_from(folder, text) for text in texts_of(fields["eval_data"]))
    return fields


def _saved_tokenizer(saved: checkpoint.Saved, config: RunConfig) -> Tokenizer:
    """Return the tokenizer that a checkpoint holds. One up to format 2 holds none: it is where its config says."""
    folder = saved.folder / checkpoint.TOKENIZER
    if folder.is_dir():
        return load_folder(folder, config.tokenizer, with_template=config.task == CHAT)
    tokenizer = load_tokenizer(config.tokenizer)
    known = saved.state.get("inputs", {}).get("tokenizer")
    if known not in (None, tokenizer.vocabulary_fingerprint):
        raise InputError(
            f"{saved.folder} was trained with another tokenizer than {config.tokenizer} is now; restore it"
        )
    return tokenizer


def _saved_architecture(saved: checkpoint.Saved, config: RunConfig) -> Architecture:
    """Return the architecture that a checkpoint holds. The first ones hold none: it is where their config says."""
    kept = saved.state.get("inputs", {}).get("model")
    if kept is None:
        return load_model_config(config.model)
    return architecture_of(json.loads(kept))


def _load_hugging_face(
    path: Path, family: Family, overrides: Mapping[str, Any], device: torch.device, *, with_template: bool
) -> LoadedModel:
    """Load a plain Hugging Face folder, whoever wrote it."""
    values = {
        "model": str(path / "config.json"),
        "optim": "adamw",
        "data": "sample",
        "tokenizer": str(path),
        "steps": 1,
    }
    if "batch_size" in overrides:
        values["total_batch_size"] = overrides["batch_size"]  # of an update, which is not made here
    config, _ = resolve({**values, **overrides}, {})
    tokenizer = begun(load_tokenizer(config.tokenizer, with_template=with_template), config.bos)
    if "tokenizer" in overrides and (path / "tokenizer_config.json").is_file():
        _warn_of_tokenizer(tokenizer, load_tokenizer(str(path)).fingerprint)
    try:
        # Only safetensors are read: loading a pickle can execute code.
        loaded, told = family.model_class.from_pretrained(
            path, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: its weights cannot be loaded ({first_line(error)})") from error
    if told["missing_keys"]:  # transformers draws these anew, and warns
        missing = sorted(told["missing_keys"])
        raise InputError(f"{path}: {len(missing)} of its weights are missing, such as {missing[0]}; copy it anew")
    check_vocabulary(config, loaded.config, tokenizer)
    model = without_masks(loaded.to(device))
    return LoadedModel(model.eval(), tokenizer, config)


def _architectures(file: Path) -> Any:
    """Return the architectures that a Hugging Face config names; None where there is no such file."""
    try:
        return json.loads(file.read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return None


def perplexity(trained: LoadedModel, device: torch.device) -> Evaluation:
    """Evaluate a model over the validation text, as its run does, and over each further one that is named.

    Raises InputError where a text is not there.
    """
    config = trained.config
    check_length(config, trained.model.config)
    layout = rows_for(config, trained.tokenizer)
    source, further = _opened(trained, layout)
    _warn_of_changes(trained, source, further)
    if isinstance(source, LocalFiles) and not config.eval_texts:
        for title in source.titles:
            log.info("%s", title)
    called = f"--data {' + '.join(texts_of(config.data))}"
    if config.eval_texts:
        called = f"--eval-data {config.eval_texts[0].path}"

    def evaluated(source: DocumentSource, called: str) -> Evaluation:
        _warn_of_text(trained, source, layout, called)
        rows = validation_rows(source, layout, config.eval_tokens, called)
        return evaluate(
            trained.model,
            rows,
            batch_size=config.batch_size,
            reference_batch=trained.reference_batch,
            device=device,
        )

    found = evaluated(source, called)
    others = {name: evaluated(other, f"--eval-data {name}") for name, other in further.items()}
    return replace(found, further=others)


def _opened(trained: LoadedModel, layout: TokenRows | ChatRows) -> tuple[DocumentSource, dict[str, DocumentSource]]:
    """Open the validation text, and further ones by their names.

    Raises InputError where one is not there, with the way out if it is the run's own.
    """
    config = trained.config
    try:
        if not config.eval_texts:
            check_hub(config.data, tokenizer=None)
        return open_validation(config, layout, trained.revision)
    except InputError as error:
        if not trained.fingerprints:
            raise
        raise InputError(f"{error}; this is the text of the run: --eval-data PATH names another") from error


def _warn_of_changes(trained: LoadedModel, source: DocumentSource, further: Mapping[str, DocumentSource]) -> None:
    """Log a warning for each text of the run that is another one than it was evaluated on."""
    now = {VALIDATION_TEXT: source.fingerprint}
    now |= {further_key(name): other.fingerprint for name, other in further.items()}
    for name, fingerprint in now.items():
        if trained.fingerprints.get(name, fingerprint) != fingerprint:
            log.warning("the %s is another one than the run was evaluated on", name)


def cloze(trained: LoadedModel, device: torch.device, *, items: int, seed: int) -> ClozeScore:
    """Score a model on a cloze test of so many ``items``, drawn with ``seed`` from the (first) validation text.

    Raises InputError where that is not there, or too short.
    """
    config = trained.config
    if config.task == CHAT:
        raise InputError(
            "--cloze: the run learned conversations, and has no other text; name its folder model/ instead"
        )
    source, _ = _opened(trained, rows_for(config, trained.tokenizer))
    made = cloze_items((text for _, _, text in in_turn(source)), items, seed)
    if len(made) < items:
        log.warning("--cloze %d: the validation text has sentences for %d items", items, len(made))
    return score_cloze(
        trained.model,
        trained.tokenizer,
        made,
        max_length=config.max_length,
        batch_size=config.batch_size,
        device=device,
    )


def _warn_of_text(trained: LoadedModel, source: DocumentSource, layout: TokenRows | ChatRows, called: str) -> None:
    """Log a warning where more of a text cannot be used than a run would begin with: its perplexity says little."""
    fault = measured(first_documents(source), trained.tokenizer, layout).fault(trained.config.max_unknown)
    if fault is not None:
        log.warning("%s: %s", called, fault.what)


@dataclass(frozen=True)
class Drawing:
    """Says how text is drawn: up to ``tokens`` tokens.

    ``temperature`` 0 takes the likeliest token each time. Otherwise tokens are drawn, with torch's ``seed``, from the
    likeliest ones that make up ``top_p`` of the probability.
    """

    tokens: int
    temperature: float
    top_p: float
    seed: int


def continue_text(trained: LoadedModel, prompt: str, drawing: Drawing) -> str:
    """Return ``prompt`` and what the model continues it with. Raises InputError where the prompt leaves no room."""
    tokenizer = trained.tokenizer
    prompt_ids = tokenizer.encode([prompt])[0].tolist()
    if not prompt_ids:
        # In training, a document begins with a marker, or else the end of another stands before it: there, any text may
        # begin.
        prompt_ids = [tokenizer.eos_id]
        if isinstance(tokenizer, Begun) and tokenizer.bos_id is not None:
            prompt_ids = [tokenizer.bos_id]
    continued = _continued(trained.model, prompt_ids, [tokenizer.eos_id], drawing)
    return tokenizer.decode(prompt_ids + continued)


def answer(trained: LoadedModel, question: str, drawing: Drawing) -> str:
    """Return what the model answers to a user's ``question``, put to it by its tokenizer's chat template.

    Raises InputError where it has none, or the question leaves no room.
    """
    template = template_of(trained.tokenizer)
    if template is None:
        raise InputError(
            f"--chat: the tokenizer of the model, {trained.tokenizer.name}, has no chat template; leave --chat out"
        )
    ids = _continued(trained.model, template.asked(question), template.ends, drawing)
    return trained.tokenizer.decode(ids)


@torch.no_grad()
def _continued(model: CausalLM, prompt_ids: list[int], ends: Sequence[int], drawing: Drawing) -> list[int]:
    """Return the ids with which a model continues others, up to the first of ``ends``, or as far as there is room."""
    positions = positions_of(model.config)
    room = positions - len(prompt_ids)
    if room < 1:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens; the model has {positions} positions")
    is_sampled = drawing.temperature > 0
    sampling: dict[str, float] = {}
    if is_sampled:
        sampling = {"temperature": drawing.temperature, "top_p": drawing.top_p}
    torch.manual_seed(drawing.seed)
    output_ids = model.generate(
        torch.tensor([prompt_ids], device=model.device),
        max_new_tokens=min(drawing.tokens, room),
        use_cache=True,
        do_sample=is_sampled,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        **sampling,
    )
    ids: list[int] = output_ids[0].tolist()
    return ids[len(prompt_ids) :]
