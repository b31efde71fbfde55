"""FlashAttention-3 from the Hub: the real client, a server on this machine, the null GPU.

What is executed is a stand-in of the same name and signature, so nothing here is about attention:
what is asked for, what is kept, and that a Hub that fails costs a run one line. See kernel_hub.py.
"""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import kernel_hub
import null_gpu
import pytest

REASON = null_gpu.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no null GPU: {REASON}")

SLOWLY = """
import torch, train
print("chosen:", train.choose_attention(torch.device("cuda")))
"""
CHOOSE = "quick_download()\n" + SLOWLY
IMPATIENT = "import train\ntrain.DOWNLOAD_SECONDS = 15\n"  # the client is imported in fewer
MAIN = """
quick_download()
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
RUN_WITH_FLASH = "chosen: flash-attn3\n"


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
def run(server, hub, prepared_cache, tmp_path):
    """Return a function that runs code with a new home: SimpleNamespace of out, err, requests."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "python").symlink_to(prepared_cache / "python")

    def run_code(code=CHOOSE, **variables):
        hub.log.clear()
        out = tmp_path / "out"
        err = tmp_path / "err"
        environment = {
            "AUTORESEARCH_CACHE": str(cache),
            "AUTORESEARCH_CORPUS": "python",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "huggingface"),
            "NO_PROXY": "127.0.0.1",
        }
        request = {"code": code, "out": str(out), "err": str(err)}
        request["environment"] = environment | variables
        print(json.dumps(request), file=server.stdin, flush=True)
        assert server.stdout.readline() == "0\n", err.read_text()
        return SimpleNamespace(out=out.read_text(), err=err.read_text(), requests=list(hub.log))

    run_code.cache = cache
    return run_code


def reason_of(seen):
    """Return why a run that printed nothing else fell back to flex_attention."""
    first, second = seen.out.splitlines()
    assert second == "chosen: flex"
    assert seen.err == ""
    start = "attention: no flash-attn3, using flex: "
    assert first.startswith(start)
    return first.removeprefix(start)


def is_file(path):
    return "/resolve/" in path


# ------------------------------------------------------------------------------------------------
# It can be had


def test_first_run_downloads_version_1_and_later_runs_ask_nothing(run, hub):
    first = run(SLOWLY)
    assert first.out == RUN_WITH_FLASH
    assert first.err == ""
    paths = {path for _, path in first.requests}
    assert f"/api/kernels/{kernel_hub.REPOSITORY}/refs" in paths
    files = {
        path.partition(f"/resolve/{hub.branches['v1']}/")[2] for path in filter(is_file, paths)
    }
    assert files == set(kernel_hub.package(kernel_hub.VARIANT)), "its files, and no other build's"
    again = run()
    assert (again.out, again.err, again.requests) == (RUN_WITH_FLASH, "", [])
    offline = run(HF_HUB_OFFLINE="1")
    assert (offline.out, offline.err, offline.requests) == (RUN_WITH_FLASH, "", [])
    hub.branches["v1"] = "c" * 40
    moved = run()
    assert (moved.out, moved.requests) == (RUN_WITH_FLASH, []), "a night keeps what it began with"


def test_nothing_but_the_log_of_a_run_is_printed(run, hub):
    hub.branches["v2"] = "c" * 40  # of which the client warns
    hub.files |= kernel_hub.package(kernel_hub.VARIANT, dirty=True)  # of this, too
    seen = run(MAIN)
    assert seen.err == ""
    lines = seen.out.splitlines()
    assert "attention: flash-attn3, compile: yes" in lines
    before = lines[: lines.index("attention: flash-attn3, compile: yes")]
    assert [line.partition(":")[0] for line in before] == ["device", "corpus"]
    assert hub.log != []


def test_package_that_is_gone_is_downloaded_again(run):
    run()
    (remembered,) = json.loads((run.cache / "remembered.json").read_text()).values()
    module = run.cache.parent / "huggingface" / "hub"
    assert remembered.startswith(str(module))
    module.rename(module.with_name("elsewhere"))
    seen = run()
    assert seen.out == RUN_WITH_FLASH
    assert any(is_file(path) for _, path in seen.requests)


def test_cache_that_cannot_be_written_costs_a_line(run):
    (run.cache / "remembered.json").mkdir()
    seen = run()
    first, second = seen.out.splitlines()
    assert first.startswith("not remembered for the next run: ")
    assert second == RUN_WITH_FLASH.strip()


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
    assert f"{status}" in reason_of(run())
    hub.fault = None
    assert run().out == RUN_WITH_FLASH, "the next run tries again"


def test_hub_that_is_not_there(run, hub):
    hub.close()
    assert "refused" in reason_of(run())


def test_offline_without_a_copy_asks_nothing(run):
    seen = run(HF_HUB_OFFLINE="1")
    assert "offline" in reason_of(seen)
    assert seen.requests == []


@pytest.mark.slow
def test_hub_that_hangs_is_waited_for_once(run, hub):
    hub.fault = hub.hang
    seen = run(IMPATIENT + SLOWLY)
    memory = run.cache / "remembered.json"
    advice = re.search(r"delete (\S+) and run: uv run python -c \"(.+)\"", reason_of(seen))
    assert advice[1] == str(memory)
    again = run()
    assert reason_of(again)
    assert again.requests == []
    hub.fault = None
    memory.unlink()
    assert run(advice[2]).out == ""
    after = run()
    assert (after.out, after.requests) == (RUN_WITH_FLASH, [])


def test_organisation_that_is_not_trusted_gets_nothing_executed(run, hub):
    hub.trusted = False
    seen = run()
    assert "not from a trusted publisher" in reason_of(seen)
    assert not any(is_file(path) for _, path in seen.requests)


def test_no_build_for_this_torch(run, hub):
    hub.files = kernel_hub.package(kernel_hub.OLD_VARIANT)
    assert "Cannot find a build variant" in reason_of(run())


def test_no_version_1(run, hub):
    hub.branches = {"main": "a" * 40, "v2": "c" * 40}
    assert "Version 1 not found" in reason_of(run())


def test_package_that_fails_is_the_reason(run, hub):
    for path in kernel_hub.package(kernel_hub.VARIANT):
        if path.endswith("interface.py"):
            hub.files[path] = b"raise ImportError('undefined symbol: planted')\n"
    assert "undefined symbol: planted" in reason_of(run())


def test_without_it_nothing_is_downloaded(run, hub):
    """As its docstring says: let choose_attention return "flex"."""
    flex = "train.choose_attention = lambda device: 'flex'\n"
    seen = run(MAIN.replace("train.main()", flex + "train.main()"))
    assert "attention: flex, compile: yes\n" in seen.out
    assert seen.requests == []
    assert not (run.cache.parent / "huggingface").exists()
