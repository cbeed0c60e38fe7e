"""Is the Hugging Face hub there? Asked once, before anything heavy is imported, and answered within seconds.

Left alone, ``load_dataset`` retries for 23 s without a network, and for minutes where packets are dropped.
"""

import re
import threading
from pathlib import Path
from queue import Empty, SimpleQueue

from galore_pretrain.errors import InputError

C4 = "allenai/c4"
T5 = ("google-t5/t5-base", "spiece.model")  # the tokenizer of the GaLore paper's C4 runs
_ANSWER = 5.0  # seconds


def check_hub(data: str, tokenizer: str) -> None:
    """Raises InputError if ``--data`` or ``--tokenizer`` needs the hub and the hub does not answer."""
    if data == "c4" and (error := _ask("dataset_info", C4)):
        raise unreachable_data(C4, error)
    repository, file = T5 if tokenizer == "t5" else (tokenizer, "tokenizer_config.json")
    asked = tokenizer == "t5" or is_hub_id(tokenizer)
    if asked and cached(repository, file) is None and (error := _ask("model_info", repository)):
        raise unreachable_tokenizer(repository, error)


def is_hub_id(name: str) -> bool:
    """Whether a tokenizer's name can only be a repository: ``owner/name``, and no path that exists."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def cached(repository: str, file: str) -> Path | None:
    """A file of the hub that an earlier run has downloaded."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository, file)
    return Path(path) if isinstance(path, str) else None


def download(repository: str, file: str) -> Path:
    """A file of the hub, from the cache if it is there."""
    import huggingface_hub

    try:
        return cached(repository, file) or Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # the hub library raises classes of two HTTP clients besides its own
        raise unreachable_tokenizer(repository, error) from error


def unreachable_data(what: str, error: Exception) -> InputError:
    """The error that names the two ways on without a hub."""
    return InputError(
        f"--data: {what} cannot be read from the hub ({first_line(error)}); go on with --data sample (embedded), "
        "or with --data PATH to local files of the data set"
    )


def unreachable_tokenizer(what: str, error: Exception) -> InputError:
    """Return the error that a tokenizer cannot be reached."""
    return InputError(
        f"--tokenizer: {what} cannot be fetched from the hub ({first_line(error)}); go on with --tokenizer sample, "
        "or with --tokenizer PATH to a SentencePiece .model file"
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _ask(question: str, repository: str) -> Exception | None:
    """In a thread of its own: the library's timeout holds for each address and each request, and not for DNS."""
    import huggingface_hub

    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            getattr(huggingface_hub.HfApi(), question)(repository, timeout=_ANSWER)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER)
    except Empty:
        return TimeoutError(f"no answer in {_ANSWER:.0f} s")
