"""Memory-efficient pretraining of LLaMA: the benchmark of the GaLore paper (arXiv 2403.03507) as real software.

``load_model_config`` and ``build_model`` are resolved on first use, so that importing the package (the command line's
``--help``, for one) does not load torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galore_pretrain.model.llama import build_model
    from galore_pretrain.model.llama_config import load_model_config

__version__ = "0.2.0"
__all__ = ["__version__", "build_model", "load_model_config"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from galore_pretrain.model.llama import build_model

        return build_model
    if name == "load_model_config":
        from galore_pretrain.model.llama_config import load_model_config

        return load_model_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
