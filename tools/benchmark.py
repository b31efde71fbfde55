"""Measure what the README quotes, on this machine, in one run; prints one table.

    uv run python tools/benchmark.py            # speed, about eight minutes
    uv run python tools/benchmark.py --quality  # trainings, shipped against published: 36 more

Needs the python corpus (`uv run prepare.py`) and a machine that does nothing else. What is compared
is run in alternation: the median of the rounds, with the range in brackets. Else it is one run.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import train  # noqa: E402

ROUNDS = 5  # of every comparison
STEPS = 10  # optimizer steps of one round
SPAWN = multiprocessing.get_context("spawn")  # a process of its own: settings are process-wide
FOREVER = 1e9  # seconds

# The published recipe shrunk by its own advice: pinned here, whatever train.py comes to ship
PUBLISHED_SEQ_LEN = 256
PUBLISHED = {
    "DEPTH": 4,
    "ASPECT_RATIO": 64,
    "HEAD_DIM": 128,
    "WINDOW_PATTERN": "L",
    "ROPE_BASE": 10_000,
    "SHIFT_KEYS": False,
    "TOTAL_BATCH_SIZE": 2**14,
    "DEVICE_BATCH_SIZE": 16,  # on the machine of the README faster than 64 rows in one pass
    "EMBEDDING_LR": 0.6,
    "UNEMBEDDING_LR": 0.004,
    "MATRIX_LR": 0.04,
    "SCALAR_LR": 0.5,
    "WEIGHT_DECAY": 0.2,
    "ADAM_BETAS": (0.8, 0.95),
    "X0_BETAS": (0.96, 0.95),
    "MUON_MOMENTUM": (0.85, 0.95),
    "MUON_MOMENTUM_STEPS": 300,
    "MUON_BETA2": 0.95,
    "GATE_CHANNELS": 32,
    "WARMUP_RATIO": 0.0,
    "WARMDOWN_RATIO": 0.5,
    "FINAL_LR_FRAC": 0.0,
}


def median(values, form, unit=1):
    """Return "median (lowest to highest)" in a unit."""
    low, mid, high = (f(values) / unit for f in (min, statistics.median, max))
    return f"{mid:{form}} ({low:{form}} to {high:{form}})"


def pair(values, form):
    return "; ".join(f"{value:{form}}" for value in values)


def ratio(pairs):
    """Return the median of the quotients of pairs."""
    return median([a / b for a, b in pairs], ".2f")


def seconds(function, *args):
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


# --- Training step and evaluation -----------------------------------------------------------------


class Gate:
    """A training loader that lets as many batches through as the benchmark asks for."""

    def __init__(self, loader, pipe):
        self.loader = loader
        self.pipe = pipe

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        self.pipe.send("warm")
        while num_steps := self.pipe.recv():
            num_tokens = num_steps * train.TOTAL_BATCH_SIZE
            num_batches = num_tokens // (self.loader.batch_size * prepare.MAX_SEQ_LEN)
            start = time.monotonic()
            yield from itertools.islice(self.loader, num_batches)
            self.pipe.send(num_tokens / (time.monotonic() - start))


def make_plain():
    """Turn train.py into the plain loop: eager, float32, torch's defaults, all logits at once."""

    def loss(x, weight, targets, _):
        logits = train.softcap(F.linear(train.norm(x), weight))
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    train.SlicedLoss = SimpleNamespace(apply=loss)
    train.tune_cpu = lambda: None
    train.choose_dtype = lambda device: torch.float32
    train.compile_model = lambda model, device: model


def gated_training(pipe, plain):
    """Run train.py's main(): steps as asked for, then evaluation against bare forward passes."""
    silence()
    if plain:
        make_plain()
    prepare.TIME_BUDGET = prepare.HARD_LIMIT = FOREVER
    make_dataloader = prepare.make_dataloader
    evaluate_bpb = prepare.evaluate_bpb

    def gated_dataloader(tokenizer, batch_size, seq_len, split, device):
        loader = make_dataloader(tokenizer, batch_size, seq_len, split, device)
        return Gate(loader, pipe) if split == "train" else loader

    def compare_evaluation(model, tokenizer, batch_size, split):
        loader = make_dataloader(tokenizer, batch_size, prepare.MAX_SEQ_LEN, split, "cpu")
        batches = [inputs for inputs, _ in loader]

        @torch.no_grad()
        def forward_passes():
            for inputs in batches:
                model(inputs)

        pipe.send(model.flops_per_token())
        for _ in range(ROUNDS):
            model.eval()
            bare = seconds(forward_passes)
            pipe.send((seconds(evaluate_bpb, model, tokenizer, batch_size, split), bare))
        return 0.0

    prepare.make_dataloader = gated_dataloader
    prepare.evaluate_bpb = compare_evaluation
    train.main()


def silence():
    """Send what this process prints nowhere."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123


def start(target, *args):
    """Start a process that runs target(pipe, *args); return it and our end of the pipe."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *args))
    process.start()
    theirs.close()
    return process, ours


def result(target, *args):
    """Return what target(pipe, *args) sends, when its process has ended."""
    process, pipe = start(target, *args)
    sent = pipe.recv()
    process.join()
    return sent


def matmul_flops(dtype, size=4096):
    """Return the best rate of a large matrix product out of five, in FLOP/s."""
    a, b, out = torch.randn(3, size, size).to(dtype).unbind(0)
    return 2 * size**3 / min(seconds(partial(torch.mm, a, b, out=out)) for _ in range(5))


def measure_training():
    processes, workers = zip(
        *(start(gated_training, plain) for plain in (False, True)), strict=True
    )
    for worker in workers:
        worker.recv()  # warm
    rounds = []
    for _ in range(1 + ROUNDS):
        rates = [matmul_flops(dtype) for dtype in (torch.float32, torch.bfloat16)]
        for worker in workers:
            worker.send(STEPS)
            rates.append(worker.recv())
        rounds.append(rates)
    single, half, shipped, plain = zip(*rounds[1:], strict=True)  # the first warms the caches up
    processes[1].terminate()
    workers[0].send(0)  # on to the evaluation
    flops = workers[0].recv()
    times = [workers[0].recv() for _ in range(ROUNDS)]
    processes[0].join()
    ceiling = map(max, single, half)
    share = [100 * flops * rate / top for rate, top in zip(shipped, ceiling, strict=True)]
    return [
        ("4096 x 4096 matrix product, float32, GFLOP/s", median(single, ".0f", 1e9)),
        ("the same, bfloat16", median(half, ".0f", 1e9)),
        ("training loop, tokens/s", median(shipped, ",.0f")),
        ("its model FLOP/s, % of the faster product's", median(share, ".0f")),
        ("tokens/s / plain loop's (eager, float32)", ratio(zip(shipped, plain, strict=True))),
        ("evaluate_bpb / bare forward passes, seconds", ratio(times)),
    ]


# --- Whole runs -----------------------------------------------------------------------------------


class Pieces(torch.nn.Module):
    """A model of a short context on longer rows: each row is cut into pieces of that context."""

    def __init__(self, model, seq_len):
        super().__init__()
        self.model = model
        self.seq_len = seq_len

    def forward(self, idx):
        return self.model(idx.view(-1, self.seq_len)).view(*idx.shape, -1)


def make_published():
    """Turn train.py into the published recipe, its context included; the evaluator stays ours.

    Returns a dictionary that will hold its bits per byte on rows of its own context, too.
    """
    seq_len = prepare.MAX_SEQ_LEN
    contract = prepare.contract()
    evaluate_bpb = prepare.evaluate_bpb
    own = {}

    def evaluate_pieces(model, tokenizer, batch_size, split):
        own["own_bpb"] = evaluate_bpb(model, tokenizer, batch_size, split)
        prepare.MAX_SEQ_LEN = seq_len
        prepare.MAX_IDLE = FOREVER
        return evaluate_bpb(Pieces(model, PUBLISHED_SEQ_LEN), tokenizer, batch_size, split)

    prepare.contract = lambda: contract
    prepare.evaluate_bpb = evaluate_pieces
    prepare.MAX_SEQ_LEN = PUBLISHED_SEQ_LEN
    for name, value in PUBLISHED.items():
        setattr(train, name, value)
    return own


def run(pipe, change, budget, seed, compile_cache):
    """Train by train.py's main(), changed or as shipped (None); send its summary."""
    silence()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compile_cache
    prepare.TIME_BUDGET = budget
    prepare.SEED = seed
    more = change() if change else {}
    pipe.send(train.main() | more)


def measure_overhead():
    """Time all that is not training: imports, compilation, evaluation."""
    overheads = []
    with tempfile.TemporaryDirectory() as compile_cache:
        for _ in range(2):
            summary = result(run, None, 10, prepare.SEED, compile_cache)
            overheads.append(summary["total_seconds"] - summary["training_seconds"])
    return [("total less training seconds, compiler's cache empty; filled", pair(overheads, ".1f"))]


def measure_quality():
    """Train for the whole budget, shipped and published in alternation."""
    changes = {"shipped": None, "published": make_published}
    bpb = {}
    with tempfile.TemporaryDirectory() as compile_cache:
        for seed, name in itertools.product((42, 43, 44), changes):
            summary = result(run, changes[name], prepare.TIME_BUDGET, seed, compile_cache)
            print(f"{name}, seed {seed}: {summary}", file=sys.stderr)
            bpb.setdefault(name, []).append(summary["val_bpb"])
            if "own_bpb" in summary:
                bpb.setdefault("own", []).append(summary["own_bpb"])
    gain = 100 * (1 - statistics.median(bpb["shipped"]) / statistics.median(bpb["published"]))
    return [
        ("val_bpb as shipped, 3 runs", median(bpb["shipped"], ".4f")),
        ("val_bpb as published, in pieces of its context, 3 runs", median(bpb["published"], ".4f")),
        ("the same on rows of its own context", median(bpb["own"], ".4f")),
        ("shipped below published, % of the medians", f"{gain:.1f}"),
    ]


# --- Data -----------------------------------------------------------------------------------------


def all_texts(paths):
    """Yield the texts of these shards, one by one."""
    for path in paths:
        for group in range(pq.ParquetFile(path).num_row_groups):
            for texts in prepare.read_texts(path, group):
                yield from texts


def obvious_loader(tokenizer, batch_size, row_len):
    """Yield batches tokenised on the fly and packed by scanning a list, as loaders mostly do."""
    texts = all_texts(itertools.cycle(prepare.shard_paths("data", "train")))
    buffer = []
    while True:
        rows = []
        while len(rows) < batch_size:
            row = []
            while len(row) < row_len:
                while len(buffer) < 1000:
                    buffer.append([tokenizer.bos_token_id, *tokenizer.encode(next(texts))])
                room = row_len - len(row)
                best = None
                shortest = 0
                for i, tokens in enumerate(buffer):
                    if len(tokens) <= room and (best is None or len(tokens) > len(buffer[best])):
                        best = i
                    if len(tokens) < len(buffer[shortest]):
                        shortest = i
                row += buffer.pop(shortest if best is None else best)[:room]
            rows.append(row)
        batch = torch.tensor(rows)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def measure_loader(batch_size=32):
    torch.set_num_threads(1)
    prepare.TIME_BUDGET = prepare.HARD_LIMIT = FOREVER
    tokenizer = prepare.Tokenizer.from_directory()
    seq_len = prepare.MAX_SEQ_LEN
    ours = prepare.make_dataloader(tokenizer, batch_size, seq_len, "train", "cpu")
    loaders = [(ours, 400), (obvious_loader(tokenizer, batch_size, seq_len + 1), 10)]
    rounds = []
    for _ in range(1 + ROUNDS):
        rates = []
        for loader, num_batches in loaders:
            took = seconds(
                lambda batches: [None for _ in batches], itertools.islice(loader, num_batches)
            )
            rates.append(num_batches * batch_size * seq_len / took)
        rounds.append(rates)
    del rounds[0]  # it filled the buffers
    return [
        ("loader on one core, M tokens/s", median([fast for fast, _ in rounds], ".1f", 1e6)),
        ("loader / tokenising on the fly, scanning a list", ratio(rounds)),
    ]


def prepare_alone(pipe, cache):
    """Do what prepare.py does, in a cache; send the peak memory of this process in MiB."""
    silence()
    prepare.CACHE_DIR = cache
    sys.argv = ["prepare.py"]
    prepare.main()
    status = Path("/proc/self/status").read_text()
    pipe.send(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10)


def peak_of_tokenizing(texts, copies):
    """Return the peak memory of tokenising a shard that holds the texts so many times, in MiB."""
    with tempfile.TemporaryDirectory() as cache:
        home = Path(cache) / prepare.CORPUS
        shutil.copytree(prepare.folder("tokenizer"), home / "tokenizer")
        (home / "data").mkdir()
        schema = pa.schema({"text": pa.string()})
        for stem in (prepare.VAL_SHARD, prepare.TEST_SHARD, "shard_00000"):
            with pq.ParquetWriter(home / "data" / f"{stem}.parquet", schema) as writer:
                for _ in range(copies if stem == "shard_00000" else 1):
                    for i in range(0, len(texts), prepare.GROUP_DOCUMENTS):
                        part = pa.array(texts[i : i + prepare.GROUP_DOCUMENTS], pa.string())
                        writer.write_batch(pa.record_batch([part], schema=schema))
        return result(prepare_alone, Path(cache))


def tokenize_anew(tokenizer, paths):
    """Tokenize shards into a cache that is thrown away."""
    with tempfile.TemporaryDirectory() as cache:
        prepare.CACHE_DIR = Path(cache)
        prepare.folder("data").mkdir(parents=True)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            prepare.tokenize(tokenizer, paths, prepare.Downloads([]))


def measure_prepare():
    tokenizer = prepare.Tokenizer.from_directory()
    with tempfile.TemporaryDirectory() as cache:
        begin = time.monotonic()
        peak = result(prepare_alone, Path(cache))
        took = time.monotonic() - begin
    paths = [path for s in ("train", "val", "test") for path in prepare.shard_paths("data", s)]
    texts = list(all_texts(paths))
    alone = []
    one_core = []
    serial = []
    home = prepare.CACHE_DIR
    num_processors = prepare.num_processors
    for _ in range(ROUNDS):
        begin = time.process_time()
        ours = seconds(tokenize_anew, tokenizer, paths)
        serial.append((time.process_time() - begin) / ours)
        prepare.num_processors = lambda: 1
        one_core.append((seconds(tokenize_anew, tokenizer, paths), ours))
        prepare.num_processors = num_processors
        alone.append((ours, seconds(tokenizer.encode_batch, texts)))
    prepare.CACHE_DIR = home
    some = texts[: len(texts) // 4]
    sizes = [copies * sum(map(len, some)) / 1e6 for copies in (2, 16)]
    peaks = [peak_of_tokenizing(some, copies) for copies in (2, 16)]
    return [
        ("prepare.py, python corpus, s; peak memory, MiB", f"{took:.1f}; {peak:,.0f}"),
        ("tokenising shard to shard / tiktoken's own threads, seconds", ratio(alone)),
        (f"one process / {num_processors()} processes, seconds", ratio(one_core)),
        ("share of a core that the process that writes takes", median(serial, ".3f")),
        (f"peak MiB, tokenising {pair(sizes, '.0f')} M characters", pair(peaks, ",.0f")),
    ]


# --- Table ----------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Measure the README's figures.")
    parser.add_argument("--quality", action="store_true", help="also train, for 36 minutes")
    quality = parser.parse_args().quality
    if train.ON_CUDA or prepare.CORPUS != "python":
        sys.exit("benchmark.py: it measures the small scale: set CUDA_VISIBLE_DEVICES= (empty)")
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}, {commit}")
    print(f"| measured | median of {ROUNDS} (range) |\n| --- | --- |", flush=True)
    trainings = [measure_quality] if quality else []
    for measure in [
        measure_training,
        measure_overhead,
        *trainings,
        measure_prepare,
        measure_loader,
    ]:
        for what, figure in measure():
            print(f"| {what} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
