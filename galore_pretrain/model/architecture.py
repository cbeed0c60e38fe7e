"""The architecture of a run: that of a decoder, or of an encoder where the run is a task of GLUE."""

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.tasks import GLUE, class_names
from galore_pretrain.model.encoder import load_encoder_config
from galore_pretrain.model.families import Architecture
from galore_pretrain.model.llama_config import load_model_config


def architecture_of_run(config: RunConfig) -> Architecture:
    """Return the architecture of a run's model, from its JSON. Raises InputError where none is built here."""
    if config.task in GLUE:
        return load_encoder_config(config.model, class_names(config.task))
    return load_model_config(config.model)
