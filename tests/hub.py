"""A stand-in for the Hugging Face hub: a server of a few repositories, in memory.

It speaks what `huggingface_hub` asks of the real one: create, preupload and commit; the tree of a
revision, and its files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What it holds, and what it was asked.

    Attributes:
        repos: by name, whether it is private, and each revision's files.
        refuses: answers every upload with 403.
    """

    def __init__(self):
        self.repos, self.private, self.tokens, self.asked = {}, {}, set(), []
        self.refuses = False

    def files(self, name, revision="main"):
        return self.repos[name][revision]

    def commit(self, name, files):
        before = self.repos.setdefault(name, {"main": {}})["main"]
        after = {**before, **files}
        digest = hashlib.sha1(repr(sorted(after.items())).encode()).hexdigest()
        self.repos[name] |= {digest: after, "main": after}
        return digest

    def sha(self, name, revision):
        held = self.repos[name]
        files = held[revision]
        return next(k for k, v in held.items() if v is files and k != "main")


def handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, content=b"", status=200, **headers):
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(status)
            for k, v in headers.items():
                self.send_header(k.replace("_", "-"), v)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, status, why):
            self.answer({"error": why}, status, X_Error_Message=why)

        def begin(self):
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self):
            body = self.begin()
            if hub.refuses:
                return self.refuse(403, "Forbidden: you may not write here")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization', 'me')}/{asked['name']}"
                url = f"http://{self.headers['Host']}/{name}"
                if name in hub.repos:
                    return self.answer({"url": url, "error": "exists"}, 409)
                hub.commit(name, {".gitattributes": b""})
                hub.private[name] = asked.get("private", asked.get("visibility") == "private")
                return self.answer({"url": url})
            if found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
                asked = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular"} for f in asked]
                return self.answer({"files": [{**m, "shouldIgnore": False} for m in modes]})
            if found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    v["path"]: base64.b64decode(v["content"])
                    for v in (e["value"] for e in lines if e["key"] == "file")
                }
                sha = hub.commit(found[1], files)
                url = f"http://{self.headers['Host']}/{found[1]}/commit/{sha}"
                return self.answer({"commitUrl": url, "commitOid": sha, "success": True})
            return self.answer({})  # the check of a README's front matter

        def do_GET(self):
            self.begin()
            path = self.path.partition("?")[0]
            if found := re.match(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?$", path):
                name, what, revision = found[1], found[2], found[3] or "main"
            elif found := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path):
                name, what, revision = found[1], found[3], found[2]
            else:
                return self.refuse(404, "Not Found")
            if revision not in hub.repos.get(name, {}):
                return self.refuse(404, "Repository not found")
            files, sha = hub.files(name, revision), hub.sha(name, revision)
            if what == "tree":
                return self.answer(
                    [
                        {"type": "file", "path": p, "size": len(c), "oid": oid(c)}
                        for p, c in files.items()
                    ]
                )
            if what in (None, "revision"):
                siblings = [{"rfilename": p} for p in files]
                return self.answer({"id": name, "modelId": name, "sha": sha, "siblings": siblings})
            if what not in files:
                return self.refuse(404, "Entry not found")
            of = {"ETag": f'"{oid(files[what])}"', "X_Repo_Commit": sha}
            return self.answer(files[what], **of)

        do_HEAD = do_GET

    return Handler


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving():
    """A running hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
