"""Ask whether the Hugging Face hub answers: once, before anything heavy is imported, and within seconds.

Left alone, ``load_dataset`` retries for 23 s without a network, and for minutes where packets are dropped.
"""

import re
import threading
from pathlib import Path
from queue import Empty, SimpleQueue

from galore_pretrain.errors import InputError

C4 = "allenai/c4"
"""The repository of the GaLore paper's data set."""
T5 = ("google-t5/t5-base", "spiece.model")
"""The repository and the file of the tokenizer of the GaLore paper's C4 runs."""
_ANSWER = 5.0  # seconds


def check_hub(data: str, tokenizer: str) -> None:
    """Raise InputError if ``--data`` or ``--tokenizer`` needs the hub and the hub does not answer."""
    if data == "c4":
        error = _ask("dataset_info", C4)
        if error is not None:
            raise unreachable_data(C4, error)
    if tokenizer == "t5":
        repository, file = T5
    elif is_hub_id(tokenizer):
        repository, file = tokenizer, "tokenizer_config.json"
    else:
        return
    if cached(repository, file) is None:
        error = _ask("model_info", repository)
        if error is not None:
            raise unreachable_tokenizer(repository, error)


def is_hub_id(name: str) -> bool:
    """Return whether a tokenizer's name can only be a repository: ``owner/name``, and no path that exists."""
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
    return looks_like_one and not Path(name).exists()


def cached(repository: str, file: str) -> Path | None:
    """Return the path of a hub's file that an earlier run has downloaded, or None if none has."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository, file)
    # Besides a path and None, there is an object that stands for a file known not to exist.
    if not isinstance(path, str):
        return None
    return Path(path)


def download(repository: str, file: str) -> Path:
    """Return the path of a hub's file, from the cache if it is there. Raises InputError where it cannot be fetched."""
    import huggingface_hub

    try:
        path = cached(repository, file)
        if path is None:
            path = Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # the hub library raises classes of two HTTP clients besides its own
        raise unreachable_tokenizer(repository, error) from error
    return path


def unreachable_data(what: str, error: Exception) -> InputError:
    """Return the error that data cannot be read from the hub; it names the two ways on without one."""
    return InputError(
        f"--data: {what} cannot be read from the hub ({first_line(error)}); go on with --data sample (embedded), "
        "or with --data PATH to local files of the data set"
    )


def unreachable_tokenizer(what: str, error: Exception) -> InputError:
    """Return the error that a tokenizer cannot be fetched from the hub; it names the two ways on without one."""
    return InputError(
        f"--tokenizer: {what} cannot be fetched from the hub ({first_line(error)}); go on with --tokenizer sample, "
        "or with --tokenizer PATH to a SentencePiece .model file"
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def _ask(question: str, repository: str) -> Exception | None:
    """Ask the hub about a repository, by a method of ``HfApi``; return what went wrong, or None if it answered."""
    # In a thread of its own, since the library's timeout is not one for the whole: it holds for each address and each
    # request, and not at all for the look-up of the hub's name.
    import huggingface_hub

    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            method = getattr(huggingface_hub.HfApi(), question)
            method(repository, timeout=_ANSWER)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER)
    except Empty:
        return TimeoutError(f"no answer in {_ANSWER:.0f} s")
