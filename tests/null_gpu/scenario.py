"""Run train.py's main() on the null GPU as a JSON scenario says; print what happened as JSON.

A process of its own, started by test_cuda_path.py with null_gpu.environment(). The scenario's keys:
flash: whether FlashAttention-3 can be loaded. compiler: "inductor", as shipped; "aot_eager", all but
the code generation; "eager"; "failing". train, prepare: constants to set. batches: training batches
after which the time is over. edit: the name of an edit of the drill in test_edits.py.
"""

import contextlib
import io
import json
import sys
import time
import types
import warnings

import null_gpu

null_gpu.trust_no_values()

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import prepare  # noqa: E402

scenario = json.loads(sys.argv[1])
source = (null_gpu.ROOT / "train.py").read_text()
if "edit" in scenario:
    sys.path.insert(0, str(null_gpu.ROOT / "tests"))
    import test_edits

    source = test_edits.EDITS[scenario["edit"]][0](source)
train = types.ModuleType("train")
exec(compile(source, str(null_gpu.ROOT / "train.py"), "exec"), vars(train))

for module, constants in ((train, scenario.get("train", {})), (prepare, scenario["prepare"])):
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)


def no_kernel():
    raise RuntimeError("no kernel here")


train.flash_attention_3 = null_gpu.flash_attention_3 if scenario.get("flash", True) else no_kernel
compile_ = torch.compile


def compiler(function, **options):
    """Compile as the scenario says; every graph that is compiled is counted, with its name."""
    kind = scenario.get("compiler", "aot_eager")
    if kind == "eager":
        return function
    if kind == "failing":
        raise RuntimeError("planted in the compiler")
    if kind == "aot_eager":
        options = {"backend": "aot_eager", "dynamic": False}
    return compile_(function, **options)


torch.compile = compiler
seen = {
    "graphs": [],  # compiled so far, at each training batch and at the end
    "shapes": [],  # of the batches, with their strides
    "pinned": 0,  # batches that were copied from pinned memory
    "ahead": 0,  # most events recorded and not yet waited for
    "tries": 0,  # models that were built and compiled
    "used": [],  # bytes in use when a model is built
}


class Event(torch.cuda.Event):
    """An event of CUDA that counts those which nobody has waited for yet."""

    waiting = 0

    def record(self, *args):
        Event.waiting += 1
        seen["ahead"] = max(seen["ahead"], Event.waiting)
        super().record(*args)

    def synchronize(self):
        Event.waiting -= 1
        super().synchronize()


torch.cuda.Event = Event
pin_memory = torch.Tensor.pin_memory
GPT = train.GPT


def counted_pin(tensor, *args):
    seen["pinned"] += 1
    return pin_memory(tensor, *args)


def counted_model(*args):
    seen["tries"] += 1
    seen["used"].append(torch.cuda.memory_allocated())
    return GPT(*args)


torch.Tensor.pin_memory = counted_pin
train.GPT = counted_model
next_batch = prepare.Dataloader.__next__


def counted_batch(loader):
    if loader.split != "train":
        return next_batch(loader)
    if len(seen["graphs"]) == scenario.get("batches", 4):
        prepare.TIME_BUDGET = 0  # the time is over
    inputs, targets = next_batch(loader)
    seen["graphs"].append(counters["stats"]["unique_graphs"])
    seen["shapes"].append([*inputs.shape, *inputs.stride(), *targets.stride()])
    return inputs, targets


prepare.Dataloader.__next__ = counted_batch
log = io.StringIO()
start = time.monotonic()
with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(log):
    warnings.simplefilter("always")
    try:
        seen["summary"] = train.main()
    except SystemExit as error:
        seen["exit"] = str(error)
seen["graphs"].append(counters["stats"]["unique_graphs"])
seen["log"] = log.getvalue()
seen["warnings"] = [str(w.message) for w in caught]
seen["seconds"] = time.monotonic() - start
print(json.dumps(seen))
