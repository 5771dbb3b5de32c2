"""A stand-in for the Hugging Face hub: as much of its protocol as keeping small files of a model takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """
    A hub on a free port of this machine.

    :param files: What was uploaded: content by (repository, path)
    """

    files: dict[tuple[str, str], bytes]

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Request)
        self.files = {}

    @property
    def url(self) -> str:
        """:return: What ``HF_ENDPOINT`` has to be"""
        return f"http://localhost:{self.server_port}"


@contextmanager
def serving() -> Iterator[Hub]:
    """:return: A hub, empty, as long as the context lasts"""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Request(BaseHTTPRequestHandler):
    """One request of ``huggingface_hub``."""

    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        """Send a whole answer; without its body to HEAD."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any) -> None:
        """Send what Python's JSON makes of it."""
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def chunks(self) -> bytes:
        """:return: The body of a request that was sent in pieces"""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def do_POST(self) -> None:
        """Make a repository, read a card, say how files have to come, take them."""
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            return self.answer_json({"url": f"{self.server.url}/{repository}", "id": repository})
        if self.path == "/api/validate-yaml":  # the model card's head
            return self.answer_json({"errors": [], "warnings": []})
        repository, _, action = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer_json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.server.files[repository, value["path"]] = base64.b64decode(value["content"])
        self.answer_json({"commitUrl": f"{self.server.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        """Send a file, or what is known of a repository."""
        path = unquote(self.path.partition("?")[0])
        if path == "/api/models":  # a search
            return self.answer_json([])
        if path.startswith("/api/models/"):
            repository = path.removeprefix("/api/models/").partition("/revision/")[0]
            names = [name for owner, name in self.server.files if owner == repository]
            return self.answer_json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
        repository, _, rest = path.removeprefix("/").partition("/resolve/")
        content = self.server.files.get((repository, rest.partition("/")[2]))
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET
