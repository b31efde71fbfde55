"""Run train.py's main() on the null GPU as scenarios say; tell what happened.

A server, so that torch is imported once: test_cuda_path.py starts it with null_gpu.environment().
It reads a JSON request a line, runs each in a fork of its own, and answers with the exit status.

    result, err: paths that get what was seen, as JSON, and standard error
    environment: variables, such as NULL_GPU_CC
    flash: whether FlashAttention-3 can be loaded (true)
    compiler: "inductor", as shipped; "aot_eager", all but the code generation; "eager"; "failing"
    train, prepare: constants to set
    batches: training batches after which the time is over (4)
    edit: the name of an edit of the drill in test_edits.py
"""

import contextlib
import io
import json
import os
import sys
import types
import warnings

import null_gpu

null_gpu.trust_no_values()

# What every run imports: once is enough
import kernels  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import requests  # noqa: E402, F401
import rustbpe  # noqa: E402, F401
import tiktoken  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.nn.attention.flex_attention  # noqa: E402
from torch._dynamo.backends.registry import lookup_backend  # noqa: E402


def edited_source(name):
    """Return the text of train.py after an edit of the drill."""
    sys.path.insert(0, str(null_gpu.ROOT / "tests"))
    import test_edits

    return test_edits.EDITS[name][0](test_edits.SOURCE)


def load_train(scenario):
    """Return train.py as a module, with the scenario's constants, FlashAttention-3 and edit."""
    path = null_gpu.ROOT / "train.py"
    source = edited_source(scenario["edit"]) if "edit" in scenario else path.read_text()
    train = types.ModuleType("train")
    exec(compile(source, str(path), "exec"), vars(train))
    set_constants(train, scenario["train"])

    def no_kernel():
        raise RuntimeError("no kernel here")

    has_flash = scenario.get("flash", True)
    train.flash_attention_3 = null_gpu.flash_attention_3 if has_flash else no_kernel
    return train


def set_constants(module, constants):
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)


def watch_compiler(kind, seen):
    """Let torch.compile be what the scenario says, and note the function of every graph."""
    compile_ = torch.compile

    def compiler(function, **options):
        if kind == "eager":
            return function
        if kind == "failing":
            raise RuntimeError("planted in the compiler")
        inner = lookup_backend(kind)
        name = getattr(function, "__qualname__", type(function).__name__)

        def backend(graph, inputs, **more):
            seen["late" if seen["batches"] else "compiled"].append(name)
            return inner(graph, inputs, **more)

        return compile_(function, backend=backend, dynamic=options.get("dynamic"), fullgraph=True)

    torch.compile = compiler


def watch_events(seen):
    """Count the events that were recorded and that nobody has waited for."""

    class Event(torch.cuda.Event):
        waiting = 0

        def record(self, *args):
            Event.waiting += 1
            seen["ahead"] = max(seen["ahead"], Event.waiting)
            super().record(*args)

        def synchronize(self):
            Event.waiting -= 1
            super().synchronize()

    torch.cuda.Event = Event


def watch_loader(prepare, num_batches, seen):
    """Count training batches and end the time after so many; count copies from pinned memory."""
    next_batch = prepare.Dataloader.__next__
    pin_memory = torch.Tensor.pin_memory

    def counted_batch(loader):
        if loader.split != "train":
            return next_batch(loader)
        if seen["batches"] == num_batches:
            prepare.TIME_BUDGET = 0
        inputs, targets = next_batch(loader)
        seen["strides"] = [inputs.stride(), targets.stride()]
        seen["batches"] += 1
        return inputs, targets

    def counted_pin(tensor, *args):
        seen["pinned"] += 1
        return pin_memory(tensor, *args)

    prepare.Dataloader.__next__ = counted_batch
    torch.Tensor.pin_memory = counted_pin


def watch_tries(train, seen):
    """Count the models that are warmed up, and the bytes in use beside each."""
    make_optimizers = train.make_optimizers

    def counted_optimizers(model, **options):
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        seen["tries"] += 1
        seen["used"].append(torch.cuda.memory_allocated() - weights)
        return make_optimizers(model, **options)

    train.make_optimizers = counted_optimizers


def run(scenario):
    """Return what a run of train.py's main() showed: a dictionary for JSON."""
    import prepare  # here, as it reads the environment

    seen = {
        "compiled": [],  # the functions of which a graph was compiled, in order
        "late": [],  # those of them that were compiled after the clock had started
        "strides": [],  # of a training batch's inputs and targets
        "batches": 0,  # for training
        "pinned": 0,  # batches that were copied from pinned memory
        "ahead": 0,  # most events recorded and not yet waited for
        "tries": 0,  # models that were warmed up
        "used": [],  # bytes in use when such a model is built, besides its own
    }
    set_constants(prepare, scenario["prepare"])
    watch_compiler(scenario.get("compiler", "aot_eager"), seen)
    train = load_train(scenario)
    watch_events(seen)
    watch_loader(prepare, scenario.get("batches", 4), seen)
    watch_tries(train, seen)
    log = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(log):
        warnings.simplefilter("always")
        try:
            seen["summary"] = train.main()
        except SystemExit as error:
            seen["exit"] = str(error)
    seen["log"] = log.getvalue()
    seen["warnings"] = [str(warning.message) for warning in caught]
    return seen


def serve():
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            err = os.open(request["err"], os.O_WRONLY | os.O_CREAT)
            os.dup2(err, sys.stderr.fileno())
            try:
                os.environ.update(request["environment"])
                with open(request["result"], "w") as file:  # noqa: PTH123
                    json.dump(run(request), file)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
