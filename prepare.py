"""
The contract of autoresearch: data, tokenizer, training clock, dataloader, metric. Nobody edits it.

    uv run prepare.py                  # once: corpus, tokenizer, token shards; a second call is quick
    uv run prepare.py --num-shards 40  # more training data (climbmix only)

Sections: contract, corpora, tokenizer training, token shards, tokenizer, dataloader and clock,
metric, command line. train.py imports make_dataloader, evaluate_bpb, Tokenizer and the constants.
"""

import argparse
import base64
import contextlib
import faulthandler
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import threading
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# Contract


class ContractError(SystemExit):
    """One line for the person who reads it; not caught, it ends the process with status 1."""


def env_choice(name, default, choices):
    """Return the environment variable `name`, or the default; raise ContractError if unknown."""
    value = os.environ.get(name) or default
    if value not in choices:
        raise ContractError(f"{name}={value!r} is unknown: use {' or '.join(choices)}")
    return value


PROCESS_START = time.monotonic() - time.process_time()  # about: imports run on one core

CORPUS = env_choice(
    "AUTORESEARCH_CORPUS",
    "climbmix" if torch.cuda.is_available() else "python",
    ("climbmix", "python"),
)
EVAL_SPLIT = env_choice("AUTORESEARCH_SPLIT", "val", ("val", "test"))  # test: for the person only
CACHE_DIR = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
try:
    SEED = int(os.environ.get("AUTORESEARCH_SEED") or 42)  # no hyperparameter: measures the noise
except ValueError:
    raise ContractError("AUTORESEARCH_SEED must be an integer") from None

ON_CLIMBMIX = CORPUS == "climbmix"
MAX_SEQ_LEN = 2048 if ON_CLIMBMIX else 512  # tokens of context
VOCAB_SIZE = 8192 if ON_CLIMBMIX else 4096  # tokens, special ones included
EVAL_TOKENS = 40 * 2**19 if ON_CLIMBMIX else 2**18  # tokens scored
TIME_BUDGET = 300  # seconds of training, from the first training batch
HARD_LIMIT = 600  # seconds of process life, then the process is ended

HF_ENDPOINT = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
CLIMBMIX_URL = "{}/datasets/karpathy/climbmix-400b-shuffle/resolve/main/{}"
VAL_SHARD, TEST_SHARD = 6542, 6541  # the same in both corpora; every other shard is training
NUM_TRAIN_SHARDS = 20  # about 1.1 G tokens, so that 500 M packed ones stay within one epoch
DOWNLOAD_ATTEMPTS, DOWNLOAD_TIMEOUT, MAX_WAIT = 5, 15, 10  # tries a file, seconds, seconds

PYTHON_CORPUS_BYTES = 100e6  # text taken from the environment
SHARD_DOCUMENTS, GROUP_DOCUMENTS = 2**16, 1024  # documents a python shard, and a row group

SPLIT_PATTERN = (  # GPT-4's, with numbers in groups of at most two digits
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the first one begins every document
TRAIN_CHARS, TRAIN_DOCUMENT_CHARS = 10**9, 10_000  # characters the tokenizer trains on

BUFFER_DOCUMENTS = 1000  # documents that the packer chooses from
SCORE_TOKENS = 8192  # tokens whose log-softmax is in memory at once
PROBE_ROWS = 32  # rows the causality probe cuts, at least
PROBE_TOLERANCE = 1e-3  # nats; what equal inputs may differ by from one forward pass to the next


def folder(kind):
    """Return the folder of this corpus: kind is "data", "tokens" or "tokenizer"."""
    return CACHE_DIR / CORPUS / kind


def contract():
    """Return the settings that the caches depend on, as they stand now."""
    return {"corpus": CORPUS, "vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN}


def check_contract(found, path):
    """Raise ContractError unless `found` are the settings of the contract."""
    if found != contract():
        was, now = (" ".join(f"{k}={v}" for k, v in c.items()) for c in (found, contract()))
        raise ContractError(f"{path} was made for {was}, not {now}: run `uv run prepare.py`")


class Progress:
    """Report done units: one updating line on a terminal, a line every ten seconds otherwise."""

    def __init__(self, label, unit, total=None):
        self.label, self.unit, self.total, self.done = label, unit, total, 0
        self.start = self.shown = time.monotonic()
        self.lock, self.tty = threading.Lock(), sys.stdout.isatty()

    def update(self, count, final=False):
        with self.lock:
            self.done += count
            now = time.monotonic()
            if not final and now - self.shown < (0.2 if self.tty else 10):
                return
            self.shown = now
            rate = self.done / max(now - self.start, 1e-9)
            of = f" of {self.total / 1e6:,.1f}" if self.total else ""
            line = f"{self.label}: {self.done / 1e6:,.1f}{of} M {self.unit}, {rate / 1e6:.2f} M/s"
            print(f"\r{line:<79}" if self.tty else line, end="" if self.tty and not final else "\n")
            sys.stdout.flush()


# ------------------------------------------------------------------------------------------------
# Corpora


def shard_name(index):
    return f"shard_{index:05d}"


def shard_split(path):
    """Return the split that a shard belongs to, by its number."""
    return {shard_name(VAL_SHARD): "val", shard_name(TEST_SHARD): "test"}.get(path.stem, "train")


def verify_parquet(path):
    """Raise ValueError unless the file is whole parquet with a string column `text`."""
    try:
        schema = pq.read_schema(path)
    except pa.ArrowException:
        raise ValueError("not a parquet file") from None
    if "text" not in schema.names or not (
        pa.types.is_string(schema.field("text").type)
        or pa.types.is_large_string(schema.field("text").type)
    ):
        raise ValueError("no string column `text`")


def fetch(url, part, progress):
    """Download url into the file `part`, going on where an earlier try stopped.

    Raises requests.RequestException on trouble with the network, ValueError on a file that is not
    what the server announced. The Hub's redirect carries size and sha256 in X-Linked-* headers.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
        linked = [r.headers for r in [*response.history, response] if "X-Linked-Etag" in r.headers]
        total = response.headers.get("Content-Length")
        if response.status_code == 206:
            total = response.headers["Content-Range"].rpartition("/")[2]
        elif response.status_code == 416:  # nothing is left to send: `part` is whole, or too long
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            response.raise_for_status()
            have = 0
        size = linked[0].get("X-Linked-Size", total) if linked else total
        digest = hashlib.sha256()
        with part.open("r+b" if have else "wb") as file:
            while file.tell() < have:
                digest.update(file.read(min(2**20, have - file.tell())))
            if response.status_code != 416:
                for chunk in response.iter_content(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    progress.update(len(chunk))
            got = file.tell()
    if size and size.isdecimal() and got < int(size):
        raise requests.ConnectionError(f"connection ended after {got} of {size} bytes")
    if size and size.isdecimal() and got > int(size):
        raise ValueError(f"{got} bytes where {size} were announced")
    etag = linked[0]["X-Linked-Etag"].strip('"') if linked else ""
    if re.fullmatch("[0-9a-f]{64}", etag) and digest.hexdigest() != etag:
        raise ValueError("sha256 differs from the one announced")
    verify_parquet(part)


def download(index, progress):
    """Bring one climbmix shard into the data folder; raise ContractError after the last try."""
    path = folder("data") / f"{shard_name(index)}.parquet"
    url = CLIMBMIX_URL.format(HF_ENDPOINT.rstrip("/"), path.name)
    part = path.with_suffix(".part")
    for attempt in range(DOWNLOAD_ATTEMPTS):
        if path.exists():
            return
        wait = min(2**attempt, MAX_WAIT)
        try:
            fetch(url, part, progress)
            part.replace(path)
            continue
        except ValueError as error:  # not what was announced: begin again
            part.unlink(missing_ok=True)
            reason = error
        except requests.HTTPError as error:
            status, reason = error.response.status_code, f"HTTP status {error.response.status_code}"
            if status not in (408, 429) and status < 500:
                break
            retry_after = error.response.headers.get("Retry-After", "")
            wait = min(int(retry_after), MAX_WAIT) if retry_after.isdecimal() else wait
        except requests.RequestException as error:
            reason = type(error).__name__
        if attempt < DOWNLOAD_ATTEMPTS - 1:
            time.sleep(wait)
    if not path.exists():
        raise ContractError(
            f"{url}: {reason}, gave up after {attempt + 1} of {DOWNLOAD_ATTEMPTS} tries: "
            "run `uv run prepare.py` again, or set HF_ENDPOINT or AUTORESEARCH_CORPUS=python"
        )


def download_climbmix(num_shards):
    """Download the validation, the test and the first num_shards training shards (-1: all)."""
    count = TEST_SHARD if num_shards < 0 else min(num_shards, TEST_SHARD)
    folder("data").mkdir(parents=True, exist_ok=True)
    have = {path.stem for path in folder("data").glob("*.parquet")}
    missing = [i for i in (VAL_SHARD, TEST_SHARD, *range(count)) if shard_name(i) not in have]
    if not missing:
        return
    print(f"downloading {len(missing)} shards of about 100 MB from {HF_ENDPOINT}")
    progress = Progress("downloaded", "bytes")
    pool = ThreadPoolExecutor(8)
    try:
        for _ in pool.map(lambda index: download(index, progress), missing):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    progress.update(0, final=True)


def python_documents(roots):
    """Collect Python source below the root folders: {split: documents}, and files not readable.

    A document is a top-level block: what stands between two blank lines. Order and split come from
    hashes of path and content: the same environment gives the same corpus, shuffled, and a file
    has blocks in one split only. Nothing is taken twice.
    """
    files, skipped = [], 0
    for root in roots:
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            if "site-packages" in name.parts:  # of the standard library: another environment's
                continue
            try:
                content = path.read_bytes()
                text = content.decode()
            except (OSError, UnicodeDecodeError):
                skipped += 1
                continue
            files.append((hashlib.sha256(str(name).encode() + content).digest(), text))
    splits, seen, size = {"train": [], "val": [], "test": []}, set(), 0
    for digest, text in sorted(files):
        if size >= PYTHON_CORPUS_BYTES:
            break
        split = {0: "val", 1: "test"}.get(digest[0] % 32, "train")
        for block in re.split(r"\n{3,}(?=\S)", text.replace("\r\n", "\n")):
            document = block.strip("\n") + "\n"
            key = hashlib.sha256(document.encode()).digest()
            if key not in seen and document != "\n":
                seen.add(key)
                splits[split].append((key, document))
                size += len(document.encode())
    return {split: [text for _, text in sorted(docs)] for split, docs in splits.items()}, skipped


def write_parquet(path, documents):
    table = pa.table({"text": pa.array(documents, pa.string())})
    pq.write_table(table, path, compression="zstd", row_group_size=GROUP_DOCUMENTS)


def build_python(roots=None):
    """Write the Python source of the running environment as parquet shards like climbmix's."""
    if folder("data").exists():
        return
    roots = roots or sorted({Path(sysconfig.get_path(p)) for p in ("stdlib", "purelib", "platlib")})
    splits, skipped = python_documents(roots)
    temporary = folder("data").with_name("data.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for split, documents in splits.items():
        if not documents:
            raise ContractError(f"too little Python source below {roots}: no {split} documents")
        first = {"val": VAL_SHARD, "test": TEST_SHARD}.get(split, 0)
        size = SHARD_DOCUMENTS if split == "train" else len(documents)
        for i, start in enumerate(range(0, len(documents), size), first):
            name = f"{shard_name(i)}.parquet"
            write_parquet(temporary / name, documents[start : start + size])
    temporary.replace(folder("data"))
    total = sum(len(documents) for documents in splits.values())
    print(f"python corpus: {total:,} documents; {skipped} files were not readable and left out")


# ------------------------------------------------------------------------------------------------
# Tokenizer training


def read_texts(path):
    """Yield the documents of a parquet shard, a list a row group."""
    try:
        verify_parquet(path)
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
                yield [text for text in texts if text]
    except (ValueError, pa.ArrowException) as error:
        reason = error if type(error) is ValueError else type(error).__name__
        raise ContractError(
            f"{path} is damaged ({reason}): delete it, run `uv run prepare.py`"
        ) from None


def train_tokenizer():
    """Train a byte pair encoding on the training shards; write it as JSON, with a checksum."""
    path = folder("tokenizer") / "tokenizer.json"
    with contextlib.suppress(ContractError):
        return Tokenizer.from_directory(path.parent)
    shards = [p for p in sorted(folder("data").glob("*.parquet")) if shard_split(p) == "train"]
    if not shards:
        raise ContractError(f"no training shard in {folder('data')}: run `uv run prepare.py`")
    progress = Progress("training the tokenizer", "characters read")

    def texts():
        for text in itertools.chain.from_iterable(itertools.chain(*map(read_texts, shards))):
            text = text[:TRAIN_DOCUMENT_CHARS]
            progress.update(len(text))
            yield text
            if progress.done >= TRAIN_CHARS:
                return

    num_ranks = VOCAB_SIZE - len(SPECIAL_TOKENS)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts(), num_ranks, pattern=SPLIT_PATTERN)
    progress.update(0, final=True)
    tokens = [
        bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1])
    ]
    if len(tokens) < num_ranks:
        raise ContractError(f"the training text fills {len(tokens)} of {num_ranks} tokens only")
    content = {
        "contract": contract(),
        "pattern": SPLIT_PATTERN,
        "special_tokens": SPECIAL_TOKENS,
        "tokens_base64": [base64.b64encode(token).decode() for token in tokens],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"sha256": checksum(content), **content}, indent=0))
    temporary.replace(path)
    return Tokenizer.from_directory(path.parent)


def checksum(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Token shards


def open_shard(path, tokenizer):
    """Memory-map a token shard; raise ContractError if damaged or of another tokenizer."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowException, OSError):
        raise ContractError(
            f"{path} is not a whole token shard: delete it, run `uv run prepare.py`"
        ) from None
    if (reader.schema.metadata or {}).get(b"tokenizer") != tokenizer.sha256.encode():
        raise ContractError(f"{path} is of another tokenizer: run `uv run prepare.py`")
    return reader


def tokenize_shard(source, path, tokenizer, progress):
    """Write the documents of a parquet shard as BOS + tokens, a record batch a row group."""
    metadata = {"tokenizer": tokenizer.sha256}
    schema = pa.schema([("tokens", pa.list_(pa.uint16()))], metadata=metadata)
    temporary = path.with_suffix(".tmp")
    encode = tokenizer.encoding.encode_to_numpy
    bos = np.array([tokenizer.bos_token_id], np.uint16)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for texts in read_texts(source):
            ids = pool.map(lambda text: encode(text, disallowed_special=()), texts)
            parts = list(itertools.chain.from_iterable((bos, part) for part in ids))
            lengths = [1 + len(part) for part in parts[1::2]]
            offsets = np.cumsum([0, *lengths], dtype=np.int32)
            values = np.concatenate(parts or [bos[:0]]).astype(np.uint16)
            writer.write_batch(
                pa.record_batch([pa.ListArray.from_arrays(offsets, values)], schema=schema)
            )
            progress.update(len(values))
    temporary.replace(path)


def tokenize(tokenizer):
    """Tokenise every shard that has no token shard of this tokenizer yet."""
    folder("tokens").mkdir(parents=True, exist_ok=True)
    todo = []
    for source in sorted(folder("data").glob("*.parquet")):
        path = folder("tokens") / f"{source.stem}.arrow"
        try:
            open_shard(path, tokenizer)
        except ContractError:
            todo.append((source, path))
    progress = Progress("tokenised", "tokens")
    for source, path in todo:
        tokenize_shard(source, path, tokenizer, progress)
    if todo:
        progress.update(0, final=True)


# ------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """Byte pair encoding with byte lengths taken from the tokens' own bytes.

    Attributes: vocab_size; bos_token_id; token_bytes, int32 (vocab_size,), the byte length of each
    token, 0 for special tokens; sha256 of the settings and tokens.
    """

    def __init__(self, tokens, sha256):
        self.vocab_size = len(tokens) + len(SPECIAL_TOKENS)
        self.bos_token_id = len(tokens)
        self.sha256 = sha256
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)},
        )
        lengths = [len(token) for token in tokens] + [0] * len(SPECIAL_TOKENS)
        self.token_bytes = torch.tensor(lengths, dtype=torch.int32)

    @classmethod
    def from_directory(cls, directory=None):
        """Load tokenizer.json; raise ContractError if missing, damaged or of another contract."""
        path = Path(directory or folder("tokenizer")) / "tokenizer.json"
        try:
            content = json.loads(path.read_text())
            sha256 = content.pop("sha256")
            tokens = [base64.b64decode(token) for token in content["tokens_base64"]]
        except OSError as error:
            reason = f"no tokenizer at {path} ({error.strerror})"
            raise ContractError(f"not prepared, {reason}: run `uv run prepare.py`") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            sha256 = None
        if sha256 is None or checksum(content) != sha256:
            raise ContractError(f"{path} is damaged: delete it, run `uv run prepare.py`")
        check_contract(content["contract"], path)
        return cls(tokens, sha256)

    def encode(self, text):
        """Return the token ids of a string; special tokens in it are plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        """Return a list of token ids a string, encoded with all cores."""
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, ids):
        """Return the string of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)


# ------------------------------------------------------------------------------------------------
# Dataloader and clock


def split_documents(tokenizer, split):
    """Yield the documents of a split once, uint16 arrays on memory-mapped tokens."""
    paths = [p for p in sorted(folder("tokens").glob("*.arrow")) if shard_split(p) == split]
    if not paths:
        raise ContractError(f"no {split} shard in {folder('tokens')}: run `uv run prepare.py`")
    for path in paths:
        reader = open_shard(path, tokenizer)
        for i in range(reader.num_record_batches):
            try:
                column = reader.get_batch(i).column(0)
                column.validate(full=True)
                values, offsets = column.values.to_numpy(), column.offsets.to_numpy().tolist()
                whole = values.max(initial=0) < tokenizer.vocab_size
            except (pa.ArrowException, OSError):
                whole = False
            if not whole:
                raise ContractError(f"{path} is damaged: delete it, run `uv run prepare.py`")
            for start, end in itertools.pairwise(offsets):
                yield values[start:end]


def pack(documents, row_len):
    """Yield rows of exactly row_len tokens, uint16, each beginning with a document.

    The longest of the buffered documents that fits goes next; where none fits, the shortest is
    cropped to fill the row. The search is a bisection in a list kept sorted by length.
    Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    documents, lengths, buffer = iter(documents), [], []
    while True:
        row, filled = np.empty(row_len, np.uint16), 0
        while filled < row_len:
            for document in itertools.islice(documents, BUFFER_DOCUMENTS - len(buffer)):
                i = bisect_right(lengths, len(document))
                lengths.insert(i, len(document))
                buffer.insert(i, document)
            if not buffer:
                return
            i = max(bisect_right(lengths, row_len - filled) - 1, 0)
            size = min(lengths.pop(i), row_len - filled)
            row[filled : filled + size] = buffer.pop(i)[:size]
            filled += size
        yield row


class Dataloader:
    """Iterator over (inputs, targets), int64 (batch_size, seq_len) on the device; see the maker."""

    clock_start = None  # one clock a process, however many loaders it makes

    def __init__(self, tokenizer, batch_size, seq_len, split, device):
        self.batch_size, self.split, self.device = batch_size, split, torch.device(device)
        self.epoch, self.num_rows, self.events = 1, EVAL_TOKENS // seq_len, []
        self.rows = pack(self.documents(tokenizer), seq_len + 1)
        if split != "train":
            self.rows = itertools.islice(self.rows, self.num_rows)

    def documents(self, tokenizer):
        """Yield the split's documents: of train epoch after epoch, otherwise once."""
        yield from split_documents(tokenizer, self.split)
        while self.split == "train":
            self.epoch += 1
            yield from split_documents(tokenizer, self.split)

    @property
    def elapsed(self):
        """Seconds since the first training batch was handed out."""
        return time.monotonic() - self.clock_start if self.clock_start else 0.0

    @property
    def progress(self):
        """Share of the training time that is over, 0 to 1."""
        return min(self.elapsed / TIME_BUDGET, 1.0)

    def __iter__(self):
        return self

    def __next__(self):
        if self.split == "train":
            self.wait_for_device()
            if self.elapsed >= TIME_BUDGET:
                raise StopIteration
        rows = list(itertools.islice(self.rows, self.batch_size))
        if self.split != "train":
            self.num_rows -= len(rows)
            if len(rows) < self.batch_size and self.num_rows:
                raise ContractError(f"the {self.split} shard is {self.num_rows} rows too short")
            if not rows:
                raise StopIteration
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        if self.device.type == "cuda":
            # A fresh pinned tensor a batch: torch's host allocator does not hand its memory out
            # again before the copy is done, so no buffer of ours can be rewritten too early.
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        if self.split == "train" and Dataloader.clock_start is None:
            Dataloader.clock_start = time.monotonic()
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def wait_for_device(self):
        """Keep the host at most two batches ahead, so that the clock measures work done."""
        if self.device.type == "cpu":
            return
        self.events.append(torch.get_device_module(self.device).Event())
        self.events[-1].record()  # reached when all batches handed out so far are worked off
        if len(self.events) > 1:
            self.events.pop(0).synchronize()


def make_dataloader(tokenizer, batch_size, seq_len, split, device):
    """Return an iterator over (inputs, targets), int64 (batch_size, seq_len) on the device.

    Targets are inputs shifted by one; every row begins with BOS and is full.
    split "train": endless epochs, with attributes epoch (from 1), elapsed (seconds since the first
    batch of the process) and progress (elapsed / TIME_BUDGET, at most 1); it ends with the budget.
    split "val" or "test": the same rows once, at every batch size; the last batch may be short.
    Making the train loader arms the hard wall: at HARD_LIMIT the process ends, stacks on stderr.
    """
    if split == "train":
        left = HARD_LIMIT - (time.monotonic() - PROCESS_START)
        faulthandler.dump_traceback_later(max(left, 0.1), exit=True, file=sys.__stderr__)
    return Dataloader(tokenizer, batch_size, seq_len, split, device)


# ------------------------------------------------------------------------------------------------
# Metric


@torch.no_grad()
def score_batch(model, inputs, targets, vocab_size):
    """Return -ln p(target) and the mean logit at every position, float32 (B, T) on the CPU.

    Raises ContractError on logits of a wrong shape or that are not finite.
    """
    logits = model(inputs)
    shape, expected = getattr(logits, "shape", type(logits).__name__), (*inputs.shape, vocab_size)
    if shape != expected:
        shape = tuple(shape) if torch.is_tensor(logits) else shape
        raise ContractError(f"model(inputs) must return logits {expected}, not {shape}")
    nats, means = [], []
    parts = zip(logits.flatten(0, 1).split(SCORE_TOKENS), targets.flatten().split(SCORE_TOKENS))
    for part, target in parts:
        part = part.float()
        nats.append(F.cross_entropy(part, target, reduction="none"))
        means.append(part.mean(dim=-1))
    nats, means = torch.cat(nats).cpu(), torch.cat(means).cpu()
    if not torch.isfinite(nats + means).all():
        raise ContractError("the model's logits are not finite")
    return nats.view(targets.shape), means.view(targets.shape)


def check_causality(model, inputs, targets, vocab_size, nats, means):
    """Raise ContractError if what the model says at t depends on tokens after t.

    Every row is cut at another position; all tokens after the cut are changed, and nothing up to
    it may move. The cuts step through the row by a number coprime to its length: no two are equal
    before all are taken, and they have no common period.
    """
    B, T = inputs.shape
    step = next(s for s in range(round(0.618 * T), 2 * T) if math.gcd(s, max(T - 1, 1)) == 1)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, PROBE_ROWS, B):
        cuts = (T - 2 - step * torch.arange(first, first + B)).remainder(max(T - 1, 1))
        later = torch.arange(T) > cuts[:, None]
        shift = torch.randint(1, vocab_size, (B, T), generator=generator) * later
        changed = (inputs + shift.to(inputs.device)) % vocab_size
        nats_changed, means_changed = score_batch(model, changed, targets, vocab_size)
        moved = torch.maximum((nats - nats_changed).abs(), (means - means_changed).abs())
        moved = (moved.masked_fill(later, 0) > PROBE_TOLERANCE).nonzero().tolist()
        if moved:
            raise ContractError(
                f"the model is not causal, or differs from call to call: its logits at position "
                f"{moved[0][1]} moved when only tokens after {cuts[moved[0][0]]} were changed"
            )


def evaluate_bpb(model, tokenizer, batch_size, split="val"):
    """Return bits per byte on the first EVAL_TOKENS of a held-out split; lower is better.

    Sum of -ln p(target) over ln 2 times the sum of the targets' bytes; special tokens count in
    neither. model(inputs) returns logits (B, T, vocab_size) for int64 inputs (B, T). Raises
    ContractError on logits of a wrong shape, not finite, or that depend on later tokens.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    nats, num_bytes, training = 0.0, 0, model.training
    model.eval()
    batches = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, split, device)
    for i, (inputs, targets) in enumerate(batches):
        scored = score_batch(model, inputs, targets, tokenizer.vocab_size)
        if i == 0:
            check_causality(model, inputs, targets, tokenizer.vocab_size, *scored)
        lengths = tokenizer.token_bytes[targets.cpu()]
        nats += scored[0].double()[lengths > 0].sum().item()
        num_bytes += lengths.sum().item()
    model.train(training)
    return nats / (math.log(2) * num_bytes)


# ------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description="Prepare data and tokenizer, once.")
    text = "training shards of climbmix to download, -1 for all (default: %(default)s)"
    parser.add_argument("--num-shards", type=int, default=NUM_TRAIN_SHARDS, help=text)
    args = parser.parse_args()
    start = time.monotonic()
    try:
        folder("data").parent.mkdir(parents=True, exist_ok=True)
        with (folder("data").parent / "lock").open("w") as lock:  # freed when the process ends
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another prepare.py is at work on this corpus: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if ON_CLIMBMIX:
                download_climbmix(args.num_shards)
            else:
                build_python()
            tokenize(train_tokenizer())
    except OSError as error:
        raise ContractError(
            f"{error.filename or folder('data').parent}: {error.strerror}"
        ) from None
    except KeyboardInterrupt:
        raise ContractError("interrupted: `uv run prepare.py` goes on from here") from None
    print(f"{CORPUS} is ready in {folder('data').parent} ({time.monotonic() - start:.1f} s)")
    print("next: uv run train.py")


if __name__ == "__main__":
    main()
