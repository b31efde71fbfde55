"""The CUDA path of train.py and prepare.py on a null GPU: all but the numbers.

Memory, shapes, launches, compilation and the log are as on an H100; every value that the host reads
is 0, so nothing here looks at a loss. See null_gpu.py, and scenario.py for one run.
"""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import null_gpu
import pytest
from conftest import PATIENCE_SECONDS

REASON = null_gpu.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no null GPU: {REASON}")
CONTEXT = 2048
SMALL = {"DEPTH": 2, "TOTAL_BATCH_SIZE": 8 * CONTEXT, "DEVICE_BATCH_SIZE": 4}
PUBLISHED_ROWS = 128
CONTRACT = {
    "TIME_BUDGET": 300,
    "EVAL_TOKENS": 8 * CONTEXT,
    "PROBE_ROWS": 2,
}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The path of the null driver, compiled."""
    return null_gpu.build(tmp_path_factory.mktemp("null_gpu"))


@pytest.fixture
def null_cache(prepared_cache, tmp_path):
    """A cache folder of its own, with the shared corpus in it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "python").symlink_to(prepared_cache / "python")
    return cache


@pytest.fixture(scope="session")
def server(library, tmp_path_factory):
    """A process that sees the null GPU and runs scenarios; its compiler's cache is its own."""
    folder = tmp_path_factory.mktemp("null_inductor")
    caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder / "triton"}
    process = subprocess.Popen(
        [sys.executable, null_gpu.HERE / "scenario.py"],
        env=null_gpu.environment(library, **caches),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=PATIENCE_SECONDS)


@pytest.fixture
def run(server, null_cache, tmp_path):
    """Return a function that runs a scenario on the null GPU: SimpleNamespace of what it saw."""

    def run_scenario(gpu=None, prepare=None, **scenario):
        environment = {f"NULL_GPU_{key}": str(value) for key, value in (gpu or {}).items()}
        environment["AUTORESEARCH_CORPUS"] = "python"
        environment["AUTORESEARCH_CACHE"] = str(null_cache)
        result = tmp_path / "result.json"
        err = tmp_path / "err"
        err.unlink(missing_ok=True)
        request = {
            "result": str(result),
            "err": str(err),
            "environment": environment,
            "train": SMALL,
            "prepare": CONTRACT | (prepare or {}),
        }
        print(json.dumps(request | scenario), file=server.stdin, flush=True)
        assert server.stdout.readline() == "0\n", err.read_text()
        return SimpleNamespace(err=err.read_text(), **json.loads(result.read_text()))

    return run_scenario


def lines_that_begin(log, start):
    return [line for line in log.splitlines() if line.startswith(start)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "attention", "compiled"),
    [
        ({}, "flash-attn3", "yes"),
        ({"flash": False}, "flex", "yes"),
        ({"compiler": "failing"}, "flash-attn3", "no"),
        ({"compiler": "failing", "flash": False}, "blocked", "no"),
    ],
)
def test_main_reaches_its_summary(run, scenario, attention, compiled):
    seen = run(**scenario)
    assert seen.summary["num_steps"] == 2
    assert seen.summary["depth"] == 2
    assert f"attention: {attention}, compile: {compiled}\n" in seen.log
    assert "device: NVIDIA H100 80GB HBM3, torch " in seen.log
    assert seen.log.count("torch.compile failed") == (compiled == "no")
    assert seen.log.count("no flash-attn3") == (not scenario.get("flash", True))
    assert seen.late == []
    assert seen.warnings == []
    assert seen.err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "attention"),
    [
        (75, "float32", "flex"),
        (86, "bfloat16", "flash-attn3"),
        (89, "bfloat16", "flash-attn3"),
        (90, "bfloat16", "flash-attn3"),
        (120, "bfloat16", "flex"),
    ],
)
def test_capability_decides_dtype_and_attention(run, capability, dtype, attention):
    seen = run({"CC": capability}, compiler="eager")
    assert "exit" not in vars(seen), seen.exit
    assert seen.summary["num_steps"] == 2
    assert f", {dtype}\n" in seen.log
    assert f"attention: {attention}, " in seen.log
    if capability in (75, 120):
        pair = divmod(capability, 10)
        assert f"not built for compute capability {pair}" in seen.log


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_nothing_is_compiled_once_the_clock_runs(run, rows):
    seen = run(train=SMALL | {"DEVICE_BATCH_SIZE": rows}, batches=8)
    assert seen.summary["num_steps"] * 8 // rows == seen.batches
    assert seen.strides == [[CONTEXT, 1], [CONTEXT, 1]]
    assert seen.late == []
    # Matrices of four shapes in Muon: square, wide, tall, and the gate's
    assert sorted(seen.compiled) == ["GPT.trunk", "head_loss", *["muon_update"] * 4]


@pytest.mark.slow
@pytest.mark.parametrize("flash", [True, False])
def test_inductor_compiles_it_all_before_the_clock(run, flash):
    """As shipped: Inductor and Triton make code for an H100."""
    seen = run(flash=flash, compiler="inductor")
    assert seen.summary["num_steps"] == 2
    assert len(seen.compiled) == 6
    assert seen.late == []
    assert seen.warnings == []
    assert seen.err == ""


# ------------------------------------------------------------------------------------------------
# Memory


def chosen_rows(seen):
    return int(re.search(r"(\d+) passes of (\d+) rows a step", seen.log)[2])


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [8, 10, 24, 40])
def test_small_card_is_filled_at_the_first_try(run, gigabytes):
    """The published size: fewer rows, which fit, and use a good part of the card."""
    seen = run({"GB": gigabytes}, train={}, compiler="eager", batches=16)
    assert "out of memory" not in seen.log
    assert seen.tries == 1
    assert 1 < chosen_rows(seen) < PUBLISHED_ROWS
    assert seen.summary["peak_vram_mb"] * 2**20 > 0.3 * gigabytes * 1e9


@pytest.mark.slow
def test_card_on_which_all_rows_fit_has_them(run):
    seen = run({"GB": 24}, compiler="eager")
    assert chosen_rows(seen) == SMALL["DEVICE_BATCH_SIZE"]
    assert seen.tries == 1


@pytest.mark.slow
def test_small_card_halves_when_it_must(run):
    """All logits at once take more memory than the formula knows of."""
    seen = run({"GB": 6}, train={"LOSS_SLICE": 2**20}, compiler="eager", batches=1)
    assert len(lines_that_begin(seen.log, "out of memory with ")) == 1
    assert chosen_rows(seen) > 1
    assert seen.tries == 2
    assert seen.used[1] < 2**20, "the memory of the first try is free again"


@pytest.mark.slow
def test_model_that_is_too_large_ends_in_one_line(run):
    seen = run({"GB": 0.4}, train={}, compiler="eager")
    assert "a single row: make the model smaller" in seen.exit
    assert "---" not in seen.log


# ------------------------------------------------------------------------------------------------
# Loop and machine


@pytest.mark.slow
def test_host_is_two_batches_ahead_at_most_and_batches_are_pinned(run):
    seen = run(compiler="eager", batches=20)
    assert seen.batches == 20
    assert seen.ahead == 2
    assert seen.pinned >= seen.batches


@pytest.mark.slow
def test_memory_that_is_the_machines_own_is_nobodys(run):
    seen = run({"UNIFIED": 1}, compiler="eager")
    (line,) = lines_that_begin(seen.log, "machine ")
    assert re.search(r"\b0\.0 GiB", line)


def check_device(library, **variables):
    code = "import prepare; prepare.check_device(); print('usable')"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=null_gpu.environment(library, **variables),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_driver_that_is_too_old_is_named(library):
    done = check_device(library, NULL_GPU_DRIVER=12040)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "driver" in line and "12040" in line and "AUTORESEARCH_CORPUS=python" in line
    meant = check_device(library, NULL_GPU_DRIVER=12040, AUTORESEARCH_CORPUS="python")
    assert meant.stdout == "usable\n"
    assert check_device(library).stdout == "usable\n"
