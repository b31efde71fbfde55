"""The canvas of autoresearch: a GPT, its optimizer, its training loop. The agent edits this file.

    uv run train.py > run.log 2>&1

The sizes for a GPU are the published ones. What this file reaches stands in README.md, "Measured".

Sections: hyperparameters, attention, model, optimizer, schedules, device, main. What an experiment
may not touch (data, tokenizer, clock, metric, seed) comes from prepare.py.

Shapes: B rows, T tokens of context, C model_dim, H heads, D head_dim, V vocabulary.
"""

import ctypes
import functools
import gc
import logging
import math
import sys
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from kernels import get_local_kernel
from torch._functorch import config as functorch_config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import prepare

# --- Hyperparameters ------------------------------------------------------------------------------

DEPTH = 8  # layers; the main size knob
ASPECT_RATIO = 64  # model_dim = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128  # channels per head
WINDOW_PATTERN = "SSSL"  # S: short, L: the full context; cycled over the layers, ends on its last
SHORT_WINDOW = 1 / 2  # share of the context that a short window covers
SOFTCAP = 15  # logits stay between -SOFTCAP and SOFTCAP; under 80, see head_loss
LOSS_SLICE = 2**14  # tokens whose logits are in memory at once
ROPE_BASE = 10_000  # of the rotary embedding; larger for long contexts
GATE_CHANNELS = 32  # of the residual stream that decide how much of a value embedding is added
SHIFT_KEYS = False  # whether layers with the full context look for a token by the one before it

TOTAL_BATCH_SIZE = 2**19  # tokens per optimizer step, in whole rows
DEVICE_BATCH_SIZE = 128  # rows per forward pass, at most; fewer are taken where memory is short

EMBEDDING_LR = 0.6  # AdamW: all embedding tables, at model_dim 768
UNEMBEDDING_LR = 0.004  # AdamW: lm_head, at model_dim 768
MATRIX_LR = 0.04  # Muon: matrices in the blocks
SCALAR_LR = 0.5  # AdamW: x0_lambda; a hundredth of it for all other scalars and vectors
WEIGHT_DECAY = 0.2  # Muon, cautious, falling to 0
ADAM_BETAS = (0.8, 0.95)  # decay of the first and second moment
X0_BETAS = (0.96, 0.95)  # the same for x0_lambda
MUON_MOMENTUM = (0.85, 0.95)  # at the first step, and after MUON_MOMENTUM_STEPS
MUON_MOMENTUM_STEPS = 300
MUON_BETA2 = 0.95  # decay of Muon's second moment

WARMUP_RATIO = 0.0  # share of the time budget in which the rates rise
WARMDOWN_RATIO = 0.5  # share of the time budget in which they fall
FINAL_LR_FRAC = 0.0  # what is left of the rates at the end

ON_CUDA = torch.cuda.is_available()

if not ON_CUDA:  # a CPU or Apple silicon: what differs from the above, tuned on 2 CPU cores
    DEPTH = 2
    ASPECT_RATIO = 96
    HEAD_DIM = 192  # the whole model_dim: one head
    WINDOW_PATTERN = "SL"
    SHORT_WINDOW = 1 / 16
    LOSS_SLICE = 512
    SHIFT_KEYS = True
    TOTAL_BATCH_SIZE = 2**13
    DEVICE_BATCH_SIZE = 4
    EMBEDDING_LR = 0.2
    MATRIX_LR = 0.03

# --- Attention ------------------------------------------------------------------------------------


def first_line(error):
    """Return the kind of an error and the first line of its message."""
    message, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {message}"


def choose_attention(device):
    """Return "flash-attn3" or "flex" for a GPU, "blocked" elsewhere; print why not the first."""
    if device.type != "cuda":
        return "blocked"
    try:
        capability = torch.cuda.get_device_capability(device)
        if capability[0] != 8 and capability != (9, 0):
            raise RuntimeError(f"not built for compute capability {capability}")
        q = torch.randn(1, 256, 1, HEAD_DIM, device=device, dtype=torch.bfloat16).requires_grad_()
        flash_attention_3()(q, q, q, causal=True, window_size=(64, 0)).sum().backward()
        torch.cuda.synchronize()
        return "flash-attn3"
    except Exception as error:
        print(f"attention: no flash-attn3, using flex: {first_line(error)}")
        return "flex"


@functools.cache
def flash_attention_3():
    """Return flash_attn_func of FlashAttention-3 (Shah et al., arXiv 2407.08608).

    It is a compiled package of the kernels-community organisation on the Hugging Face Hub, which
    prepare.py downloads. Every run executes it, and it may do what you may do. To do without it,
    let choose_attention return "flex" on CUDA: then nothing of it is executed. Raises
    FileNotFoundError if it is not there, or what the package raises.
    """
    folder = prepare.flash_attention_3_folder()
    if not folder.exists():
        raise FileNotFoundError(f"no {folder}: `uv run prepare.py` downloads it")
    logging.getLogger("kernels").setLevel(logging.ERROR)  # it warns of how a package was built
    return get_local_kernel(folder).flash_attn_func


def masked_attention(q, k, v, mask):
    """Attend from q (..., T, H, D) to k, v (..., S, H_kv, D) where the mask is true.

    The mask broadcasts to (..., H_kv, H / H_kv, T, S). The formula is written out, because on a CPU
    torch's flash kernel took half as long again.
    """
    q = q.unflatten(-2, (k.size(-2), -1))  # (..., T, H_kv, H / H_kv, D)
    scores = torch.einsum("...tghd,...sgd->...ghts", q, k) * q.size(-1) ** -0.5
    bias = torch.where(mask, 0.0, -math.inf).to(q.dtype)
    weights = (scores + bias).softmax(dim=-1)
    return torch.einsum("...ghts,...sgd->...tghd", weights, v).flatten(-3, -2)


def attend_by_blocks(q, k, v, window, block_size):
    """Attend in blocks of at least the window, each of them to itself and to the one before it."""
    positions = torch.arange(q.size(1), device=q.device)
    query = positions.view(-1, 1, 1, block_size, 1)
    key = query[..., :1, :] + torch.arange(-block_size, block_size, device=q.device)
    mask = (key >= 0) & (key <= query) & (query - key <= window)  # (blocks, 1, 1, size, 2 size)
    q = q.unflatten(1, (-1, block_size))
    k = k.unflatten(1, (-1, block_size))
    v = v.unflatten(1, (-1, block_size))
    k = torch.cat([k.roll(1, dims=1), k], dim=2)  # what the first block gets here is masked
    v = torch.cat([v.roll(1, dims=1), v], dim=2)
    return masked_attention(q, k, v, mask).flatten(1, 2)


def attend_by_quarters(q, k, v, window):
    """Attend with a quarter of the queries at a time, to the keys that some of them see."""
    T = q.size(1)
    positions = torch.arange(T, device=q.device)
    ago = positions[:, None] - positions
    mask = (ago >= 0) & (ago <= window)
    size = math.ceil(T / 4)
    parts = []
    for start in range(0, T, size):
        queries = slice(start, start + size)
        keys = slice(max(start - window, 0), start + size)
        parts.append(masked_attention(q[:, queries], k[:, keys], v[:, keys], mask[queries, keys]))
    return torch.cat(parts, dim=1)


def blocked_attention(q, k, v, window):
    """Attend in the smallest equal blocks that cover the window, in quarters if none are small."""
    T = q.size(1)
    for block_size in range(max(window, 1), T // 4 + 1):
        if T % block_size == 0:
            return attend_by_blocks(q, k, v, window, block_size)
    return attend_by_quarters(q, k, v, window)


def make_attention(backend, seq_len, window, device):
    """Return causal attention in which a query sees itself and `window` tokens before it.

    The function maps q (B, T, H, D) and k, v (B, T, H_kv, D) to (B, T, H, D), T up to seq_len.
    """
    window = min(window, seq_len)
    if backend == "flash-attn3":
        return functools.partial(flash_attention_3(), causal=True, window_size=(window, 0))
    if backend == "blocked":
        return functools.partial(blocked_attention, window=window)

    def is_seen(b, h, query, key):
        return (key <= query) & (query - key <= window)

    make_mask = functools.partial(create_block_mask, is_seen, None, None, device=device)
    full_mask = make_mask(seq_len, seq_len)

    def flex(q, k, v):
        T = q.size(1)
        mask = full_mask if seq_len == T else make_mask(T, T)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return flex


# --- Model ----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Linear map without bias: weights uniform with this std, cast to the dtype of the input."""

    def __init__(self, in_features, out_features, std):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        if std:
            nn.init.uniform_(self.weight, -math.sqrt(3) * std, math.sqrt(3) * std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def norm(x):
    """RMSNorm over the last dimension, without a gain (Zhang and Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(seq_len, head_dim, device):
    """Return cos and sin of the angles, float32 (2, seq_len, 1, head_dim / 2)."""
    channels = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, ROPE_BASE ** (-channels / head_dim))
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def apply_rotary(x, rotary):
    """Rotate the channel pairs of x (B, T, H, D) by position (Su et al., arXiv 2104.09864)."""
    cos, sin = rotary.unbind(0)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def shift_keys(k):
    """Return keys (B, T, H, D) whose second half of the channels is that of the token before.

    A query can then find a token by what stood before it, in one layer, and copy it. This follows
    the smeared keys of Olsson et al., "In-context Learning and Induction Heads", arXiv 2209.11895,
    without their learned share. Only layers with the full context have it: a layer with a short
    window sometimes did the copying in their place, and saw too little for it.
    """
    own, shifted = k.chunk(2, dim=-1)
    shifted = F.pad(shifted[:, :-1], (0, 0, 0, 0, 1, 0))  # the first token has none before it
    return torch.cat([own, shifted], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with RoPE, QK-norm and, where asked for, gated value embeddings.

    QK-norm: Henry et al., arXiv 2010.04245. Value embeddings: Zhou et al., arXiv 2410.17897.
    """

    def __init__(self, model_dim, n_head, n_kv_head, has_value_embed, shifts_keys, attend):
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_dim = model_dim // n_head
        std = model_dim**-0.5
        self.c_q = Linear(model_dim, n_head * self.head_dim, std)
        self.c_k = Linear(model_dim, n_kv_head * self.head_dim, std)
        self.c_v = Linear(model_dim, n_kv_head * self.head_dim, std)
        self.c_proj = Linear(n_head * self.head_dim, model_dim, std=0)
        self.gate = None
        if has_value_embed:
            self.gate = Linear(min(GATE_CHANNELS, model_dim), n_kv_head, std=0)
        self.shifts_keys = shifts_keys
        self.attend = attend

    def forward(self, x, value_embed, rotary):
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value_embed is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))  # (B, T, H_kv)
            v = v + gate[..., None] * value_embed.view(v.shape)
        if self.shifts_keys:
            k = shift_keys(k)
        # A rotation changes no length: norm first is the same function, and keeps less in memory
        q = apply_rotary(norm(q), rotary)
        k = apply_rotary(norm(k), rotary)
        return self.c_proj(self.attend(q, k, v).reshape(B, T, -1))


class ReluSquared(torch.autograd.Function):
    """The square of relu(x), which keeps its result alone for the backward pass, not x as well."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 2 * y.sqrt() * grad


class MLP(nn.Module):
    """Four times wide, relu squared (So et al., "Primer", arXiv 2109.08668)."""

    def __init__(self, model_dim):
        super().__init__()
        self.c_fc = Linear(model_dim, 4 * model_dim, std=model_dim**-0.5)
        self.c_proj = Linear(4 * model_dim, model_dim, std=0)

    def forward(self, x):
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x.

    x0, the token embedding, is mixed back in before.
    """

    def __init__(self, model_dim, n_head, n_kv_head, **attention_args):
        super().__init__()
        self.resid_lambda = nn.Parameter(torch.tensor(1.0))
        self.x0_lambda = nn.Parameter(torch.tensor(0.1))
        self.attn = Attention(model_dim, n_head, n_kv_head, **attention_args)
        self.mlp = MLP(model_dim)

    def forward(self, x, x0, value_embed, rotary):
        x = self.resid_lambda * x + self.x0_lambda * x0
        x = x + self.attn(norm(x), value_embed, rotary)
        return x + self.mlp(norm(x))


def softcap(logits):
    """Return SOFTCAP * tanh(logits / SOFTCAP) in float32 (Gemma 2, arXiv 2408.00118)."""
    return 2 * SOFTCAP * torch.sigmoid(logits.float() * (2 / SOFTCAP)) - SOFTCAP


def head_loss(x, weight, targets):
    """Return the summed cross-entropy in nats of x (N, C) through lm_head's weight (V, C)."""
    logits = softcap(F.linear(norm(x), weight))
    log_sum = logits.exp().sum(dim=-1).log()  # SOFTCAP bounds it: no maximum is needed
    # Not gather: its derivative would first fill a tensor of the logits' size with zeros
    is_target = torch.arange(logits.size(1), device=x.device) == targets[:, None]
    return (log_sum - torch.where(is_target, logits, 0).sum(dim=-1)).sum()


class SlicedLoss(torch.autograd.Function):
    """Mean of a loss that is a sum over tokens, its gradients computed on the way.

    loss_and_grads is torch.func.grad_and_value of head_loss, or of what takes its place. The logits
    are by far the largest tensor of a batch, so they are made, used and dropped a slice of tokens
    at a time (Wijmans et al., arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, loss_and_grads):
        cast_weight = weight.to(x.dtype)
        flat_x = x.flatten(0, -2)  # (N, C)
        flat_targets = targets.flatten()
        dx = torch.empty_like(flat_x)
        dw = torch.zeros_like(weight, dtype=torch.float)
        loss_sum = torch.zeros((), device=x.device)
        for start in range(0, len(flat_x), LOSS_SLICE):
            part = slice(start, start + LOSS_SLICE)
            grads, loss = loss_and_grads(flat_x[part], cast_weight, flat_targets[part])
            dx[part] = grads[0]
            dw += grads[1]
            loss_sum += loss
        ctx.save_for_backward(dx.view(x.shape), dw)
        return loss_sum / len(flat_x)

    @staticmethod
    def backward(ctx, grad_loss):
        dx, dw = ctx.saved_tensors
        scale = grad_loss / dx[..., 0].numel()
        return dx * scale.to(dx.dtype), dw * scale, None, None


class GPT(nn.Module):
    """Decoder-only transformer; the residual stream has dtype `dtype`, logits are float32."""

    def __init__(
        self, vocab_size, seq_len, depth, model_dim, n_head, n_kv_head, backend, dtype, device
    ):
        super().__init__()
        self.dtype = dtype
        self.windows = layer_windows(WINDOW_PATTERN, depth, seq_len)
        self.loss_and_grads = torch.func.grad_and_value(head_loss, argnums=(0, 1))  # x and weight
        attends = {w: make_attention(backend, seq_len, w, device) for w in set(self.windows)}
        embedded = range((depth - 1) % 2, depth, 2)  # every second layer, the last one included
        table_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        kv_dim = model_dim // n_head * n_kv_head
        bound = math.sqrt(3 / model_dim)
        with device:
            self.wte = nn.Embedding(vocab_size, model_dim, dtype=table_dtype)  # drawn from N(0, 1)
            self.lm_head = Linear(model_dim, vocab_size, std=0)
            nn.init.normal_(self.lm_head.weight, std=0.001)
            self.blocks = nn.ModuleList(
                Block(
                    model_dim,
                    n_head,
                    n_kv_head,
                    has_value_embed=i in embedded,
                    shifts_keys=SHIFT_KEYS and window == seq_len,
                    attend=attends[window],
                )
                for i, window in enumerate(self.windows)
            )
            self.value_embeds = nn.ModuleDict()
            for i in embedded:
                table = torch.empty(vocab_size, kv_dim, dtype=table_dtype).uniform_(-bound, bound)
                self.value_embeds[str(i)] = nn.Embedding.from_pretrained(table, freeze=False)
        rotary = rotary_tables(seq_len, model_dim // n_head, device).to(dtype)
        self.register_buffer("rotary", rotary, persistent=False)

    def trunk(self, idx):
        """Return the residual stream (B, T, C) after the last block."""
        x = norm(self.wte(idx).to(self.dtype))
        x0 = x.view_as(x)  # a tensor of its own: were x0 x, block 0 would compile apart
        rotary = self.rotary[:, : idx.size(1)]
        for i, block in enumerate(self.blocks):
            value_embed = None
            if str(i) in self.value_embeds:
                value_embed = self.value_embeds[str(i)](idx).to(x.dtype)
            x = block(x, x0, value_embed, rotary)
        return x

    def forward(self, idx, targets=None):
        """Return logits (B, T, V), or with targets (B, T) the mean cross-entropy in nats."""
        with torch.enable_grad():  # compiled code is of one grad mode: evaluation runs training's
            x = self.trunk(idx)
        if targets is None:
            if not torch.is_grad_enabled():
                x = x.detach()  # frees what the trunk has kept for a backward pass
            return softcap(self.lm_head(norm(x)))
        return SlicedLoss.apply(x, self.lm_head.weight, targets, self.loss_and_grads)

    def params_by_kind(self):
        """Return {kind: parameters}; make_optimizers has the settings of each kind."""
        kinds = ("embeddings", "lm_head", "x0_lambda", "vectors", "matrices")
        params = {kind: [] for kind in kinds}
        for name, p in self.named_parameters():
            parts = name.split(".")
            owner = self.get_submodule(".".join(parts[:-1]))
            if isinstance(owner, nn.Embedding):
                kind = "embeddings"
            elif "lm_head" in parts:
                kind = "lm_head"
            elif "x0_lambda" in parts:
                kind = "x0_lambda"
            elif p.ndim < 2:  # scalars, too
                kind = "vectors"
            elif parts[0] == "blocks":
                kind = "matrices"
            else:
                sys.exit(f"train.py: no optimizer for {name}: give it a kind in params_by_kind")
            params[kind].append(p)
        return params

    def num_params(self):
        """Return the number of parameters by kind."""
        return {kind: sum(p.numel() for p in ps) for kind, ps in self.params_by_kind().items()}

    def flops_per_token(self):
        """Return training FLOPs a token: 6 a matrix weight, 12 C a token attended to.

        As in Chowdhery et al., "PaLM", arXiv 2204.02311: a window is a saving, a causal mask none.
        """
        attended = sum(min(window, self.rotary.size(1)) for window in self.windows)
        matrices = self.num_params()["matrices"] + self.lm_head.weight.numel()
        return 6 * matrices + 12 * self.wte.embedding_dim * attended


def layer_windows(pattern, depth, seq_len):
    """Return each layer's window in tokens: S a share of the context, L all; see WINDOW_PATTERN."""
    sizes = {"S": int(seq_len * SHORT_WINDOW), "L": seq_len}
    letters = (pattern * depth)[: depth - 1] + pattern[-1]
    return [sizes[letter] for letter in letters]


# --- Optimizer ------------------------------------------------------------------------------------

# The five steps of Amsel et al., "The Polar Express", arXiv 2505.16932: X -> aX + (bA + cA^2)X
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(grad, dtype):
    """Return the semi-orthogonal matrices nearest to grad (n, r, c), roughly, computed in dtype."""
    is_tall = grad.size(-2) > grad.size(-1)
    X = (grad.mT if is_tall else grad).to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # bounds the spectral norm by 1
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if is_tall else X


def muon_update(params, grads, buffer, second_moment, lr, momentum, weight_decay, beta2, dtype):
    """Update stacked params (n, r, c) in place.

    State: buffer (n, r, c) is the momentum; second_moment is (n, r, 1) if r >= c, else (n, 1, c).
    lr, momentum and weight_decay are tensors, so that a new value compiles nothing.
    Muon: Jordan et al., kellerjordan.github.io/posts/muon. NorMuon: Li et al., arXiv 2510.05491.
    Cautious weight decay: Chen et al., arXiv 2510.12402.
    """
    buffer.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(buffer, momentum), dtype).float()  # Nesterov
    across = -1 if second_moment.size(-1) == 1 else -2  # the mean over the shorter side
    mean_square = update.square().mean(dim=across, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    old_norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    new_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    update = update * scale * (old_norm / new_norm.clamp_min(1e-10))
    lr = lr * max(1, params.size(-2) / params.size(-1)) ** 0.5
    params.sub_(lr * (update + weight_decay * params * (update * params > 0)))


class Muon(torch.optim.Optimizer):
    """Muon for (stacks of) matrices, all of one shape in one stacked update; see muon_update."""

    def __init__(self, params, lr, momentum, weight_decay, beta2, compiled=False):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "beta2": beta2}
        super().__init__([{"params": group} for group in shapes.values()], defaults)
        self.update = torch.compile(muon_update, dynamic=False) if compiled else muon_update
        self.dtype = choose_dtype(params[0].device)

    @torch.no_grad()
    def step(self):
        """Update all parameters; every one of them must have a gradient."""
        for group in self.param_groups:
            params = group["params"]
            stack = torch.stack([p.data for p in params]).flatten(0, -3)
            grads = torch.stack([p.grad for p in params]).flatten(0, -3)
            state = self.state[params[0]]  # of the whole stack
            if not state:
                n, r, c = stack.shape
                state["momentum_buffer"] = torch.zeros_like(stack)
                state["second_moment"] = stack.new_zeros((n, r, 1) if r >= c else (n, 1, c))
            values = torch.tensor([group["lr"], group["momentum"], group["weight_decay"]])
            lr, momentum, weight_decay = values.to(stack.device, non_blocking=ON_CUDA).unbind(0)
            self.update(
                stack,
                grads,
                state["momentum_buffer"],
                state["second_moment"],
                lr,
                momentum,
                weight_decay,
                group["beta2"],
                self.dtype,
            )
            updated = stack.view(-1, *params[0].shape).unbind(0)
            torch._foreach_copy_(params, list(updated))


def make_optimizers(model, compiled=False):
    """Return [AdamW, Muon]; every kind of parameter must have its settings here."""
    kinds = model.params_by_kind()
    scale = (model.wte.embedding_dim / 768) ** -0.5
    matrices = kinds.pop("matrices")
    muon = Muon(matrices, MATRIX_LR, muon_momentum(0), WEIGHT_DECAY, MUON_BETA2, compiled)
    settings = {
        "embeddings": {"lr": EMBEDDING_LR * scale},
        "lm_head": {"lr": UNEMBEDDING_LR * scale},
        "x0_lambda": {"lr": SCALAR_LR, "betas": X0_BETAS},
        "vectors": {"lr": SCALAR_LR / 100},
    }
    groups = [{"params": params, **settings[kind]} for kind, params in kinds.items()]
    adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0, fused=True)
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return [adamw, muon]


# --- Schedules ------------------------------------------------------------------------------------


def lr_multiplier(progress):
    """Return what the rates are multiplied by at a progress of 0 to 1."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = (1 - progress) / WARMDOWN_RATIO
    return left + (1 - left) * FINAL_LR_FRAC


def muon_momentum(step):
    """Return Muon's momentum at a step."""
    first, last = MUON_MOMENTUM
    return first + (last - first) * min(step / max(MUON_MOMENTUM_STEPS, 1), 1)


def muon_weight_decay(progress):
    """Return Muon's weight decay at a progress of 0 to 1."""
    return WEIGHT_DECAY * (1 - progress)


# --- Device ---------------------------------------------------------------------------------------

# Dense bf16 peaks in FLOP/s by the vendors' datasheets; the first name that fits counts
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989.5e12,
    "H200": 989.5e12,
    "NVIDIA B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_name):
    """Return the peak of a device in FLOP/s, nan where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), math.nan)


def cause_of(error):
    """Return the error that the compiler wrapped into one of its own, or the error itself."""
    return getattr(error, "inner_exception", error)


def is_out_of_memory(error):
    """Return whether an error of CUDA, of MPS or of a CPU says that memory is short."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    says_so = "out of memory" in text or "can't allocate memory" in text
    return says_so and isinstance(error, RuntimeError)


def choose_dtype(device):
    """Return bf16 where the device computes in it, else float32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        # On 2 cores of an AMD Zen 5, matrix products in bf16 ran over 4 times faster than in
        # float32. A Zen 3 has to emulate bf16, and was 25 times slower
        flags = torch.cpu.get_capabilities()
        has_bf16 = flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16")
    else:
        has_bf16 = False
    return torch.bfloat16 if has_bf16 else torch.float32


def tune_cpu():
    """Silence what torch says of a missing GPU or compiler, and keep freed memory for reuse."""
    for library in ("torch.utils.cpp_extension", "torch._inductor.scheduler"):
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    # Handing every large tensor back to the kernel costs a page fault for each of its pages
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD = -1  # these two are from malloc.h
    M_MMAP_MAX = -4
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def compile_model(model, device):
    """Compile the loss, and the whole trunk on a GPU or each block on a CPU; return the model."""
    # Without this, torch traces a graph with an autograd.Function in it, as ReluSquared is, anew in
    # every run. This cache knows an operator of torch.library by its name alone: rename it when you
    # edit it
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    options = {}
    if device.type == "cuda":
        # Whole, as kernels then reach across blocks: by tools/step.py 3.5 % faster than by blocks
        model.trunk = torch.compile(model.trunk, dynamic=False)
    else:
        # By blocks, which share code. vec_isa_ok skips a test, which takes seconds, of whether the
        # C++ compiler knows the CPU's vector instructions
        options = {"cpp.vec_isa_ok": True}
        for block in model.blocks:
            block.compile(dynamic=False, options=options)
    model.loss_and_grads = torch.compile(model.loss_and_grads, dynamic=False, options=options)
    return model


def warm_up(model, optimizers, rows, seq_len, vocab_size, device):
    """Train on made-up tokens and score a batch of them, then clear gradients and optimizer state.

    All that can fail, must be compiled or takes memory is tried here, before the clock starts.
    """
    inputs = torch.randint(vocab_size, (rows, seq_len), device=device)
    targets = inputs.clone()  # two tensors, as the loader gives: compiled code tells that apart
    context = torch.randint(vocab_size, (rows, prepare.MAX_SEQ_LEN), device=device)
    try:
        for _ in range(2 if ON_CUDA else 1):  # 2nd: gradients and optimizer state in memory
            model(inputs, targets).backward()
            for optimizer in optimizers:
                optimizer.step()
        model.eval()
        with torch.compiler.set_stance("eager_on_recompile"):
            prepare.score_batch(model, context, context, vocab_size)
        model.train()
    finally:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()


def free_gpu_memory():
    """Give back what is no longer in use, and forget the peak."""
    gc.collect()  # a compiled model refers to itself: it goes when the collector finds it
    if ON_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def rows_that_fit(device_bytes, vocab_size, model_dim, seq_len, dtype):
    """Return about how many rows a forward pass may have in a GPU's memory; at least 1.

    A formula for the model as shipped, fitted to what torch's allocator gives out (tools/fits.py).
    Where it promises too much, warm-up runs out of memory, and fewer rows are tried.
    """
    kept = 16 * DEPTH * model_dim * dtype.itemsize * seq_len  # until the backward pass
    logits = (dtype.itemsize + 8) * vocab_size * prepare.MAX_SEQ_LEN  # to score: in float32 twice
    share = 0.8  # of the memory; the rest is for the weights, the optimizer and the compiler
    return max(1, int(share * device_bytes / max(kept, logits)))


def largest_divisor(number, limit):
    """Return the largest divisor of a number that is not above the limit."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


# --- Main -----------------------------------------------------------------------------------------


def main():
    if ON_CUDA:
        device = torch.device("cuda")
        device_name = torch.cuda.get_device_name()
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # greets every run
    else:
        device = torch.device("mps" if torch.mps.is_available() else "cpu")
        device_name = device.type
        if device.type == "cpu":
            tune_cpu()
    tokenizer = prepare.Tokenizer.from_directory()
    vocab_size = tokenizer.vocab_size
    context = prepare.MAX_SEQ_LEN
    seq_len = context  # of a training row; evaluation has all of it
    dtype = choose_dtype(device)
    print(f"device: {device_name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
    sizes = f"vocabulary {vocab_size}, context {context}"
    print(f"corpus: {prepare.CORPUS}, {sizes}, seed {prepare.SEED}")
    backend = choose_attention(device)
    use_compile = device.type != "mps"

    # Model and warm-up. If memory is short, try fewer rows; if the compiler fails, do without it
    n_head = math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM)
    model_dim = n_head * HEAD_DIM
    max_rows = DEVICE_BATCH_SIZE
    if ON_CUDA:
        device_bytes = torch.cuda.get_device_properties(device).total_memory
        fitting = rows_that_fit(device_bytes, vocab_size, model_dim, seq_len, dtype)
        max_rows = min(max_rows, fitting)
    rows_a_step = max(1, TOTAL_BATCH_SIZE // seq_len)
    rows = largest_divisor(rows_a_step, max_rows)
    while True:
        settings = {
            "depth": DEPTH,
            "model_dim": model_dim,
            "n_head": n_head,
            "n_kv_head": n_head,
            "backend": backend,
            "dtype": dtype,
            "device": device,
        }
        try:
            model = GPT(vocab_size, context, **settings)
            if use_compile:
                compile_model(model, device)
            optimizers = make_optimizers(model, compiled=use_compile and ON_CUDA)
            warm_up(model, optimizers, rows, seq_len, vocab_size, device)
            break
        except Exception as error:
            if is_out_of_memory(error):
                if rows == 1:
                    sys.exit("train.py: out of memory with a single row: make the model smaller")
                fewer = largest_divisor(rows_a_step, rows // 2)
                print(f"out of memory with {rows} rows a forward pass, trying {fewer}")
                rows = fewer
            elif isinstance(cause_of(error), OSError):
                needs = "the compiler needs a folder with room that it may write to"
                sys.exit(f"train.py: {cause_of(error)}: {needs}; TORCHINDUCTOR_CACHE_DIR names one")
            elif use_compile:
                print(f"torch.compile failed, running eagerly: {first_line(error)}")
                use_compile = False
                if backend == "flex":
                    backend = "blocked"  # flex_attention is too slow where it is not compiled
            else:
                raise
        model = optimizers = None
        torch.compiler.reset()
        free_gpu_memory()
    free_gpu_memory()
    passes_a_step = rows_a_step // rows
    torch.manual_seed(prepare.SEED)
    fresh = GPT(vocab_size, context, **settings)  # warm-up has trained the other one
    model.load_state_dict(fresh.state_dict())
    del fresh
    loader = prepare.make_dataloader(tokenizer, rows, seq_len, "train", device)
    flops_per_token = model.flops_per_token()
    num_params = model.num_params()
    print(f"attention: {backend}, compile: {'yes' if use_compile else 'no'}")
    print(f"parameters: {sum(num_params.values()):,} {num_params}")
    print(f"FLOPs a token: {flops_per_token:.4e}, {passes_a_step} passes of {rows} rows a step")

    # Training
    on_terminal = sys.stdout.isatty()
    peak = peak_flops(device_name)
    report_seconds = 0.5 if on_terminal else prepare.TIME_BUDGET / 90
    loss_sum = torch.zeros((), device=device)
    smooth_loss = torch.zeros((), device=device)
    step = 0
    passes = 0  # of the current step
    total_tokens = 0
    shown_step = 0  # these three: at the last report
    shown_tokens = 0
    shown_seconds = 0.0
    for inputs, targets in loader:
        loss = model(inputs, targets)
        (loss / passes_a_step).backward()
        loss_sum += loss.detach() / passes_a_step
        passes += 1
        if passes < passes_a_step:
            continue
        progress = loader.progress
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_multiplier(progress)
                if isinstance(optimizer, Muon):
                    group["momentum"] = muon_momentum(step)
                    group["weight_decay"] = muon_weight_decay(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        total_tokens += passes * inputs.numel()
        passes = 0
        smooth_loss.lerp_(loss_sum, max(0.1, 1 / step))
        loss_sum.zero_()

        is_due = step == 1 or loader.elapsed - shown_seconds >= report_seconds
        if is_due or device.type == "cpu":  # reading the loss makes the host wait for a GPU
            train_loss = smooth_loss.item()
            if not math.isfinite(train_loss):
                sys.exit(f"train.py: the loss is not finite at step {step}")
        if is_due:
            seconds = loader.elapsed - shown_seconds
            speed = (total_tokens - shown_tokens) / seconds
            line = (
                f"step {step:5d} ({loader.progress:6.1%}) | loss {train_loss:.4f} | "
                f"lr x{lr_multiplier(progress):.2f} | "
                f"{1000 * seconds / (step - shown_step):.0f} ms/step | "
                f"{speed:,.0f} tok/s | mfu {100 * speed * flops_per_token / peak:.1f}% | "
                f"epoch {loader.epoch} | {max(prepare.TIME_BUDGET - loader.elapsed, 0):.0f} s left"
            )
            if on_terminal:
                print(f"\r{line}", end="", flush=True)
            else:
                print(line, flush=True)
            shown_step = step
            shown_tokens = total_tokens
            shown_seconds = loader.elapsed
    if on_terminal:
        print()
    if step == 0:
        advice = "make the model or TOTAL_BATCH_SIZE smaller"
        sys.exit(f"train.py: no step was finished in {prepare.TIME_BUDGET} s: {advice}")
    if not math.isfinite(smooth_loss.item()):
        sys.exit("train.py: the loss is not finite")
    training_seconds = loader.elapsed

    # Evaluation. A batch of another shape than warm-up's runs eagerly: compiling would take longer
    with torch.compiler.set_stance("eager_on_recompile"):
        bpb = prepare.evaluate_bpb(model, tokenizer, rows, prepare.EVAL_SPLIT)
    if ON_CUDA:
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        import resource  # here, as Windows has none, and prepare has said so by now

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # Summary: fixed interface, the ratchet reads it
    summary = {
        f"{prepare.EVAL_SPLIT}_bpb": f"{bpb:.6f}",
        "training_seconds": f"{training_seconds:.1f}",
        "total_seconds": f"{time.monotonic() - prepare.PROCESS_START:.1f}",
        "peak_vram_mb": f"{peak_bytes / 2**20:.1f}",
        "mfu_percent": f"{100 * total_tokens * flops_per_token / training_seconds / peak:.2f}",
        "total_tokens_M": f"{total_tokens / 1e6:.1f}",
        "num_steps": f"{step}",
        "num_params_M": f"{sum(num_params.values()) / 1e6:.1f}",
        "depth": f"{DEPTH}",
    }
    print("---")
    for name, value in summary.items():
        print(f"{name + ':':<18}{value}")
    return {name: float(value) for name, value in summary.items()}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
