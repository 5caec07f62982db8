"""A Hugging Face Hub on 127.0.0.1, small enough to read: real HTTP for the real client, and failures on demand.

It keeps repositories in memory and knows the routes that pushing, pulling and listing a model repository need. Every
file is stored as a regular one (no LFS, no Xet). Use it with a client in another process, since ``huggingface_hub``
reads its environment on import::

    with LoopbackHub() as hub:
        subprocess.run([...], env=hub.environment(cache_folder, token=OWNER))
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER, READER = "hf_owner", "hf_reader"
#: Tokens that are accepted: who they belong to, and whether they may write.
TOKENS = {OWNER: ("alice", True), READER: ("alice", False), "hf_other": ("bob", True)}


@dataclasses.dataclass
class Repository:
    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes | None], ref: str = "main", parent: str = "main") -> str:
        """Add a commit that changes ``files`` (``None`` removes one); returns its hash."""
        changed = {**self.commits.get(self.refs.get(parent, ""), {}), **files}
        tree = {name: data for name, data in changed.items() if data is not None}
        sha = hashlib.sha1(f"{len(self.commits)}{ref}{sorted(tree.items())}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = tree, sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose ``"METHOD /path"`` matches ``pattern``, ``times`` times.

    ``status``: answer with this error. ``headers``: of that answer, or instead of those of the proper one (``None``
    drops one). ``wait``: seconds before anything is answered. ``cut``: bytes of the file after which the connection
    is closed. ``body``: sent in place of the file, under the headers of the proper one.
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str | None] = dataclasses.field(default_factory=dict)
    wait: float = 0.0
    cut: int | None = None
    body: Callable[[bytes], bytes] | None = None
    times: int = 10**9


def blob_id(data: bytes) -> str:
    """Git's name for a file's contents, which the Hub sends as ETag."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(request)
        self.fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, request)), None)
        if self.fault:
            self.fault.times -= 1
            time.sleep(self.fault.wait)
            if self.fault.status:
                return self._answer(self.fault.status, b"the reason", dict(self.fault.headers))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token and self.token not in TOKENS:
            return self._error(401, "", "Invalid credentials in Authorization header")
        self.user, self.may_write = TOKENS.get(self.token, ("", False))
        for pattern, route in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {url.path}"):
                return route(self, **{key: unquote(value) for key, value in match.groupdict().items()})
        return self._error(404, "", "no such route")

    def _answer(self, status: int, body: bytes, headers: dict[str, str | None] | None = None) -> None:
        everything = {
            "X-Request-Id": f"Root={len(self.hub.requests)}", "Content-Length": str(len(body)), **(headers or {})
        }  # fmt: skip
        if self.fault and not self.fault.status:
            everything |= self.fault.headers
        try:
            self.send_response(status)
            for name, value in everything.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has given up waiting

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, json.dumps({"error": message}).encode(), {
            "Content-Type": "application/json", "X-Error-Code": code or None, "X-Error-Message": message,
        })  # fmt: skip

    def _open(self, repo: str, *, write: bool = False) -> Repository | None:
        """The repository, or ``None`` once the refusal has been sent."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self.user != repository.owner):
            self._error(404 if self.user else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and self.user != repository.owner:
            self._error(403 if self.user else 401, "GatedRepo", f"Access to model {repo} is restricted")
        elif write and not self.user:
            self._error(401, "", "Invalid username or password.")
        elif write and not (self.may_write and (self.user == repository.owner or "create_pr" in self.query)):
            self._error(403, "", "You don't have the required permissions")
        else:
            return repository
        return None

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        repo = f"{owner}/{asked['name']}"
        if not self.user:
            return self._error(401, "", "Invalid username or password.")
        if not self.may_write or owner != self.user:
            return self._error(403, "", f"You don't have the rights to create a model under {owner}")
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.add(repo, {".gitattributes": b""}, private=private)
        return self._json(answer)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        errors = []
        try:
            if not isinstance(yaml.safe_load(content.split("\n---\n")[0]), dict):
                errors.append({"message": "the metadata is not an object"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        if repository := self._open(repo, write=True):
            tree = repository.commits.get(repository.find(revision) or "", {})
            self._json({"files": [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False,
                 "oid": blob_id(tree[path]) if path in tree else None}
                for path in (file["path"] for file in json.loads(self.body)["files"])
            ]})  # fmt: skip

    def commit(self, repo: str, revision: str) -> None:
        if not (repository := self._open(repo, write=True)):
            return None
        if not repository.find(revision):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files: dict[str, bytes | None] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                files[entry["value"]["path"]] = None
        ref, pr_url = revision, ""
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref, pr_url = f"refs/pr/{number}", f"{self.hub.url}/{repo}/discussions/{number}"
        oid = repository.commit(files, ref, parent=revision)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        return self._json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": pr_url})

    def branch(self, repo: str, revision: str) -> None:
        if repository := self._open(repo, write=True):
            if revision in repository.refs:
                return self._error(409, "", "Reference already exists")
            repository.refs[revision] = repository.refs["main"]
            self._answer(201, b"")
        return None

    def info(self, repo: str, revision: str = "main") -> None:
        if repository := self._open(repo):
            if not (sha := repository.find(revision)):
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            self._json({"_id": "0", "id": repo, "modelId": repo, "sha": sha, "private": repository.private, "tags": [],
                        "siblings": [{"rfilename": name} for name in repository.commits[sha]]})  # fmt: skip
        return None

    def tree(self, repo: str, revision: str) -> None:
        if repository := self._open(repo):
            if not (sha := repository.find(revision)):
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            self._json([{"type": "file", "path": name, "oid": blob_id(data), "size": len(data)}
                        for name, data in repository.commits[sha].items()])  # fmt: skip
        return None

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (repository := self._open(repo)):
            return None
        if not (sha := repository.find(revision)):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if (data := repository.commits[sha].get(path)) is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers: dict[str, str | None] = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start)
        if self.fault and self.fault.body:
            data = self.fault.body(data)
        if self.fault and self.fault.cut is not None:
            data, self.close_connection = data[: self.fault.cut], True
        self._answer(status, data[start:], headers)
        return None

    def whoami(self) -> None:
        if not self.user:
            return self._error(401, "", "Invalid username or password.")
        return self._json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    ("GET /api/whoami-v2", _Handler.whoami),
    (f"POST /api/models/{_REPO}/preupload/{_REV}", _Handler.preupload),
    (f"POST /api/models/{_REPO}/commit/{_REV}", _Handler.commit),
    (f"POST /api/models/{_REPO}/branch/{_REV}", _Handler.branch),
    (f"GET /api/models/{_REPO}/revision/{_REV}", _Handler.info),
    (f"GET /api/models/{_REPO}/tree/{_REV}", _Handler.tree),
    (f"GET /api/models/{_REPO}", _Handler.info),
    (f"(?:HEAD|GET) /{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
]


class LoopbackHub:
    """The server, running between ``with`` and its end.

    ``repositories`` may be read and changed, ``faults`` set, and ``requests`` is what was asked, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False  # a client that still sleeps through a slow answer must not hold us up
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository that holds ``files``."""
        repository = self.repositories[repo] = Repository(repo.split("/")[0], private, gated)
        repository.commit(files)
        return repository

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """Environment of a client process that knows this Hub only; its login and cache are in ``home``."""
        foreign = re.compile("HF_|HUGGING|.*proxy", re.IGNORECASE)
        inherited = {key: value for key, value in os.environ.items() if not foreign.match(key)}
        if token:
            more["HF_TOKEN"] = token
        return {
            **inherited, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **more,
        }  # fmt: skip
