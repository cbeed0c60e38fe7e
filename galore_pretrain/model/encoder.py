"""transformers' ``RobertaForSequenceClassification``: an encoder of sentences, fine-tuned to tell their labels."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional as F

from galore_pretrain.config.options import find_model
from galore_pretrain.errors import InputError
from galore_pretrain.model.families import Architecture, check_depth
from galore_pretrain.model.initial import InitialWeights, check_shapes, take
from galore_pretrain.model.llama import draw
from galore_pretrain.model.lowrank import Factors, layers
from galore_pretrain.tensors.rounding import derive_seed

Encoder = Any
"""A ``RobertaForSequenceClassification``."""
HEAD = "classifier."
"""How the names of the head begin: new weights, whatever the encoder was trained on before."""
_NOT_TAKEN = ("lm_head.", "roberta.pooler.")
_OF_CONFIG = (".position_ids", ".token_type_ids")
_BUILT = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
"""Keys by which it would be another model, and the value with which it is the one that is built."""

log = logging.getLogger(__name__)


def is_encoder(architecture: Architecture) -> bool:
    """Return whether a model by this configuration tells the labels of sentences, and predicts no tokens."""
    return bool(architecture.model_type == "roberta")


def load_encoder_config(place: str, classes: Sequence[str]) -> Architecture:
    """Return the configuration of an encoder that tells classes of these names apart; without any, it gives a number.

    Raises InputError where ``place``, a folder or a JSON file, has no RoBERTa's.
    """
    file = find_model(place)
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); a model config is one JSON object") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds a JSON {type(values).__name__}; a model config is one JSON object")
    model_type = values.get("model_type")
    if model_type != "roberta":
        raise InputError(
            f"--model {place}: model_type is {model_type!r}, and tasks of GLUE are built for 'roberta' alone; give "
            "FacebookAI/roberta-base, or another RoBERTa"
        )
    if values.get("auto_map"):
        raise InputError(f"--model {place}: names code of its own, which is not run here; give a plain RoBERTa")
    for key, built in _BUILT.items():
        if values.get(key, built) != built:
            raise InputError(f"--model {place}: {key} is {values[key]!r}; a RoBERTa with {built!r} is built here")
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int):
        check_depth(layers, str(file))
    labels = ("id2label", "label2id", "num_labels", "problem_type", "architectures")
    kept = {key: value for key, value in values.items() if key not in labels}
    try:
        config = transformers.RobertaConfig.from_dict(kept)
        config.num_labels = max(1, len(classes))
        if classes:
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: number for number, name in enumerate(classes)}
        config.architectures = [transformers.RobertaForSequenceClassification.__name__]
        config.use_cache = False
        with torch.device("meta"):
            transformers.RobertaForSequenceClassification(config)
    except (TypeError, ValueError, KeyError, StrictDataclassError, RuntimeError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error
    return config


def positions_of_encoder(architecture: Architecture) -> int:
    """Return how many tokens a row may have: RoBERTa's positions begin behind that of padding."""
    return int(architecture.max_position_embeddings) - int(architecture.pad_token_id) - 1


def build_encoder(
    config: Architecture,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    change: Callable[[Encoder], None] | None = None,
) -> Encoder:
    """Return the model on ``device`` and in ``dtype``, its weights whatever their memory held.

    ``change`` may put other modules in, before there is memory for any.
    """
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(config).to(dtype)
        model.set_attn_implementation("sdpa")
        if change is not None:
            change(model)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    fill_buffers(model)
    return model


@torch.no_grad()
def fill_buffers(model: Encoder) -> None:
    """Number the positions anew, and make all tokens of one type: no file of weights holds these tables."""
    embeddings = model.roberta.embeddings
    numbers = torch.arange(embeddings.position_ids.shape[-1], device=embeddings.position_ids.device)
    embeddings.position_ids.copy_(numbers.expand(1, -1))
    embeddings.token_type_ids.zero_()


def check_encoder_weights(weights: InitialWeights, architecture: Architecture) -> None:
    """Raise InputError that names what is missing, surplus or misshapen among ``weights``, those of the head aside."""
    passed_over = (*_NOT_TAKEN, HEAD)
    given: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.shapes().items():
        if not name.startswith(passed_over) and not name.endswith(_OF_CONFIG):
            given[name] = shape
    check_shapes(weights.place, given, _encoder_shapes(architecture), "the encoder of its config.json")


def _encoder_shapes(architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each weight of the model, but for those of its head."""
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(architecture)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(HEAD)}


# A head that was trained for as many classes is taken as it is: so RTE, MRPC and STS-B of LoRA's paper begin from the
# encoder of MNLI, and a run goes on with its own task from its own export.
@torch.no_grad()
def take_encoder_weights(model: Encoder, weights: InitialWeights, factors: Factors | None, seed: int) -> None:
    """Read ``weights``, which were checked, into ``model``; a head is drawn where they have none of its shapes."""
    given = weights.shapes()
    of_head = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(HEAD)}
    has_head = all(given.get(name) == shape for name, shape in of_head.items())
    of_factors: set[str] = set()
    for name, _ in layers(model):
        of_factors |= {f"{name}.A.weight", f"{name}.B.weight"}
    for name, parameter in model.named_parameters():
        if name in of_head and not has_head:
            draw(name, parameter, model.config.initializer_range, seed)
        elif name not in of_factors:
            take(parameter, weights, name)
    if not has_head:
        log.info("the head is new, of %d classes", model.config.num_labels)
    if factors is not None:
        factors.initialize(model, lambda name, dense: dense.copy_(weights.read(name)))


def seed_dropout(seed: int) -> None:
    """Seed torch's generators, from which an encoder's dropout draws. A checkpoint holds where they are."""
    torch.manual_seed(derive_seed(seed, "dropout"))


def draws(model: nn.Module) -> bool:
    """Return whether a forward pass of ``model`` in training draws from torch's generators."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


# Attention needs a mask, since padding stands among what is attended to. It is made here, of batch × 1 × 1 × tokens:
# transformers would look at it first, for which a GPU is waited for, and write it out for each query.
def class_logits(model: Encoder, input_ids: Tensor) -> Tensor:
    """Return the logits of each row of ``input_ids`` (rows × tokens, padded): rows × classes, in fp32."""
    is_real = input_ids != model.config.pad_token_id
    outputs = model.roberta(input_ids, attention_mask=is_real[:, None, None, :])
    logits: Tensor = model.classifier(outputs.last_hidden_state)
    return logits.float()


def class_loss(model: Encoder, input_ids: Tensor, labels: Tensor, divisor: int, places: Tensor | None = None) -> Tensor:
    """Return Σ loss / ``divisor``: what a micro-batch of a training step contributes, an fp32 scalar.

    A row is one example, so there are no ``places`` of several.

    The loss of a row is the cross-entropy of its class in nats, or its squared error where ``labels`` are numbers.
    """
    assert places is None
    logits = class_logits(model, input_ids)
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square().sum() / divisor
    return F.cross_entropy(logits, labels, reduction="sum") / divisor
