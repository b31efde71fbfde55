"""A server on 127.0.0.1 with a kernel repository, laid out as the `kernels` client expects the Hub.

The package in it is FlashAttention-3 in name and signature; what it computes is null_gpu.py's
stand-in. What the client asks of the Hub, in this order:

    GET  /api/agent-harnesses                     which agents there are, once a day
    GET  /api/organizations/ORGANISATION/overview whether the publisher is trusted
    GET  /api/kernels/REPOSITORY/refs             branches: version 1 is the branch v1
    GET  /api/kernels/REPOSITORY/tree/COMMIT/build   folders: a build for each torch, CUDA, platform
    HEAD and GET /kernels/REPOSITORY/resolve/COMMIT/build/VARIANT/metadata.json
    GET  /api/kernels/REPOSITORY/tree/COMMIT      all files, then HEAD and GET of the variant's
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "kernels-community/flash-attn3"
# As published: built against torch's stable interface of 2.9, for two versions of CUDA
VARIANT = "torch-stable-abi29-cu130-x86_64-linux"
OTHER_VARIANT = "torch-stable-abi29-cu126-x86_64-linux"
OLD_VARIANT = "torch28-cxx11-cu126-x86_64-linux"
MODULE = """
import null_gpu


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1),
):
    return null_gpu.flash_attention_3()(q, k, v, causal=causal, window_size=window_size)
"""


def package(variant, dirty=False):
    """Return the files of a build, {path in the repository: bytes}.

    dirty: made from files that were not committed, of which the client warns.
    """
    git = {"commit": "0" * 40, "dirty": dirty}
    metadata = {
        "id": f"_flash_attn3_cuda_{hashlib.sha256(variant.encode()).hexdigest()[:7]}",
        "name": "flash-attn3",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cuda", "archs": ["8.0", "9.0a"]},
        "provenance": {"kernel-builder": {"version": "0.17.2"}, "kernel": git},
    }
    folder = f"build/{variant}"
    return {
        f"{folder}/metadata.json": json.dumps(metadata).encode(),
        f"{folder}/__init__.py": b"from .interface import flash_attn_func\n",
        f"{folder}/interface.py": MODULE.encode(),
    }


class KernelHub:
    """The server.

    files: {path: bytes} of the branch v1. branches: {name: commit}. trusted: whether the Hub trusts
    the organisation. fault: a function of (handler, path) that is called instead of an answer where
    `is_faulty(path)`. log: (method, path) of all requests.
    """

    def __init__(self):
        self.files = {"README.md": b"# flash-attn3\n"} | package(VARIANT) | package(OTHER_VARIANT)
        self.branches = {"main": "a" * 40, "v1": "b" * 40}
        self.trusted = True
        self.fault = None
        self.is_faulty = lambda path: True
        self.log = []
        self.closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                recursive = "recursive=true" in self.path.lower()
                hub.log.append((self.command, path))
                try:
                    if hub.fault is not None and hub.is_faulty(path):
                        hub.fault(self)
                    else:
                        hub.answer(self, path, recursive)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_HEAD = do_GET

            def send(self, status, body, **headers):
                self.send_response(status)
                for key, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def send_json(self, value):
                body = json.dumps(value).encode()
                self.send(200, body, Content_Type="application/json")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler, path, recursive):
        organisation = REPOSITORY.partition("/")[0]
        api = f"/api/kernels/{REPOSITORY}"
        commit = self.branches.get("v1")
        resolve = f"/kernels/{REPOSITORY}/resolve/{commit}/"
        if path == "/api/agent-harnesses":
            handler.send_json({"standardEnvVars": [], "harnesses": {}})
        elif path == f"/api/organizations/{organisation}/overview":
            handler.send_json({"name": organisation, "trustedKernelPublisher": self.trusted})
        elif path == f"{api}/refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": target}
                for name, target in self.branches.items()
            ]
            handler.send_json({"branches": branches, "converts": [], "tags": []})
        elif path.startswith(f"{api}/tree/{commit}"):
            handler.send_json(self.tree(path.removeprefix(f"{api}/tree/{commit}"), recursive))
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            body = self.files[path.removeprefix(resolve)]
            etag = f'"{blob_id(body)}"'
            handler.send(200, body, ETag=etag, X_Repo_Commit=commit)
        else:
            handler.send(404, b"Entry not found", X_Error_Code="EntryNotFound")

    def tree(self, folder, recursive):
        """Return what the Hub says about the files and folders in a folder ("" or "/build")."""
        prefix = f"{folder}/".removeprefix("/")
        entries = {}
        for path, body in self.files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": blob_id(b""), "size": 0}
            if recursive or len(parts) == 1:
                entry = {"type": "file", "path": path, "oid": blob_id(body), "size": len(body)}
                entries[path] = entry
        return list(entries.values())

    def hang(self, handler):
        """Answer nothing until the server is closed."""
        self.closing.wait()
        handler.close_connection = True

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def blob_id(body):
    """Return git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
