"""The shipped train.py: its attention, model, optimizer and schedules against hand-written oracles.

What is true of any train.py stands in test_run.py. Tests marked `gpu` need a CUDA device.
"""

import ast
import functools
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_edits
import torch
from conftest import PERSONS_CACHE, make_cache
from torch._dynamo.utils import counters

import prepare
import train

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def build(model_dim=32, n_head=2, n_kv_head=2, depth=2, vocab_size=61, seq_len=24, **more):
    """Build a GPT of a small size."""
    kind = {"backend": "blocked", "dtype": torch.float32, "device": CPU} | more
    return train.GPT(vocab_size, seq_len, depth, model_dim, n_head, n_kv_head, **kind)


def shake(model, seed=0):
    """Draw every parameter anew, so that nothing that starts at zero hides a path; return model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = 1.0 if p.ndim < 2 else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def tokens(*shape, vocab_size=61, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def constants(on_cuda, monkeypatch):
    """Return train.py's globals as they are with or without a CUDA device."""
    spec = importlib.util.spec_from_file_location("train_elsewhere", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: on_cuda)
        spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------
# Hyperparameters


def test_cuda_constants_are_the_published_baseline(monkeypatch):
    shipped = constants(True, monkeypatch)
    published = {
        "DEPTH": 8,
        "ASPECT_RATIO": 64,
        "HEAD_DIM": 128,
        "WINDOW_PATTERN": "SSSL",
        "SHORT_WINDOW": 1 / 2,
        "SHIFT_KEYS": False,
        "TOTAL_BATCH_SIZE": 2**19,
        "DEVICE_BATCH_SIZE": 128,
        "EMBEDDING_LR": 0.6,
        "UNEMBEDDING_LR": 0.004,
        "MATRIX_LR": 0.04,
        "SCALAR_LR": 0.5,
        "WEIGHT_DECAY": 0.2,
        "ADAM_BETAS": (0.8, 0.95),
        "WARMUP_RATIO": 0.0,
        "WARMDOWN_RATIO": 0.5,
        "FINAL_LR_FRAC": 0.0,
    }
    assert {name: getattr(shipped, name) for name in published} == published


def test_shipped_batch_sizes_divide(monkeypatch):
    for on_cuda in (True, False):
        shipped = constants(on_cuda, monkeypatch)
        rows = shipped.DEVICE_BATCH_SIZE
        assert shipped.TOTAL_BATCH_SIZE % (rows * prepare.SHIPPED["MAX_SEQ_LEN"]) == 0


SMALL = {"DEPTH": 2, "ASPECT_RATIO": 8, "HEAD_DIM": 8}  # two heads of four pairs of channels
OTHER_VALUES = {  # of every knob, different from what SMALL, test_edits.TINY or train.py says
    "DEPTH": 3,
    "ASPECT_RATIO": 16,
    "HEAD_DIM": 4,
    "WINDOW_PATTERN": "L",
    "SHORT_WINDOW": 1 / 4,
    "SOFTCAP": 7,
    "LOSS_SLICE": 16,
    "ROPE_BASE": 500,
    "GATE_CHANNELS": 2,
    "SHIFT_KEYS": not train.SHIFT_KEYS,
    "TOTAL_BATCH_SIZE": 6 * test_edits.SEQ_LEN,
    "DEVICE_BATCH_SIZE": 1,
    "EMBEDDING_LR": 0.1,
    "UNEMBEDDING_LR": 0.02,
    "MATRIX_LR": 0.01,
    "SCALAR_LR": 0.1,
    "WEIGHT_DECAY": 0.9,
    "ADAM_BETAS": (0.5, 0.9),
    "X0_BETAS": (0.5, 0.9),
    "MUON_MOMENTUM": (0.5, 0.6),
    "MUON_MOMENTUM_STEPS": 2,
    "MUON_BETA2": 0.5,
    "WARMUP_RATIO": 0.7,
    "WARMDOWN_RATIO": 0.8,
    "FINAL_LR_FRAC": 0.4,
}


def knobs():
    """Return the names of the constants that stand above the first function of train.py."""
    names = []
    for node in ast.parse(test_edits.SOURCE).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                names.append(part.id)
    return sorted({*names} - {"ON_CUDA"})  # which the machine decides


def train_small(monkeypatch, **constants):
    """Run main() for six batches; return all that a knob may change: batches, weights, summary."""
    monkeypatch.setattr(prepare, "CLOCK", prepare.Clock())
    settings = [f"{name} = {value!r}" for name, value in (SMALL | constants).items()]
    run = test_edits.run_text("\n".join([test_edits.SOURCE, *settings]), monkeypatch)
    times = ("training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent")
    summary = {name: value for name, value in run.summary.items() if name not in times}
    weights = [{name: p.tolist() for name, p in params.items()} for params in run.history]
    return (
        run.shapes,
        summary,
        weights,
        {name: p.tolist() for name, p in run.model.named_parameters()},
    )


@pytest.fixture(scope="module")
def small_contract(corpus, tmp_path_factory):
    some = {split: documents[:2000] for split, documents in corpus.items()}
    folder = make_cache(tmp_path_factory.mktemp("knobs"), some, **test_edits.CONTRACT)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (test_edits.CONTRACT | {"CACHE_DIR": folder}).items():
            patch.setattr(prepare, name, value)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def as_shipped(small_contract):
    """What a run gives with no knob turned, twice the same."""
    runs = []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            runs.append(train_small(patch))
    assert runs[0] == runs[1]
    return runs[0]


@pytest.mark.parametrize("name", knobs())
def test_no_knob_is_dead(name, as_shipped, monkeypatch):
    """Another value of it changes something: batches, weights or the summary, to the last bit."""
    assert name in OTHER_VALUES, f"give OTHER_VALUES another value of {name}"
    assert train_small(monkeypatch, **{name: OTHER_VALUES[name]}) != as_shipped


def test_a_dead_knob_would_be_found(as_shipped, monkeypatch):
    assert train_small(monkeypatch, NO_SUCH_KNOB=1) == as_shipped


# ------------------------------------------------------------------------------------------------
# Attention


def loop_attention(q, k, v, window):
    """Attention by its definition: one query at a time, over itself and `window` before it."""
    heads_a_kv = q.shape[2] // k.shape[2]
    rows = []
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        first, h_kv = max(0, t - window), h // heads_a_kv
        scores = k[b, first : t + 1, h_kv] @ q[b, t, h] / math.sqrt(q.shape[3])
        weights = (scores - scores.max().detach()).exp()
        rows.append(weights @ v[b, first : t + 1, h_kv] / weights.sum())
    return torch.stack(rows).view(q.shape)


def draw_qkv(T, H, H_kv, D=16, B=2, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, D), (B, T, H_kv, D), (B, T, H_kv, D))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


CASES = [  # T, window, H, H_kv: odd lengths, no context, full context and beyond, GQA and MQA
    (1, 1, 2, 2),
    (16, 4, 2, 2),
    (48, 8, 4, 2),
    (37, 7, 4, 2),
    (33, 0, 2, 1),
    (64, 31, 4, 1),
    (64, 32, 2, 2),
    (33, 31, 2, 1),
    (33, 32, 2, 2),
    (33, 33, 4, 2),
    (19, 512, 6, 2),
]


@pytest.mark.parametrize(("T", "window", "H", "H_kv"), CASES)
def test_blocked_equals_the_loop_forward_and_backward(T, window, H, H_kv):
    ours, reference = draw_qkv(T, H, H_kv), draw_qkv(T, H, H_kv)
    attend = train.make_attention("blocked", T, window, CPU)
    y, expected = attend(*ours), loop_attention(*reference, window)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # flex warns when it is run eagerly
@pytest.mark.parametrize(("T", "window", "H", "H_kv"), CASES)
def test_flex_equals_the_loop(T, window, H, H_kv):
    q, k, v = (x.detach() for x in draw_qkv(T, H, H_kv, dtype=torch.float32))
    y = train.make_attention("flex", T, window, CPU)(q, k, v)
    expected = loop_attention(q.double(), k.double(), v.double(), window)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["blocked", "flex"])
@pytest.mark.parametrize("T", [1, 7, 24, 40, 48])
@pytest.mark.parametrize("window", [8, 48])
def test_attention_of_any_length_up_to_the_context(backend, T, window):
    q, k, v = (x.detach() for x in draw_qkv(T, 2, 1, dtype=torch.float32))
    y = train.make_attention(backend, 48, window, CPU)(q, k, v)
    torch.testing.assert_close(y, loop_attention(q, k, v, window), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["blocked", "flex"])
@pytest.mark.parametrize("window", [0, 3, 11, 12])
def test_query_sees_itself_and_the_window_before_it(backend, window):
    T, cut = 12, 4
    q, k, v = (x.detach() for x in draw_qkv(T, 2, 2, dtype=torch.float32))
    attend = train.make_attention(backend, T, window, CPU)
    before = attend(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, cut] += 1
    v[:, cut] += 1
    moved = (attend(q, k, v) - before).abs().amax(dim=(0, 2, 3)) > 1e-4
    assert moved.tolist() == [cut <= t <= cut + window for t in range(T)]


@pytest.mark.parametrize("message", ["", " \n", "why\nwhere"])
def test_an_error_is_said_in_one_line(message):
    said = train.first_line(RuntimeError(message))
    assert said == f"RuntimeError: {message.strip().partition(chr(10))[0]}"


def test_backend_without_cuda_is_blocked():
    assert train.choose_attention(CPU) == train.choose_attention(torch.device("mps")) == "blocked"


def test_layer_windows(monkeypatch):
    monkeypatch.setattr(train, "SHORT_WINDOW", 1 / 8)
    assert train.layer_windows("SL", 4, 1024) == [128, 1024, 128, 1024]
    monkeypatch.setattr(train, "SHORT_WINDOW", 1 / 2)
    assert train.layer_windows("SSSL", 8, 2048) == [1024, 1024, 1024, 2048] * 2
    assert train.layer_windows("SSSL", 6, 512) == [256, 256, 256, 512, 256, 512]  # the last is L
    assert train.layer_windows("SL", 1, 512) == [512]
    assert train.layer_windows("L", 3, 100) == [100, 100, 100]
    assert train.layer_windows("S", 3, 512) == [256, 256, 256]
    assert train.layer_windows("LS", 4, 512) == [512, 256, 512, 256]


# ------------------------------------------------------------------------------------------------
# Model


def test_rotary_is_a_complex_rotation():
    T, D = 300, 16
    x = torch.randn(2, T, 3, D, generator=torch.Generator().manual_seed(0))
    y = train.apply_rotary(x, train.rotary_tables(T, D, CPU)).double()
    inverse = 10_000.0 ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * inverse  # (T, D / 2)
    turn = torch.polar(torch.ones_like(angle), -angle)[:, None]
    z = torch.complex(*x.double().chunk(2, dim=-1)) * turn
    torch.testing.assert_close(y, torch.cat([z.real, z.imag], -1), rtol=0, atol=1e-4)


def test_rotary_scores_depend_on_distance_alone():
    T, D = 64, 32
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(0)).double()
    rotary = train.rotary_tables(T, D, CPU).double()
    q, k = (train.apply_rotary(x.expand(1, T, 1, D), rotary)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in (0, 1, 17, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (scores.diagonal(0)[0] - scores.diagonal(17)[0]).abs() > 0.1


def reference_logits(model, idx, n_head, n_kv_head, windows, shifts_keys):
    """The forward pass of the design, plainly, in float64, from the model's parameters alone."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    depth, T = len(windows), idx.shape[1]
    model_dim = w["wte.weight"].shape[1]
    D = model_dim // n_head
    angle = torch.arange(T).double()[:, None] * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x):
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        x1, x2 = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)

    x = x0 = norm(w["wte.weight"][idx])
    for i, window in enumerate(windows):
        p = f"blocks.{i}."
        x = w[f"{p}resid_lambda"] * x + w[f"{p}x0_lambda"] * x0
        h = norm(x)
        q, k, v = ((h @ w[f"{p}attn.{name}.weight"].T) for name in ("c_q", "c_k", "c_v"))
        q, k, v = (y.view(*idx.shape, -1, D) for y in (q, k, v))
        if (depth - 1 - i) % 2 == 0:
            gate = 2 / (1 + (-(h[..., :32] @ w[f"{p}attn.gate.weight"].T)).exp())
            embed = w[f"value_embeds.{i}.weight"][idx].view(*idx.shape, n_kv_head, D)
            v = v + gate[..., None] * embed
        if shifts_keys and window == T:
            for t in reversed(range(T)):
                k[:, t, :, D // 2 :] = k[:, t - 1, :, D // 2 :] if t else 0
        y = loop_attention(norm(rotate(q)), norm(rotate(k)), v, window)
        x = x + y.reshape(*idx.shape, model_dim) @ w[f"{p}attn.c_proj.weight"].T
        hidden = (norm(x) @ w[f"{p}mlp.c_fc.weight"].T).clamp_min(0).square()
        x = x + hidden @ w[f"{p}mlp.c_proj.weight"].T
    return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)


@pytest.mark.parametrize("shifts_keys", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_model_equals_a_plain_float64_forward(n_kv_head, shifts_keys, monkeypatch):
    monkeypatch.setattr(train, "SHIFT_KEYS", shifts_keys)
    monkeypatch.setattr(train, "WINDOW_PATTERN", "SL")
    monkeypatch.setattr(train, "SHORT_WINDOW", 1 / 2)
    model = shake(build(64, 4, n_kv_head, depth=3))
    idx = tokens(2, 24)
    expected = reference_logits(model, idx, 4, n_kv_head, [12, 24, 24], shifts_keys)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(idx).double(), expected, rtol=0, atol=2e-4)


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    model = shake(build())
    idx, targets = tokens(3, 24), tokens(3, 24, seed=1)
    log_p = model(idx).double().log_softmax(-1)
    expected = -log_p.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(idx, targets).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_slice", [512, 20])  # tokens at a time, where the loss is sliced
def test_gradients_are_those_of_the_plain_cross_entropy(loss_slice, monkeypatch):
    monkeypatch.setattr(train, "LOSS_SLICE", loss_slice, raising=False)
    model, idx, targets = shake(build()), tokens(3, 24), tokens(3, 24, seed=1)
    (3 * model(idx, targets)).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    (3 * torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten())).backward()
    for p, grad in zip(model.parameters(), ours, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)


def test_model_is_causal_and_logits_are_capped_float32():
    model = shake(build(dtype=torch.bfloat16))
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    idx = tokens(2, 24)
    logits = model(idx)
    assert logits.dtype == torch.float32 and logits.shape == (2, 24, 61)
    assert 14 < logits.abs().max() <= 15
    for cut in (0, 1, 11, 22):
        changed = idx.clone()
        changed[:, cut + 1 :] = (changed[:, cut + 1 :] + 7) % 61
        moved = (model(changed) - logits).abs().amax(dim=(0, 2)) > 1e-3
        assert not moved[: cut + 1].any() and moved[cut + 1 :].all()


def test_prefix_has_the_logits_of_the_whole():
    model, idx = shake(build()), tokens(2, 24)
    for T in (1, 9, 12):
        torch.testing.assert_close(model(idx[:, :T]), model(idx)[:, :T], rtol=0, atol=1e-4)


def test_rows_do_not_depend_on_the_rest_of_the_batch():
    model = shake(build())
    idx = tokens(5, 24)
    torch.testing.assert_close(model(idx)[2:3], model(idx[2:3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_value_embeddings_on_every_second_layer_the_last_included(depth):
    model = build(depth=depth)
    expected = list(range((depth - 1) % 2, depth, 2))
    assert [int(i) for i in model.value_embeds] == expected and expected[-1] == depth - 1
    assert [i for i, b in enumerate(model.blocks) if b.attn.gate is not None] == expected


def test_parameters_and_flops_of_the_cuda_defaults_by_hand(monkeypatch):
    monkeypatch.setattr(train, "WINDOW_PATTERN", "SSSL")
    monkeypatch.setattr(train, "SHORT_WINDOW", 1 / 2)
    meta = {"device": torch.device("meta"), "dtype": torch.bfloat16}
    model = build(512, 4, 4, depth=8, vocab_size=8192, seq_len=2048, **meta)
    table = 8192 * 512
    gates = 4 * 4 * 32
    blocks = 8 * (4 * 512**2 + 2 * 4 * 512**2) + gates
    parts = {"embeddings": 5 * table, "lm_head": table}
    parts |= {"x0_lambda": 8, "vectors": 8, "matrices": blocks}
    assert model.num_params() == parts
    total = sum(p.numel() for p in model.parameters())
    assert sum(parts.values()) == total == 50_332_176
    attended = 6 * 1024 + 2 * 2048
    assert model.flops_per_token() == 6 * (blocks + table) + 12 * 512 * attended == 239_078_400


def test_published_mfu_follows_from_the_flops():
    """39.80 % at 953 steps in 300.1 s: the original left its first ten steps out of the clock."""
    rate = 943 * 2**19 * 239_078_400 / 300.1
    assert 100 * rate / train.peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(39.80, abs=0.02)


def test_initial_weights():
    torch.manual_seed(0)
    model = build(256, 2, 2, depth=2, vocab_size=2000)
    for weight, std in ((model.wte.weight, 1.0), (model.lm_head.weight, 0.001)):
        assert abs(weight.mean()) < 0.01 * std
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        within = (weight.abs() < std).float().mean().item()
        assert within == pytest.approx(0.6827, abs=0.005)  # of a normal law
    bound = math.sqrt(3 / 256)
    uniform = [model.value_embeds["1"].weight]
    for block in model.blocks:
        attn = block.attn
        uniform += [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight, block.mlp.c_fc.weight]
        assert not attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
    assert not model.blocks[1].attn.gate.weight.any()
    for weight in uniform:
        assert 0.999 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(256**-0.5, rel=0.01)
    assert not torch.equal(uniform[1], uniform[2])
    for block in model.blocks:
        assert block.resid_lambda == 1 and block.x0_lambda == torch.tensor(0.1)


def test_first_logits_are_nearly_uniform():
    torch.manual_seed(0)
    model = build(256, 2, 2, vocab_size=1000)
    idx, targets = tokens(4, 24, vocab_size=1000), tokens(4, 24, vocab_size=1000, seed=1)
    assert model(idx, targets).item() == pytest.approx(math.log(1000), abs=0.01)


def test_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return [p.detach() for p in build().parameters()]

    a, b, c = weights(42), weights(42), weights(43)
    assert all(map(torch.equal, a, b))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True) if x.ndim and x.std() > 0)


def test_accumulated_gradients_equal_one_large_batch():
    model = shake(build())
    idx, targets = tokens(8, 24), tokens(8, 24, seed=1)
    model(idx, targets).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    for part in range(0, 8, 2):
        (model(idx[part : part + 2], targets[part : part + 2]) / 4).backward()
    for p, expected in zip(model.parameters(), whole, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Optimizer


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_every_parameter_is_in_exactly_one_group():
    model = build(depth=3)
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(32))
    model.shift = torch.nn.Parameter(torch.zeros(3))
    adamw, muon = train.make_optimizers(model)
    grouped = [id(p) for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    (vectors,) = (g for g in adamw.param_groups if g["lr"] == train.SCALAR_LR / 100)
    assert {id(model.shift), id(model.blocks[0].gain)} < {id(p) for p in vectors["params"]}


def test_parameter_without_a_place_is_named():
    model = build()
    model.extra = torch.nn.Linear(5, 32, bias=False)
    with pytest.raises(SystemExit, match=r"extra\.weight"):
        train.make_optimizers(model)
    with pytest.raises(SystemExit, match=r"extra\.weight"):
        model.num_params()


@pytest.mark.parametrize("place", ["extra", "blocks.1.extra"])
def test_every_table_is_trained_like_the_token_embedding(place):
    model = build()
    table = torch.nn.Embedding(5, 32)  # a table is no matrix for Muon, in a block neither
    model.get_submodule(place.rpartition(".")[0]).add_module("extra", table)
    adamw, _ = train.make_optimizers(model)
    (of_wte,) = [g for g in adamw.param_groups if any(p is model.wte.weight for p in g["params"])]
    assert any(p is table.weight for p in of_wte["params"])


def test_tied_embeddings_are_counted_once_and_work_twice():
    model = build()
    apart, flops = sum(model.num_params().values()), model.flops_per_token()
    model.lm_head.weight = model.wte.weight
    assert sum(model.num_params().values()) == apart - 61 * 32
    assert model.flops_per_token() == flops
    train.make_optimizers(model)


def test_rates_and_betas_of_every_group_by_hand(monkeypatch):
    for name, value in {
        "EMBEDDING_LR": 0.6,
        "UNEMBEDDING_LR": 0.004,
        "MATRIX_LR": 0.04,
        "SCALAR_LR": 0.5,
        "WEIGHT_DECAY": 0.2,
        "ADAM_BETAS": (0.8, 0.95),
    }.items():
        monkeypatch.setattr(train, name, value)
    model = build(192, 2, 2, depth=3)  # 192 = 768 / 4: the scaled rates are doubled
    adamw, muon = train.make_optimizers(model)
    by_parameter = {id(p): g for g in adamw.param_groups for p in g["params"]}
    expected = {
        "lm_head.weight": (0.008, (0.8, 0.95)),
        "wte.weight": (1.2, (0.8, 0.95)),
        "value_embeds.0.weight": (1.2, (0.8, 0.95)),
        "value_embeds.2.weight": (1.2, (0.8, 0.95)),
    }
    for i in range(3):
        expected[f"blocks.{i}.resid_lambda"] = (0.005, (0.8, 0.95))
        expected[f"blocks.{i}.x0_lambda"] = (0.5, (0.96, 0.95))
    assert len(adamw.param_groups) == 4 and len(by_parameter) == len(expected)
    for name, (lr, betas) in expected.items():
        group = by_parameter[id(model.get_parameter(name))]
        assert group["lr"] == group["initial_lr"] == pytest.approx(lr)
        assert tuple(group["betas"]) == betas
        assert group["eps"] == 1e-10 and group["weight_decay"] == 0
    matrices = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == matrices
    for group in muon.param_groups:
        assert group["lr"] == group["initial_lr"] == 0.04
        assert group["weight_decay"] == 0.2 and group["beta2"] == 0.95
        assert len({p.shape for p in group["params"]}) == 1


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_the_textbook_formula(table_dtype):
    """Kingma and Ba, with bias correction, no decay; in float64, with the rates read by hand."""
    model = shake(build(192, 2, 2))
    model.wte.to(table_dtype)
    model.value_embeds.to(table_dtype)
    adamw, _ = train.make_optimizers(model)
    lr, betas = {}, {}
    for name, _ in model.named_parameters():
        kind = name.removesuffix(".weight").split(".")[-1]
        lr[name] = {
            "lm_head": 2 * train.UNEMBEDDING_LR,
            "resid_lambda": train.SCALAR_LR / 100,
            "x0_lambda": train.SCALAR_LR,
        }.get(kind, 2 * train.EMBEDDING_LR)
        betas[name] = (0.96, 0.95) if kind == "x0_lambda" else train.ADAM_BETAS
    names = [n for n, p in model.named_parameters() if "blocks" not in n or p.ndim == 0]
    expected = {name: model.get_parameter(name).detach().double() for name in names}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 5):
        give_gradients(model, step)
        adamw.step()
        for name in names:
            g, (b1, b2) = model.get_parameter(name).grad.double(), betas[name]
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            m_hat, v_hat = m[name] / (1 - b1**step), v[name] / (1 - b2**step)
            expected[name] -= lr[name] * m_hat / (v_hat.sqrt() + 1e-10)
            p = model.get_parameter(name).detach().double()
            # bf16 has 8 bits: each step rounds weight, m and v, of sizes of about the rate
            rounded = model.get_parameter(name).dtype == torch.bfloat16
            tolerance = step * lr[name] * (2**-5 if rounded else 1e-5)
            torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=tolerance)


def polar_express(s):
    """The five steps on a singular value instead of a matrix."""
    for a, b, c in train.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


def test_polar_express_coefficients_bring_singular_values_near_one():
    s = torch.logspace(-2, 0, 2000, dtype=torch.float64) / 1.02
    assert len(train.POLAR_EXPRESS) == 5
    assert polar_express(s).min() > 0.85 and polar_express(s).max() < 1.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 96, 32), (3, 32, 96), (2, 128, 32), (1, 4, 32), (1, 33, 7)])
def test_orthogonalize_by_singular_values(shape, dtype):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    result = train.orthogonalize(grad, dtype)
    assert result.shape == shape and result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.83 and values.max() < 1.17  # the band of the test above, and bf16
    U, _, Vh = torch.linalg.svd(grad.double(), full_matrices=False)
    assert (result.double() - U @ Vh).norm() < 0.15 * (U @ Vh).norm()


def run_muon(weights, grads, lr=0.02, momentum=0.9, weight_decay=0.0):
    """Give each parameter its gradients, one list a step, and return the parameters at the end."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    muon = train.Muon(params, lr, momentum, weight_decay, train.MUON_BETA2)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        muon.step()
    return [p.detach() for p in params]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (32, 32)])
def test_muon_equals_a_plain_float64_version(shape, monkeypatch):
    """All but the orthogonalisation, whose bf16 would blur the comparison."""
    monkeypatch.setattr(train, "orthogonalize", lambda g, dtype: g.sin())
    lr, momentum, decay = 0.02, 0.9, 0.3
    weight, grads = randn(*shape), [[randn(*shape, seed=s)] for s in range(1, 5)]
    (ours,) = run_muon([weight], grads, lr, momentum, decay)
    p, buffer = weight.double(), torch.zeros(shape).double()
    axis = 1 if shape[0] >= shape[1] else 0  # averaged over the shorter side
    second = torch.zeros(shape).double().mean(axis, keepdim=True)
    for (g,) in grads:
        buffer = momentum * buffer + (1 - momentum) * g.double()
        update = ((1 - momentum) * g.double() + momentum * buffer).sin()
        second = 0.95 * second + 0.05 * update.square().mean(axis, keepdim=True)
        normed = update / second.sqrt()
        normed *= update.norm() / normed.norm()
        rate = lr * math.sqrt(max(1, shape[0] / shape[1]))
        p = p - rate * (normed + decay * p * (normed * p > 0))
    torch.testing.assert_close(ours.double(), p, rtol=1e-4, atol=1e-5)


def first_update(weight, grad, **more):
    (after,) = run_muon([weight], [[grad]], lr=1.0, **more)
    return weight - after


@pytest.mark.parametrize("shape", [(96, 32), (32, 96)])
def test_muon_first_update_is_semi_orthogonal_and_even_over_neurons(shape):
    update = first_update(torch.zeros(shape), randn(*shape)) / max(1, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.4  # NorMuon evens the neurons, bends the values
    plain = train.orthogonalize(randn(*shape)[None], torch.bfloat16)[0].float()
    assert update.norm().item() == pytest.approx(plain.norm().item(), rel=0.01)
    longer = update.square().mean(1 if shape[0] > shape[1] else 0).sqrt()
    assert longer.std() / longer.mean() < 1e-3
    assert (update * plain).sum() / (update.norm() * plain.norm()) > 0.97


def test_muon_rate_grows_with_the_shape():
    size = {}
    for shape in ((128, 32), (32, 32), (32, 128)):
        size[shape] = first_update(torch.zeros(shape), randn(*shape)).norm() / math.sqrt(32)
    assert size[128, 32] == pytest.approx(2.0, rel=0.15)
    assert size[32, 128] == pytest.approx(1.0, rel=0.15)
    assert size[32, 32] == pytest.approx(1.0, rel=0.25)


def test_muon_is_blind_to_the_size_of_the_gradient():
    small = first_update(torch.zeros(64, 32), 1e-4 * randn(64, 32))
    large = first_update(torch.zeros(64, 32), 1e4 * randn(64, 32))
    assert (small - large).norm() < 0.1 * large.norm()  # bf16 rounds them differently


def test_muon_momentum_is_nesterovs(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "orthogonalize", lambda g, dtype: seen.append(g.clone()) or g)
    g1, g2 = randn(8, 8, seed=1), randn(8, 8, seed=2)
    run_muon([torch.zeros(8, 8)], [[g1], [g2]], momentum=0.8)
    b1 = 0.2 * g1
    b2 = 0.8 * b1 + 0.2 * g2
    torch.testing.assert_close(seen[0][0], 0.2 * g1 + 0.8 * b1)
    torch.testing.assert_close(seen[1][0], 0.2 * g2 + 0.8 * b2)


def test_weight_decay_only_where_update_and_weight_agree():
    weight, grad = randn(64, 32), randn(64, 32, seed=1)
    update = first_update(weight, grad)
    extra = first_update(weight, grad, weight_decay=0.25) - update
    agree = update * weight > 0
    assert 0.3 < agree.float().mean() < 0.7
    rate = math.sqrt(2)
    expected = torch.where(agree, rate * 0.25 * weight, torch.zeros(()))
    torch.testing.assert_close(extra, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_computes_in_what_the_device_has(dtype, monkeypatch):
    """A CPU without bf16 emulates it: 25 times slower on a Zen 3, most of a training step."""
    seen, orthogonalize = [], train.orthogonalize
    monkeypatch.setattr(train, "choose_dtype", lambda device: dtype)
    monkeypatch.setattr(
        train, "orthogonalize", lambda *args: seen.append(orthogonalize(*args)) or seen[-1]
    )
    first_update(torch.zeros(8, 4), randn(8, 4))
    assert [update.dtype for update in seen] == [dtype]


def test_muon_stacked_by_shape_equals_one_by_one():
    shapes = [(32, 16), (16, 32), (32, 16), (4, 16), (32, 16)]
    weights = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    grads = [[randn(*s, seed=10 * t + i) for i, s in enumerate(shapes)] for t in range(1, 4)]
    together = run_muon(weights, grads, weight_decay=0.1)
    for i, ours in enumerate(together):
        (alone,) = run_muon([weights[i]], [[step[i]] for step in grads], weight_decay=0.1)
        torch.testing.assert_close(ours, alone, rtol=1e-2, atol=1e-3)


def test_muon_takes_stacks_of_matrices():
    """As experts in one tensor are: each is updated as if it stood alone."""
    weight, grads = randn(3, 32, 16), [[randn(3, 32, 16, seed=s)] for s in range(1, 4)]
    (together,) = run_muon([weight], grads, weight_decay=0.1)
    for i in range(3):
        (alone,) = run_muon([weight[i]], [[g[i]] for (g,) in grads], weight_decay=0.1)
        torch.testing.assert_close(together[i], alone, rtol=1e-2, atol=1e-3)


def test_optimizers_survive_gradients_of_zero():
    model = build()
    optimizers = train.make_optimizers(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Schedules


def test_rate_is_constant_then_linear(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.0)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.0)
    by_hand = {0: 1, 0.3: 1, 0.5: 1, 0.6: 0.8, 0.75: 0.5, 0.9: 0.2, 1: 0}
    for progress, expected in by_hand.items():
        assert train.lr_multiplier(progress) == pytest.approx(expected)


def test_rate_warms_up_and_keeps_a_rest(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.2)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.4)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.1)
    by_hand = {0: 0, 0.05: 0.25, 0.1: 0.5, 0.2: 1, 0.6: 1, 0.8: 0.55, 1: 0.1}
    for progress, expected in by_hand.items():
        assert train.lr_multiplier(progress) == pytest.approx(expected)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.0)
    assert train.lr_multiplier(1.0) == 1


def test_muon_momentum_rises_over_300_steps():
    by_hand = {0: 0.85, 150: 0.9, 300: 0.95, 1000: 0.95}
    for step, expected in by_hand.items():
        assert train.muon_momentum(step) == pytest.approx(expected)


def test_weight_decay_falls_to_zero(monkeypatch):
    monkeypatch.setattr(train, "WEIGHT_DECAY", 0.2)
    for progress, expected in {0: 0.2, 0.25: 0.15, 1: 0}.items():
        assert train.muon_weight_decay(progress) == pytest.approx(expected)


def test_peak_of_known_devices_only():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989.5e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989.5e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
    }
    for name, peak in peaks.items():
        assert train.peak_flops(name) == peak
    for name in (
        "cpu",
        "mps",
        "NVIDIA T4",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "",
    ):
        assert math.isnan(train.peak_flops(name))


# ------------------------------------------------------------------------------------------------
# Learning


def overfit(steps, device=CPU, dtype=torch.float32, model_dim=64):
    """Train a tiny GPT on one batch with the shipped optimizers and schedule; return the losses."""
    shape = {"model_dim": model_dim, "depth": 2, "seq_len": 32, "vocab_size": 64}
    torch.manual_seed(0)
    model = build(**shape, device=device, dtype=dtype)
    optimizers = train.make_optimizers(model)
    idx = tokens(4, 33, vocab_size=64).to(device)
    losses = []
    for step in range(steps):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * train.lr_multiplier(step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_tiny_model_learns_a_batch_by_heart():
    losses = overfit(60)
    assert losses[0] == pytest.approx(math.log(64), abs=0.02)
    assert losses[-1] < 0.1


# ------------------------------------------------------------------------------------------------
# The graph that a GPU compiles, captured without one


def attention_weights(q, k, left):
    ahead = torch.arange(q.size(1))[:, None] - torch.arange(q.size(1))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(3))
    return scores.masked_fill((ahead < 0) | (ahead > left), -math.inf).softmax(dim=-1)


@torch.library.custom_op("autoresearch::attention", mutates_args=())
def opaque_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> torch.Tensor:
    """Stand in for FlashAttention-3: an operator that the compiler cannot look into."""
    return torch.einsum("bhts,bshd->bthd", attention_weights(q, k, left), v).contiguous()


@torch.library.custom_op("autoresearch::attention_backward", mutates_args=())
def opaque_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int
) -> list[torch.Tensor]:
    p = attention_weights(q, k, left)
    dp = torch.einsum("bthd,bshd->bhts", grad, v)
    ds = p * (dp - (dp * p).sum(dim=-1, keepdim=True)) / math.sqrt(q.size(3))
    dq, dk = torch.einsum("bhts,bshd->bthd", ds, k), torch.einsum("bhts,bthd->bshd", ds, q)
    dv = torch.einsum("bhts,bthd->bshd", p, grad)
    return [dq.contiguous(), dk.contiguous(), dv.contiguous()]


opaque_attention.register_fake(lambda q, k, v, left: torch.empty_like(q))
opaque_backward.register_fake(lambda grad, q, k, v, left: [torch.empty_like(x) for x in (q, k, v)])
opaque_attention.register_autograd(
    lambda ctx, grad: (*opaque_backward(grad, *ctx.saved_tensors, ctx.left), None),
    setup_context=lambda ctx, inputs, output: (
        ctx.save_for_backward(*inputs[:3]),
        setattr(ctx, "left", inputs[3]),
    ),
)


@pytest.fixture
def whole_graph(monkeypatch):
    """Let compile_model() compile as for a GPU, all but the code; a graph break is an error."""
    torch.compiler.reset()
    counters.clear()
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    monkeypatch.setattr(train, "LOSS_SLICE", 20)
    yield lambda model: train.compile_model(model, torch.device("cuda"))
    torch.compiler.reset()
    assert not counters["graph_break"]


COMPILES_THE_MLP = """
import types, torch, train
from torch._dynamo.utils import counters
model = types.SimpleNamespace(blocks=[], loss_and_grads=lambda x: train.ReluSquared.apply(x).sum())
train.compile_model(model, torch.device("cpu"))
x = torch.ones(8, requires_grad=True)
model.loss_and_grads(x).backward()
print(x.grad[0].item(), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_a_traced_graph_is_kept_until_its_backward_pass_is_edited(tmp_path):
    """Or an agent's edit would train as before, from the compiler's cache."""
    shutil.copy(ROOT / "prepare.py", tmp_path)
    source = (ROOT / "train.py").read_text()
    told = []
    for factor in (2, 2, 3):
        edited = test_edits.patch(source, ("return 2 * y.sqrt()", f"return {factor} * y.sqrt()"))
        (tmp_path / "train.py").write_text(edited)
        done = subprocess.run(
            [sys.executable, "-c", COMPILES_THE_MLP],
            cwd=tmp_path,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split())
    assert told == [["2.0", "0"], ["2.0", "1"], ["3.0", "0"]]


@pytest.mark.slow
def test_trunk_with_flash_attention_is_one_graph(whole_graph, monkeypatch):
    def flash(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        return opaque_attention(q, k, v, window_size[0])

    monkeypatch.setattr(train, "flash_attention_3", lambda: flash)
    model = shake(build(depth=3, backend="flash-attn3"))
    plain = shake(build(depth=3))
    whole_graph(model)
    for seed in range(3):
        idx, targets = tokens(3, 24, seed=seed), tokens(3, 24, seed=seed + 9)
        loss, expected = model(idx, targets), plain(idx, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            logits = model.eval()(idx)
        torch.testing.assert_close(logits, plain(idx), rtol=1e-5, atol=1e-4)
        model.train()
    # The trunk, the loss of a full slice and of the rest; evaluation has no graph of its own
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
def test_trunk_with_flex_attention_is_one_graph(whole_graph):
    """Forward alone: flex_attention has no backward on a CPU."""
    model = shake(build(depth=3, backend="flex")).requires_grad_(False)
    plain = shake(build(depth=3))
    whole_graph(model.eval())
    with torch.no_grad():
        for T, num_graphs in ((24, 1), (24, 1), (12, 2)):
            idx, targets = tokens(3, T), tokens(3, T, seed=1)
            torch.testing.assert_close(model(idx), plain(idx), rtol=1e-5, atol=1e-4)
            assert counters["stats"]["unique_graphs"] == num_graphs
        loss = model(idx, targets)
        torch.testing.assert_close(loss, plain(idx, targets), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# On a CUDA device


def gpu(test):
    return pytest.mark.gpu(NO_CUDA(test))


def need_backend(name, monkeypatch):
    """Skip the test if a backend cannot be used here."""
    if name == "flash-attn3":
        monkeypatch.setattr(prepare, "CACHE_DIR", Path(PERSONS_CACHE).expanduser())
        if train.choose_attention(torch.device("cuda")) != name:
            pytest.skip("no FlashAttention-3 here")


@gpu
@pytest.mark.parametrize("backend", ["flash-attn3", "flex", "blocked"])
@pytest.mark.parametrize(("T", "window", "H", "H_kv"), [(256, 64, 4, 2), (256, 256, 2, 2)])
def test_gpu_backends_equal_the_loop(backend, T, window, H, H_kv, monkeypatch):
    need_backend(backend, monkeypatch)
    ours = draw_qkv(T, H, H_kv, D=64, B=1, dtype=torch.bfloat16, device="cuda")
    reference = [x.detach().cpu().double().requires_grad_() for x in ours]
    attend = torch.compile(train.make_attention(backend, T, window, torch.device("cuda")))
    y, expected = attend(*ours), loop_attention(*reference, window)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0.02, atol=0.02)
    y.float().square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, reference, strict=True):
        error = (a.grad.cpu().double() - b.grad).norm() / b.grad.norm()
        assert error < 0.03


@gpu
def test_gpu_bf16_trains_like_float32():
    device = torch.device("cuda")
    half, full = (overfit(50, device, t, 128) for t in (torch.bfloat16, torch.float32))
    difference = [abs(a - b) for a, b in zip(half, full, strict=True)]
    assert max(difference) < 0.5 and sum(difference) / 50 < 0.1  # where it falls, it falls steeply
    assert half[-1] == pytest.approx(full[-1], abs=0.02)


def busy(device, count=8):
    """Queue work of some milliseconds on the device."""
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    for _ in range(count):
        x = x @ x * 1e-3
    return x


@gpu
def test_gpu_loader_delivers_the_packers_batches_under_load(cache, tokenizer):
    loader = prepare.make_dataloader(tokenizer, 8, 256, "train", torch.device("cuda"))
    paths = prepare.shard_paths("tokens", "train")
    rows = prepare.pack((d for path in paths for d in prepare.read_tokens(path, tokenizer)), 257)
    seen = []
    for inputs, targets in itertools.islice(loader, 100):
        busy("cuda")
        seen.append((inputs.clone(), targets.clone()))
    for inputs, targets in seen:
        expected = torch.stack(
            [torch.from_numpy(row.astype("int64")) for row in itertools.islice(rows, 8)]
        )
        assert torch.equal(inputs.cpu(), expected[:, :-1])
        assert torch.equal(targets.cpu(), expected[:, 1:])


@gpu
def test_gpu_clock_measures_work_done(cache, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "TIME_BUDGET", 2)
    busy("cuda")
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in prepare.make_dataloader(tokenizer, 8, 256, "train", torch.device("cuda")):
        busy("cuda", 50)
    torch.cuda.synchronize()
    assert time.monotonic() - start == pytest.approx(2, abs=0.5)


@gpu
@pytest.mark.slow
def test_gpu_evaluator_raises_no_false_alarm(cache, tokenizer, monkeypatch):
    device, seq_len = torch.device("cuda"), prepare.MAX_SEQ_LEN
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 32 * seq_len)
    monkeypatch.setattr(train, "WINDOW_PATTERN", "SL")
    monkeypatch.setattr(train, "SHORT_WINDOW", 1 / 2)
    size = {"model_dim": 256, "depth": 4, "vocab_size": tokenizer.vocab_size, "seq_len": seq_len}
    backend = train.choose_attention(device)
    model = build(**size, device=device, dtype=torch.bfloat16, backend=backend)
    train.compile_model(model, device)
    for seed in range(100):
        shake(model, seed)
        assert 0 < prepare.evaluate_bpb(model, tokenizer, 32) < 40


@gpu
@pytest.mark.slow
def test_gpu_out_of_memory_halves_the_batch(prepared_cache, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(prepared_cache))
    capped = """
import torch, prepare, train
prepare.TIME_BUDGET, prepare.EVAL_TOKENS = 2, 2**16
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)
train.DEPTH, train.WINDOW_PATTERN = 2, "L"
train.DEVICE_BATCH_SIZE = 1024
train.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", capped], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory with 1024 rows" in done.stdout
    assert "\nval_bpb: " in done.stdout
