"""A Hugging Face hub on loopback: what huggingface_hub asks for to list and fetch a model's files, and nothing more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

COMMIT = "c0ffee" * 6 + "c0ff"


@contextmanager
def hub_of(
    models: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    *,
    sizes: Mapping[str, Mapping[str, int | None]] | None = None,
) -> Iterator[list[tuple[str, str]]]:
    """Serve folders by hub name until the end of the block; yields the requests so far, (method, path) each.

    sizes: what is said of a file's size, where it is not its own.
    """
    asked: list[tuple[str, str]] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append((self.command, urlsplit(self.path).path))
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in models:
                name = "/".join(parts[2:4])
                self._answer(200, self._tree(name) if parts[4:5] == ["tree"] else {"id": name, "sha": COMMIT})
            elif parts[2:4] == ["resolve", COMMIT] and "/".join(parts[:2]) in models:
                name, inner = "/".join(parts[:2]), "/".join(parts[4:])
                self._file(models[name] / inner, (sizes or {}).get(name, {}), inner)
            else:
                self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _tree(self, name: str) -> list[dict[str, object]]:
            folder, said = models[name], (sizes or {}).get(name, {})
            entries = []
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                inner, data = path.relative_to(folder).as_posix(), path.read_bytes()
                size = said.get(inner) or len(data)
                entries.append({"type": "file", "path": inner, "oid": _oid(data), "size": size})
            return entries

        def _file(self, path: Path, said: Mapping[str, int | None], inner: str) -> None:
            if not path.is_file():
                self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            data = path.read_bytes()
            headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.command == "HEAD" and inner in said:
                headers |= {"Content-Length": str(said[inner] or "")}
            self._answer(200, data, headers)

        def _answer(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    import huggingface_hub.constants as hub

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", hub.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "HF_TOKEN_PATH", str(cache / "no-token"))
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
