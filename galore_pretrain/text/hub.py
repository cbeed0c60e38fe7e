"""Which text of the Hugging Face hub is meant, whether the hub answers, and which of its failures pass.

It is asked before anything heavy is imported. Left alone, ``load_dataset`` retries for 23 s without a network, and for
minutes where packets are dropped.
"""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from galore_pretrain.errors import InputError, did_you_mean

C4 = "allenai/c4"
"""The repository of the GaLore paper's data set."""
GLUE = "nyu-mll/glue"
"""The repository of GLUE, the benchmark of the paper's fine-tuning."""
T5 = ("google-t5/t5-base", "spiece.model")
"""The repository and the file of the tokenizer of the GaLore paper's C4 runs."""
PATIENCE = 30 * 60.0
"""Seconds without an answer after which the hub is given up by a run that has begun."""
LONGEST = 60.0
"""Seconds between two attempts to reach it, at most."""
NO_ACCESS = (401, 403, 404)
"""HTTP statuses that another attempt does not change."""
_FIRST_PATIENCE = 8.0  # the same for a run that begins: its user may wait before the screen
_FIRST_WAIT = 1.0  # seconds before a question is asked again; each next wait is twice as long
_ANSWER = 5.0  # seconds
_PASSING = (408, 425, 429)  # those that it does, besides 5xx
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")
_PREFIX = "hub:"

# A model's files belong together, and are fetched one by one while somebody may change the repository. So a process
# reads all of them from one commit: that of the first it reads, or the one that a run has begun with.
_commits: dict[str, str] = {}  # of each model's repository that was read

log = logging.getLogger(__name__)


class AbsentError(InputError):
    """Raised for a file that a repository of the hub does not have."""


@dataclass(frozen=True)
class HubText:
    """Names a text on the hub: a repository, and one of its configs, None where it has but one or a default."""

    repository: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}:{self.config}" if self.config else self.repository


def hub_text(data: str | Sequence[str]) -> HubText | None:
    """Return the text on the hub that ``--data`` names, ``c4`` or ``hub:ORG/NAME[:CONFIG]``; None if it names another.

    Several texts are none of the hub. Raises InputError where what follows ``hub:`` is no name of the hub.
    """
    if data == "c4":
        return HubText(C4, "en")
    if not isinstance(data, str) or not data.startswith(_PREFIX):
        return None
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([^:]+))?", data.removeprefix(_PREFIX))
    if match is None:
        raise InputError(f"--data {data}: no name of a data set; write hub:ORG/NAME, or hub:ORG/NAME:CONFIG")
    return HubText(match[1], match[2])


def check_hub(data: str | Sequence[str], tokenizer: str | None, *, goes_on: bool = False) -> None:
    """Raise InputError if ``--data`` or ``--tokenizer`` needs the hub and the hub does not answer.

    ``tokenizer`` is None where it is there already. A run that ``goes_on`` waits for half an hour; any other is told
    within seconds.
    """
    text = hub_text(data)
    if text is not None:
        error = _answer("dataset_info", text.repository, goes_on)
        if error is not None and status_of(error) in NO_ACCESS:
            raise InputError(
                f"--data {data}: the hub has no data set {text.repository}, or does not show it to you "
                f"({first_line(error)}); write its name as the hub does, or log in with hf auth login"
            )
        if error is not None:
            raise unreachable_data(text.repository, error)
    if tokenizer == "t5":
        repository, file = T5
    elif tokenizer is not None and is_hub_id(tokenizer):
        repository, file = tokenizer, "tokenizer_config.json"
    else:
        return
    if cached(repository, file, revision=commit_of(repository)) is None:
        error = _answer("model_info", repository, goes_on)
        if error is not None:
            raise unreachable_tokenizer(repository, error)


def is_hub_id(name: str) -> bool:
    """Return whether a tokenizer's name can only be a repository: ``owner/name``, and no path that exists."""
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
    return looks_like_one and not Path(name).exists()


def cached(repository: str, file: str, *, revision: str | None = None, kind: str = "model") -> Path | None:
    """Return the path of a hub's file that an earlier run has downloaded, or None if none has."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision, repo_type=kind)
    # Besides a path and None, there is an object that stands for a file known not to exist.
    if not isinstance(path, str):
        return None
    return Path(path)


def commit_of(repository: str) -> str | None:
    """Return the commit at which this process reads a model's repository, or None where it has read no file of it."""
    return _commits.get(repository)


def read_at(repository: str, commit: str) -> None:
    """Have this process read all further files of a model's repository at one commit."""
    _commits[repository] = commit


def download(repository: str, file: str, *, goes_on: bool = False) -> Path:
    """Return the path of a tokenizer's file on the hub, from the cache if it is there.

    The hub is waited for as `download_model` does. Raises InputError where the file cannot be fetched.
    """

    def told(error: Exception) -> InputError:
        return unreachable_tokenizer(repository, error)

    return _model_file(repository, file, f"--tokenizer {repository}", told, goes_on=goes_on)


# transformers would fetch a tokenizer's files by itself: from the newest commit, whatever the model's is, and not once
# more where a connection drops. So they are fetched here, and it is given their folder. What a repository has not is
# noted in the cache, and not asked for again.
def download_tokenizer(repository: str, files: Sequence[str]) -> Path:
    """Return the folder with those of ``files`` that a repository of the hub has, all of one commit.

    It must have the first one. Where that is in the cache and nothing answers, what is in the cache is taken for all
    there is. Raises InputError where one cannot be fetched.
    """
    has_answered = cached(repository, files[0], revision=commit_of(repository)) is None
    folder = download(repository, files[0]).parent
    for file in files[1:]:
        if _is_known(repository, file):
            continue
        try:
            download(repository, file, goes_on=has_answered)
        except AbsentError:
            pass
        except InputError as error:
            if not has_answered and error.__cause__ is not None and _is_unanswered(error.__cause__):
                break
            raise
        has_answered = True
    return folder


def _is_known(repository: str, file: str) -> bool:
    """Return whether the cache has a file of a model's repository, or a note that there is none."""
    import huggingface_hub

    return huggingface_hub.try_to_load_from_cache(repository, file, revision=commit_of(repository)) is not None


def download_model(repository: str, file: str, *, goes_on: bool = False) -> Path:
    """Return the path of a file of a model on the hub, from the cache if it is there.

    Where the hub is busy, broken or cut off it is asked again, for seconds, or for half an hour by what ``goes_on``; a
    file of which a part is there is gone on with. Raises InputError where it cannot be fetched.
    """

    def told(error: Exception) -> InputError:
        return unreachable_model(repository, file, error)

    return _model_file(repository, file, f"--init {repository}", told, goes_on=goes_on)


def _model_file(
    repository: str, file: str, flag: str, told: Callable[[Exception], InputError], *, goes_on: bool
) -> Path:
    """Return the path of a file of a model's repository, at the commit that this process reads it at."""
    path = _patiently_downloaded("model", repository, file, commit_of(repository), flag, told, goes_on=goes_on)
    _commits.setdefault(repository, path.parent.name)  # the cache has …/snapshots/COMMIT/FILE
    return path


def download_glue(file: str, flag: str, *, revision: str | None = None) -> Path:
    """Return the path of a file of GLUE's repository, from the cache if it is there. ``flag`` is what messages name.

    Of a ``revision``, which only a hub that has answered before can have told, the hub is asked for half an hour; else
    for seconds. Raises InputError where the file cannot be fetched.
    """

    def told(error: Exception) -> InputError:
        return unreachable_glue(file, flag, error)

    goes_on = revision is not None
    if not goes_on and cached(GLUE, file, kind="dataset") is None:
        error = _answer(
            "dataset_info", GLUE, goes_on
        )  # within seconds, where the hub library would try for half a minute
        if error is not None:
            raise told(error)
    return _patiently_downloaded("dataset", GLUE, file, revision, flag, told, goes_on=goes_on)


def _patiently_downloaded(
    kind: str,
    repository: str,
    file: str,
    revision: str | None,
    flag: str,
    told: Callable[[Exception], InputError],
    *,
    goes_on: bool,
) -> Path:
    """Do the work of `download_model` for a repository of this ``kind``; raise what is ``told`` of the last error."""
    import huggingface_hub

    patience = PATIENCE if goes_on else _FIRST_PATIENCE
    began = time.monotonic()
    wait = _FIRST_WAIT
    while True:
        try:
            found = cached(repository, file, revision=revision, kind=kind)
            if found is not None:
                return found
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, repo_type=kind))
        except Exception as error:  # the hub library raises classes of two HTTP clients besides its own
            is_over = time.monotonic() + wait - began > patience
            if is_over or not is_passing(error) or (_is_refusal(error) and not goes_on):
                raise told(error) from error
            log.warning("%s: %s does not come (%s); asking again", flag, file, first_line(error))
        time.sleep(wait)
        wait = min(2 * wait, LONGEST)


def unreachable_model(repository: str, file: str, error: Exception) -> InputError:
    """Return the error that a file of a model cannot be fetched; it names the way on."""
    import huggingface_hub

    if isinstance(error, huggingface_hub.errors.RemoteEntryNotFoundError):
        return AbsentError(f"--init {repository}: the hub's repository has no {file}; name one of a model")
    if status_of(error) in NO_ACCESS:
        return InputError(
            f"--init {repository}: no such folder here, and the hub has no model of that name, or does not show it to "
            f"you ({first_line(error)}); write its name as the hub does, or log in with hf auth login"
        )
    return InputError(
        f"--init {repository}: no such folder here, and {file} cannot be fetched from the hub ({first_line(error)}); "
        "try again, which goes on with what is there, or name a folder"
    )


def unreachable_glue(file: str, flag: str, error: Exception) -> InputError:
    """Return the error that a file of GLUE's repository cannot be fetched; it names the way on without a hub."""
    import huggingface_hub

    way_out = "give --data FOLDER with files of your own"
    if isinstance(error, huggingface_hub.errors.RemoteEntryNotFoundError):
        return AbsentError(f"{flag}: {GLUE} of the hub has no {file}; {way_out}")
    return InputError(f"{flag}: {file} of {GLUE} cannot be fetched from the hub ({first_line(error)}); {way_out}")


def unreachable_data(what: str, error: Exception) -> InputError:
    """Return the error that data cannot be read from the hub; it names the two ways on without one."""
    return InputError(
        f"--data: {what} cannot be read from the hub ({first_line(error)}); go on with --data sample (embedded), "
        "or with --data PATH to local files of the data set"
    )


def unreachable_tokenizer(what: str, error: Exception) -> InputError:
    """Return the error that a tokenizer cannot be fetched from the hub; it names the two ways on without one."""
    import huggingface_hub

    kind = AbsentError if isinstance(error, huggingface_hub.errors.RemoteEntryNotFoundError) else InputError
    return kind(
        f"--tokenizer: {what} cannot be fetched from the hub ({first_line(error)}); {did_you_mean(what)}"
        "go on with --tokenizer sample, or with --tokenizer PATH to a SentencePiece .model file"
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of the hub library carries, or None where it carries none."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def is_passing(error: Exception) -> bool:
    """Return whether another attempt may succeed: the hub was busy or broken, or the connection failed."""
    # The libraries wrap errors of the connection in others of their own, even in one that says a file is not found. The
    # outermost that has a status, or is of the connection, decides.
    import huggingface_hub

    causes = list(_causes(error))
    if any(isinstance(cause, huggingface_hub.errors.OfflineModeIsEnabled) for cause in causes):
        return False
    for cause in causes:
        status = status_of(cause)
        if status is not None:
            return status in _PASSING or status >= 500
        if isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        if type(cause).__module__.partition(".")[0] in _CLIENTS:
            return True
    return False


def _is_refusal(error: BaseException) -> bool:
    """Return whether no connection came about at all, as where nothing listens or the hub's name is unknown."""
    names = ("ConnectError", "ConnectionRefusedError", "gaierror")
    return any(type(cause).__name__ in names for cause in _causes(error))


def _is_cut_off(error: BaseException) -> bool:
    """Return whether the hub was not asked at all: no connection came about, or none is wanted."""
    is_offline = any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in _causes(error))
    return is_offline or _is_refusal(error)


def _is_unanswered(error: BaseException) -> bool:
    """Return whether nothing answered: the hub was not asked at all, or was silent."""
    return _is_cut_off(error) or any("Timeout" in type(cause).__name__ for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came of, the outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _answer(question: str, repository: str, goes_on: bool) -> Exception | None:
    """Ask the hub about a repository until it answers; return what went wrong at last, or None if it answered."""
    patience = PATIENCE if goes_on else _FIRST_PATIENCE
    began = time.monotonic()
    wait = _FIRST_WAIT
    while True:
        error = _ask(question, repository)
        if error is None or not is_passing(error):
            return error
        is_over = time.monotonic() + wait - began > patience
        if is_over or (_is_refusal(error) and not goes_on):
            return error
        if goes_on:
            log.warning("%s: the hub does not answer (%s); asking again", repository, first_line(error))
        time.sleep(wait)
        wait = min(2 * wait, LONGEST)


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
