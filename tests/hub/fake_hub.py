"""A fake hub on the loopback interface: real sockets, real files, and injected faults.

It implements what huggingface_hub requests of a model hub: the list of a repository's files, HEAD and GET
of a file with its checksum and parts of it by Range, and what an upload needs. Files are served
from disk, so repositories of full size are fine:

    with FakeHub() as hub:
        hub.add("owner/tiny", folder)            # or commit="133a…" for a pinned revision
        subprocess.run([...], env={**os.environ, **hub.environment(cache_folder)})

    python -m tests.hub.fake_hub 8099 owner/tiny=FOLDER CompVis/stable-diffusion-v1-4@133a…=FOLDER
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1 << 20
"""From this size on, and for all safetensors, a file is large: declared by SHA-256."""
PORTAL = b"<html><title>Welcome to our hotel</title>Please sign in.</html>"


@dataclass
class Fault:
    """What goes wrong, where, and how often.

    Args:
        kind: "drop" cuts the connection half-way, "short" closes it there in good order,
            "corrupt" sends as many wrong bytes, "portal" answers with the page of a captive portal,
            "status" with another status, "hang" with nothing at all.
        path: a pattern for the address.
        times: how many requests it meets.
        status, headers: of "status".
        method: "GET", "HEAD", or "*".
    """

    kind: str
    path: str = "*"
    times: int = 10**9
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "*"


@dataclass(frozen=True)
class File:
    path: Path
    size: int
    sha256: str
    sha1: str

    @property
    def large(self) -> bool:
        return self.size >= LARGE or self.path.suffix in (".safetensors", ".pt")

    @property
    def digest(self) -> str:
        return self.sha256 if self.large else self.sha1


@dataclass
class Repository:
    commit: str
    files: dict[str, File]
    licence: str = "apache-2.0"
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """A server with repositories, pending faults, and a log of requests."""

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[str, dict[str, Repository]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method, path
        self.authorizations: list[str] = []
        self.tokens = {"hf_good"}
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.chunk_gate: threading.Event | None = None  # a download waits here after its first half
        self.started_body = threading.Event()
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self.chunk_gate is not None:
            self.chunk_gate.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the variables under which a process uses this hub and caches of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "E4T_OFFLINE": "0",
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "E4T_CACHE_DIR": str(folder / "own"),
            "XDG_DATA_HOME": str(folder / "data"),
            "NO_PROXY": "127.0.0.1",
        }

    def add(
        self, name: str, folder: Path, *, commit: str = "", licence: str = "apache-2.0",
        gated: bool = False, copy_sharing_weights: str = "main",
    ) -> str:  # fmt: skip
        """Publish a folder as a repository, or as its next state; returns the commit."""
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    sha256.update(block)
                    sha1.update(block)
            files[path.relative_to(folder).as_posix()] = File(path, size, sha256.hexdigest(), sha1.hexdigest())
        content = json.dumps({key: file.sha256 for key, file in files.items()})
        commit = commit or hashlib.sha1(content.encode()).hexdigest()
        repository = Repository(commit, files, licence, gated)
        states = self.repositories.setdefault(name, {})
        states[commit] = states[copy_sharing_weights] = repository
        return commit

    def count(self, method: str, pattern: str) -> int:
        """Return how many requests there were."""
        return sum(one == method and fnmatchcase(path, pattern) for one, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        hub.requests.append((self.command, path))
        if token := self.headers.get("Authorization"):
            hub.authorizations.append(token)
        fault = self._fault(path)
        if fault is not None and fault.kind == "hang":
            hub._closing.wait(60)
            self.close_connection = True
            return None
        if fault is not None and fault.kind == "portal":
            return self._send(200, PORTAL, {"Content-Type": "text/html"})
        if fault is not None and fault.kind == "status":
            return self._send(fault.status, b"{}", fault.headers)
        if token and token.removeprefix("Bearer ") not in hub.tokens:
            message = "Invalid credentials in Authorization header"
            return self._send(401, b"{}", {"X-Error-Message": message})
        if self.command in ("POST", "PUT"):
            return self._upload(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, kind, revision = match.groups()
            made = self.hub.uploads.get(name, {}).get("private")
            if made and not kind and name not in self.hub.repositories:
                return self._json({"id": name, "private": json.loads(made), "siblings": []})
            repository = self._repository(name, revision or "main", needs_token=False)
            if repository is not None:
                listing = self._tree(repository) if kind == "tree" else self._info(name, repository)
                self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
            return None
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, wanted = match.groups()
            repository = self._repository(name, revision, needs_token=True)
            if repository is None:
                return None
            if wanted not in repository.files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._send_file(repository, repository.files[wanted], fault)
        return self._send(404, b"not here", {})

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            met = fnmatchcase(path, fault.path) and fault.method in ("*", self.command)
            if met and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def _repository(self, name: str, revision: str, *, needs_token: bool) -> Repository | None:
        states = self.hub.repositories.get(name)
        if states is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in states:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        if states[revision].gated and needs_token and not self.headers.get("Authorization"):
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        return states[revision]

    def _info(self, name: str, repository: Repository) -> dict[str, Any]:
        return {
            "id": name, "modelId": name, "sha": repository.commit, "private": False,
            "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0,
            "cardData": {"license": repository.licence} if repository.licence else {},
            "siblings": [
                {
                    "rfilename": path, "size": file.size, "blobId": file.sha1,
                    **({"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}}
                       if file.large else {}),
                }
                for path, file in repository.files.items()
            ],
        }  # fmt: skip

    def _tree(self, repository: Repository) -> list[dict[str, Any]]:
        return [
            {
                "type": "file", "path": path, "size": file.size, "oid": file.sha1,
                **({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}}
                   if file.large else {}),
            }
            for path, file in repository.files.items()
        ]  # fmt: skip

    def _send_file(self, repository: Repository, file: File, fault: Fault | None) -> None:
        start = 0
        request = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if request:
            start = int(request[1])
        self.send_response(206 if start else 200)
        length = file.size - start
        kind = fault.kind if fault is not None else ""
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{file.size - 1}/{file.size}")
        self.send_header("ETag", f'"{file.digest}"')
        self.send_header("X-Repo-Commit", repository.commit)
        if file.large:
            self.send_header("X-Linked-Etag", f'"{file.sha256}"')
            self.send_header("X-Linked-Size", str(file.size))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent, half = 0, length // 2
        for block in self._blocks(file.path, start, length):
            if kind == "corrupt":
                block = bytes(byte ^ 1 for byte in block)
            if kind in ("drop", "short") and sent + len(block) > half:
                self.wfile.write(block[: max(half - sent, 0)])
                self._cut(politely=kind == "short")
                return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(block[: len(block) // 2])
                self.wfile.flush()
                self.hub.started_body.set()
                if self.hub.chunk_gate is not None and file.large:
                    self.hub.chunk_gate.wait(30)
                self.wfile.write(block[len(block) // 2 :])
            sent += len(block)

    @staticmethod
    def _blocks(path: Path, start: int, length: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            while length > 0 and (block := file.read(min(1 << 20, length))):
                length -= len(block)
                yield block

    def _cut(self, *, politely: bool) -> None:
        """End the connection, in order or with a reset."""
        self.wfile.flush()
        if not politely:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        if politely:
            self.connection.shutdown(socket.SHUT_WR)
            return
        self.connection.close()

    def _upload(self, path: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0) or 0))
        # Large files go to a signed address, without the token.
        if not self.headers.get("Authorization") and not path.startswith("/lfs/"):
            return self._send(401, b"{}", {})
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            if name in self.hub.repositories:
                body = {"error": "it exists", "url": f"{self.hub.url}/{name}"}
                return self._send(409, json.dumps(body).encode(), {})
            private = request.get("visibility", "public") == "private" or request.get("private", False)
            self.hub.uploads[name] = {"private": json.dumps(private).encode()}
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
            files = json.loads(body)["files"]
            answer = [
                {"path": one["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in files
            ]  # fmt: skip
            return self._json({"files": answer})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            place = f"{self.hub.url}/lfs/{match[1]}"
            objects = [
                {**one, "actions": {"upload": {"href": f"{place}/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == match[2]
            self.hub.uploads.setdefault(match[1], {})[match[2]] = body
            return self._send(200, b"", {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            import base64

            kept = self.hub.uploads.setdefault(match[1], {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    kept[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    kept[value["path"]] = kept[value["oid"]]
            commit = hashlib.sha1(body).hexdigest()
            url = f"{self.hub.url}/{match[1]}/commit/{commit}"
            return self._json({"success": True, "commitOid": commit, "commitUrl": url})
        return self._json({})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main(arguments: list[str]) -> None:
    """Serve folders until interrupted: PORT NAME[@COMMIT]=FOLDER …"""
    with FakeHub(int(arguments[0])) as hub:
        for argument in arguments[1:]:
            name, _, folder = argument.partition("=")
            name, _, commit = name.partition("@")
            print(name, hub.add(name, Path(folder), commit=commit), flush=True)
        print(hub.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
