"""A stand-in for the Hugging Face Hub on this machine: the calls that an upload makes, over HTTP.

It answers as the Hub does and keeps what it is sent. Weights come either through Xet, the client's
default, whose storage accepts the parts without looking into them, or by Git LFS.
"""

import base64
import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

from json_server import start_serving

DROP = "drop"
"""Planned in the place of a status: the connection ends without an answer."""

COMMIT = "c" * 40


@dataclass
class StoredFile:
    """A file as the Hub lists it; `oid` is git's name, `sha256` is set for large files."""

    size: int
    oid: str
    sha256: str | None = None


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, StoredFile]] = field(default_factory=lambda: {"main": {}})


class HubStandIn(ThreadingHTTPServer):
    """Repositories by name, Git LFS objects by SHA-256, and every request that came.

    Attributes:
        planned: Statuses, or `DROP`, that the next requests get whose path holds a text.
    """

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bytes]] = []
        self.planned: dict[str, deque] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def plan(self, part: str, *answers: int | str) -> None:
        """Let the next requests whose path holds `part` fail, each in one of these ways."""
        self.planned.setdefault(part, deque()).extend(answers)

    def paths(self, part: str) -> list[str]:
        """The paths of all requests that hold a text."""
        return [path for _, path, _ in self.requests if part in path]

    def files(self, name: str, branch: str = "main") -> dict[str, StoredFile]:
        return self.repositories[name].branches[branch]


@contextlib.contextmanager
def running_hub(token: str) -> Iterator[HubStandIn]:
    hub = HubStandIn(token)
    start_serving(hub)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        body = self._read_body()
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, path, body))
        for part, answers in self.server.planned.items():
            if part in path and answers:
                answer = answers.popleft()
                if answer == DROP:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self._answer({"error": "planned by the test"}, answer)
                return
        if path.startswith("/cas/"):
            self._cas(path)
        elif path.startswith("/objects/"):
            self._put_object(path, body)
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif path.startswith("/api/models/"):
            self._model(path, body)
        else:
            self._answer({}, 404)

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.server.repositories
        if not exists:
            private = asked.get("visibility") == "private"
            self.server.repositories[name] = Repository(private)
        self._answer({"url": f"{self.server.url}/{name}"}, 409 if exists else 200)

    def _model(self, path: str, body: bytes) -> None:
        organization, model, *rest = path.removeprefix("/api/models/").split("/", 3)
        repository = self.server.repositories.get(f"{organization}/{model}")
        if repository is None:
            self._answer({"error": "Repository not found"}, 404)
            return
        action, revision = [*rest, "", "main"][:2] if not rest else [*rest, "main"][:2]
        if action == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, dict(repository.branches["main"]))
            self._answer({}, 409 if known else 200)
            return
        files = repository.branches.get(revision, {})
        if action == "preupload":
            self._answer({"files": [_upload_mode(item, files) for item in _sent_files(body)]})
        elif action == "xet-write-token":
            expires = int(time.time()) + 3600
            url = f"{self.server.url}/cas"
            self._answer({"accessToken": "of-the-storage", "exp": expires, "casUrl": url})
        elif action == "commit":
            _commit(body, files)
            url = f"{self.server.url}/{organization}/{model}/commit/{COMMIT}"
            self._answer({"commitOid": COMMIT, "commitUrl": url})
        elif action == "paths-info":
            asked = parse_qs(body.decode()).get("paths", [])
            self._answer([_listed(path, files[path]) for path in asked if path in files])
        elif action == "tree":
            self._answer([_listed(path, item) for path, item in files.items()])
        elif action in ("", "revision"):
            name = f"{organization}/{model}"
            siblings = [{"rfilename": path} for path in files]
            found = {"id": name, "modelId": name, "private": repository.private, "sha": COMMIT}
            self._answer({**found, "siblings": siblings, "tags": [], "downloads": 0})
        else:
            self._answer({}, 404)

    def _cas(self, path: str) -> None:
        """Xet's storage: takes every block and shard, and knows none before."""
        if path.startswith("/cas/v1/xorbs/"):
            self._answer({"was_inserted": True})
        elif path == "/cas/v1/shards":
            self._answer({"result": 1})
        else:
            self._answer({}, 404)

    def _lfs_batch(self, asked: dict) -> None:
        objects = []
        for item in asked["objects"]:
            answer = dict(item)
            if item["oid"] not in self.server.objects:
                href = f"{self.server.url}/objects/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def _put_object(self, path: str, body: bytes) -> None:
        digest = path.removeprefix("/objects/")
        if hashlib.sha256(body).hexdigest() != digest:
            self._answer({"error": "wrong content"}, 400)
            return
        self.server.objects[digest] = body
        self._answer({})


def _sent_files(body: bytes) -> list[dict]:
    return json.loads(body)["files"]


def _upload_mode(item: dict, files: dict[str, StoredFile]) -> dict:
    path = item["path"]
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    if path in files:
        answer["oid"] = files[path].sha256 or files[path].oid
    return answer


def _commit(body: bytes, files: dict[str, StoredFile]) -> None:
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            data = base64.b64decode(value["content"])
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            files[value["path"]] = StoredFile(len(data), git)
        elif entry["key"] == "lfsFile":
            files[value["path"]] = StoredFile(value["size"], "0" * 40, value["oid"])


def _listed(path: str, item: StoredFile) -> dict:
    found = {"type": "file", "path": path, "size": item.size, "oid": item.oid}
    if item.sha256 is not None:
        found["lfs"] = {"oid": item.sha256, "size": item.size, "pointerSize": 130}
    return found
