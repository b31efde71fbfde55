"""evaluate_bpb: what it measures, and what it refuses."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import make_cache

import prepare

T, NUM_ROWS, V = 64, 40, 320  # short rows and a small vocabulary, to look at every position


@pytest.fixture(scope="module")
def small_cache(corpus, tmp_path_factory):
    texts = {split: documents[:1000] for split, documents in corpus.items()}
    folder = tmp_path_factory.mktemp("small")
    return make_cache(folder, texts, VOCAB_SIZE=V, MAX_SEQ_LEN=T, EVAL_TOKENS=T * NUM_ROWS)


@pytest.fixture(autouse=True)
def contract(small_cache, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE_DIR", small_cache)
    monkeypatch.setattr(prepare, "VOCAB_SIZE", V)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", T)
    monkeypatch.setattr(prepare, "PROBE_ROWS", T)  # a cut at every position of these short rows
    monkeypatch.setattr(prepare, "EVAL_TOKENS", T * NUM_ROWS)


@pytest.fixture
def tokenizer(contract):
    return prepare.Tokenizer.from_directory()


class Causal(nn.Module):
    """A random causal model: every layer mixes in the mean of all tokens up to here."""

    def __init__(self, vocab_size, dtype=torch.float32, seed=0, scale=3.0):
        super().__init__()
        torch.manual_seed(seed)
        self.wte, self.lm_head = nn.Embedding(vocab_size, 32), nn.Linear(32, vocab_size)
        self.to(dtype)
        self.scale = scale

    def hidden(self, x):
        x = self.wte(x)
        count = torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None]
        return torch.tanh(x + x.cumsum(1) / count)

    def forward(self, inputs):
        return self.scale * self.lm_head(self.hidden(inputs))


class Uniform(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, inputs):
        return torch.zeros(*inputs.shape, self.vocab_size)


def held_out(tokenizer, split="val"):
    return next(prepare.make_dataloader(tokenizer, NUM_ROWS, T, split, "cpu"))


def bpb(model, tokenizer, batch_size=8, split="val"):
    return prepare.evaluate_bpb(model, tokenizer, batch_size, split)


def by_hand(model, tokenizer, split="val"):
    """Bits per byte, a loop over positions in float64, from the bytes that decoding gives."""
    inputs, targets = held_out(tokenizer, split)
    log_p = F.log_softmax(model(inputs).double(), dim=-1)
    nats, num_bytes = 0.0, 0
    for b in range(inputs.size(0)):
        for t in range(inputs.size(1)):
            token = targets[b, t].item()
            if token < tokenizer.bos_token_id:
                nats -= log_p[b, t, token].item()
                num_bytes += len(tokenizer.encoding.decode_single_token_bytes(token))
    return nats / math.log(2) / num_bytes


# ------------------------------------------------------------------------------------------------
# The number


@pytest.mark.parametrize("split", ["val", "test"])
def test_uniform_model_is_analytic(tokenizer, split):
    _, targets = held_out(tokenizer, split)
    scored = targets[targets < tokenizer.bos_token_id].tolist()
    assert 0 < len(scored) < targets.numel()  # some are special and count in neither sum
    num_bytes = sum(len(tokenizer.encoding.decode_single_token_bytes(t)) for t in scored)
    expected = len(scored) * math.log2(tokenizer.vocab_size) / num_bytes
    assert bpb(Uniform(tokenizer.vocab_size), tokenizer, split=split) == pytest.approx(expected)


def test_random_model_equals_a_loop(tokenizer):
    model = Causal(tokenizer.vocab_size)
    assert bpb(model, tokenizer) == pytest.approx(by_hand(model, tokenizer), rel=1e-6)


def test_certainty_costs_nothing_and_doubt_costs_one_bit(tokenizer):
    class Oracle(nn.Module):  # knows val by heart; half of its mass is on a wrong token
        def forward(self, inputs):
            answers = torch.cat([inputs[:, 1:], last[: len(inputs)]], dim=1)
            logits = torch.full((*inputs.shape, tokenizer.vocab_size), -50.0)
            logits.scatter_(2, answers[..., None], 0.0)
            return logits.scatter_(2, (answers[..., None] + 1) % tokenizer.vocab_size, 0.0)

    inputs, targets = held_out(tokenizer)
    last = targets[:, -1:]
    num_bytes = tokenizer.token_bytes[targets]
    scores = prepare.score_batch(Oracle(), inputs, targets, tokenizer.vocab_size)
    assert scores[0].sum().item() == pytest.approx(targets.numel() * math.log(2), rel=1e-5)
    assert num_bytes.sum() > targets.numel()  # so that a bit a token is less than a bit a byte


@pytest.mark.parametrize("batch_size", [1, 7, 16, 39, 40, 1000])
def test_same_rows_at_every_batch_size(tokenizer, batch_size):
    model = Causal(tokenizer.vocab_size)
    reference = bpb(model, tokenizer, batch_size=8)
    assert bpb(model, tokenizer, batch_size) == pytest.approx(reference, rel=1e-6)


def test_slices_do_not_change_the_scores(tokenizer, monkeypatch):
    model, (inputs, targets) = Causal(tokenizer.vocab_size), held_out(tokenizer)
    whole = prepare.score_batch(model, inputs, targets, tokenizer.vocab_size)
    monkeypatch.setattr(prepare, "SCORE_TOKENS", 77)
    sliced = prepare.score_batch(model, inputs, targets, tokenizer.vocab_size)
    torch.testing.assert_close(sliced, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_no_false_alarm(tokenizer, dtype, seed):
    model = Causal(tokenizer.vocab_size, dtype, seed, scale=[1, 3, 10, 30][seed])
    assert bpb(model, tokenizer) == pytest.approx(by_hand(model, tokenizer), rel=1e-5)


def test_no_false_alarm_for_attention(tokenizer):
    class Attention(Causal):
        def hidden(self, x):
            q = self.wte(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]

    for dtype in (torch.float32, torch.bfloat16):
        model = Attention(tokenizer.vocab_size, dtype)
        assert bpb(model, tokenizer) == pytest.approx(by_hand(model, tokenizer), rel=1e-3)


def test_view_on_a_shared_buffer_is_scored_rightly(tokenizer):
    class Shared(Causal):
        buffer = torch.empty(NUM_ROWS, T, tokenizer.vocab_size)

        def forward(self, inputs):
            view = self.buffer[: len(inputs)]
            return view.copy_(super().forward(inputs))

    expected = by_hand(Causal(tokenizer.vocab_size), tokenizer)
    assert bpb(Shared(tokenizer.vocab_size), tokenizer) == pytest.approx(expected, rel=1e-6)


def test_evaluation_mode_and_gradients(tokenizer):
    class Watched(Causal):
        def forward(self, inputs):
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(inputs)

    model = Watched(tokenizer.vocab_size).train()
    bpb(model, tokenizer)
    assert model.training


# ------------------------------------------------------------------------------------------------
# Models that look ahead


class Peeking(Causal):
    """Gives the next token away where `where` says so; `how` is how the token gets there."""

    def __init__(self, vocab_size, where, how="next", shared=False):
        super().__init__(vocab_size)
        self.where, self.how = where, how
        self.buffer = torch.empty(NUM_ROWS, T, vocab_size) if shared else None

    def forward(self, inputs):
        logits, length = super().forward(inputs), inputs.size(1)
        if self.how == "next":
            hint = F.one_hot(inputs.roll(-1, 1), logits.size(-1)) * 5.0
            hint[:, -1] = 0  # nothing is later than the last token
        elif self.how == "far":  # the token after the next
            hint = F.one_hot(inputs.roll(-2, 1), logits.size(-1)) * 5.0
            hint[:, -2:] = 0
        elif self.how == "row":
            hint = self.lm_head(self.wte(inputs)).mean(dim=1, keepdim=True)
        elif self.how == "batch":
            hint = self.lm_head(self.wte(inputs)).mean(dim=0, keepdim=True)
        mask = torch.tensor([self.where(t, length) for t in range(length)])
        logits = logits + hint * mask[:, None]
        if self.buffer is None:
            return logits
        return self.buffer[: len(inputs)].copy_(logits)


PEEKS = {
    "everywhere": (lambda t, n: True, "next"),
    "first half": (lambda t, n: t < n // 2, "next"),
    "second half": (lambda t, n: t >= n // 2, "next"),
    **{f"every fourth, {p}": (lambda t, n, p=p: t % 4 == p, "next") for p in range(4)},
    **{f"every sixteenth, {p}": (lambda t, n, p=p: t % 16 == p, "next") for p in range(16)},
    "last position": (lambda t, n: t == n - 2, "next"),
    "first position": (lambda t, n: t == 0, "next"),
    "one in the middle": (lambda t, n: t == 29, "next"),
    "the token after the next": (lambda t, n: True, "far"),
    "row mean": (lambda t, n: True, "row"),
    "batch mean": (lambda t, n: True, "batch"),
}


@pytest.mark.parametrize("name", PEEKS)
@pytest.mark.parametrize("batch_size", [3, 32])
def test_peeking_is_refused(tokenizer, name, batch_size):
    with pytest.raises(prepare.ContractError, match="not causal"):
        bpb(Peeking(tokenizer.vocab_size, *PEEKS[name]), tokenizer, batch_size)


def test_peeking_through_a_shared_buffer_is_refused(tokenizer):
    with pytest.raises(prepare.ContractError, match="not causal"):
        bpb(Peeking(tokenizer.vocab_size, *PEEKS["everywhere"], shared=True), tokenizer)


@pytest.mark.parametrize("phase", range(16))
@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_cuts_are_spread_over_a_row_of_full_length(length, phase, monkeypatch):
    """A stand-in of two tokens that sees the next one at every sixteenth position of full rows."""

    class Narrow(nn.Module):
        def forward(self, inputs):
            later = inputs.roll(-1, 1) * (torch.arange(length) % 16 == phase)
            later[:, -1] = 0
            return torch.stack([torch.zeros(later.shape), later.float()], dim=-1)

    monkeypatch.setattr(prepare, "PROBE_ROWS", prepare.SHIPPED["PROBE_ROWS"])
    inputs = torch.randint(2, (4, length), generator=torch.Generator().manual_seed(phase))
    scores = prepare.score_batch(Narrow(), inputs, inputs, 2)
    with pytest.raises(prepare.ContractError, match="not causal"):
        prepare.check_causality(Narrow(), {}, inputs, inputs, 2, scores)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 64, 512, 513, 2048])
def test_rows_of_any_length_can_be_probed(length):
    model, inputs = Causal(11), torch.randint(11, (3, length))
    scores = prepare.score_batch(model, inputs, inputs, 11)
    state = prepare.copy_state(model)
    prepare.check_causality(model, state, inputs, inputs, 11, scores)


# ------------------------------------------------------------------------------------------------
# Models that return something else


def spoiled(change):
    class Spoiled(Causal):
        def forward(self, inputs):
            return change(super().forward(inputs), inputs)

    return Spoiled


def put(value):
    def change(logits, inputs):
        logits[1, 2, 3] = value
        return logits

    return change


OTHER = {
    "a loss": (lambda x, _: x.mean(), "shape"),
    "a loss a token": (lambda x, _: x.mean(dim=-1), "shape"),
    "losses, in a tuple": (lambda x, _: (x, x.mean()), "tuple"),
    "None": (lambda x, _: None, "NoneType"),
    "a number": (lambda x, _: 1.0, "float"),
    "numpy": (lambda x, _: x.numpy(), "shape|ndarray"),
    "fewer tokens": (lambda x, _: x[..., :-1], "shape"),
    "more tokens": (lambda x, _: F.pad(x, (0, 1)), "shape"),
    "flat": (lambda x, _: x.flatten(0, 1), "shape"),
    "the last position only": (lambda x, _: x[:, -1:], "shape"),
    "rows left out": (lambda x, _: x[:-1], "shape"),
    "one NaN": (put(math.nan), "finite"),
    "one +inf": (put(math.inf), "finite"),
    "one -inf": (put(-math.inf), "finite"),
}


@pytest.mark.parametrize("name", OTHER)
def test_anything_but_finite_logits_is_refused(tokenizer, name):
    change, message = OTHER[name]
    with pytest.raises(prepare.ContractError, match=message) as error:
        bpb(spoiled(change)(tokenizer.vocab_size), tokenizer)
    assert "\n" not in str(error.value)


def test_nan_in_the_last_batch_alone_is_refused(tokenizer):
    held_inputs, _ = held_out(tokenizer)

    def change(logits, inputs):
        if torch.equal(inputs[-1], held_inputs[-1]):
            logits[-1, -1, 0] = math.nan
        return logits

    with pytest.raises(prepare.ContractError, match="finite"):
        bpb(spoiled(change)(tokenizer.vocab_size), tokenizer)


def test_half_precision_is_allowed(tokenizer):
    half = spoiled(lambda x, _: x.half())(tokenizer.vocab_size)
    assert bpb(half, tokenizer) == pytest.approx(by_hand(half, tokenizer), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Models that learn from what they are scored on

ENOUGH_CALLS = 4  # the first batch and the causality probe are over by then
CHEAT_BATCH = 4  # rows


class Learner(Causal):
    """A random causal model that learns: every call ends with learn(inputs, logits).

    Nothing of it shows before `patience` calls, so that the causality probe meets an honest model.
    """

    def __init__(self, vocab_size, patience=ENOUGH_CALLS):
        super().__init__(vocab_size)
        self.num_calls = 0
        self.patience = patience

    def forward(self, inputs):
        logits = self.predict(inputs)
        self.num_calls += 1
        self.learn(inputs)
        return logits

    def predict(self, inputs):
        return super().forward(inputs)

    def learn(self, inputs):
        pass


class BigramCounter(Learner):
    """Counts the bigrams of the rows it has scored, and predicts the next batches with them."""

    def __init__(self, vocab_size, patience=ENOUGH_CALLS):
        super().__init__(vocab_size, patience)
        self.counts = torch.zeros(vocab_size, vocab_size)  # no buffer: the evaluator cannot see it

    def predict(self, inputs):
        logits = super().predict(inputs)
        if self.num_calls < self.patience:
            return logits
        counts = self.counts[inputs] + 0.5 * logits.softmax(dim=-1)
        return (counts / counts.sum(dim=-1, keepdim=True)).log()

    def learn(self, inputs):
        ones = torch.ones(inputs[:, 1:].numel())
        pairs = (inputs[:, :-1].flatten(), inputs[:, 1:].flatten())
        self.counts.index_put_(pairs, ones, accumulate=True)


class TestTimeTraining(Learner):
    """Takes a step of gradient descent on every batch that it has scored."""

    __test__ = False  # no test class of pytest

    def learn(self, inputs):
        if self.num_calls < self.patience:
            return
        with torch.enable_grad():
            logits = Causal.forward(self, inputs)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
            (grad,) = torch.autograd.grad(loss, [self.lm_head.bias])
        self.lm_head.bias.data -= 3 * grad  # .data: no version counter sees it


class RunningMean(Learner):
    """Keeps a running mean of its logits in a buffer and subtracts it, as BatchNorm might."""

    def __init__(self, vocab_size, patience=ENOUGH_CALLS):
        super().__init__(vocab_size, patience)
        self.register_buffer("mean", torch.zeros(vocab_size), persistent=False)

    def predict(self, inputs):
        return super().predict(inputs) - self.mean

    def learn(self, inputs):
        self.mean.lerp_(super().predict(inputs).mean(dim=(0, 1)), 1e-6)  # too slow for the probe


class CallCounter(Learner):
    """Counts its calls in a buffer, which changes no logit."""

    def __init__(self, vocab_size, patience=ENOUGH_CALLS):
        super().__init__(vocab_size, patience)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def learn(self, inputs):
        self.num_batches_tracked += 1


class Colder(Learner):
    """Grows surer from call to call."""

    def predict(self, inputs):
        late = max(self.num_calls - self.patience, 0)
        return super().predict(inputs) * (1 + 0.01 * late)


class Memory(Learner):
    """Remembers every row that it was given, and knows its tokens when the row comes again."""

    def __init__(self, vocab_size, patience=ENOUGH_CALLS):
        super().__init__(vocab_size, patience)
        self.rows = set()

    def predict(self, inputs):
        logits = super().predict(inputs)
        for row, tokens in enumerate(inputs.tolist()):
            if tuple(tokens) in self.rows:
                logits[row, :-1] += 9 * F.one_hot(inputs[row, 1:], logits.size(-1))
        return logits

    def learn(self, inputs):
        self.rows.update(map(tuple, inputs.tolist()))


class Dropout(Learner):
    """Leaves dropout on in evaluation."""

    def predict(self, inputs):
        return F.dropout(super().predict(inputs), 0.1, training=True)


class NewWeights(Learner):
    """Puts new parameters in the place of the old ones."""

    def learn(self, inputs):
        if self.num_calls == self.patience + 2:  # the first rows were scored before
            self.lm_head = nn.Linear(32, self.lm_head.out_features)


class OneMoreParameter(Learner):
    """Gains a parameter that changes no logit."""

    def learn(self, inputs):
        if self.num_calls == self.patience + 2:
            self.extra = nn.Parameter(torch.zeros(1))


LEARNERS = {  # and what the refusal names
    BigramCounter: "scored again",
    TestTimeTraining: "lm_head.bias",
    RunningMean: "mean",
    CallCounter: "num_batches_tracked",
    Colder: "scored again",
    Memory: "scored again",
    Dropout: "scored again",
    NewWeights: "lm_head",
    OneMoreParameter: "extra",
}


@pytest.mark.parametrize("patience", [0, ENOUGH_CALLS])
@pytest.mark.parametrize("kind", LEARNERS, ids=lambda kind: kind.__name__)
def test_model_that_learns_while_it_is_scored_is_refused(tokenizer, monkeypatch, kind, patience):
    monkeypatch.setattr(prepare, "PROBE_ROWS", 2 * CHEAT_BATCH)
    with pytest.raises(prepare.ContractError, match="evaluation is no training") as error:
        bpb(kind(tokenizer.vocab_size, patience), tokenizer, CHEAT_BATCH)
    assert LEARNERS[kind] in str(error.value)
    assert "\n" not in str(error.value)


def test_counting_bigrams_would_pay(tokenizer, monkeypatch):
    """Without the second look the cheat would get a better number than the same model honestly."""
    monkeypatch.setattr(prepare, "PROBE_ROWS", 2 * CHEAT_BATCH)
    honest = bpb(Causal(tokenizer.vocab_size), tokenizer, CHEAT_BATCH)
    monkeypatch.setattr(prepare, "check_unchanged", lambda *args: None)
    cheat = bpb(BigramCounter(tokenizer.vocab_size), tokenizer, CHEAT_BATCH)
    assert cheat < 0.95 * honest


def test_evaluation_leaves_the_model_as_it_was(tokenizer):
    model = Causal(tokenizer.vocab_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bpb(model, tokenizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("seed", range(100))
def test_no_honest_model_is_refused(tokenizer, monkeypatch, seed):
    """Random models of three dtypes, at batch sizes from 1 to 128, the last batch often short."""
    monkeypatch.setattr(prepare, "PROBE_ROWS", 8)
    dtype = [torch.float32, torch.bfloat16, torch.float16][seed % 3]
    model = Causal(tokenizer.vocab_size, dtype, seed, scale=1 + seed % 30)
    batch_size = [1, 3, 7, 16, 39, 64, 128][seed % 7]
    assert 0 < bpb(model, tokenizer, batch_size) < 200


def test_odd_state_is_no_change(tokenizer):
    """NaN that nothing reads, an empty buffer, a scalar, an expanded one, tied weights, a mask."""
    model = Causal(tokenizer.vocab_size)
    model.register_buffer("unused", torch.tensor([math.nan, 1.0]))
    model.register_buffer("empty", torch.zeros(0, 3), persistent=False)
    model.register_buffer("scalar", torch.tensor(True))
    model.register_buffer("expanded", torch.zeros(1, 3).expand(5, 3))
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    model.tied = model.wte
    expected = by_hand(model, tokenizer)
    assert bpb(model, tokenizer) == pytest.approx(expected, rel=1e-6)


def test_buffers_made_when_first_needed_are_no_change(tokenizer):
    """As tables of the length at hand are, and masks of the batch at hand: the last is short."""

    class Lazy(Causal):
        def forward(self, inputs):
            if getattr(self, "mask", torch.zeros(0)).shape != inputs.shape:
                self.register_buffer("mask", torch.ones(inputs.shape))
            return super().forward(inputs) * self.mask[..., None]

    model = Causal(tokenizer.vocab_size)
    lazy = Lazy(tokenizer.vocab_size)
    assert bpb(lazy, tokenizer, 16) == pytest.approx(bpb(model, tokenizer, 16), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_is_not_refused(tokenizer, dtype):
    model = Causal(tokenizer.vocab_size, dtype)
    compiled = torch.compile(model, dynamic=False)
    assert bpb(compiled, tokenizer, 16) == pytest.approx(by_hand(model, tokenizer), rel=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_of_every_size_have_the_strides_of_a_tensor_of_their_own(tokenizer, batch_size):
    """A stride that changes with the batch size would make the model compile anew."""
    for split in ("train", "val"):
        loader = prepare.make_dataloader(tokenizer, batch_size, T, split, "cpu")
        inputs, targets = next(loader)
        assert inputs.stride() == targets.stride() == (T, 1)
        assert inputs.storage_offset() == targets.storage_offset() == 0
    seen = []

    class Watched(Causal):
        def forward(self, inputs):
            seen.append(inputs.stride())
            return super().forward(inputs)

    bpb(Watched(tokenizer.vocab_size), tokenizer, batch_size)
    assert set(seen) == {(T, 1)}


# ------------------------------------------------------------------------------------------------
# The clock and the constants


def test_training_on_after_the_end_is_refused(tokenizer, clock):
    hoard = []
    for batch in prepare.make_dataloader(tokenizer, 2, T, "train", "cpu"):
        hoard.append(batch)
        clock.now += 0.4 * prepare.TIME_BUDGET
    assert len(hoard) == 3
    model = Uniform(tokenizer.vocab_size)
    clock.now += 0.9 * prepare.MAX_IDLE
    bpb(model, tokenizer)  # soon after the end: allowed
    clock.now += 0.2 * prepare.MAX_IDLE  # training on with the hoard
    with pytest.raises(prepare.ContractError, match="after the training time was over"):
        bpb(model, tokenizer)


def test_a_last_batch_that_takes_long_is_no_idling(tokenizer, clock):
    assert 2 * prepare.MAX_IDLE < prepare.TIME_BUDGET
    next(prepare.make_dataloader(tokenizer, 2, T, "train", "cpu"))
    clock.now += 2 * prepare.MAX_IDLE  # and TIME_BUDGET is not over
    assert bpb(Uniform(tokenizer.vocab_size), tokenizer) > 0


def clock_line(capsys):
    """Return tokens and seconds of the one line that the clock prints."""
    (line,) = re.findall(r"(?m)^clock: (\d+) tokens in (\d+\.\d) seconds$", capsys.readouterr().out)
    return int(line[0]), float(line[1])


def test_the_clock_counts_the_tokens_that_it_handed_out(tokenizer, clock, capsys):
    """Of every loader of the process, training rows alone; seconds up to the end of the data."""
    first = prepare.make_dataloader(tokenizer, 3, T, "train", "cpu")
    second = prepare.make_dataloader(tokenizer, 5, T, "train", "cpu")
    held_out(tokenizer)
    for loader in (first, first, second):
        next(loader)
        clock.now += 7.3
    bpb(Uniform(tokenizer.vocab_size), tokenizer)
    assert clock_line(capsys) == ((3 + 3 + 5) * T, 21.9)
    clock.now += prepare.TIME_BUDGET
    assert list(first) == []
    clock.now += 5  # after the data has ended
    bpb(Uniform(tokenizer.vocab_size), tokenizer)
    assert clock_line(capsys) == ((3 + 3 + 5) * T, 21.9 + prepare.TIME_BUDGET)


def test_changed_constants_are_named_in_the_log(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "TIME_BUDGET", 301)
    monkeypatch.setattr(prepare, "PROBE_ROWS", 1)
    bpb(Uniform(tokenizer.vocab_size), tokenizer)
    lines = capsys.readouterr().out.splitlines()
    assert "contract changed: TIME_BUDGET is 301, shipped as 300" in lines
    assert any(line.startswith("contract changed: PROBE_ROWS is 1,") for line in lines)
    assert not any("HARD_LIMIT" in line or "SEED" in line for line in lines)


def test_unchanged_constants_are_not_named(tokenizer, monkeypatch, capsys):
    shipped = {name: getattr(prepare, name) for name in prepare.SHIPPED}
    monkeypatch.setattr(prepare, "SHIPPED", shipped)
    bpb(Uniform(tokenizer.vocab_size), tokenizer)
    assert capsys.readouterr().out == ""


def test_all_constants_are_values_that_cannot_change_in_place():
    for name, value in prepare.SHIPPED.items():
        hash(value)
        assert not isinstance(value, np.ndarray), name
    assert {"TIME_BUDGET", "EVAL_TOKENS", "MAX_IDLE", "SEED", "MAX_SEQ_LEN"} <= set(prepare.SHIPPED)
