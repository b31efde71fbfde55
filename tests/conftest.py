"""What the tests share: a tiny corpus, its tokenizer and cache folder, and a local shard server.

Every test runs on the contract of the python corpus, whatever the machine. None can reach the cache
of the person who runs them, but for those of FlashAttention-3 on a real GPU, which is found there.
README.md in this folder says what goes where.
"""

import bisect
import faulthandler
import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What the server that forks processes for tests imports first; pytest has one server for all files
PRELOAD = ["kernels", "pyarrow.parquet", "pytest", "requests", "rustbpe", "tiktoken", "torch"]
PRELOAD += ["torch._dynamo", "torch.nn.attention.flex_attention", "torch.optim"]
PATIENCE_SECONDS = 300  # until a process counts as hung, however busy the machine is
sys.path.insert(0, str(ROOT))

for name in ("AUTORESEARCH_SEED", "AUTORESEARCH_SPLIT", "HF_ENDPOINT", "http_proxy", "https_proxy"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = "127.0.0.1"
# On tensors this small torch's threads mostly wait for each other, and keep their processors busy
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["AUTORESEARCH_CORPUS"] = "python"
PERSONS_CACHE = os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
os.environ["AUTORESEARCH_CACHE"] = f"{os.devnull}/autoresearch"  # no folder, nor can it be one

import prepare  # noqa: E402  (reads the environment)

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([*PRELOAD, "prepare"])
FORKSERVER.set_forkserver_preload = lambda names: None  # prepare.py would choose for its processes


def pytest_xdist_auto_num_workers(config):
    """Return how many processes run the tests: two for all of them, none beside this for a few."""
    is_whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if is_whole_suite else 0


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Give every test the state of a process that has just started."""
    monkeypatch.setattr(prepare, "PROCESS_START", time.monotonic())
    monkeypatch.setattr(prepare, "CLOCK", prepare.Clock())
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def clock(monkeypatch):
    """The time that prepare.py reads: `now`, in seconds, which only the test moves."""
    clock = SimpleNamespace(now=prepare.PROCESS_START, monotonic=lambda: clock.now)
    monkeypatch.setattr(prepare, "time", clock)
    return clock


# ------------------------------------------------------------------------------------------------
# Corpus, tokenizer, cache folder


@pytest.fixture(scope="session")
def corpus():
    """A slice of the standard library: {split: documents}, short against the context."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(stdlib.glob("*.py")), *sorted(stdlib.glob("[a-ru-z]*/*.py"))]
    blocks = (b for f in files for b in re.split(r"\n\n+", f.read_text("utf-8", "ignore")))
    documents = sorted(set(blocks) - {""}, key=lambda text: hashlib.sha256(text.encode()).digest())
    ends = list(itertools.accumulate(map(len, documents)))
    val, test, end = (bisect.bisect(ends, size) for size in (1_800_000, 3_600_000, 6_000_000))
    assert end < len(documents)
    splits = {"val": documents[:val], "test": documents[val:test], "train": documents[test:end]}
    return splits


def make_cache(folder, corpus, **constants):
    """Prepare a corpus, {split: documents}, in a cache folder; return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(prepare, name, value)
        patch.setattr(prepare, "CACHE_DIR", folder)
        patch.setattr(prepare, "python_documents", lambda roots: (corpus, 0))
        patch.setattr(sys, "argv", ["prepare.py"])
        prepare.main()
    return folder


@pytest.fixture(scope="session")
def prepared_cache(corpus, tmp_path_factory):
    """A cache folder (AUTORESEARCH_CACHE) in which the python corpus is prepared, read only.

    val and test have enough text for the real EVAL_TOKENS. The workers of pytest-xdist share it:
    prepare.py lets the second one wait for the first, and then has nothing left to do.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return make_cache(folder / "cache", corpus)


@pytest.fixture(scope="session")
def tokenizer(prepared_cache):
    return prepare.Tokenizer.from_directory(prepared_cache / "python" / "tokenizer")


@pytest.fixture
def cache(prepared_cache, monkeypatch):
    """The prepared cache folder, in use by this process."""
    monkeypatch.setattr(prepare, "CACHE_DIR", prepared_cache)
    return prepared_cache


# ------------------------------------------------------------------------------------------------
# Shard server


class Hub:
    """A server of files on 127.0.0.1 that can misbehave.

    files: {name: bytes}. redirect: answer like the Hub, with a redirect whose own headers carry
    size and sha256. faults: {name: [fault, ...]}, one taken for every request of the file itself,
    the last one staying if `forever`; a fault is a function of (handler, body). log: (name, Range).
    """

    def __init__(self):
        self.files, self.redirect, self.ranges = {}, True, True
        self.faults, self.forever, self.log = {}, False, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                name = self.path.rpartition("/")[2]
                body = hub.files.get(name)
                if hub.redirect and body is not None and not self.path.startswith("/cdn/"):
                    self.answer(302, b"", **hub.linked(name), Location=f"/cdn/{name}")
                    return
                hub.log.append((name, self.headers.get("Range")))
                faults = hub.faults.get(name, [])
                fault = (faults[0] if hub.forever else faults.pop(0)) if faults else hub.serve
                try:
                    fault(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def answer(self, status, body, **headers):
                self.send_response(status)
                for key, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        # How often it looks whether to end: close() waits for that, half a second by default
        serve = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        serve.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def linked(self, name):
        body = self.files[name]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return {"X_Linked_Etag": etag, "X_Linked_Size": len(body)}

    def serve(self, handler, body):
        """Answer as it should be: all of the file, the range asked for, 416 or 404."""
        start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        if body is None:
            handler.answer(404, b"Entry not found")
        elif not (start and self.ranges):
            handler.answer(200, body)
        elif int(start[1]) >= len(body):
            handler.answer(416, b"", Content_Range=f"bytes */{len(body)}")
        else:
            first = int(start[1])
            content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
            handler.answer(206, body[first:], Content_Range=content_range)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()
