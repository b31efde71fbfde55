"""Count what an optimizer step asks of an H100 at the published size, on a machine without a GPU.

    uv run python tools/step.py                         # this train.py, about two minutes
    uv run python tools/step.py --train /tmp/train.py   # another one, to compare
    uv run python tools/step.py --kernels 20            # and the 20 dearest kernels

torch's CUDA path runs on a driver that computes nothing (tests/null_gpu); its profiler lists every
operator and kernel with the shapes of its tensors. A matrix product takes its FLOPs at GEMM_FLOPS
or its bytes at BANDWIDTH, whichever is longer, attention its FLOPs at ATTENTION_FLOPS, all else its
bytes at BANDWIDTH. Such times are counted, not measured: launches, caches and overlap are left out.
"""

import argparse
import collections
import gc
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "null_gpu")]

import null_gpu  # noqa: E402

BANDWIDTH = 3.0e12  # bytes a second of an H100's memory that kernels reach
GEMM_FLOPS = 700e12  # FLOP/s of its bf16 matrix products
ATTENTION_FLOPS = 500e12  # FLOP/s of FlashAttention-3, forward and backward
BACKWARD = 2.5  # FLOPs of attention's backward pass, in forward passes
VOCAB_SIZE = 8192  # of climbmix

SIZES = {"c10::BFloat16": 2, "float": 4, "long int": 8, "int": 4, "bool": 1, "unsigned char": 1}
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
ATTENTION = {"null_gpu::attend": 1.0, "null_gpu::attend_backward": BACKWARD}
# Operators without a kernel: they make views or reserve memory
FREE = re.compile(
    r"aten::(empty|new_empty|as_strided|view|_unsafe_view|reshape|expand|slice|select|t|transpose|"
    r"permute|unbind|split|squeeze|unsqueeze|detach|alias|resize|result_type|flatten|item|"
    r"_local_scalar_dense|set_|lift|unflatten|narrow|is_|data)"
)
# Operators that are counted whole; what they call is theirs
WHOLE = ("aten::embedding_dense_backward", "aten::_fused_adamw_", *PRODUCTS, *ATTENTION)


def numel(shape):
    return math.prod(shape)


def tensors(event):
    """Return [(shape, bytes)] of an event's tensor arguments, lists of tensors included."""
    found = []
    args = event["args"]
    for shape, kind in zip(args.get("Input Dims", []), args.get("Input type", []), strict=False):
        if kind in SIZES and (not shape or not isinstance(shape[0], list)):
            found.append((shape, numel(shape) * SIZES[kind]))
        elif shape and isinstance(shape[0], list):  # the element's type is not recorded
            found += [(part, numel(part) * 4) for part in shape]
    return found


def product_seconds(event):
    """Return (seconds, FLOPs) of a matrix product."""
    matrices = [shape for shape, _ in tensors(event) if len(shape) >= 2]
    first = 1 if event["name"].endswith(("addmm", "baddbmm")) else 0
    a, b = matrices[first], matrices[first + 1]
    batch = a[0] if len(a) == 3 else 1
    flops = 2 * batch * a[-2] * a[-1] * b[-1]
    itemsize = tensors(event)[first][1] // numel(a)
    moved = itemsize * batch * (a[-2] * a[-1] + b[-2] * b[-1] + a[-2] * b[-1] * (1 + first))
    return max(flops / GEMM_FLOPS, moved / BANDWIDTH), flops


def attention_flops(event):
    """Return the FLOPs of windowed causal attention, forward or backward."""
    q = tensors(event)[0][0]
    window = int(event["args"]["Concrete Inputs"][-1])
    B, T, H, D = q
    window = min(window, T)
    pairs = window * (window + 1) / 2 + (T - window) * (window + 1)
    return 4 * B * H * D * pairs * ATTENTION[event["name"]]


def triton_bytes(event):
    """Return the bytes that a compiled kernel reads and writes: each tensor once, in_out twice."""
    source = Path(event["args"]["kernel_file"]).read_text()
    names = re.search(rf"def {event['name']}\(([^)]*)\)", source)[1].split(",")
    shapes = event["args"]["Input Dims"]
    kinds = event["args"]["Input type"]
    total = 0
    for name, shape, kind in zip(names, shapes, kinds, strict=False):
        if kind in SIZES:
            total += numel(shape) * SIZES[kind] * (2 if "in_out" in name else 1)
    return total


def eager_bytes(event):
    """Return the bytes that an operator outside compiled code reads and writes, roughly."""
    name = event["name"]
    sizes = [size for _, size in tensors(event)]
    if not sizes:
        return 0
    if name in ("aten::gather", "aten::embedding_dense_backward"):
        shapes = [shape for shape, _ in tensors(event)]
        rows = shapes[1] if name == "aten::gather" else shapes[0]
        return 2 * numel(rows) * 2  # bf16 rows read and written; the table is in the cache
    if name in ("aten::copy_", "aten::fill_", "aten::zero_"):
        return sum(sizes)
    if name == "aten::_fused_adamw_":
        return 0  # see adamw_bytes
    if name in ("aten::mean", "aten::sum"):
        return max(sizes)
    written = sizes[0] if name.endswith("_") else max(sizes)
    return sum(sizes) + written


def leaves(events):
    """Yield the events that stand for a kernel: the innermost ones, or those counted whole."""
    events = [e for e in events if e.get("cat") == "cpu_op" and "Input Dims" in e["args"]]
    events.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    whole_until = collections.defaultdict(float)
    for i, event in enumerate(events):
        thread = event["tid"]
        is_kernel = "kernel_file" in event["args"] or event["name"] in ATTENTION
        if not (is_kernel or event["name"].startswith("aten::")):
            continue  # a node of autograd, a region of the compiler
        if event["ts"] < whole_until[thread] or FREE.match(event["name"]):
            continue
        end = event["ts"] + event["dur"]
        if event["name"] in WHOLE:
            whole_until[thread] = end
            yield event
            continue
        inner = []
        for later in events[i + 1 :]:
            if later["tid"] != thread or later["ts"] >= end:
                break
            inner.append(later)
        if all(FREE.match(e["name"]) for e in inner):
            yield event


class Count:
    """Sum the seconds of a list of profiler events by part, and by kernel."""

    def __init__(self, events):
        self.seconds = dict.fromkeys(("products", "attention", "compiled", "eager"), 0.0)
        self.launches = collections.Counter()
        self.kernels = collections.Counter()
        self.flops = 0
        for event in leaves(events):
            self.add(event)

    def add(self, event):
        name = event["name"]
        if name in PRODUCTS:
            part = "products"
            seconds, flops = product_seconds(event)
            self.flops += flops
        elif name in ATTENTION:
            part = "attention"
            seconds = attention_flops(event) / ATTENTION_FLOPS
        elif "kernel_file" in event["args"]:
            part = "compiled"
            seconds = triton_bytes(event) / BANDWIDTH
        else:
            part = "eager"
            seconds = eager_bytes(event) / BANDWIDTH
        self.seconds[part] += seconds
        self.launches[part] += 1
        shapes = [shape for shape, _ in tensors(event)] if part != "compiled" else []
        self.kernels[f"{part}: {name} {shapes or ''}"] += seconds


def adamw_bytes(optimizer):
    """Return what a fused AdamW reads (4 tensors a parameter) and writes (3)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(7 * p.numel() * p.element_size() for p in params)


def load(path):
    """Import a train.py from a path."""
    spec = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def profiled(function, folder):
    """Run a function under torch's profiler; return the list of its events."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        function()
    path = folder / "trace.json"
    profile.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


def count(path, rows, backend, num_kernels):
    """Print the count of one optimizer step and of one evaluation pass of a train.py."""
    null_gpu.trust_no_values()
    import torch
    from torch._dynamo.utils import counters

    import prepare

    train = load(path)
    if backend == "flash-attn3":
        train.flash_attention_3 = null_gpu.flash_attention_3
    device = torch.device("cuda")
    context = prepare.MAX_SEQ_LEN
    n_head = math.ceil(train.DEPTH * train.ASPECT_RATIO / train.HEAD_DIM)
    model_dim = n_head * train.HEAD_DIM
    sizes = (VOCAB_SIZE, context, train.DEPTH, model_dim, n_head, n_head)
    model = train.GPT(*sizes, backend, torch.bfloat16, device)
    forward = train.compile_model(model, device)
    optimizers = train.make_optimizers(model, True)
    inputs = torch.zeros(rows, context, dtype=torch.long, device=device)
    targets = inputs.clone()
    passes = train.TOTAL_BATCH_SIZE // (rows * context)

    def step():
        for _ in range(passes):
            (forward(inputs, targets) / passes).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def evaluate():
        model.eval()
        with torch.compiler.set_stance("eager_on_recompile"):
            prepare.score_batch(forward, inputs, targets, VOCAB_SIZE)
        model.train()

    start = time.perf_counter()
    step()
    compiled_in = time.perf_counter() - start
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    host, collected = host_seconds(step)
    with tempfile.TemporaryDirectory() as folder:
        counted = Count(profiled(step, Path(folder)))
        torch.cuda.reset_peak_memory_stats()
        evaluate()
        evaluation_peak = torch.cuda.max_memory_allocated()
        evaluation = Count(profiled(evaluate, Path(folder)))
    fused = [o for o in optimizers if isinstance(o, torch.optim.AdamW)]
    counted.seconds["eager"] += sum(map(adamw_bytes, fused)) / BANDWIDTH
    total = sum(counted.seconds.values())
    tokens = passes * rows * context
    print(f"{path}, {backend}, {passes} passes of {rows} rows; counted, not measured")
    for part, seconds in counted.seconds.items():
        print(f"{part:<10} {1000 * seconds:7.1f} ms  {counted.launches[part]:5d} launches")
    print(f"{'a step':<10} {1000 * total:7.1f} ms, {tokens / total / 1e6:.2f} M tokens/s")
    graphs = counters["stats"]["unique_graphs"]
    print(f"peak {peak / 2**20:.0f} MB, in evaluation {evaluation_peak / 2**20:.0f} MB")
    print(f"{graphs} graphs compiled in {compiled_in:.0f} s of this machine")
    print(f"the host's own {1000 * host:.0f} ms a step, of it {1000 * collected:.1f} collecting")
    eval_tokens = 40 * 2**19  # EVAL_TOKENS of climbmix
    eval_seconds = sum(evaluation.seconds.values()) * eval_tokens / (rows * context)
    print(f"evaluation of {eval_tokens / 1e6:.0f} M tokens: {eval_seconds:.1f} s")
    for name, seconds in counted.kernels.most_common(num_kernels):
        print(f"  {1000 * seconds:6.2f} ms  {name}")
    for name, seconds in evaluation.kernels.most_common(num_kernels // 3):
        print(f"  evaluation pass: {1000 * seconds:6.2f} ms  {name}")


def host_seconds(step, num_steps=20):
    """Return what the host spends on a step, and the share of it that collects garbage."""
    collected = [0.0, 0.0]  # total, start of the one that runs

    def watch(phase, info):
        if phase == "start":
            collected[1] = time.perf_counter()
        else:
            collected[0] += time.perf_counter() - collected[1]

    gc.callbacks.append(watch)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    seconds = time.perf_counter() - start
    gc.callbacks.remove(watch)
    return seconds / num_steps, collected[0] / num_steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, default=ROOT / "train.py", help="the file to count")
    parser.add_argument("--rows", type=int, default=128, help="rows a forward pass (128)")
    parser.add_argument("--backend", default="flash-attn3", choices=["flash-attn3", "flex"])
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list the N dearest")
    args = parser.parse_args()
    if "NULL_GPU" in os.environ:
        return count(args.train, args.rows, args.backend, args.kernels)
    if reason := null_gpu.why_not():
        sys.exit(f"step.py: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        library = null_gpu.build(Path(folder))
        more = {"NULL_GPU": 1, "AUTORESEARCH_CORPUS": "climbmix"}
        env = null_gpu.environment(library, **more)
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)


if __name__ == "__main__":
    main()
