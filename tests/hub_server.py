"""A Hugging Face Hub of its own on 127.0.0.1: as much of the API as the client needs to push, list and pull models."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_testtoken"
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, newest last, as (id, files, message), and branches by name."""

    private: bool = False
    commits: list[tuple[str, Files, str]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: Files, message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{branch}{message}".encode()).hexdigest()
        self.commits.append((sha, files, message))
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> tuple[str, Files] | None:
        wanted = self.branches.get(revision, revision)
        return next(((sha, files) for sha, files, _ in self.commits if sha == wanted), None)


class FakeHub(ThreadingHTTPServer):
    """
    The server: ``repos`` by id; ``requests`` as (method, path); ``cut``: repository of whose weights half is sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A server that runs within the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((method, path))
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "orgs": []}) if self._known() else self._error(401, "")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._model_api("/".join(parts[2:4]), parts[4:], body)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), method)
        return self._error(404, "")

    # --- answers ------------------------------------------------------------------------------------------------

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, send: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if send < 0 else data[:send])
        if send >= 0:
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def _repo(self, repo_id: str) -> Repo | None:
        """The repository, if whoever asks may see it."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self._known()):
            self._error(401 if not self._known() else 404, "RepoNotFound")
            return None
        return repo

    # --- calls --------------------------------------------------------------------------------------------------

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._known():
            return self._error(401, "")
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            return self._json(answer | {"error": "You already created this model repo"}, 409)
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.server.repos[repo_id] = Repo(private)
        return self._json(answer)

    def _validate(self, content: str) -> None:
        """What the Hub finds wrong first: a block that is no YAML, or fields of the wrong kind."""
        try:
            data = yaml.safe_load(content.split("---")[1])
            kinds = {"tags": list, "datasets": list, "library_name": str, "pipeline_tag": str, "model-index": list}
            wrong = [name for name, kind in kinds.items() if name in data and not isinstance(data[name], kind)]
            errors = [{"message": f"{name} is of the wrong kind"} for name in wrong]
        except (yaml.YAMLError, IndexError, TypeError) as error:
            errors = [{"message": f"Invalid YAML: {error}"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _model_api(self, repo_id: str, rest: list[str], body: bytes) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        if not rest or rest[0] == "revision":
            found = repo.files(rest[1] if rest else "main")
            if found is None:
                return self._error(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in found[1]]
            return self._json(
                {"id": repo_id, "sha": found[0], "private": repo.private, "tags": [], "siblings": siblings}
            )
        if rest[0] == "tree":
            found = repo.files(rest[1])
            if found is None:
                return self._error(404, "RevisionNotFound")
            return self._json([_entry(name, data) for name, data in found[1].items()])
        if rest[0] == "branch":
            repo.branches.setdefault(rest[1], repo.branches["main"])
            return self._json({})
        if not self._known():
            return self._error(401, "")
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._json({"files": [{"path": file["path"], **mode} for file in asked]})
        if rest[0] == "commit":
            return self._commit(repo_id, repo, rest[1], body)
        return self._error(404, "")

    def _commit(self, repo_id: str, repo: Repo, branch: str, body: bytes) -> None:
        found = repo.files(branch)
        files, message = dict(found[1]) if found else {}, ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        answer: dict[str, Any] = {"success": True}
        if "create_pr=1" in self.path:
            repo.pull_requests += 1
            branch = f"refs/pr/{repo.pull_requests}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{repo.pull_requests}"
        sha = repo.commit(branch, files, message)
        self._json(answer | {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"})

    def _resolve(self, repo_id: str, revision: str, name: str, method: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        found = repo.files(revision)
        if found is None:
            return self._error(404, "RevisionNotFound")
        sha, files = found
        if name not in files:
            return self._error(404, "EntryNotFound")
        data = files[name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(data)}"'}
        cut = method == "GET" and self.server.cut == repo_id and name.endswith(".safetensors")
        return self._bytes(data, 200, headers, len(data) // 2 if cut else -1)


def _oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
