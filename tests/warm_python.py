"""A Python that has imported everything already: `executable()` stands for ``sys.executable`` where a test, or what it
runs, starts processes of its own. To start Python and import torch takes longer than most of such processes run.

What is started is a small client. It hands its words, variables, folder and standard files to a server, which was
forked from runs.py's process in which all is imported, and has no thread. The server forks a child for it, and the
client ends as the child does: with its exit code, or by its signal. Signals that the client gets go to the child.

It differs from Python in this: the child is no child of the client, so ``os.getppid()`` names the server; what a
library reads from the environment when it is imported has been read; and of a client that is killed by SIGKILL, the
child is killed a moment later. So who kills with SIGKILL uses `runs.start`. All children hash texts alike, so that
orders by hash are the same in each.
"""

import atexit
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import types
from multiprocessing import process as of_multiprocessing
from pathlib import Path
from typing import Any, NoReturn

from galore_pretrain import run as program
from runs import forked, known_peak

UNPLANNED = "WITHOUT_A_PLAN_OF_MEMORY"
"""A variable: with it, a run's summary has no plan of its memory, which takes as long as the rest of a small run."""
_CLIENT = """#!{python} -IS
import json, os, signal, socket, struct, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
def forward(number, frame):
    try:
        connection.sendall(bytes([number]))
    except OSError:
        pass  # the child has ended just now
job = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(connection, [struct.pack("i", len(job))], [0, 1, 2])
connection.sendall(job)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, forward)
answer = connection.recv(4)
if len(answer) < 4:
    sys.exit("the server of tests/warm_python.py is gone")
(code,) = struct.unpack("i", answer)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""
Job = tuple[list[str], dict[str, str], str]


@functools.cache
def executable() -> str:
    """Return the path of the client, whose server this process of pytest has started."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address, client = folder / "socket", folder / "python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    client.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    forked(serve, listener, str(client), daemon=True)  # it is ended with this process
    return str(client)


# -- the server -------------------------------------------------------------------------------------------------------


# One loop waits for clients, for their signals, for the ends of children, and for the end of the process of pytest. In
# a child, the loop is left: whatever comes after it is the child's.
def serve(listener: socket.socket, client: str) -> None:
    """Fork a child for each client, until the process of pytest ends."""
    gc.freeze()
    parent = multiprocessing.parent_process()
    assert parent is not None
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(parent.sentinel, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj == parent.sentinel:
                    return
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    received = _receive(connection)
                    if received is None:
                        connection.close()
                        continue
                    job, files = received
                    pid = os.fork()
                    if pid == 0:
                        _close(ready, connection, parent.sentinel)
                        become(job, files, client)
                    for file in files:
                        os.close(file)
                    ready.register(connection, selectors.EVENT_READ, pid)
                    ready.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
                elif key.fileobj in (entry.fileobj for entry in ready.get_map().values()):  # else closed in this round
                    _answer(ready, key)


def _receive(connection: socket.socket) -> tuple[Job, list[int]] | None:
    """Return what a client asks for, and its standard files; None if it was killed meanwhile."""
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    if len(size) < 4:
        return None
    with connection.makefile("rb") as file:
        told = file.read(struct.unpack("i", size)[0])
    try:
        return tuple(json.loads(told)), files  # type: ignore[return-value]
    except ValueError:
        for number in files:
            os.close(number)
        return None


def _answer(ready: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """A client has sent signals, or is gone; or a child has ended."""
    if isinstance(key.data, int):
        assert isinstance(key.fileobj, socket.socket)
        numbers = key.fileobj.recv(16)
        for number in numbers or [signal.SIGKILL]:
            os.kill(key.data, number)  # it is there until it has been waited for
        if not numbers:
            ready.unregister(key.fileobj)
        return
    pid, connection = key.data
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ready.unregister(key.fileobj)
    os.close(key.fd)
    if connection in (entry.fileobj for entry in ready.get_map().values()):
        ready.unregister(connection)
        with contextlib.suppress(OSError):  # the client was killed just now
            connection.sendall(struct.pack("i", code))
    connection.close()


def _close(ready: selectors.BaseSelector, *others: Any) -> None:
    """Close all that is the server's."""
    for entry in [*ready.get_map().values()]:
        if entry.fileobj not in others:
            os.close(entry.fd)
    for other in others:
        os.close(other if isinstance(other, int) else other.fileno())
    ready.close()


# -- a child ----------------------------------------------------------------------------------------------------------


def become(job: Job, files: list[int], client: str) -> NoReturn:
    """Be the Python that was asked for, to its end."""
    words, environment, folder = job
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (multiprocessing has closed the old one)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    itself = multiprocessing.current_process()
    itself.name = "MainProcess"
    itself._config["daemon"] = False  # type: ignore[attr-defined]
    of_multiprocessing._parent_process = None  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = client
    if UNPLANNED in environment:
        program._planned_peak = known_peak
    code = 0
    try:
        _execute(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What Python does at its end, but for freeing what it has imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    os._exit(code & 255)


def _execute(words: list[str]) -> None:
    """Execute ``-m module …``, ``-c script …`` or ``file …``."""
    is_unbuffered = words[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=is_unbuffered)  # type: ignore[union-attr]
    words = words[words[0] == "-u" :]
    first = {"-m": os.getcwd(), "-c": ""}.get(words[0], str(Path(words[0]).parent))
    added = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [first, *added, *(folder for folder in sys.path if folder != str(Path(__file__).parent))]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = words
        module.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), module.__dict__)
