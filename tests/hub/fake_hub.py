"""A hub of one process: it answers what huggingface_hub asks when it uploads, and records every request."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    private: bool = False
    branches: dict = field(default_factory=lambda: {"main": {".gitattributes": b""}})


@dataclass
class FakeHub:
    """What is on the hub, and what was asked.

    Attributes:
        repos: name -> repository.
        requests: (method, path, JSON content or None).
        refuse: regular expression of "METHOD path" -> status to answer with.
    """

    repos: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    refuse: dict = field(default_factory=dict)
    stored: dict = field(default_factory=dict)
    pull_requests: list = field(default_factory=list)
    url: str = ""

    def asked(self, method, end):
        return [content for m, path, content in self.requests if m == method and path.endswith(end)]

    def writes(self):
        reading = ("/preupload/", "/whoami", "/validate-yaml")
        return [(m, p) for m, p, _ in self.requests if m not in ("GET", "HEAD") and not any(r in p for r in reading)]

    def answer(self, method, path, body):
        for pattern, status in self.refuse.items():
            if re.search(pattern, f"{method} {path}"):
                return status, {"error": f"refused with {status}"}
        content = self._content(path, body)
        self.requests.append((method, path, content))
        for pattern, function in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return function(self, *map(unquote, found.groups()), content)
        return 404, {"error": f"no route {method} {path}"}

    @staticmethod
    def _content(path, body):
        if "/commit/" in path:
            return [json.loads(line) for line in body.splitlines()]
        return body if path.startswith("/lfs/") else json.loads(body) if body else None

    def whoami(self, _):
        return 200, {"name": "me", "type": "user", "orgs": []}

    def info(self, name, revision="main", _=None):
        repo = self.repos.get(name)
        branch = repo and repo.branches.get(revision.removeprefix("sha-"))
        if branch is None:
            return 404, "RevisionNotFound" if repo else "RepoNotFound"
        siblings = [{"rfilename": file} for file in branch]
        return 200, {"id": name, "sha": f"sha-{revision}", "private": repo.private, "siblings": siblings}

    def info_of_main(self, name, _):
        return self.info(name)

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        self.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
        return 200, {"url": f"{self.url}/{name}"}

    def delete(self, asked):
        del self.repos[f"{asked['organization']}/{asked['name']}"]
        return 200, {}

    def branch(self, name, branch, _):
        self.repos[name].branches[branch] = dict(self.repos[name].branches["main"])
        return 200, {}

    def delete_branch(self, name, branch, _):
        del self.repos[name].branches[branch]
        return 200, {}

    def preupload(self, _name, _revision, asked):
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
            for f in asked["files"]
        ]
        return 200, {"files": files}

    def batch(self, _name, asked):
        upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{{}}"}}}
        objects = [
            {"oid": o["oid"], "size": o["size"], **json.loads(json.dumps(upload).replace("{}", o["oid"]))}
            for o in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, oid, body):
        self.stored[oid] = body
        return 200, {}

    def commit(self, name, revision, lines):
        branch = self.repos[name].branches[revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branch[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del branch[value["path"]]
        url = f"{self.url}/{name}"
        return 200, {"commitUrl": f"{url}/commit/abc", "commitOid": "abc", "pullRequestUrl": f"{url}/discussions/1"}

    def validate(self, _asked):
        return 200, {"errors": [], "warnings": []}

    def file(self, name, revision, path, _):
        branch = self.repos[name].branches[revision.removeprefix("sha-")]
        return (200, branch[path]) if path in branch else (404, "EntryNotFound")


NAME = "([^/]+/[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", FakeHub.whoami),
    (f"GET /api/models/{NAME}", FakeHub.info_of_main),
    (f"GET /api/models/{NAME}/revision/([^/]+)", FakeHub.info),
    ("POST /api/repos/create", FakeHub.create),
    ("DELETE /api/repos/delete", FakeHub.delete),
    (f"POST /api/models/{NAME}/branch/([^/]+)", FakeHub.branch),
    (f"DELETE /api/models/{NAME}/branch/([^/]+)", FakeHub.delete_branch),
    (f"POST /api/models/{NAME}/preupload/([^/]+)", FakeHub.preupload),
    ("POST /api/validate-yaml", FakeHub.validate),
    (f"POST /{NAME}.git/info/lfs/objects/batch", FakeHub.batch),
    ("PUT /lfs/(.*)", FakeHub.put),
    (f"POST /api/models/{NAME}/commit/([^/]+)", FakeHub.commit),
    (f"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.*)", FakeHub.file),
]


@contextmanager
def serving():
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.body()
            status, content = hub.answer(self.command, urlsplit(self.path).path, body)
            shown = {"error": content} if isinstance(content, str) else content
            sent = shown if isinstance(shown, bytes) else json.dumps(shown).encode()
            self.send_response(status)
            if status == 404 and isinstance(content, str):
                self.send_header("X-Error-Code", content)
            if self.command in ("GET", "HEAD") and isinstance(content, bytes):
                self.send_header("ETag", '"abc"')
                self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 (named by http.server)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
