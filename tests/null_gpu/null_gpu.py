"""A null GPU: torch's CUDA path on a driver that computes nothing (driver.c), and what runs on it.

build() compiles the driver, environment() is that of a process which sees it. Imported in such a
process, before torch has compiled anything, this module switches off what would decide by values
that no kernel has computed, and offers a stand-in for FlashAttention-3.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SITE = Path(sysconfig.get_path("purelib"))
INCLUDES = [
    SITE / "nvidia" / "cu13" / "include",
    SITE / "triton" / "backends" / "nvidia" / "include",
]
TORCH_LIBRARIES = ["torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc"]


def why_not():
    """Return why there can be no null GPU here, or None."""
    if not (SITE / "torch" / "lib" / "libtorch_cuda.so").exists():
        return "torch is built without CUDA"
    if not all(folder.is_dir() for folder in INCLUDES):
        return "no CUDA headers in this environment"
    for tool in ("gcc", "nm"):
        if subprocess.run(["which", tool], capture_output=True).returncode:
            return f"no {tool}"
    return None


def symbols(library, *options):
    """Return the names of a library's dynamic symbols, undefined or defined by the options."""
    command = ["nm", "-D", *options, str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def build(folder):
    """Compile the driver into a folder; what torch imports and driver.c lacks returns 0."""
    includes = [f"-I{path}" for path in INCLUDES]
    first = folder / "driver.so"
    shared = ["gcc", "-shared", "-fPIC", "-O1", "-w"]
    subprocess.run([*shared, *includes, "-o", first, HERE / "driver.c"], check=True)
    libraries = [SITE / "torch" / "lib" / f"lib{name}.so" for name in TORCH_LIBRARIES]
    wanted = set()
    for library in filter(Path.exists, libraries):
        wanted |= symbols(library, "--undefined-only")
    wanted = {name for name in wanted if re.match(r"cuda|cublas|cu[A-Z]", name)}
    # Triton's launcher, compiled when it is needed, calls more of the driver than torch imports
    header = (INCLUDES[0] / "cuda.h").read_text()
    wanted |= set(re.findall(r"CUDAAPI (cu[A-Z]\w+)\(", header))
    wanted |= set(re.findall(r"#define +cu[A-Z]\w+ +(cu[A-Z]\w+)", header))
    rest = sorted(wanted - symbols(first, "--defined-only"))
    filler = folder / "filler.c"
    filler.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in rest))
    library = folder / "libcuda.so.1"  # the name by which torch and Triton open the driver
    sources = [HERE / "driver.c", filler]
    subprocess.run([*shared, *includes, "-o", library, *sources], check=True)
    return library


def environment(library, **more):
    """Return the variables of a process that sees the null GPU; more: NULL_GPU_CC and the like."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "NULL_GPU_"))}
    paths = {"LD_LIBRARY_PATH": str(library.parent), "LD_PRELOAD": str(library)}
    # The compiler's workers load the driver, too: as threads' children they would wait for it
    return kept | paths | {"PYTHONPATH": f"{HERE}:{ROOT}"} | {k: str(v) for k, v in more.items()}


def trust_no_values():
    """Let Inductor neither fold constants, which it would read, nor time kernels to pad shapes."""
    import torch._inductor.config as inductor

    inductor.joint_graph_constant_folding = False
    inductor.shape_padding = False


def flash_attention_3():
    """Return a function like flash_attn_func: it gives tensors of the right shapes, and gradients.

    An operator of its own, opaque to the compiler, which allocates what FlashAttention-3 does.
    """
    import torch
    from torch import Tensor

    if not hasattr(torch.ops.null_gpu, "attend"):

        @torch.library.custom_op("null_gpu::attend", mutates_args=())
        def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
            B, T, H, _ = q.shape
            return torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)

        @torch.library.custom_op("null_gpu::attend_backward", mutates_args=())
        def attend_backward(
            grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
        ) -> tuple[Tensor, Tensor, Tensor]:
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        @attend.register_fake
        def _(q, k, v, window):
            B, T, H, _ = q.shape
            return torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)

        @attend_backward.register_fake
        def _(grad, q, k, v, out, lse, window):
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        def save(ctx, inputs, output):
            q, k, v, ctx.window = inputs
            out, lse = output
            ctx.save_for_backward(q, k, v, out, lse)

        def backward(ctx, grad, _):
            grads = torch.ops.null_gpu.attend_backward(
                grad.contiguous(), *ctx.saved_tensors, ctx.window
            )
            return (*grads, None)

        attend.register_autograd(backward, setup_context=save)

    def flash_attn_func(q, k, v, causal, window_size):
        return torch.ops.null_gpu.attend(q, k, v, window_size[0])[0]

    return flash_attn_func


if __name__ == "__main__":  # null_gpu.py FOLDER: build it there, say how to use it
    built = build(Path(sys.argv[1]).resolve())
    print(f"LD_LIBRARY_PATH={built.parent} LD_PRELOAD={built}")
