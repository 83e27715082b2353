"""Hugging Face hub on the loopback interface: the routes of its API that huggingface_hub calls."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

COMMIT = "0123456789" * 4


class Hub(ThreadingHTTPServer):
    """Serves `folder` as the model `tiny/model` at branch main, tag v1 and its one commit."""

    repo = "tiny/model"

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request."""
        self.gated = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in alphabetical order."""
        prefix = f"/{self.repo}/resolve/{COMMIT}/"
        return sorted(
            path.removeprefix(prefix)
            for method, path in self.requests
            if method == "GET" and path.startswith(prefix)
        )


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: object) -> None:
        """Stays silent."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        repo = self.server.repo
        if path.startswith(f"/api/models/{repo}/"):
            kind, _, revision = path.removeprefix(f"/api/models/{repo}/").partition("/")
            if revision not in ("main", "v1", COMMIT):
                self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
            elif kind == "revision":
                self._send_json({"id": repo, "sha": COMMIT, "siblings": []}, with_body)
            else:
                self._send_json([self._entry(file) for file in self._files()], with_body)
        elif path.startswith(f"/{repo}/resolve/{COMMIT}/"):
            self._send_file(path.removeprefix(f"/{repo}/resolve/{COMMIT}/"), with_body)
        elif path == f"/api/models/{repo}":
            self._send_json({"id": repo, "sha": COMMIT, "siblings": []}, with_body)
        else:
            self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

    def _files(self) -> list[Path]:
        return sorted(path for path in self.server.folder.rglob("*") if path.is_file())

    def _entry(self, file: Path) -> dict[str, object]:
        name = file.relative_to(self.server.folder).as_posix()
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _hash(file)}

    def _send_file(self, name: str, with_body: bool) -> None:
        if self.server.gated:
            self._send(403, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
            return
        file = self.server.folder / name
        headers = {"ETag": f'"{_hash(file)}"', "X-Repo-Commit": COMMIT}
        self._send(200, file.read_bytes(), with_body, headers)

    def _send_json(self, value: object, with_body: bool) -> None:
        self._send(200, json.dumps(value).encode(), with_body, {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Hub with the model in `folder`, while the block runs."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def use(monkeypatch, endpoint: str, cache: Path, offline: bool = False) -> None:
    """Makes huggingface_hub of this process use a hub and a cache, as its environment variables would."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
