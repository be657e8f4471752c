"""A web server on this machine: files with ranges, and the few endpoints of a hub that its client asks."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Server(ThreadingHTTPServer):
    """Serves a folder, and repositories that are folders of it."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        self.cut: int | None = None
        """Bytes after which the next answer of a file ends, once."""
        self.more = b""
        """Bytes that are sent behind each file."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        """Keep quiet."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path, self.headers.get("Range", "")))
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.describe(found[1], found[2])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            return self.json(self.listing(found[1]))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(self.server.root / found[1] / found[3])
        return self.file(self.server.root / path.lstrip("/"))

    def do_POST(self):
        self.server.asked.append((self.command, self.path, ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            name = json.loads(body)
            repository = f"{name.get('organization') or 'me'}/{name['name']}"
            (self.server.root / repository).mkdir(parents=True, exist_ok=True)
            return self.json({"url": f"{self.server.address}/{repository}", "name": repository})
        if self.path.startswith("/api/models/") and "/preupload/" in self.path:
            files = [{"path": entry["path"], "uploadMode": "regular"} for entry in json.loads(body)["files"]]
            return self.json({"files": [{**entry, "shouldIgnore": False} for entry in files]})
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        found = re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path)
        if found is None:
            return self.fail(404)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                target = self.server.root / found[1] / entry["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(entry["value"]["content"]))
        return self.json(
            {"commitUrl": f"{self.server.address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
        )

    def listing(self, repository):
        root = self.server.root / repository
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": p.relative_to(root).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
            for p in files
        ]

    def describe(self, repository, revision):
        if not (self.server.root / repository).is_dir():
            return self.fail(404, "RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self.fail(404, "RevisionNotFound")
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": "0" * 40} for e in self.listing(repository)]
        return self.json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []})

    def json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status, code=""):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, path):
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        content = path.read_bytes() + self.server.more
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", "")):
            start = int(found[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        sent = content[start:]
        if self.server.cut is not None and len(sent) > self.server.cut:
            sent, self.server.cut = sent[: self.server.cut], None
            self.close_connection = True
        self.wfile.write(sent)
        return None


@contextlib.contextmanager
def serving(root: Path):
    """Serve a folder while a block of code runs."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
