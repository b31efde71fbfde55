"""Run Python code on the null GPU in forks of a process that has imported torch.

test_hub.py starts it with null_gpu.environment(). It reads a JSON request a line and answers with
the exit status of the code.

    code: what is run; quick_download() makes it call a fork where it would call a new interpreter
    environment: variables that are set before
    out, err: paths that get the standard output and the standard error, of the fork's children, too
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import null_gpu  # noqa: F401  (a fork's code uses it)
import pyarrow.parquet  # noqa: F401  (these are imported once for all; kernels reads variables)
import requests  # noqa: F401
import rustbpe  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch._dynamo
import torch.nn.attention.flex_attention  # noqa: F401


def fork(code, out, err, names):
    """Run code in a fork that writes to two files; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    os.dup2(out.fileno(), sys.stdout.fileno())
    os.dup2(err.fileno(), sys.stderr.fileno())
    try:
        exec(compile(code, "<code>", "exec"), names | {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def quick_download():
    """Let subprocess.run(["python", "-c", code], ...) run the code in a fork: torch is in it."""

    def forked_run(command, timeout, **options):
        assert options == {"capture_output": True, "text": True}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = fork(command[2], out, err, {})
            deadline = time.monotonic() + timeout
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    raise subprocess.TimeoutExpired(command, timeout)
                time.sleep(0.01)
            out.seek(0)
            err.seek(0)
            status = os.waitstatus_to_exitcode(ended[1])
            return subprocess.CompletedProcess(command, status, out.read(), err.read())

    subprocess.run = forked_run


def serve():
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    names = {"quick_download": quick_download}
    for line in sys.stdin:
        request = json.loads(line)
        before = dict(os.environ)
        os.environ.update(request["environment"])
        with open(request["out"], "w") as out, open(request["err"], "w") as err:  # noqa: PTH123
            child = fork(request["code"], out, err, names)
        os.environ.clear()
        os.environ.update(before)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
