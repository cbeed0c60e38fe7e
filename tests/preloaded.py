"""Import all before runs.py's forkserver forks, and fill a table that each export would make anew."""

import bitsandbytes  # noqa: F401
import pytest  # noqa: F401
import sentencepiece.sentencepiece_model_pb2  # noqa: F401
import torch.distributed.run  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from galore_pretrain import cli, run  # noqa: F401
from galore_pretrain.rundir import loaded  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # which names of weights are others in files, of all architectures
