"""A server of the Hugging Face Hub's file protocol on the loopback, which can also misbehave as a network does."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    """The files of one repository at its only commit, which the branch `main` names."""

    files: dict[str, bytes]
    sha: str = field(init=False)

    def __post_init__(self):
        self.sha = hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class HubServer:
    """Serves `repos`, from ("model" or "dataset", "org/name") to Repo, at `url` for as long as the `with` block lasts.

    `faults` maps a part of a request's path to the way in which every request for such a path goes wrong:

        a number   that HTTP status
        "loop"     a redirect to itself
        "refuse"   the connection ends before an answer
        "hang"     no answer for `hang` seconds
        "garbage"  an answer that is not what was asked for
        "cut"      the connection ends in the middle of the body (of a GET, as the next two)
        "short"    the body has a byte less than the listed size, and a length that agrees with the body
        "long"     the same with a byte more
        "drip"     the body comes in 20 pieces, each after a 20th of `hang` seconds (of a GET, as the next)
        "stall"    half of the body comes, then nothing for `hang` seconds

    With `once`, a fault is over after the first such request.
    `requests` records "METHOD path" of every request, in order.
    """

    def __init__(self, hang: float = 30.0):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: dict[str, int | str] = {}
        self.once = False
        self.requests: list[str] = []
        self.hang = hang
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self._stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, files: dict[str, bytes], kind: str = "model") -> Repo:
        """Publish `files` (path to content) as the repository `org/name`."""
        self.repos[kind, repo] = Repo(files)
        return self.repos[kind, repo]

    def _fault(self, method: str, path: str) -> int | str | None:
        """Return how this request goes wrong, if it does."""
        for part, fault in list(self.faults.items()):
            if part in path and (method == "GET" or fault not in ("cut", "short", "long", "drip", "stall")):
                if self.once:
                    del self.faults[part]
                return fault
        return None

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._handle()

    def do_GET(self):
        self._handle()

    def log_message(self, *args):
        pass

    def _handle(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        fault = hub._fault(self.command, path)
        if isinstance(fault, int):
            return self._send(fault, b"no luck")
        if fault == "loop":
            return self._send(302, b"", {"Location": self.path})
        if fault == "hang":
            hub._stopped.wait(hub.hang)
        if fault in ("hang", "refuse"):
            self.close_connection = True
            return None
        if fault == "garbage":
            return self._send(200, b"<html>log in to this network</html>")
        if match := _API.fullmatch(path):
            return self._api(**match.groupdict())
        if match := _FILE.fullmatch(path):
            return self._file(fault, **match.groupdict())
        return self._send(404, b"")

    def _repo(self, kind: str, name: str, revision: str | None) -> Repo | None:
        repo = self.server.hub.repos.get((kind, name))
        if repo is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", repo.sha):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _api(self, kind: str, repo: str, what: str | None, revision: str | None):
        found = self._repo(kind.removesuffix("s"), repo, revision)
        if found is None:
            return
        if what == "tree":
            answer = [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in found.files.items()]
        else:
            siblings = [{"rfilename": path} for path in found.files]
            answer = {"id": repo, "sha": found.sha, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, fault, kind: str | None, repo: str, revision: str, path: str):
        found = self._repo("dataset" if kind else "model", repo, revision)
        if found is None:
            return
        if path not in found.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.sha})
            return
        body = found.files[path]
        headers = {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": found.sha, "X-Linked-Size": str(len(body))}
        body = {"short": body[:-1], "long": body + b"!"}.get(fault, body)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and self.command == "GET":
            start = int(start[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206, body[start:], headers, fault)
        else:
            self._send(200, body, headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: int | str | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        hub = self.server.hub
        if self.command == "GET" and fault == "drip":
            size = -(-len(body) // 20)
            for start in range(0, len(body), size):
                hub._stopped.wait(hub.hang / 20)
                self.wfile.write(body[start : start + size])
        elif self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stall") else body)
        if fault == "stall":
            hub._stopped.wait(hub.hang)
        self.close_connection |= fault in ("cut", "stall")


def _oid(content: bytes) -> str:
    """The name that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
