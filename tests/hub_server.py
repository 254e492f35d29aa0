"""A stand-in for the Hugging Face Hub: the part of its HTTP API that uploads and downloads use, on a real socket.

Written after huggingface_hub's client: creation of a repository, the upload mode of each file, files in Git LFS by the
`basic` transfer, commits in JSON lines, and downloads with the headers that the client's cache needs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READER = "hf_writer", "hf_reader"


class Hub:
    """Repositories in memory.

    Attributes:
        url: Where it listens.
        commits: By repository, in order: its files, `{name: bytes}`.
        messages: By repository: those of the commits.
        private, gated: Names of repositories.
        broken: Every answer is 501, which the client does not try again.
        requests: Methods and paths, in order.
    """

    def __init__(self):
        self.commits, self.messages, self.blobs = {}, {}, {}
        self.private, self.gated, self.broken, self.requests = set(), set(), False, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def put(self, repo, **files):
        """A commit without a client."""
        self.commits.setdefault(repo, []).append({name.replace("__", "."): data for name, data in files.items()})

    def oid(self, repo, index=-1):
        """The hash of a commit."""
        place = index % len(self.commits[repo])
        return hashlib.sha1(f"{repo}{place}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fault(self, status, code):
        self.answer(status, {"error": code}, {"X-Error-Code": code} if code else {})

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_HEAD(self):
        self.download()

    def do_GET(self):
        self.download()

    def download(self):
        self.hub.requests.append((self.command, self.path))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if self.hub.broken or not found:
            return self.fault(501 if self.hub.broken else 404, "")
        repo, revision, name = found.groups()
        if repo not in self.hub.commits or (repo in self.hub.private and self.token not in (TOKEN, READER)):
            return self.fault(401 if not self.token else 404, "RepoNotFound")
        if repo in self.hub.gated:
            return self.fault(403, "GatedRepo")
        oids = [self.hub.oid(repo, index) for index in range(len(self.hub.commits[repo]))]
        if revision != "main" and revision not in oids:
            return self.fault(404, "RevisionNotFound")
        place = oids.index(revision) if revision in oids else len(oids) - 1
        files = self.hub.commits[repo][place]
        if name not in files:
            return self.fault(404, "EntryNotFound")
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": oids[place]})

    def do_PUT(self):
        self.hub.requests.append((self.command, self.path))
        data = self.body()
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == name
        self.hub.blobs[name] = data
        self.answer(200)

    def do_POST(self):
        self.hub.requests.append((self.command, self.path))
        body = self.body()
        if self.hub.broken:
            return self.fault(501, "")
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.token != TOKEN:
            return self.fault(403 if self.token else 401, "")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            if repo in self.hub.commits:
                return self.answer(409, {"url": f"{self.hub.url}/{repo}"})
            self.hub.commits[repo], self.hub.messages[repo] = [], []
            if asked.get("visibility") == "private":
                self.hub.private.add(repo)
            return self.answer(200, {"url": f"{self.hub.url}/{repo}"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            return self.batch(json.loads(body))
        found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        if not found or found[1] not in self.hub.commits:
            return self.fault(404, "RepoNotFound")
        if found[2] == "preupload":
            return self.preupload(json.loads(body))
        return self.commit(found[1], [json.loads(line) for line in body.splitlines()])

    def preupload(self, asked):
        modes = [
            {"path": own["path"], "uploadMode": "lfs" if own["path"].endswith("safetensors") else "regular"}
            for own in asked["files"]
        ]
        return self.answer(200, {"files": [own | {"shouldIgnore": False} for own in modes]})

    def batch(self, asked):
        objects = [
            {
                "oid": own["oid"],
                "size": own["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/upload/{own['oid']}"}},
            }
            for own in asked["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo, lines):
        files = dict(self.hub.commits[repo][-1]) if self.hub.commits[repo] else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages[repo].append(value["summary"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        self.hub.commits[repo].append(files)
        oid = self.hub.oid(repo)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
