"""The contract of autoresearch: data, tokenizer, clock, dataloader, metric. Nobody edits it.

    uv run prepare.py                  # once; a second call finishes in seconds
    uv run prepare.py --num-shards 40  # more training data (climbmix only)

Sections: contract, corpora, tokenizer training, token shards, tokenizer, dataloader and clock,
metric, command line.
"""

import argparse
import faulthandler
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import time
from bisect import bisect_right, insort
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
from torch.nn.functional import cross_entropy


# --- Contract -------------------------------------------------------------------------------------
class ContractError(SystemExit):
    """One line for the person who reads it; not caught, it ends the process with status 1."""


def setting(name, default, pattern):
    """Return an environment variable; raise ContractError if the pattern does not match it."""
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        raise ContractError(f"{name}={value!r} is not {pattern}: set it anew, or unset it")
    return value


if sys.platform == "win32":
    raise ContractError("this runs on Linux, on macOS, and on Windows inside WSL")
PROCESS_START = time.monotonic() - time.process_time()  # approximate: imports take one core
CORPUS = "climbmix" if torch.cuda.is_available() else "python"
CORPUS = setting("AUTORESEARCH_CORPUS", CORPUS, "climbmix|python")
EVAL_SPLIT = setting("AUTORESEARCH_SPLIT", "val", "val|test")  # test: for the person alone
SEED = int(setting("AUTORESEARCH_SEED", "42", "[0-9]{1,18}"))  # no hyperparameter: noise
CACHE_DIR = Path(setting("AUTORESEARCH_CACHE", "~/.cache/autoresearch", ".+")).expanduser()
HF_ENDPOINT = setting("HF_ENDPOINT", "https://huggingface.co", "https?://.+").rstrip("/")
MAX_SEQ_LEN = 2048  # tokens of context
VOCAB_SIZE = 8192 if CORPUS == "climbmix" else 4096  # tokens, special ones included
EVAL_TOKENS = 40 * 2**19 if CORPUS == "climbmix" else 2**18  # tokens scored
TIME_BUDGET = 300  # seconds of training, from the first training batch
HARD_LIMIT = 600  # seconds of process life, then the process is ended
MAX_IDLE = 10  # seconds from the end of training to the evaluation
MAX_LACKED, MAX_OTHERS = 0.1, 4  # share of processor time, GiB of GPU that others may have
VAL_SHARD, TEST_SHARD = "shard_06542", "shard_06541"  # every other shard is training
NUM_TRAIN_SHARDS = 20  # about 1.1 G tokens: 500 M packed ones, crops lost, stay within one epoch
PYTHON_CORPUS_CHARS = 10**8  # text taken from the environment, at most
DOWNLOAD_TRIES, MAX_WAIT, DOWNLOAD_TIMEOUT = 4, 300, (3, 15)  # seconds to wait; connect, read
SPLIT_PATTERN = (  # GPT-4's, with numbers in groups of at most two digits
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the first begins every document
TRAIN_CHARS, TRAIN_DOCUMENT_CHARS = 10**9, 10_000  # characters the tokenizer is trained on
PIECE_CHARS = 10**5  # encoded at once: tiktoken fails on white space of megabytes
GROUP_DOCUMENTS, BUFFER_DOCUMENTS = 1024, 1000  # in a row group; that the packer chooses from
SCORE_TOKENS = 8192 if CORPUS == "climbmix" else 128  # whose log-softmax is in memory at once
PROBE_ROWS = 64 if CORPUS == "climbmix" else 16  # that the causality probe cuts, at least
PROBE_TOLERANCE = 1e-3  # nats; equal inputs may differ by this much from pass to pass
SHIPPED = {name: value for name, value in globals().items() if name.isupper()}
PREPARE, RENEW = "run `uv run prepare.py`", "delete it, run `uv run prepare.py`"


def contract():
    """Return the settings that the caches depend on, as they stand now."""
    return {"corpus": CORPUS, "vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN}


def folder(kind):
    """Return the folder of this corpus: kind is "data", "tokens" or "tokenizer"."""
    return CACHE_DIR / CORPUS / kind


def shard_paths(kind, split):
    """Return the shards of a split, sorted; raise ContractError if there is none."""
    held_out = {VAL_SHARD: "val", TEST_SHARD: "test"}
    paths = sorted(folder(kind).glob({"data": "*.parquet", "tokens": "*.arrow"}[kind]))
    paths = [path for path in paths if held_out.get(path.stem, "train") == split]
    if not paths:
        raise ContractError(f"no {split} shard in {folder(kind)}: {PREPARE}")
    return paths


class Progress:
    """Print millions done and the rate: one updating line on a terminal, else now and then."""

    def __init__(self, label):
        self.label, self.done, self.tty = label, 0, sys.stdout.isatty()
        self.start = self.shown = time.monotonic()

    def update(self, count, final=False):
        self.done, now = self.done + count, time.monotonic()
        if (final and self.done) or now - self.shown > (0.2 if self.tty else 10):
            rate = self.done / (now - self.start + 1e-9)
            line = f"{self.label}: {self.done / 1e6:.1f} M, {rate / 1e6:.2f} M/s"
            line, end = (f"\r{line:<79}", "\n" * final) if self.tty else (line, "\n")
            print(line, end=end, flush=True)
            self.shown = now


# --- Corpora --------------------------------------------------------------------------------------
def fetch(url, part, progress):
    """Download url into the file `part`, going on where an earlier try stopped; check sha256."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416:
            raise ValueError("nothing left to resume")
        response.raise_for_status()
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            for chunk in response.iter_content(2**14):
                progress.update(file.write(chunk))
    sha256 = hashlib.sha256(part.read_bytes()).hexdigest()
    etags = [a.headers.get("X-Linked-Etag", "").strip('"') for a in (response, *response.history)]
    if any(len(etag) == 64 and etag != sha256 for etag in etags):
        raise ValueError("sha256 differs from the one announced")
    pq.read_metadata(part)  # raises a ValueError of its own if this is no parquet


def download(path, progress):
    """Bring one climbmix shard to its path; raise ContractError after the last try."""
    url = f"{HF_ENDPOINT}/datasets/karpathy/climbmix-400b-shuffle/resolve/main/{path.name}"
    part, wait, reason = path.with_suffix(".part"), 0, None
    for attempt in range(DOWNLOAD_TRIES):
        if reason:
            print(f"{path.name}: {reason}, again in {min(wait, MAX_WAIT):.0f} s", flush=True)
        time.sleep(min(wait, MAX_WAIT))
        wait = 2**attempt
        try:
            fetch(url, part, progress)
            return part.replace(path)
        except requests.HTTPError as error:
            reason = error.response.status_code
            if reason < 500 and reason not in (408, 429):
                break
            with suppress(Exception):  # of a header that makes no sense
                wait = requests.adapters.Retry().get_retry_after(error.response) or wait
        except requests.RequestException as error:
            reason = type(error).__name__
        except ValueError as error:  # not what was announced: begin again
            part.unlink(missing_ok=True)
            reason = error
    advice = "run `uv run prepare.py` again, or set HF_ENDPOINT or AUTORESEARCH_CORPUS=python"
    raise ContractError(f"no {url} ({reason}): {advice}")


def download_climbmix(num_shards):
    """Download the validation, the test and the first num_shards training shards (-1: all)."""
    folder("data").mkdir(parents=True, exist_ok=True)
    most = int(TEST_SHARD[-5:])  # training shards that exist: all before it
    train = [f"shard_{i:05d}" for i in range(most if num_shards < 0 else min(num_shards, most))]
    paths = [folder("data") / f"{stem}.parquet" for stem in (VAL_SHARD, TEST_SHARD, *train)]
    missing, progress = [path for path in paths if not path.exists()], Progress("bytes downloaded")
    print(f"{len(missing)} shards of about 100 MB to download from {HF_ENDPOINT}", flush=True)
    for path in missing:
        download(path, progress)
    progress.update(0, final=True)


def python_documents(roots):
    """Collect Python source below the root folders: {split: documents}, and files not readable.

    A document is a top-level block. Order and split come from hashes of path and content: the same
    environment gives the same corpus, shuffled; no file has blocks in two splits, none comes twice.
    """
    files, unreadable = [], 0
    for root, path in ((base, path) for base in roots for path in base.rglob("*.py")):
        name = str(path.relative_to(root))
        if "site-packages" not in name:  # below the standard library: another environment's
            try:
                content = path.read_bytes()
                files.append((hashlib.sha256(name.encode() + content).digest(), content.decode()))
            except (OSError, UnicodeError):
                unreadable += 1
    splits, seen, size = {"train": [], "val": [], "test": []}, set(), 0
    for digest, text in sorted(files):
        split = {0: "val", 1: "test"}.get(digest[0] % 32, "train")
        for block in re.split(r"\n{3,}(?=\S)", text.replace("\r\n", "\n")):
            document = block.strip("\n") + "\n"
            key = hashlib.sha256(document.encode()).digest()
            if key not in seen and size < PYTHON_CORPUS_CHARS and document.strip():
                seen.add(key)
                splits[split].append((key, document))
                size += len(document)
    return {split: [text for _, text in sorted(docs)] for split, docs in splits.items()}, unreadable


def build_python():
    """Write the Python source of the running environment as parquet shards like climbmix's."""
    with suppress(ContractError):
        return [shard_paths("data", split) for split in ("train", "val", "test")]
    roots = sorted({Path(sysconfig.get_path(p)) for p in ("stdlib", "purelib", "platlib")})
    splits, unreadable = python_documents(roots)
    temporary, stems = folder("data").with_name("data.tmp"), {"val": VAL_SHARD, "test": TEST_SHARD}
    for stale in (temporary, folder("data"), folder("tokens")):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    for split, texts in splits.items():
        if not texts:
            raise ContractError(f"too little Python source below {roots}: no {split} documents")
        path = temporary / f"{stems.get(split, 'shard_00000')}.parquet"
        pq.write_table(pa.table({"text": texts}), path, GROUP_DOCUMENTS, compression="zstd")
    temporary.replace(folder("data"))
    print(f"python corpus written; {unreadable} files were not readable")


def read_texts(path):
    """Yield the documents of a parquet shard that are not empty, in lists."""
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.field("text").type != pa.string():
                raise ValueError
            for batch in file.iter_batches(GROUP_DOCUMENTS, columns=["text"]):
                yield [text for text in batch["text"].to_pylist() if text]
    except (ValueError, KeyError, OSError, pa.ArrowException):
        raise ContractError(f"{path} is not parquet with UTF-8 in column `text`: {RENEW}") from None


# --- Tokenizer training ---------------------------------------------------------------------------
def checksum(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def train_tokenizer():
    """Train byte pair encoding on the training shards, unless done; write it as plain JSON."""
    with suppress(ContractError):
        return Tokenizer.from_directory()
    progress = Progress("characters read for the tokenizer")

    def documents():
        for texts in itertools.chain(*map(read_texts, shard_paths("data", "train"))):
            for text in texts:
                yield text[:TRAIN_DOCUMENT_CHARS]
                progress.update(min(len(text), TRAIN_DOCUMENT_CHARS))
            if progress.done >= TRAIN_CHARS:
                return

    trainer, num_tokens = rustbpe.Tokenizer(), VOCAB_SIZE - len(SPECIAL_TOKENS)
    trainer.train_from_iterator(documents(), num_tokens, pattern=SPLIT_PATTERN)
    progress.update(0, final=True)
    ranks = {rank: bytes(token) for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_tokens:
        raise ContractError(f"the training text fills {len(ranks)} of {num_tokens} tokens only")
    content = {"contract": contract(), "tokens": [ranks[i].hex() for i in range(num_tokens)]}
    folder("tokenizer").mkdir(exist_ok=True)
    temporary = folder("tokenizer") / "tokenizer.tmp"
    temporary.write_text(json.dumps({"sha256": checksum(content), **content}, indent=0))
    temporary.replace(temporary.with_suffix(".json"))
    return Tokenizer.from_directory()


# --- Token shards ---------------------------------------------------------------------------------
def read_tokens(path, tokenizer):
    """Yield the documents of a token shard, uint16 arrays in a memory-mapped file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if (reader.schema.metadata or {}).get(b"tokenizer") != tokenizer.sha256.encode():
            raise ValueError
        for i in range(reader.num_record_batches):
            column = reader.get_batch(i).column(0)
            column.validate(full=True)
            values, offsets = map(np.from_dlpack, (column.values, column.offsets))  # not pandas
            if values.max(initial=0) >= tokenizer.vocab_size:
                raise ValueError
            for start, end in itertools.pairwise(offsets.tolist()):
                yield values[start:end]
    except (ValueError, OSError, pa.ArrowException):
        raise ContractError(f"{path} is damaged or of another tokenizer: {RENEW}") from None


def tokenize(tokenizer):
    """Write each shard's documents as BOS + tokens, a record batch a row group, unless done."""
    folder("tokens").mkdir(exist_ok=True)
    schema = pa.schema({"tokens": pa.list_(pa.uint16())}, metadata={"tokenizer": tokenizer.sha256})
    progress, bos = Progress("tokens written"), np.array([tokenizer.bos_token_id], np.uint16)

    def encode(text):
        pieces = (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))
        ids = (tokenizer.encoding.encode_to_numpy(p, disallowed_special=()) for p in pieces)
        return np.concatenate([bos, *ids]).astype(np.uint16)

    for source in itertools.chain(*(shard_paths("data", s) for s in ("train", "val", "test"))):
        path = folder("tokens") / f"{source.stem}.arrow"
        with suppress(ContractError):
            next(read_tokens(path, tokenizer), None)
            continue
        temporary, pool = path.with_suffix(".tmp"), ThreadPoolExecutor(os.cpu_count())
        with pool, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for texts in filter(None, read_texts(source)):
                documents = list(pool.map(encode, texts))
                offsets = np.cumsum([0, *map(len, documents)], dtype=np.int32)
                column = pa.ListArray.from_arrays(offsets, np.concatenate(documents))
                writer.write_batch(pa.record_batch([column], schema=schema))
                progress.update(offsets[-1])
        temporary.replace(path)
    progress.update(0, final=True)


# --- Tokenizer ------------------------------------------------------------------------------------
class Tokenizer:
    """Byte pair encoding: vocab_size, bos_token_id, and int32 (vocab_size,) token_bytes."""

    def __init__(self, tokens, sha256):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        # Special tokens in a text are plain text; bytes that are not UTF-8 become U+FFFD
        self.encode, self.decode = encoding.encode_ordinary, encoding.decode
        self.encode_batch = encoding.encode_ordinary_batch
        self.sha256, self.vocab_size, self.bos_token_id = sha256, encoding.n_vocab, len(tokens)
        self.token_bytes = torch.tensor([*map(len, tokens), *[0] * len(SPECIAL_TOKENS)]).int()

    @classmethod
    def from_directory(cls, directory=None):
        """Load tokenizer.json; raise ContractError if missing, damaged or of another contract."""
        path = Path(directory or folder("tokenizer")) / "tokenizer.json"
        try:
            content = json.loads(path.read_bytes())
            sha256 = content.pop("sha256")
            if checksum(content) != sha256:
                raise ValueError
        except OSError as error:
            raise ContractError(f"not prepared, {path}: {error.strerror}: {PREPARE}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ContractError(f"{path} is damaged: {PREPARE}") from None
        if (made := content["contract"]) != contract():
            raise ContractError(f"{path} is made for {made}, not {contract()}: {PREPARE}")
        return cls([bytes.fromhex(token) for token in content["tokens"]], sha256)


# --- Dataloader and clock -------------------------------------------------------------------------
def pack(documents, row_len):
    """Yield rows of exactly row_len tokens, uint16, each beginning with a document.

    The longest buffered document that fits goes next; where none fits, the shortest is cropped, so
    one longer than a row waits for long. Nothing masks a row's documents from each other. After
    Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    documents, buffer = iter(documents), []
    while True:
        row, filled = np.empty(row_len, np.uint16), 0
        while filled < row_len:
            for document in itertools.islice(documents, BUFFER_DOCUMENTS - len(buffer)):
                insort(buffer, document, key=len)
            if not buffer:
                return
            i = max(bisect_right(buffer, row_len - filled, key=len) - 1, 0)
            document = buffer.pop(i)[: row_len - filled]
            row[filled : filled + len(document)] = document
            filled += len(document)
        yield row


def processor_seconds():
    """Return what this process's threads ran, and waited for a processor (0 but on Linux)."""
    seconds = np.zeros(2)
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            seconds += np.array(path.read_text().split()[:2], float) / 1e9
    return seconds


class Dataloader(Iterator):
    """Iterator over batches of packed rows; see make_dataloader."""

    epoch, clock_start, clock_end, seconds = 1, None, None, 0  # one clock a process, monotonic

    def __init__(self, tokenizer, batch_size, seq_len, split, device):
        self.batch_size, self.device, self.split = batch_size, torch.device(device), split
        self.num_left = math.inf if split == "train" else EVAL_TOKENS // seq_len
        self.rows, self.events = pack(self.documents(tokenizer), seq_len + 1), []

    def documents(self, tokenizer):
        epochs = itertools.count(1) if self.split == "train" else (1,)
        for self.epoch in epochs:
            for path in shard_paths("tokens", self.split):
                yield from read_tokens(path, tokenizer)

    @property
    def elapsed(self):
        return time.monotonic() - self.clock_start if self.clock_start is not None else 0.0

    @property
    def progress(self):
        return min(self.elapsed / TIME_BUDGET, 1.0)

    def __next__(self):
        size, train = min(self.batch_size, self.num_left), self.split == "train"
        self.num_left -= size
        if train and self.device.type != "cpu":
            # The host may be two batches ahead, so that the clock measures work done, not queued
            self.events.append(torch.get_device_module(self.device).Event())
            self.events[-1].record()  # reached when all that was queued so far is worked off
            if len(self.events) > 1:
                self.events.pop(0).synchronize()
        if train and self.elapsed >= TIME_BUDGET:
            Dataloader.clock_end = self.clock_end or time.monotonic()
            raise StopIteration
        if size == 0:
            raise StopIteration
        rows = list(itertools.islice(self.rows, size))
        if len(rows) < size:
            raise ContractError(f"too little text in {folder('tokens')} for {self.split} rows")
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        if self.device.type == "cuda":
            # Pinned anew each time: torch gives pinned memory out again only when its copy is done
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=batch.is_pinned())
        if train and self.clock_start is None:
            Dataloader.clock_start, Dataloader.seconds = time.monotonic(), processor_seconds()
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def make_dataloader(tokenizer, batch_size, seq_len, split, device):
    """Return an iterator over (inputs, targets), int64 (batch_size, seq_len) on the device.

    Targets are inputs shifted by one; every row begins with BOS and is full.
    split "train": endless epochs, until TIME_BUDGET is over; attributes epoch (from 1), elapsed
    (seconds since the process's first training batch), progress (elapsed / TIME_BUDGET, at most 1).
    split "val" or "test": the same rows once, at every batch size; the last batch may be short.
    Arms the hard wall if "train": at HARD_LIMIT the process ends, with stacks on stderr.
    """
    if split == "train":
        left = HARD_LIMIT - (time.monotonic() - PROCESS_START)
        faulthandler.dump_traceback_later(max(left, 0.1), exit=True, file=sys.__stderr__)
    return Dataloader(tokenizer, batch_size, seq_len, split, device)


# --- Metric ---------------------------------------------------------------------------------------
@torch.no_grad()
def score_batch(model, inputs, targets, vocab_size):
    """Return -ln p(target) and mean logit, float32 (2, B, T) on the CPU; refuse bad logits."""
    logits, expected = model(inputs), (*inputs.shape, vocab_size)
    got = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
    if got != expected:
        raise ContractError(f"model(inputs) must return logits of shape {expected}, not {got}")
    scores = []
    for i in range(0, targets.numel(), SCORE_TOKENS):
        part = logits.flatten(0, 1)[i : i + SCORE_TOKENS].float()
        nats = cross_entropy(part, targets.flatten()[i : i + SCORE_TOKENS], reduction="none")
        scores.append(torch.stack([nats, part.mean(dim=-1)]).cpu())
    scores = torch.cat(scores, dim=1).view(2, *targets.shape)
    if not scores.isfinite().all():
        raise ContractError("the model's logits are not all finite")
    return scores


def check_causality(model, inputs, targets, vocab_size, scores):
    """Raise ContractError if what the model says at t depends on tokens after t.

    Every row is cut at another position; all tokens after the cut are changed, and nothing up to
    it may move. The step from cut to cut is prime, so that cuts follow no shorter period.
    """
    (B, T), generator = inputs.shape, torch.Generator().manual_seed(SEED)
    primes = (s for s in range(T // PROBE_ROWS or 1, 0, -1) if all(s % d for d in range(2, s)))
    step = next(s for s in primes if math.gcd(s, T - 1) == 1)
    for first in range(0, PROBE_ROWS, B):
        cuts = (T - 2 - step * torch.arange(first, first + B)) % (T - 1)
        later = torch.arange(T) > cuts[:, None]
        shift = torch.randint(1, vocab_size, (B, T), generator=generator) * later
        changed = (inputs + shift.to(inputs.device)) % vocab_size
        after = score_batch(model, changed, targets, vocab_size)
        moved = ((scores - after).abs() > PROBE_TOLERANCE).any(dim=0) & ~later
        for row, position in moved.nonzero().tolist():
            what = f"logits at {position} moved when only tokens after {cuts[row]} were changed"
            raise ContractError(f"the model is not causal, or not the same at every call: {what}")


def evaluate_bpb(model, tokenizer, batch_size, split="val"):
    """Return bits per byte on the first EVAL_TOKENS of a held-out split; lower is better.

    The sum of -ln p(target) over ln 2 times the sum of the targets' bytes; special tokens count in
    neither. Raises ContractError unless model(inputs) gives finite logits (B, T, vocab_size) that
    do not depend on later tokens, and when training went on after its data had ended.
    """
    if Dataloader.clock_start is not None:
        idle = time.monotonic() - (Dataloader.clock_end or Dataloader.clock_start + TIME_BUDGET)
        if idle > MAX_IDLE:
            raise ContractError(f"evaluation began {idle:.0f} s after the training time was over")
        ran, waited = processor_seconds() - Dataloader.seconds
        lacked = waited / (ran + waited or 1)
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        others = (total - free - torch.cuda.memory_reserved()) / 2**30  # our CUDA context included
        state = "busy" if lacked > MAX_LACKED or others > MAX_OTHERS else "quiet"
        print(f"machine {state}: lacked {lacked:.1%} of processor time, {others:.1f} GiB of GPU")
    for name, value in SHIPPED.items():
        if globals()[name] != value:
            print(f"contract changed: {name} is {globals()[name]}, shipped as {value}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sum_nats, sum_bytes, training = 0.0, 0, model.training
    model.eval()
    batches = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, split, device)
    for i, (inputs, targets) in enumerate(batches):
        scores = score_batch(model, inputs, targets, tokenizer.vocab_size)
        if i == 0:
            check_causality(model, inputs, targets, tokenizer.vocab_size, scores)
        num_bytes = tokenizer.token_bytes[targets.cpu()]
        sum_nats += scores[0].double()[num_bytes > 0].sum().item()
        sum_bytes += num_bytes.sum().item()
    model.train(training)
    return sum_nats / (math.log(2) * sum_bytes)


# --- Command line ---------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description="Prepare data (of climbmix: N shards, -1: all).")
    parser.add_argument("--num-shards", type=int, default=NUM_TRAIN_SHARDS, metavar="N")
    num_shards, start, home = parser.parse_args().num_shards, time.monotonic(), CACHE_DIR / CORPUS
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            print(f"{CORPUS} in {home}, one prepare.py at a time", flush=True)
            os.lockf(lock.fileno(), os.F_LOCK, 0)  # freed when its process ends, however it ends
            download_climbmix(num_shards) if CORPUS == "climbmix" else build_python()
            tokenize(train_tokenizer())
    except OSError as error:
        why = f"{error.filename or home}: {error.strerror or error}"
        raise ContractError(f"{why}: make room, or set AUTORESEARCH_CACHE elsewhere") from None
    except KeyboardInterrupt:
        raise ContractError("interrupted: `uv run prepare.py` goes on from here") from None
    print(f"ready after {time.monotonic() - start:.0f} s, next: uv run train.py")


if __name__ == "__main__":
    main()
