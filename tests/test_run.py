"""The contract of any train.py: summary, budget, log, exit status, whatever the agent made of it.

One run of train.py as it stands, compiled and in an interpreter of its own, serves most tests. The
failures run a copy with a small model, uncompiled, in processes forked from one that has imported
torch already. They are provoked from outside, through prepare and torch, never by train.py's names.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FORKSERVER, PATIENCE_SECONDS, make_cache

pytestmark = pytest.mark.slow  # nearly every test is a run or several
ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 3
WHOLE_RUN_SECONDS = 10  # of the one run as it stands: three steps on slow processors, too
SUMMARY = {  # fixed interface: ratchet.py reads it
    "val_bpb": r"\d+\.\d{6}",
    "training_seconds": r"\d+\.\d",
    "total_seconds": r"\d+\.\d",
    "peak_vram_mb": r"\d+\.\d",
    "mfu_percent": r"\d+\.\d\d|nan",
    "total_tokens_M": r"\d+\.\d",
    "num_steps": r"\d+",
    "num_params_M": r"\d+\.\d",
    "depth": r"\d+",
}
SMALL = {  # for runs that test no learning; a constant that is not there any more is left alone
    "DEPTH": "2",
    "ASPECT_RATIO": "32",
    "HEAD_DIM": "32",
    "DEVICE_BATCH_SIZE": "1",
    "TOTAL_BATCH_SIZE": "2**10",
}
CONTEXT = 512  # of these runs; a step is two batches

# ------------------------------------------------------------------------------------------------
# Running train.py; a script is what a process executes, the scenario standing before the run

BEGIN = f"""
import gc, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import prepare
prepare.TIME_BUDGET, prepare.EVAL_TOKENS = {BUDGET_SECONDS}, 2**13
"""
# Its clock counts the processor time of its thread: on a busy machine it makes as many steps
WHOLE_RUN = f"""
started = time.monotonic() - time.thread_time()
time.monotonic = lambda: started + time.thread_time()
prepare.TIME_BUDGET = {WHOLE_RUN_SECONDS}
"""

LITTLE_WORK = f"""
prepare.MAX_SEQ_LEN = {CONTEXT}
prepare.EVAL_TOKENS, prepare.PROBE_ROWS = 8 * {CONTEXT}, 4
torch.set_num_threads(1)
"""

EAGER = """
torch.compile = lambda f=None, **options: f or (lambda f: f)
"""

ON_BATCH = """
next_batch, count = prepare.Dataloader.__next__, {"train": 0, "val": 0, "test": 0}

def counted(loader):
    batch = next_batch(loader)
    count[loader.split] += 1
    on_batch(loader.split, count[loader.split], batch)
    return batch

prepare.Dataloader.__next__ = counted

def on_batch(split, number, batch):
    pass
"""

# A clock that training batches move makes runs repeatable
NUM_BATCHES = 16
FAKE_CLOCK = f"""
class Clock:
    now, tick = time.monotonic(), {BUDGET_SECONDS / (NUM_BATCHES - 0.5)}
    monotonic = staticmethod(lambda: Clock.now)

prepare.time = Clock

def on_batch(split, number, batch):
    Clock.now += Clock.tick * (split == "train")
"""


def run_script(path):
    return f"import runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The path of a copy of train.py with small constants."""
    source = (ROOT / "train.py").read_text()
    for name, value in SMALL.items():
        source = re.sub(rf"(?m)^( *){name} = .*$", rf"\g<1>{name} = {value}", source)
    path = tmp_path_factory.mktemp("small") / "train.py"
    path.write_text(source)
    return path


@pytest.fixture(scope="module")
def small_cache(corpus, tmp_path_factory):
    """A cache folder for runs of the small context."""
    return make_cache(tmp_path_factory.mktemp("small") / "cache", corpus, MAX_SEQ_LEN=CONTEXT)


def environment(cache, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AUTORESEARCH_")}
    return {
        **kept,
        "AUTORESEARCH_CACHE": str(cache),
        "AUTORESEARCH_CORPUS": "python",
        "TORCHINDUCTOR_CACHE_DIR": str(cache.parent / "inductor"),
    } | more


def forked(script, cwd, variables, out, err):
    """Execute a script; runs in the forked process."""
    os.chdir(cwd)
    os.environ.update(variables)
    # prepare.py blocks Ctrl-C for the processes that it begins, the server that forks among them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.modules.pop("prepare", None)  # another file's tests may share the server that forks
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    exec(compile(script, "<scenario>", "exec"), {"__name__": "scenario"})


class Run:
    """A forked process that runs the small train.py after a scenario."""

    def __init__(self, path, cache, folder, scenario="", cwd=None, end=None, **variables):
        self.out, self.err = folder / "out", folder / "err"
        script = BEGIN + LITTLE_WORK + EAGER + ON_BATCH + scenario + (end or run_script(path))
        args = (script, cwd or folder, environment(cache, **variables), self.out, self.err)
        self.process = FORKSERVER.Process(target=forked, args=args, daemon=True)
        self.process.start()

    def wait(self):
        self.process.join(PATIENCE_SECONDS)
        hung = self.process.is_alive()
        self.process.kill()
        out, err = (p.read_text() if p.exists() else "" for p in (self.out, self.err))
        assert not hung, f"still running after {PATIENCE_SECONDS} s\n{out}\n{err}"
        return SimpleNamespace(status=self.process.exitcode, out=out, err=err)


@pytest.fixture
def fork(small, small_cache, tmp_path):
    """Return a function that runs the small train.py after a scenario to its end."""

    def run(scenario="", **more):
        return Run(small, small_cache, tmp_path, scenario, **more).wait()

    return run


def summary_of(log, metric="val_bpb"):
    """Return the summary at the end of a log as {key: text}; check its form to the letter."""
    lines = log.splitlines()[-len(SUMMARY) - 1 :]
    assert lines[0] == "---"
    keys = [metric, *list(SUMMARY)[1:]]
    assert [line.partition(":")[0] for line in lines[1:]] == keys
    for line, form in zip(lines[1:], SUMMARY.values(), strict=True):
        assert re.fullmatch(form, line[18:]), line
        assert line[:18] == (line.partition(":")[0] + ":").ljust(18)
    return {line.partition(":")[0]: line[18:] for line in lines[1:]}


def assert_no_summary(log):
    assert "---" not in log.splitlines()
    assert not re.search("(?m)^(val|test)_bpb:", log)


# ------------------------------------------------------------------------------------------------
# One run as it stands


@pytest.fixture(scope="module")
def baseline(prepared_cache, tmp_path_factory):
    """A run of train.py as it stands, compiled, its log redirected: SimpleNamespace."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + WHOLE_RUN + run_script(ROOT / "train.py")],
        cwd=ROOT,
        env=environment(prepared_cache),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=4 * PATIENCE_SECONDS,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    print(out, err, sep="\n", file=sys.stderr)  # pytest shows it where a test fails
    seconds = time.monotonic() - start
    return SimpleNamespace(status=done.returncode, out=out, err=err, seconds=seconds)


def test_run_ends_well_with_the_summary(baseline):
    assert baseline.status == 0
    summary = summary_of(baseline.out)
    assert baseline.out.splitlines().count("---") == 1
    assert len(re.findall("(?m)^(?:val|test)_bpb:", baseline.out)) == 1
    assert 0 < float(summary["val_bpb"]) < 8  # a byte has eight bits
    assert int(summary["num_steps"]) > 0 and float(summary["peak_vram_mb"]) > 0
    assert float(summary["num_params_M"]) > 0 and int(summary["depth"]) > 0


def test_run_trains_for_its_budget(baseline):
    summary = summary_of(baseline.out)
    step_seconds = max(float(ms) for ms in re.findall(r"(\d+) ms/step", baseline.out)) / 1000
    training = float(summary["training_seconds"])
    over = training - WHOLE_RUN_SECONDS
    assert 0 <= over <= step_seconds + 0.1  # of rounding
    assert training < float(summary["total_seconds"]) <= baseline.seconds + 0.1


def test_log_is_short_whole_lines(baseline):
    assert "\r" not in baseline.out and baseline.out.endswith("\n")
    lines = baseline.out.splitlines()
    assert len(lines) < 120
    assert max(map(len, lines)) < 200
    assert all(line.isprintable() for line in lines)


def test_log_says_what_ran(baseline):
    start = baseline.out.partition("\nstep ")[0].lower()
    for word in ("device", "attention", "corpus", "seed", "parameters", "flops"):
        assert word in start
    report = re.search(r"(?m)^step +1 .*$", baseline.out)[0]
    for word in ("loss", "lr", "ms/step", "tok/s", "mfu", "epoch", "left"):
        assert word in report


def test_loss_falls(baseline):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", baseline.out)]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] - 0.1


def test_stderr_is_harmless(baseline):
    assert not re.search("Traceback|Error|Exception|fault", baseline.err)
    assert len(baseline.err.splitlines()) < 10


def test_log_holds_no_document_text(baseline, corpus):
    log = baseline.out + baseline.err
    lines = {
        line.strip() for split in corpus.values() for text in split for line in text.split("\n")
    }
    lines = [line for line in lines if len(line) >= 12]
    assert len(lines) > 10_000
    assert not [line for line in lines if line in log]


# ------------------------------------------------------------------------------------------------
# Seeds, splits, honest figures

FINGERPRINT = """
def on_batch(split, number, batch):
    Clock.now += Clock.tick * (split == "train")
    if (split, number) == ("train", 1):
        models = [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]
        model = max(models, key=lambda m: sum(p.numel() for p in m.parameters()))
        params = [p.detach().flatten().double().cpu() for p in model.parameters()]
        print("weights", sum(p.std().item() for p in params if len(p) > 1), flush=True)
        print("num_params", sum(map(len, params)), flush=True)
    if split == "train":
        print("tokens", number * batch[0].numel(), flush=True)
"""


@pytest.fixture(scope="module")
def seeds(small, small_cache, tmp_path_factory):
    """Runs on a clock that counts batches: seed 42 twice, 43, and 43 on the test split."""
    runs = {}
    for name, variables in {
        "42": {},
        "42 again": {"AUTORESEARCH_SEED": "42"},
        "43": {"AUTORESEARCH_SEED": "43"},
        "43 test": {"AUTORESEARCH_SEED": "43", "AUTORESEARCH_SPLIT": "test"},
    }.items():
        folder = tmp_path_factory.mktemp("seed")
        scenario = FAKE_CLOCK + FINGERPRINT
        runs[name] = Run(small, small_cache, folder, scenario, **variables)
    return {name: run.wait() for name, run in runs.items()}


def last(word, log):
    return re.findall(rf"(?m)^{word} (\S+)$", log)[-1]


def test_same_seed_gives_the_same_run(seeds):
    once, again = (summary_of(seeds[name].out) for name in ("42", "42 again"))
    assert last("weights", seeds["42"].out) == last("weights", seeds["42 again"].out)
    assert float(once["val_bpb"]) == pytest.approx(float(again["val_bpb"]), abs=2e-3)


def test_another_seed_gives_other_weights_and_another_number(seeds):
    once, other = (summary_of(seeds[name].out) for name in ("42", "43"))
    assert last("weights", seeds["42"].out) != last("weights", seeds["43"].out)
    assert once["val_bpb"] != other["val_bpb"]


def test_test_split_prints_test_bpb_alone(seeds):
    run = seeds["43 test"]
    assert run.status == 0
    assert "val_bpb" not in run.out
    test = float(summary_of(run.out, "test_bpb")["test_bpb"])
    assert test != float(summary_of(seeds["43"].out)["val_bpb"])
    assert 0 < test < 8


def test_figures_of_the_summary_are_true(seeds):
    out = seeds["42"].out
    summary, handed_out = summary_of(out), int(last("tokens", out))
    a_step = handed_out / int(summary["num_steps"])
    tokens = 1e6 * float(summary["total_tokens_M"])
    assert handed_out - a_step - 5e4 <= tokens <= handed_out + 5e4  # of rounding
    for ms, rate in re.findall(r"(\d+) ms/step \| ([\d,]+) tok/s", out):
        assert float(rate.replace(",", "")) * float(ms) / 1000 == pytest.approx(a_step, rel=0.05)
    assert float(summary["num_params_M"]) == pytest.approx(
        int(last("num_params", out)) / 1e6, abs=0.051
    )
    assert float(summary["training_seconds"]) == pytest.approx(BUDGET_SECONDS, abs=0.11)


def test_main_returns_the_summary(fork, small):
    end = f"import json, runpy\nmain = runpy.run_path({str(small)!r})['main']\n"
    run = fork(FAKE_CLOCK, end=end + "print('returned', json.dumps(main()))\n")
    log, _, returned = run.out.partition("returned ")
    assert run.status == 0, run.err
    expected = {key: float(value) for key, value in summary_of(log).items()}
    assert json.loads(returned) == pytest.approx(expected, nan_ok=True)


# ------------------------------------------------------------------------------------------------
# A loss that is no number

SPOIL_LOSS = """
def spoiled(function):
    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        if torch.is_tensor(out) and out.ndim == 0 and count["train"]:
            out = spoil(out, count["train"])
        return out
    return call

torch.nn.Module.__call__ = spoiled(torch.nn.Module.__call__)
torch.nn.functional.cross_entropy = spoiled(torch.nn.functional.cross_entropy)
"""

BAD_LOSSES = {
    "nan": "loss * float('nan')",
    "inf": "loss + float('inf')",
    "minus inf": "loss - float('inf')",
    "nan in the last batch": f"loss * float('nan') if number == {NUM_BATCHES} else loss",
    "nan in one batch": "loss * float('nan') if number == 2 else loss",
    "exploding": "loss * 1e6**number",
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_loss_that_is_no_number_ends_the_run(fork, kind):
    spoil = f"\ndef spoil(loss, number):\n    return {BAD_LOSSES[kind]}\n"
    run = fork(FAKE_CLOCK + SPOIL_LOSS + spoil)
    assert run.status == 1
    assert_no_summary(run.out)
    assert "loss" in run.err and len(run.err.splitlines()) == 1
    if "last" not in kind:
        assert run.out.count("\nstep ") < 4  # at once, not at the end


def test_broken_weights_in_evaluation_give_no_summary(fork):
    run = fork(
        FAKE_CLOCK
        + """
embedding = torch.nn.functional.embedding
torch.nn.functional.embedding = lambda *a, **k: embedding(*a, **k) * spoil

spoil = 1

def on_batch(split, number, batch):
    global spoil
    Clock.now += Clock.tick * (split == "train")
    if split == "val" and number == 2:
        spoil = float("nan")
"""
    )
    assert run.status == 1
    assert_no_summary(run.out)
    assert "finite" in run.err and len(run.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# Signals and hangs

WARMING_UP = """
backward = torch.Tensor.backward

def interrupted(self, *args, **kwargs):
    if not count["train"]:
        happen()
    return backward(self, *args, **kwargs)

torch.Tensor.backward = interrupted
"""

AT_BATCH = """
def on_batch(split, number, batch):
    Clock.now += Clock.tick * (split == "train")
    if (split, number) == PLACE:
        happen()
"""

PLACES = {
    "warm-up": WARMING_UP,
    "training": AT_BATCH.replace("PLACE", "('train', 3)"),
    "evaluation": AT_BATCH.replace("PLACE", "('val', 2)"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_ends_the_run_without_summary(fork, name, place):
    happen = f"\ndef happen():\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(0.2)\n"
    run = fork(FAKE_CLOCK + PLACES[place] + happen)
    assert run.status not in (0, None)
    assert_no_summary(run.out)
    assert len(run.err.splitlines()) <= 1
    assert ("\nstep " in run.out) == (place != "warm-up")


@pytest.mark.parametrize("place", ["training", "evaluation"])
def test_hang_is_ended_by_the_wall_with_all_stacks(fork, place):
    """The hang holds the interpreter's lock: nothing written in Python could end it.

    When it comes, the wall that is armed by then is moved to a second from now.
    """
    wall = """
import ctypes, faulthandler
Clock.tick *= 4
arm, disarm, armed = faulthandler.dump_traceback_later, faulthandler.cancel_dump_traceback_later, []

def watched_arm(timeout, **options):
    armed[:] = [options]
    arm(timeout, **options)

def watched_disarm():
    armed.clear()
    disarm()

faulthandler.dump_traceback_later = watched_arm
faulthandler.cancel_dump_traceback_later = watched_disarm
threading.Thread(target=time.sleep, args=(3600,), daemon=True, name="other").start()

def happen():
    arm(1, **armed[0])
    ctypes.PyDLL(None).sleep(3600)
"""
    run = fork(FAKE_CLOCK + PLACES[place] + wall)
    assert run.status not in (0, None)
    assert_no_summary(run.out)
    assert run.err.count("most recent call first") == 2
    assert "happen" in run.err and "train.py" in run.err


# ------------------------------------------------------------------------------------------------
# Trouble before the clock starts

SCARCE_MEMORY = """
embedding = torch.nn.functional.embedding

def scarce(rows, *args, **kwargs):
    if rows.size(0) > MOST_ROWS:
        raise OUT_OF_MEMORY
    return embedding(rows, *args, **kwargs)

torch.nn.functional.embedding = scarce
"""
OUT_OF_MEMORY = {
    "cuda": 'torch.OutOfMemoryError("allocation of 3 GiB refused\\nsecond line")',
    # As torch's allocator for Apple silicon words it: an error of no kind of its own
    "mps": 'RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GiB, other allocations: '
    '1.00 GiB, max allowed: 18.13 GiB). Tried to allocate 3.00 GiB on private pool.")',
}


def scarce_memory(most_rows, kind="cuda"):
    return SCARCE_MEMORY + f"MOST_ROWS = {most_rows}\nOUT_OF_MEMORY = {OUT_OF_MEMORY[kind]}\n"


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_says_so(small, small_cache, tmp_path, kind):
    path = tmp_path / "train.py"
    path.write_text(small.read_text().replace("DEVICE_BATCH_SIZE = 1\n", "DEVICE_BATCH_SIZE = 2\n"))
    scenario = FAKE_CLOCK + scarce_memory(1, kind)
    run = Run(path, small_cache, tmp_path, scenario).wait()
    assert run.status == 0, run.err
    summary_of(run.out)
    messages = [line for line in run.out.splitlines() if "out of memory" in line.lower()]
    assert len(messages) == 1 and re.search(r"\b2\b.*\b1\b", messages[0]), "from 2 rows to 1"
    assert run.err == ""


def test_out_of_memory_with_one_row_ends_clearly(fork):
    run = fork(FAKE_CLOCK + scarce_memory(0))
    assert run.status == 1
    assert_no_summary(run.out)
    assert "memory" in run.err and len(run.err.splitlines()) == 1


def test_crash_in_evaluation_is_found_before_the_clock_starts(fork):
    run = fork(
        FAKE_CLOCK
        + """
embed = torch.nn.Embedding.forward

def fragile(self, idx):
    if not self.training:
        raise RuntimeError("planted in evaluation")
    return embed(self, idx)

torch.nn.Embedding.forward = fragile

def on_batch(split, number, batch):
    print("the clock has started", flush=True)
"""
    )
    assert run.status == 1
    assert_no_summary(run.out)
    assert "the clock has started" not in run.out
    assert "planted in evaluation" in run.err


def test_not_prepared_says_what_to_run(fork, small, tmp_path):
    run = Run(small, tmp_path / "nothing", tmp_path).wait()
    assert run.status == 1
    assert len(run.err.splitlines()) == 1 and "uv run prepare.py" in run.err
    assert_no_summary(run.out)


def test_no_compiler_falls_back_to_eager(small, small_cache, tmp_path):
    variables = {"PATH": "", "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + LITTLE_WORK + run_script(small)],
        cwd=tmp_path,
        env=environment(small_cache, **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    summary_of(done.stdout)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 10
    if "torch.compile" in small.read_text():
        said = [
            line for line in done.stdout.splitlines() if re.search("compile.*(fail|eager)", line)
        ]
        assert len(said) == 1


@pytest.mark.parametrize(
    ("chosen", "left"),
    [("flash-attn3", "flash-attn3"), ("flex", "blocked"), ("blocked", "blocked")],
)
def test_only_flex_is_lost_with_the_compiler(fork, small, chosen, left):
    run = fork(
        FAKE_CLOCK,
        end=f"""
import runpy
train = runpy.run_path({str(small)!r})["main"].__globals__

def flash(q, k, v, causal, window_size):
    return train["blocked_attention"](q, k, v, window_size[0])

def fail(model, device):
    raise RuntimeError("planted in the compiler")

train["choose_attention"] = lambda device: {chosen!r}
train["flash_attention_3"] = lambda: flash
train["compile_model"] = fail
train["main"]()
""",
    )
    assert run.status == 0, run.err
    summary_of(run.out)
    assert "torch.compile failed, running eagerly: RuntimeError: planted" in run.out
    assert f"\nattention: {left}, compile: no\n" in run.out


# ------------------------------------------------------------------------------------------------
# Surroundings


@pytest.mark.parametrize("folder", ["deleted", "read-only"])
def test_working_folder_is_not_needed(fork, tmp_path, folder):
    scenario = FAKE_CLOCK
    if folder == "deleted":
        (tmp_path / "gone").mkdir()
        scenario += (
            f"\nos.chdir({str(tmp_path / 'gone')!r})\nos.rmdir({str(tmp_path / 'gone')!r})\n"
        )
    elif not Path("/proc").is_dir():
        pytest.skip("no folder here that even root cannot write to")
    run = fork(scenario, cwd="/proc" if folder == "read-only" else None)
    assert run.status == 0, run.err
    summary_of(run.out)


def test_nothing_is_written_to_the_working_folder(fork, tmp_path):
    (tmp_path / "work").mkdir()
    assert fork(FAKE_CLOCK, cwd=tmp_path / "work").status == 0
    assert not list((tmp_path / "work").iterdir())


def test_closed_stdout_ends_the_run(small, small_cache, tmp_path):
    """As `uv run train.py | head -1` does."""
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + LITTLE_WORK + EAGER + run_script(small)],
            cwd=tmp_path,
            env=environment(small_cache),
            stdout=subprocess.PIPE,
            stderr=err,
        )
        first = process.stdout.readline()
        process.stdout.close()
        status = process.wait(timeout=PATIENCE_SECONDS)
    assert first and status != 0
    assert len((tmp_path / "err").read_text().splitlines()) < 40


def test_two_runs_on_one_device_both_end_well(small, small_cache, tmp_path_factory):
    """On the real clock, with many steps a second: the reports are throttled."""
    runs = [Run(small, small_cache, tmp_path_factory.mktemp("two")) for _ in range(2)]
    for run in [run.wait() for run in runs]:
        assert run.status == 0, run.err
        assert float(summary_of(run.out)["training_seconds"]) >= BUDGET_SECONDS
        assert len(run.out.splitlines()) < 120


def test_import_is_silent_and_touches_no_device(fork):
    run = fork(
        """
def refuse(*args, **kwargs):
    raise AssertionError("train.py touched the device on import")

torch.cuda.init = torch.cuda._lazy_init = torch.cuda.get_device_name = refuse
torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse
prepare.make_dataloader = prepare.Tokenizer.from_directory = refuse
before = threading.active_count(), dict(os.environ), torch.random.get_rng_state().sum().item()
""",
        end=f"""
import runpy, subprocess
runpy.run_path({str(ROOT / "train.py")!r}, run_name="train")
assert before == (threading.active_count(), dict(os.environ), torch.get_rng_state().sum().item())
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
""",
    )
    assert (run.status, run.out, run.err) == (0, "", "")


# ------------------------------------------------------------------------------------------------
# The text of the two files


def test_train_reads_no_environment_and_takes_no_flags():
    source = (ROOT / "train.py").read_text()
    assert not re.search(r"environ|getenv|argparse|sys\.argv", source)


def test_train_leaves_the_contract_to_prepare():
    """No constant of the contract is set or repeated, and the seed is no number."""
    import prepare

    tree = ast.parse((ROOT / "train.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    contract = {name for name in vars(prepare) if name.isupper() and len(name) > 1}
    assert {"TIME_BUDGET", "EVAL_TOKENS", "HARD_LIMIT", "MAX_SEQ_LEN", "SEED"} <= contract
    assert not names & contract
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            assert not (isinstance(target, ast.Attribute) and target.attr in contract)
        if isinstance(node, ast.Call) and "seed" in ast.unparse(node.func):
            assert ast.unparse(node.args[0]).startswith("prepare.SEED")
