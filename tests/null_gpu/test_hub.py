"""FlashAttention-3 from the Hub: the real client, a server on this machine, the null GPU.

prepare.py fetches it, and train.py executes what was fetched. That is a stand-in of the same name
and signature, so nothing here is about attention: what is asked for and what is kept, that a Hub
that fails costs one line, and that a run asks for nothing. See kernel_hub.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernel_hub
import null_gpu
import pytest
import torch

REASON = null_gpu.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"no null GPU: {REASON}"),
]

FETCH_SLOWLY = """
import prepare
prepare.fetch_flash_attention_3()
"""
FETCH = "quick_download()" + FETCH_SLOWLY
CHOOSE = """
import torch, train
print("chosen:", train.choose_attention(torch.device("cuda")))
"""
MAIN = """
import torch, prepare, train
torch.compile = lambda function, **options: function
prepare.TIME_BUDGET = 0.1
prepare.EVAL_TOKENS = 2 * prepare.MAX_SEQ_LEN
prepare.PROBE_ROWS = 2
train.DEPTH = 2
train.TOTAL_BATCH_SIZE = prepare.MAX_SEQ_LEN
train.DEVICE_BATCH_SIZE = 1
train.main()
"""
CHOSEN = "chosen: flash-attn3\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A process that sees the null GPU and runs code in forks."""
    library = null_gpu.build(tmp_path_factory.mktemp("null_gpu"))
    process = subprocess.Popen(
        [sys.executable, null_gpu.HERE / "fork_server.py"],
        env=null_gpu.environment(library),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def hub():
    hub = kernel_hub.KernelHub()
    yield hub
    hub.close()


@pytest.fixture
def environment(hub, prepared_cache, tmp_path):
    """The variables of a process with a new home, in whose cache folder the corpus is prepared."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "python").symlink_to(prepared_cache / "python")
    return {
        "AUTORESEARCH_CACHE": str(cache),
        "AUTORESEARCH_CORPUS": "python",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def run(server, hub, environment, tmp_path):
    """Return a function that runs code: SimpleNamespace of out, err, and requests to the Hub."""

    def run_code(code, **variables):
        hub.log.clear()
        out = tmp_path / "out"
        err = tmp_path / "err"
        request = {"code": code, "out": str(out), "err": str(err)}
        request["environment"] = environment | variables
        print(json.dumps(request), file=server.stdin, flush=True)
        assert server.stdout.readline() == "0\n", err.read_text()
        return SimpleNamespace(out=out.read_text(), err=err.read_text(), requests=list(hub.log))

    return run_code


@pytest.fixture
def link(environment):
    """The path at which train.py finds FlashAttention-3."""
    return Path(environment["AUTORESEARCH_CACHE"], f"flash-attn3-torch-{torch.__version__}")


def why_not_fetched(seen):
    """Return why prepare.py, which went on and printed nothing else, has not fetched it."""
    assert seen.err == ""
    _, line = seen.out.splitlines()
    return re.fullmatch(r"no FlashAttention-3 \((.+)\): .*prepare\.py.*", line)[1]


def why_not_chosen(seen):
    """Return why a run that asked the Hub for nothing fell back to flex_attention."""
    assert seen.err == ""
    assert seen.requests == []
    first, second = seen.out.splitlines()
    assert second == "chosen: flex"
    start = "attention: no flash-attn3, using flex: "
    assert first.startswith(start)
    return first.removeprefix(start)


def files_asked_for(seen):
    """Return the paths in the repository of all files that were asked for."""
    paths = {path for _, path in seen.requests if "/resolve/" in path}
    return {path.partition("/resolve/")[2].partition("/")[2] for path in paths}


# ------------------------------------------------------------------------------------------------
# It can be had


def test_version_1_is_fetched_once_and_runs_ask_nothing(run, hub, link):
    first = run(FETCH)
    assert first.err == ""
    assert len(first.out.splitlines()) == 1
    assert f"/api/kernels/{kernel_hub.REPOSITORY}/refs" in {path for _, path in first.requests}
    files = set(kernel_hub.package(kernel_hub.VARIANT))
    assert files_asked_for(first) == files, "its files, and no other build's"
    assert link.is_symlink()
    chosen = run(CHOOSE)
    assert (chosen.out, chosen.err, chosen.requests) == (CHOSEN, "", [])
    offline = run(CHOOSE, HF_HUB_OFFLINE="1")
    assert (offline.out, offline.err, offline.requests) == (CHOSEN, "", [])
    hub.branches["v1"] = "c" * 40
    again = run(FETCH)
    assert (again.out, again.err, again.requests) == ("", "", []), "what is there stays"


@pytest.mark.slow
def test_machine_without_a_gpu_fetches_the_same_build(hub, environment, link):
    """As a cluster's login node does, with climbmix; with the python corpus it asks for nothing."""
    variables = os.environ | {"PYTHONPATH": str(null_gpu.ROOT), "CUDA_VISIBLE_DEVICES": ""}

    def fetch(corpus):
        hub.log.clear()
        subprocess.run(
            [sys.executable, "-c", FETCH_SLOWLY],
            env=variables | environment | {"AUTORESEARCH_CORPUS": corpus},
            check=True,
        )
        return SimpleNamespace(requests=list(hub.log))

    assert fetch("python").requests == []
    assert not link.is_symlink()
    assert files_asked_for(fetch("climbmix")) == set(kernel_hub.package(kernel_hub.VARIANT))
    assert link.resolve().name == kernel_hub.VARIANT


def test_nothing_but_the_log_of_a_run_is_printed(run, hub):
    hub.branches["v2"] = "c" * 40  # of which the client warns
    hub.files |= kernel_hub.package(kernel_hub.VARIANT, dirty=True)  # of this, too
    fetched = run(FETCH)
    assert fetched.err == ""
    assert len(fetched.out.splitlines()) == 1
    seen = run(MAIN)
    assert seen.err == ""
    lines = seen.out.splitlines()
    assert "attention: flash-attn3, compile: yes" in lines
    before = lines[: lines.index("attention: flash-attn3, compile: yes")]
    assert [line.partition(":")[0] for line in before] == ["device", "corpus"]


def test_package_that_is_gone_is_fetched_again(run, link):
    run(FETCH)
    module = link.parent.parent / "huggingface" / "hub"
    assert link.resolve().is_relative_to(module)
    module.rename(module.with_name("elsewhere"))
    assert "prepare.py" in why_not_chosen(run(CHOOSE))
    assert files_asked_for(run(FETCH)) != set()
    assert run(CHOOSE).out == CHOSEN


def test_another_torch_has_its_own(run, link):
    run(FETCH)
    link.rename(link.with_name("flash-attn3-torch-2.0.0"))
    assert "prepare.py" in why_not_chosen(run(CHOOSE))
    run(FETCH)
    assert run(CHOOSE).out == CHOSEN


# ------------------------------------------------------------------------------------------------
# It cannot be had: one line, and flex_attention


def answer(status):
    return lambda handler: handler.send(status, b"planted")


@pytest.mark.parametrize(
    ("status", "part"), [(500, "/overview"), (404, "/refs"), (404, "/resolve/"), (403, "/build")]
)
def test_status_of_the_hub_is_the_reason(run, hub, status, part):
    hub.fault = answer(status)
    hub.is_faulty = lambda path: part in path
    assert f"{status}" in why_not_fetched(run(FETCH))
    assert "prepare.py" in why_not_chosen(run(CHOOSE))
    hub.fault = None
    run(FETCH)
    assert run(CHOOSE).out == CHOSEN, "another call tries again"


def test_hub_that_is_not_there(run, hub):
    hub.close()
    assert "refused" in why_not_fetched(run(FETCH))


@pytest.mark.parametrize("is_there", [True, False])
def test_prepare_fetches_it_and_is_ready_without(run, hub, link, is_there):
    if not is_there:
        hub.close()
    seen = run("quick_download()\nimport prepare, sys\nsys.argv = ['-']\nprepare.main()")
    assert link.exists() == is_there
    assert ("no FlashAttention-3" in seen.out) != is_there
    assert seen.out.splitlines()[-1].startswith("ready")


def test_offline_without_a_copy_asks_nothing(run):
    seen = run(FETCH, HF_HUB_OFFLINE="1")
    assert "offline" in why_not_fetched(seen)
    assert seen.requests == []


def test_hub_that_hangs_is_not_waited_for_without_end(run, hub):
    hub.fault = hub.hang
    reason = why_not_fetched(run("import prepare\nprepare.FLASH_SECONDS = 5\n" + FETCH))
    assert "5 s" in reason
    hub.fault = None
    run(FETCH)
    assert run(CHOOSE).out == CHOSEN


def test_link_that_cannot_be_placed_is_the_reason(run, link):
    link.mkdir()
    assert "irectory" in why_not_fetched(run(FETCH))


def test_organisation_that_is_not_trusted_gets_nothing_downloaded(run, hub):
    hub.trusted = False
    seen = run(FETCH)
    assert "not from a trusted publisher" in why_not_fetched(seen)
    assert files_asked_for(seen) == set()


def test_no_build_for_this_torch(run, hub):
    hub.files = kernel_hub.package(kernel_hub.OLD_VARIANT)
    assert "Cannot find a build variant" in why_not_fetched(run(FETCH))


def test_no_version_1(run, hub):
    hub.branches = {"main": "a" * 40, "v2": "c" * 40}
    assert "Version 1 not found" in why_not_fetched(run(FETCH))


def test_package_that_fails_is_the_reason(run, hub):
    for path in kernel_hub.package(kernel_hub.VARIANT):
        if path.endswith("interface.py"):
            hub.files[path] = b"raise ImportError('undefined symbol: planted')\n"
    fetched = run(FETCH)
    assert len(fetched.out.splitlines()) == 1, "nothing of it is executed"
    assert "undefined symbol: planted" in why_not_chosen(run(CHOOSE))


def test_without_it_nothing_is_executed(run, hub):
    """As its docstring says: let choose_attention return "flex"."""
    for path in kernel_hub.package(kernel_hub.VARIANT):
        if path.endswith("interface.py"):
            hub.files[path] = b"print('executed')\n" + hub.files[path]
    run(FETCH)
    assert "executed" in run(MAIN).out
    flex = "train.choose_attention = lambda device: 'flex'\n"
    seen = run(MAIN.replace("train.main()", flex + "train.main()"))
    assert "attention: flex, compile: yes\n" in seen.out
    assert "executed" not in seen.out
