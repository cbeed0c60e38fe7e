"""A loopback stand-in for the Hugging Face hub: tests run the libraries' own network code without a network.

    python tests/fakehub.py ROOT PORT
    HF_ENDPOINT=http://127.0.0.1:PORT python -m galore_pretrain --model llama_1m --data c4 …

ROOT/OWNER/NAME holds the files of a repository, whatever they are. The shards of C4 go to
ROOT/allenai/c4/en/c4-train.*.json.gz and c4-validation.*.json.gz; its card and T5's tokenizer (in truth this package's
own small one) are added if missing.
"""

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

C4, T5 = "allenai/c4", "google-t5/t5-base"
_COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
_SAMPLE_MODEL = Path(__file__).resolve().parents[1] / "galore_pretrain" / "tokenizers" / "sample.model"
_API = r"/api/(?:datasets|models)/([^/]+/[^/]+)"
_CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}
---
"""


@dataclass
class Fault:
    """What happens to the next ``times`` GETs of a path that ends in ``suffix``, and of a file's byte ``at``.

    It may be other ``methods`` that it happens to: a HEAD asks how large a file is, and of which commit. The answer is
    the error ``status``; without one, the connection closes where that byte is due, ``hang`` s late. What the hub's API
    answers, a list of files for instance, has no bytes: nothing of it comes.
    """

    times: int
    status: int | None = None
    at: int = 0
    hang: float = 0.0
    suffix: str = ".json.gz"
    methods: tuple[str, ...] = ("GET",)


class FakeHub(ThreadingHTTPServer):
    """``with FakeHub(root) as hub`` serves at ``hub.url``; a ``hub.fault``, or another newest ``hub.commit``, can be
    set at any time, and so can ``hub.more_faults``, and ``hub.older``: folders of commits that are not the newest."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._lock = threading.Lock()
        self.hold(root)

    def hold(self, root: Path) -> None:
        """Serve another folder from now on, without a fault."""
        self.root, self.fault, self.commit = root, Fault(times=0), _COMMIT
        self.more_faults: list[Fault] = []
        self.older: dict[str, Path] = {}
        for repository in (C4, T5):
            (root / repository).mkdir(parents=True, exist_ok=True)
        if not (card := root / C4 / "README.md").exists():
            card.write_text(_CARD)
        if not (model := root / T5 / "spiece.model").exists():
            shutil.copyfile(_SAMPLE_MODEL, model)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def take_fault(self, path: str, first: int = 0, last: int = 0, method: str = "GET") -> Fault | None:
        """The fault that strikes this request, if one does; it has then one time less."""
        with self._lock:
            for fault in (self.fault, *self.more_faults):
                strikes = fault.times and path.endswith(fault.suffix) and method in fault.methods
                if strikes and first <= fault.at <= last:
                    fault.times -= 1
                    return fault
            return None

    def pending(self) -> list[Fault]:
        """The faults that have not happened as often as they were to."""
        return [fault for fault in (self.fault, *self.more_faults) if fault.times]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeHub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):  # a reader that has enough hangs up
            return super().handle_one_request()
        self.close_connection = True
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            root = self.server.older.get(match[2], self.server.root)
            if not (root / match[1]).is_dir():
                return self._json(None, missing="RepoNotFound")
            self._file(root / match[1] / match[3])
        elif fault := self.server.take_fault(path):
            self._fail(fault)
        elif match := re.fullmatch(_API + r"(?:/revision/[^/]+)?", path):
            names = [{"rfilename": entry["path"]} for entry in self._entries(match[1], "file")]
            self._json(
                {"id": match[1], "sha": self._commit(), "siblings": names, "tags": []} if names else None,
                missing="RepoNotFound",
            )
        elif match := re.fullmatch(_API + r"/tree/[^/]+(?:/(.*))?", path):
            deep = parse_qs(urlsplit(self.path).query).get("recursive") in (["true"], ["True"], ["1"])
            prefix = f"{match[2].strip('/')}/" if match[2] else ""
            below = [entry for entry in self._entries(match[1]) if entry["path"].startswith(prefix)]
            self._json([e for e in below if deep or "/" not in e["path"].removeprefix(prefix)] or None)
        else:
            self._json(None)
        return None

    def _fail(self, fault: Fault) -> None:
        if fault.status:
            return self._json({"error": "injected"}, fault.status)
        time.sleep(fault.hang)
        self.close_connection = True
        return None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if match := re.fullmatch(_API + r"/paths-info/[^/]+", unquote(self.path)):
            form = "form" in self.headers.get("Content-Type", "")
            asked = (parse_qs(body) if form else json.loads(body))["paths"]
            self._json([entry for entry in self._entries(match[1]) if entry["path"] in asked])
        else:
            self._json(None)

    def _entries(self, repository: str, kind: str = "") -> Iterator[dict[str, Any]]:
        """The repository's files and folders, as the hub's tree describes them."""
        folder = self.server.root / repository
        for path in sorted(folder.rglob("*")):
            found, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
            if kind in ("", found):
                name = path.relative_to(folder).as_posix()
                yield {"type": found, "path": name, "size": size, "oid": _digest(path)}

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._json(None)
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]), size - 1) if wanted and wanted[2] else size - 1
        fault = self.server.take_fault(path.name, first, last, self.command)
        if fault and (fault.status or self.command == "HEAD"):
            return self._fail(fault)
        self.send_response(206 if wanted else 200)
        self._headers(last - first + 1, "application/octet-stream")
        self.send_header("ETag", f'"{_digest(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read((fault.at if fault else last + 1) - first))
            if fault:
                time.sleep(fault.hang)
            self.close_connection = self.close_connection or fault is not None
        return None

    def _json(self, value: Any, status: int = 200, missing: str = "EntryNotFound") -> None:
        """``None`` is what the hub has not: an entry, or a repository."""
        body = json.dumps({"error": "not here"} if value is None else value).encode()
        self.send_response(404 if value is None else status)
        self._headers(len(body), "application/json")
        if value is None:
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _headers(self, length: int, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("X-Repo-Commit", self._commit())

    def _commit(self) -> str:
        """The one that was asked for, or the newest."""
        asked = re.search(r"/(?:resolve|revision|tree|paths-info)/([0-9a-f]{40})(?:/|$)", unquote(self.path))
        return asked[1] if asked else self.server.commit


def _digest(path: Path) -> str:
    """A stand-in for the content's hash: changes with the file, and costs no reading of it."""
    stat = path.stat()
    return hashlib.sha1(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        FakeHub(Path(sys.argv[1]), int(sys.argv[2])).serve_forever()
