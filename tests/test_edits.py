"""A drill: what researchers try, each as an edit of the text of train.py, and what it costs.

Every edit is patched in as an agent would, run for some optimizer steps and an evaluation of a tiny
model, eagerly, in this process. The number beside each is the lines of train.py that it touches: no
more than the idea needs. If one grows, mend train.py, not the drill.
"""

import difflib
import re
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_cache
from torch._dynamo.utils import counters

import prepare
import train

SOURCE = (Path(__file__).resolve().parent.parent / "train.py").read_text()
SEQ_LEN, NUM_BATCHES = 64, 6
TINY = {  # where an edit leaves the constant alone
    "DEPTH": 2,
    "ASPECT_RATIO": 4,
    "HEAD_DIM": 2,
    "LOSS_SLICE": 48,
    "TOTAL_BATCH_SIZE": 2 * SEQ_LEN,
    "DEVICE_BATCH_SIZE": 2,
}
CONTRACT = {
    "MAX_SEQ_LEN": SEQ_LEN,
    "VOCAB_SIZE": 512,
    "EVAL_TOKENS": 6 * SEQ_LEN,
    "PROBE_ROWS": 4,
}
EDITS = {}


def edit(lines, check=lambda run: True):
    """Enter a function from text to text in the drill: how many lines it may touch, its effect."""

    def enter(function):
        EDITS[function.__name__] = (function, lines, check)
        return function

    return enter


def patch(source, *changes):
    """Replace each old text by the new one; the old one must be there once."""
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in train.py: {old}"
        source = source.replace(old, new)
    return source


@pytest.fixture(scope="module")
def tiny_cache(corpus, tmp_path_factory):
    some = {split: documents[:2000] for split, documents in corpus.items()}
    return make_cache(tmp_path_factory.mktemp("tiny"), some, **CONTRACT)


@pytest.fixture
def tiny(tiny_cache, monkeypatch):
    """A contract of few tokens and a short context, in a process of one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in (CONTRACT | {"CACHE_DIR": tiny_cache}).items():
        monkeypatch.setattr(prepare, name, value)
    yield
    torch.set_num_threads(num_threads)


def lines_touched(before, after):
    """Count the lines changed, added or removed; a line put in another's place counts once."""
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    codes = (code for code in matcher.get_opcodes() if code[0] != "equal")
    return sum(max(i2 - i1, j2 - j1) for _, i1, i2, j1, j2 in codes)


def eager(function=None, **options):
    return function or (lambda f: f)


def run_text(source, monkeypatch, compiler=eager, on_batch=lambda number: None):
    """Run the main() of a text of train.py on a clock that counts batches; return what it made."""
    module = types.ModuleType("train_edited")
    exec(compile(source, "<train.py, edited>", "exec"), vars(module))
    for name, value in TINY.items():
        if getattr(module, name) == getattr(train, name):
            setattr(module, name, value)
    run = SimpleNamespace(module=module, shapes=[], history=[])  # history: parameters by step
    clock = SimpleNamespace(now=prepare.PROCESS_START, monotonic=lambda: clock.now)
    make_optimizers, next_batch = module.make_optimizers, prepare.Dataloader.__next__

    def watched_optimizers(model, **options):
        run.model, run.optimizers = model, make_optimizers(model, **options)
        return run.optimizers

    def counted(loader):
        if loader.split == "train":
            params = run.model.named_parameters()
            run.history.append({name: p.detach().clone() for name, p in params})
        inputs, targets = next_batch(loader)
        if loader.split == "train":
            run.shapes.append(inputs.shape)
            on_batch(len(run.shapes))
            clock.now += prepare.TIME_BUDGET / (NUM_BATCHES - 0.5)
        return inputs, targets

    monkeypatch.setattr(prepare, "time", clock)
    monkeypatch.setattr(prepare.Dataloader, "__next__", counted)
    monkeypatch.setattr(torch, "compile", compiler)
    module.make_optimizers, module.tune_cpu = watched_optimizers, lambda: None
    run.summary = module.main()
    return run


# ------------------------------------------------------------------------------------------------
# Layers


@edit(2, lambda run: run.model.blocks[0].mlp.c_gate.weight.any())
def swiglu(source):
    proj = "        self.c_proj = Linear(4 * model_dim, model_dim, std=0)\n"
    gate = "        self.c_gate = Linear(model_dim, 4 * model_dim, std=model_dim**-0.5)\n"
    return patch(
        source,
        (proj, gate + proj),
        ("ReluSquared.apply(self.c_fc(x))", "F.silu(self.c_gate(x)) * self.c_fc(x)"),
    )


@edit(1)
def gelu(source):
    return patch(source, ("ReluSquared.apply(self.c_fc(x))", "F.gelu(self.c_fc(x))"))


@edit(2)
def parallel_attention_and_mlp(source):
    return patch(
        source,
        (
            "        x = x + self.attn(norm(x), value_embed, rotary)\n"
            "        return x + self.mlp(norm(x))\n",
            "        h = norm(x)\n"
            "        return x + self.attn(h, value_embed, rotary) + self.mlp(h)\n",
        ),
    )


@edit(2, lambda run: run.model.lm_head.weight is run.model.wte.weight)
def tied_embeddings(source):
    return patch(
        source,
        (
            "            nn.init.normal_(self.lm_head.weight, std=0.001)\n",
            "            nn.init.normal_(self.wte.weight, std=0.02)\n"
            "            self.lm_head.weight = self.wte.weight\n",
        ),
    )


def in_adamw(run, end, num):
    """Return whether AdamW, not Muon, has so many parameters whose names end so."""
    (wanted,) = [[p for n, p in run.model.named_parameters() if n.endswith(end)]]
    inside = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    return len(wanted) == num and {id(p) for p in wanted} <= inside


@edit(4, lambda run: in_adamw(run, "gain", 4))
def rmsnorm_gains(source):
    mlp = "        self.mlp = MLP(model_dim)\n"
    return patch(
        source,
        (
            mlp,
            mlp + "        self.attn_gain = nn.Parameter(torch.ones(model_dim))\n"
            "        self.mlp_gain = nn.Parameter(torch.ones(model_dim))\n",
        ),
        ("self.attn(norm(x), ", "self.attn(norm(x) * self.attn_gain.to(x.dtype), "),
        ("self.mlp(norm(x))", "self.mlp(norm(x) * self.mlp_gain.to(x.dtype))"),
    )


@edit(4, lambda run: in_adamw(run, "bias", 13))
def biases(source):
    return patch(
        source,
        (
            "def __init__(self, in_features, out_features, std):\n        super().__init__()\n",
            "def __init__(self, in_features, out_features, std, bias=True):\n"
            "        super().__init__()\n"
            "        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else 0\n",
        ),
        (
            "return F.linear(x, self.weight.to(x.dtype))",
            "return (F.linear(x, self.weight.to(x.dtype)) + self.bias).to(x.dtype)",
        ),
        (
            "Linear(model_dim, vocab_size, std=0)",
            "Linear(model_dim, vocab_size, std=0, bias=False)",
        ),
    )


@edit(1, lambda run: len(run.model.blocks[0].attn.c_k.weight) == 2)
def multi_query(source):
    return patch(source, ('"n_kv_head": n_head', '"n_kv_head": 1'))


@edit(1, lambda run: len(run.model.blocks[0].attn.c_k.weight) == 4)
def two_kv_heads(source):
    return patch(source, ('"n_kv_head": n_head', '"n_kv_head": 2'))


def num_tables(run):
    return sum(isinstance(module, torch.nn.Embedding) for module in run.model.modules())


@edit(1, lambda run: num_tables(run) == 1)
def value_embeddings_removed(source):
    return patch(source, ("embedded = range((depth - 1) % 2, depth, 2)", "embedded = range(0)"))


@edit(1, lambda run: num_tables(run) == 3)
def value_embeddings_in_every_layer(source):
    return patch(source, ("embedded = range((depth - 1) % 2, depth, 2)", "embedded = range(depth)"))


@edit(2, lambda run: in_adamw(run, "before.weight", 1) and run.model.before.weight.any())
def a_table_of_the_token_before(source):
    wte = "            self.wte = nn.Embedding("
    table = "            self.before = nn.Embedding(vocab_size, model_dim, dtype=table_dtype)\n"
    both = "self.wte(idx) + self.before(F.pad(idx[:, :-1], (1, 0)))"
    return patch(source, (wte, table + wte), ("norm(self.wte(idx).to", f"norm(({both}).to"))


@edit(6, lambda run: in_adamw(run, "skip_lambdas", 1))
def unet_skips(source):
    tables = "            self.value_embeds = nn.ModuleDict()\n"
    loop = "        for i, block in enumerate(self.blocks):\n            value"
    call = "            x = block(x, x0, value_embed, rotary)\n"
    skip = """            j = len(self.blocks) - 1 - i
            if j < i:
                x = x + self.skip_lambdas[j].to(x.dtype) * outputs[j]
"""
    return patch(
        source,
        (
            tables,
            "            self.skip_lambdas = nn.Parameter(torch.zeros(depth // 2))\n" + tables,
        ),
        (loop, "        outputs = []\n" + loop),
        (call, skip + call + "            outputs.append(x)\n"),
    )


@edit(2, lambda run: in_adamw(run, "shift", 2))
def share_of_the_token_before(source):
    mlp = "        self.mlp = MLP(model_dim)\n"
    attn = "        x = x + self.attn("
    shift = "        x = x + self.shift.to(x.dtype) * F.pad(x[:, :-1], (0, 0, 1, 0))\n"
    return patch(
        source,
        (mlp, mlp + "        self.shift = nn.Parameter(torch.zeros(model_dim))\n"),
        (attn, shift + attn),
    )


@edit(15, lambda run: run.model.blocks[1].mlp.router.weight.any())
def mixture_of_experts(source):
    experts = """class Experts(nn.Module):
    def __init__(self, model_dim, num_experts=4, num_chosen=2):
        super().__init__()
        self.num_chosen = num_chosen
        self.router = Linear(model_dim, num_experts, std=model_dim**-0.5)
        self.experts = nn.ModuleList(MLP(model_dim) for _ in range(num_experts))

    def forward(self, x):
        scores = self.router(x).sigmoid()
        best = scores.topk(self.num_chosen, dim=-1).indices
        weights = scores * torch.zeros_like(scores).scatter(-1, best, 1.0)
        return sum(w * mlp(x) for w, mlp in zip(weights.split(1, -1), self.experts))


"""
    return patch(
        source,
        ("class Block(nn.Module):\n", experts + "class Block(nn.Module):\n"),
        ("self.mlp = MLP(model_dim)", "self.mlp = Experts(model_dim)"),
    )


# ------------------------------------------------------------------------------------------------
# Loss


def loss_is(expected):
    """Return a check of the edited head_loss against an expression of logits and targets."""

    def check(run):
        x, weight = torch.randn(5, 8), torch.randn(11, 8)
        targets = torch.tensor([3, 0, 10, 7, 7])
        logits = run.module.softcap(run.module.norm(x) @ weight.T)
        torch.testing.assert_close(
            run.module.head_loss(x, weight, targets), expected(logits, targets)
        )
        return True

    return check


def cross_entropy(logits, targets, **options):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", **options)


@edit(1, loss_is(lambda z, t: cross_entropy(z, t) + 1e-4 * z.logsumexp(-1).square().sum()))
def z_loss(source):
    return patch(source, ("(log_sum - torch", "(log_sum + 1e-4 * log_sum.square() - torch"))


@edit(1, loss_is(lambda z, t: cross_entropy(z, t, label_smoothing=0.1)))
def label_smoothing(source):
    line = "    return (log_sum - torch.where(is_target, logits, 0).sum(dim=-1)).sum()\n"
    smooth = '    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)\n'
    return patch(source, (line, smooth))


@edit(2, loss_is(cross_entropy))
def no_softcap(source):
    cap = "    return 2 * SOFTCAP * torch.sigmoid(logits.float() * (2 / SOFTCAP)) - SOFTCAP\n"
    sums = "logits.exp().sum(dim=-1).log()  # SOFTCAP bounds it: no maximum is needed\n"
    return patch(source, (cap, "    return logits.float()\n"), (sums, "logits.logsumexp(dim=-1)\n"))


@edit(5, lambda run: run.model.second.weight.any())
def second_target(source):
    apply = "SlicedLoss.apply(x, self.lm_head.weight, targets, self.loss_and_grads)\n"
    second = "SlicedLoss.apply(x, self.lm_head.weight, targets[:, 1:], self.loss_and_grads)\n"
    head = "            self.lm_head = Linear(model_dim, vocab_size, std=0)\n"
    layer = "            self.second = Linear(model_dim, model_dim, std=model_dim**-0.5)\n"
    return patch(
        source,
        (head, head + layer),
        (
            "        return " + apply,
            "        loss = " + apply + "        x = self.second(x[:, :-1])\n"
            "        return loss + " + second,
        ),
        ('parts[0] == "blocks"', 'parts[0] in ("blocks", "second")'),
    )


# ------------------------------------------------------------------------------------------------
# Sizes


@edit(1, lambda run: run.shapes[0] == (2, SEQ_LEN // 2) and len(run.shapes) == NUM_BATCHES)
def half_the_context(source):
    return patch(source, ("    seq_len = context  #", "    seq_len = context // 2  #"))


@edit(1, lambda run: run.summary["num_steps"] == 4 and run.shapes[0] == (2, SEQ_LEN))
def batch_doubled_half_way(source):
    zero = "        loss_sum.zero_()\n"
    double = "        passes_a_step = rows_a_step // rows * (2 if progress >= 0.5 else 1)\n"
    return patch(source, (zero, zero + double))


def constants(**values):
    """Return the edit that gives hyperparameters other values."""

    def change(source):
        for name, value in values.items():
            # The line that holds without CUDA: the indented one where there are two
            *_, line = re.finditer(rf"(?m)^( *){name} = .*$", source)
            changed = f"{line[1]}{name} = {value!r}"
            source = source[: line.start()] + changed + source[line.end() :]
        return source

    return change


EDITS |= {
    "half_the_batch": (
        constants(TOTAL_BATCH_SIZE=SEQ_LEN),
        1,
        lambda run: run.shapes[0] == (1, SEQ_LEN) and run.summary["num_steps"] == NUM_BATCHES,
    ),
    "three_short_layers": (
        constants(DEPTH=3, WINDOW_PATTERN="S"),
        2,
        lambda run: run.model.windows == [int(SEQ_LEN * run.module.SHORT_WINDOW)] * 3,
    ),
} | {
    f"depth_{depth}": (
        constants(DEPTH=depth),
        1,
        lambda run: len(run.model.blocks) == run.summary["depth"] == run.module.DEPTH,
    )
    for depth in (1, 3, 12)
}


# ------------------------------------------------------------------------------------------------
# Optimizer, schedule, loop

MUON = "Muon(matrices, MATRIX_LR, muon_momentum(0), WEIGHT_DECAY, MUON_BETA2, compiled)"


@edit(1)
def gradient_clipping(source):
    at = "        progress = loader.progress\n"
    return patch(
        source, (at, "        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n" + at)
    )


def averaged(run):
    average, *weights = [params["wte.weight"] for params in run.history]
    for weight in weights:
        average = average.lerp(weight, 0.3)
    return len(weights) == NUM_BATCHES and torch.allclose(run.model.wte.weight, average)


@edit(4, averaged)
def weights_averaged(source):
    step = "        step += 1\n"
    score = '    with torch.compiler.set_stance("eager_on_recompile"):\n        bpb'
    return patch(
        source,
        (
            "    # Training\n",
            "    # Training\n    params = [p.detach() for p in model.parameters()]\n"
            "    average = [p.clone() for p in params]\n",
        ),
        (step, "        torch._foreach_lerp_(average, params, 0.3)\n" + step),
        (score, "    torch._foreach_copy_(params, average)\n" + score),
    )


@edit(15, lambda run: type(run.optimizers[1]).__name__ == "Lion")
def lion_for_the_matrices(source):
    lion = """class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = m.lerp(p.grad, 0.1).sign()
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
                m.lerp_(p.grad, 0.01)


"""
    return patch(
        source,
        ("def make_optimizers(", lion + "def make_optimizers("),
        (MUON, "Lion(matrices, 3e-4, weight_decay=WEIGHT_DECAY)"),
    )


@edit(1, lambda run: type(run.optimizers[1]) is torch.optim.AdamW)
def adamw_for_the_matrices(source):
    return patch(source, (MUON, "torch.optim.AdamW(matrices, 3e-3, ADAM_BETAS)"))


@edit(4, lambda run: run.module.lr_multiplier(0.5) == pytest.approx(0.5))
def cosine_schedule(source):
    return patch(
        source,
        (
            "    if progress <= 1 - WARMDOWN_RATIO:\n"
            "        return 1.0\n"
            "    left = (1 - progress) / WARMDOWN_RATIO\n"
            "    return left + (1 - left) * FINAL_LR_FRAC\n",
            "    return 0.5 + 0.5 * math.cos(math.pi * progress)\n",
        ),
    )


# ------------------------------------------------------------------------------------------------
# The drill


def test_shipped_text_runs(tiny, monkeypatch):
    run = run_text(SOURCE, monkeypatch)
    assert run.summary["num_steps"] == len(run.shapes) == NUM_BATCHES


@pytest.mark.parametrize("name", EDITS)
def test_edit(name, tiny, monkeypatch):
    function, lines, check = EDITS[name]
    source = function(SOURCE)
    assert lines_touched(SOURCE, source) == lines
    run = run_text(source, monkeypatch)
    assert 0 < run.summary["val_bpb"] < 20
    params = dict(run.model.named_parameters())
    assert sum(run.model.num_params().values()) == sum(p.numel() for p in params.values())
    still = [name for name, p in params.items() if torch.equal(p, run.history[0][name])]
    assert not still, "what is made is trained"
    assert check(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as shipped", "unet_skips", "mixture_of_experts"])
def test_nothing_is_compiled_after_warm_up(name, tiny, monkeypatch):
    """As for a CPU, all but the code generation; each block one graph, shared where it is alike."""
    compile_, set_stance, at_batch = torch.compile, torch.compiler.set_stance, []

    def compiler(function, options, **more):
        return compile_(function, backend="aot_eager", fullgraph=True, **more)

    def strict_stance(stance):
        """Let a model that its warm-up has not seen fail in evaluation, instead of run eagerly."""
        return set_stance("fail_on_recompile" if at_batch else stance)

    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch.compiler, "set_stance", strict_stance)
    source = SOURCE if name == "as shipped" else EDITS[name][0](SOURCE)
    source = constants(DEPTH=6)(source)
    run = run_text(
        source,
        monkeypatch,
        compiler,
        lambda number: at_batch.append(counters["stats"]["unique_graphs"]),
    )
    assert len(at_batch) == NUM_BATCHES
    assert set(at_batch) == {counters["stats"]["unique_graphs"]}
    # Blocks with and without a value embedding, the loss of a full slice and of the rest
    assert at_batch[0] == 2 + 2
    assert len(run.model.blocks) == 6
    torch.compiler.reset()


def test_forgotten_parameter_is_named(tiny, monkeypatch):
    """A matrix outside the blocks: nothing says how it is trained."""
    anchor = "            self.lm_head = Linear(model_dim, vocab_size, std=0)\n"
    line = "            self.second = Linear(model_dim, model_dim, std=0.02)\n"
    with pytest.raises(SystemExit, match=r"second\.weight"):
        run_text(patch(SOURCE, (anchor, anchor + line)), monkeypatch)


def test_forgotten_init_is_an_error(tiny, monkeypatch):
    source = patch(SOURCE, ("Linear(4 * model_dim, model_dim, std=0)", "Linear(4, model_dim)"))
    with pytest.raises(TypeError, match="std"):
        run_text(source, monkeypatch)
