"""The contract of autoresearch: data, tokenizer, clock, dataloader, metric. Nobody edits it.

    uv run prepare.py                  # once; a second call finishes in seconds
    uv run prepare.py --num-shards 40  # more training data (climbmix only)

Sections: contract, progress, corpora, tokenizer training, token shards, tokenizer, dataloader and
clock, machine, metric, FlashAttention-3, command line.
"""

import argparse
import faulthandler
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

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
    """Return an environment variable, or the default where it is not set or empty.

    Raises ContractError if the pattern does not match it.
    """
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        raise ContractError(f"{name}={value!r} is not {pattern}: set it anew, or unset it")
    return value


if sys.platform == "win32":
    raise ContractError("this runs on Linux, on macOS, and on Windows inside WSL")

PROCESS_START = time.monotonic() - time.process_time()  # approximate: imports take one core

# What the environment may set
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a driver that is too old: check_device speaks of it
    HAS_CUDA = torch.cuda.is_available()
DEFAULT_CORPUS = "climbmix" if HAS_CUDA else "python"
CORPUS = setting("AUTORESEARCH_CORPUS", DEFAULT_CORPUS, "climbmix|python")
EVAL_SPLIT = setting("AUTORESEARCH_SPLIT", "val", "val|test")  # test is for the person alone
SEED = int(setting("AUTORESEARCH_SEED", "42", "[0-9]{1,18}"))  # measures noise, is no knob
CACHE_DIR = Path(setting("AUTORESEARCH_CACHE", "~/.cache/autoresearch", ".+")).expanduser()
HF_ENDPOINT = setting("HF_ENDPOINT", "https://huggingface.co", "https?://.+").rstrip("/")

# What every run has in common
MAX_SEQ_LEN = 2048  # tokens of context
VOCAB_SIZE = 8192 if CORPUS == "climbmix" else 4096  # tokens, special ones included
EVAL_TOKENS = 40 * 2**19 if CORPUS == "climbmix" else 2**18  # tokens scored
TIME_BUDGET = 300  # seconds of training, from the first training batch
HARD_LIMIT = 600  # seconds of process life, then the process is ended
MAX_IDLE = 10  # seconds that may pass from the end of training to the evaluation
MAX_SHARE_TAKEN = 0.1  # of a run's processor time, by others, on a quiet machine
MAX_OTHERS_GIB = 4  # of a GPU's memory that others hold on a quiet machine

# Corpora
VAL_SHARD = "shard_06542"
TEST_SHARD = "shard_06541"  # every other shard is training
NUM_TRAIN_SHARDS = 20  # about 1.1 G tokens; half are cropped away, and 500 M are within an epoch
PYTHON_CORPUS_CHARS = 10**8  # characters of Python source taken from the environment, at most
SHARD_BYTES = 10**8  # of a climbmix shard, until the server has told its size
NUM_DOWNLOADS = 8  # at once
DOWNLOAD_TRIES = 4  # per shard
DOWNLOAD_TIMEOUT = (3, 15)  # seconds to connect, seconds between two pieces of the answer
MAX_WAIT = 300  # seconds between two tries, whatever the server asks for

# Tokenizer and token shards
SPLIT_PATTERN = (  # GPT-4's, with numbers in groups of at most two digits
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the first begins every document
TRAIN_CHARS = 10**9  # characters that the tokenizer is trained on, at most
TRAIN_DOCUMENT_CHARS = 10_000  # characters of one document among them, at most
PIECE_CHARS = 10**5  # characters encoded at once: tiktoken fails on white space of megabytes
GROUP_DOCUMENTS = 1024  # documents in a row group
BUFFER_DOCUMENTS = 1000  # documents that the packer chooses from

# Evaluation
SCORE_TOKENS = 8192 if HAS_CUDA else 128  # tokens whose log-softmax is held at once
PROBE_ROWS = 64 if CORPUS == "climbmix" else 16  # rows that the causality probe cuts, at least
PROBE_TOLERANCE = 1e-3  # nats by which equal inputs may differ from pass to pass

SHIPPED = {name: value for name, value in globals().items() if name.isupper()}


def contract():
    """Return the settings that the caches depend on, as they stand now."""
    return {"corpus": CORPUS, "vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN}


def folder(kind):
    """Return the folder of this corpus: kind is "data", "tokens" or "tokenizer"."""
    return CACHE_DIR / CORPUS / kind


def split_of(path):
    """Return the split of a shard, "train", "val" or "test": its name alone decides."""
    return {VAL_SHARD: "val", TEST_SHARD: "test"}.get(path.stem, "train")


def shard_paths(kind, split):
    """Return the shards of a split, sorted; raise ContractError if there is none."""
    suffix = {"data": ".parquet", "tokens": ".arrow"}[kind]
    paths = sorted(folder(kind).glob(f"*{suffix}"))
    paths = [path for path in paths if split_of(path) == split]
    if not paths:
        raise ContractError(f"no {split} shard in {folder(kind)}: run `uv run prepare.py`")
    return paths


def is_valid(read, *args):
    """Return whether read(*args) accepts what it reads: there, whole and of this contract."""
    try:
        read(*args)
    except ContractError:
        return False
    return True


# --- Progress -------------------------------------------------------------------------------------


class Progress:
    """Print what is done, how fast, and how long the rest will take.

    On a terminal all stages that are going share one line, which is written over; elsewhere each
    has a line of its own every ten seconds. Threads may share a stage.
    """

    going: ClassVar = {}  # {label: line} of the stages on the terminal's line
    lock = threading.RLock()  # of what is on the screen

    def __init__(self, label, unit):
        self.label = label
        self.unit = unit  # of a million
        self.done = 0
        self.is_terminal = sys.stdout.isatty()
        self.interval = 0.2 if self.is_terminal else 10  # seconds between two lines
        self.start = time.monotonic()
        self.shown = self.start

    def update(self, count, left=0, final=False):
        """Add to what is done; the final call prints it, if there was anything to do.

        left: how much is still to do, estimated.
        """
        with self.lock:
            self.done += count
            now = time.monotonic()
            is_due = now - self.shown > self.interval
            if is_due or (final and self.done):
                self.shown = now
                self.show(self.line(now - self.start, left), final)

    def line(self, seconds, left):
        """Return the line to print after so many seconds."""
        rate = self.done / (seconds + 1e-9)
        line = f"{self.label}: {self.done / 1e6:.1f}"
        if left:
            line += f" of {(self.done + left) / 1e6:.0f}"
        line += f" {self.unit}, {rate / 1e6:.2f} {self.unit}/s"
        if left and rate:
            line += f", {left / rate:.0f} s left"
        return line

    def show(self, line, final):
        """Print a line; on a terminal beside those of the other stages, until it is final."""
        if not self.is_terminal:
            print(line, flush=True)
            return
        Progress.going[self.label] = line
        if final:
            del Progress.going[self.label]
            say(line)
        text = " | ".join(Progress.going.values())
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}\r", end="", flush=True)

    @classmethod
    def clear(cls):
        """Take the line of stages that will not end off the terminal."""
        if cls.going:
            cls.going.clear()
            say("")


def say(line):
    """Print a line; on a terminal over what stages have written there."""
    with Progress.lock:
        if sys.stdout.isatty():
            line = f"{line:<{shutil.get_terminal_size().columns - 1}}"
        print(line, flush=True)


# --- Corpora --------------------------------------------------------------------------------------


def retry_after(response):
    """Return the seconds that a server asks us to wait; None if it does not, or makes no sense."""
    try:
        return requests.adapters.Retry().get_retry_after(response)
    except Exception:  # any text can stand in a header, and may fail to parse in many ways
        return None


class Downloads:
    """Shards of climbmix on their way, NUM_DOWNLOADS at once, in the order of paths.

    A failure of one stops all; what they have got by then stays, and the next run goes on there.
    """

    def __init__(self, paths):
        self.left = dict.fromkeys(paths, SHARD_BYTES)  # bytes to come, estimated
        self.num_left = SHARD_BYTES * len(paths)  # their sum
        self.num_missing = len(paths)  # shards
        self.progress = Progress("download", "MB")
        self.pause_end = 0.0  # time.monotonic() before which no request begins
        self.is_stopped = threading.Event()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(NUM_DOWNLOADS)
        self.futures = {}

    def begin(self):
        """Begin to download; whoever calls this also calls stop()."""
        for path in self.left:
            self.futures[path] = self.pool.submit(self.download, path)

    def wait_for(self, path):
        """Return when a shard is there; raise ContractError if it or another cannot be had."""
        if path in self.futures:
            self.futures[path].result()
        self.check()

    def check(self):
        """Raise the ContractError of the first shard that cannot be had, if there is one."""
        if self.is_stopped.is_set():
            self.pool.shutdown(cancel_futures=True)
            for future in self.futures.values():
                if not future.cancelled():
                    future.result()

    def stop(self):
        """Begin nothing more, and return when nothing more comes."""
        self.is_stopped.set()
        self.pool.shutdown(cancel_futures=True)

    def download(self, path):
        """Bring a shard to its path, unless stopped; whatever goes wrong stops the others."""
        try:
            self.try_to_download(path)
        except BaseException:
            self.is_stopped.set()
            raise

    def try_to_download(self, path):
        """Bring a shard to its path, unless stopped; raise ContractError after the last try."""
        url = f"{HF_ENDPOINT}/datasets/karpathy/climbmix-400b-shuffle/resolve/main/{path.name}"
        part = path.with_suffix(".part")
        advice = "run `uv run prepare.py` again, or set HF_ENDPOINT or AUTORESEARCH_CORPUS=python"
        reason = ""  # why the last try failed
        delay = 0  # seconds until the next try
        for attempt in range(DOWNLOAD_TRIES):
            if reason:
                say(f"{path.name}: {reason}; trying again in {delay:.0f} s")
            self.sleep(delay)
            if self.is_stopped.is_set():
                return
            delay = 2**attempt
            status = 0
            try:
                self.fetch(url, path, part)
                return
            except requests.HTTPError as error:
                status = error.response.status_code
                reason = f"the server answered {status}"
                is_passing = status >= 500 or status in (408, 429)
                if not is_passing:
                    break
                delay = retry_after(error.response) or delay
            except requests.RequestException as error:
                reason = type(error).__name__
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    reason = "its certificate cannot be verified"
                    advice = "set REQUESTS_CA_BUNDLE to the file of the certificates to trust"
                    break
            except OSError as error:
                if "TLS CA certificate" not in str(error):
                    raise
                reason = str(error)
                advice = "set REQUESTS_CA_BUNDLE to a file that is there, or unset it"
                break
            except ValueError as error:  # not what was announced: begin again
                part.unlink(missing_ok=True)
                reason = str(error)
            delay = min(delay, MAX_WAIT)
            if status == 429:  # too many requests, by all of us
                self.pause_end = max(self.pause_end, time.monotonic() + delay)
        raise ContractError(f"no {url} ({reason}): {advice}")

    def sleep(self, seconds):
        """Wait so long, and for the end of a pause that the server asked of any of us; or stop."""
        end = time.monotonic() + seconds
        while not self.is_stopped.is_set():
            left = max(end, self.pause_end) - time.monotonic()
            if left <= 0:
                return
            self.is_stopped.wait(left)

    def fetch(self, url, path, part):
        """Download url to path by way of the file `part`, going on where an earlier try stopped.

        Raises ValueError if what came is not what was announced, else as requests does.
        """
        headers = {"Accept-Encoding": "identity"}
        have = part.stat().st_size if part.exists() else 0
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
            if response.status_code == 416:
                raise ValueError("nothing left to resume")
            response.raise_for_status()
            announced = response.headers.get("Content-Length", "")
            if announced.isdecimal():
                self.set_left(path, int(announced))
            mode = "ab" if response.status_code == 206 else "wb"  # 206: the range asked for
            with part.open(mode) as file:
                for chunk in response.iter_content(2**14):
                    file.write(chunk)
                    self.set_left(path, max(self.left[path] - len(chunk), 0))
                    self.progress.update(len(chunk), self.num_left)
                    if self.is_stopped.is_set():
                        return
        with part.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for answer in (response, *response.history):
            etag = answer.headers.get("X-Linked-Etag", "").strip('"')
            if len(etag) == 64 and etag != sha256:
                raise ValueError("sha256 differs from the one announced")
        try:
            pq.read_metadata(part)
        except (ValueError, OSError):
            raise ValueError("what came is no parquet") from None
        part.replace(path)
        self.set_left(path, 0)
        with self.lock:
            self.num_missing -= 1
            self.progress.update(0, self.num_left, final=self.num_missing == 0)

    def set_left(self, path, num_bytes):
        """Note how much of a shard is still to come."""
        with self.lock:
            self.num_left += num_bytes - self.left[path]
            self.left[path] = num_bytes


def climbmix_shards(num_shards):
    """Return the paths of the validation, the test and the first num_shards training shards.

    -1 is all of them, 0 none of any kind: the text is a person's own. Raises ContractError if that
    is not complete, or if num_shards is None, the default, and there is text of one's own.
    """
    data = folder("data")
    if num_shards == 0:
        check_own_text()
        return []
    if num_shards is None:
        if any(not re.fullmatch(r"shard_\d{5}", path.stem) for path in data.glob("*.parquet")):
            advice = "--num-shards 0 takes it alone, another number mixes it with climbmix"
            raise ContractError(f"{data} has text of your own: {advice}")
        num_shards = NUM_TRAIN_SHARDS
    num_existing = int(TEST_SHARD.removeprefix("shard_"))  # training shards: all before it
    if num_shards < 0 or num_shards > num_existing:
        num_shards = num_existing
    stems = [VAL_SHARD, TEST_SHARD]
    stems += [f"shard_{i:05d}" for i in range(num_shards)]
    return sorted(data / f"{stem}.parquet" for stem in stems)


def python_files(roots):
    """Return [(hash of path and content, text)], sorted, and the number of unreadable files."""
    files = []
    num_unreadable = 0
    for root in roots:
        for path in root.rglob("*.py"):
            name = str(path.relative_to(root))
            if "site-packages" in name:  # below the standard library: another environment's
                continue
            try:
                content = path.read_bytes()
                digest = hashlib.sha256(name.encode() + content).digest()
                files.append((digest, content.decode()))
            except (OSError, UnicodeError):
                num_unreadable += 1
    return sorted(files), num_unreadable


def python_documents(roots):
    """Return {split: documents}, Python source below the root folders, and the number left out.

    Left out are files that cannot be read. A document is a top-level block. Order and split come
    from hashes of path and content: the same environment gives the same corpus, shuffled; no file
    has blocks in two splits, none comes twice.
    """
    files, num_unreadable = python_files(roots)
    keyed = {"train": [], "val": [], "test": []}  # split: [(hash, document)]
    seen = set()
    num_chars = 0
    for digest, text in files:
        split = {0: "val", 1: "test"}.get(digest[0] % 32, "train")
        for block in re.split(r"\n{3,}(?=\S)", text.replace("\r\n", "\n")):
            document = block.strip("\n") + "\n"
            key = hashlib.sha256(document.encode()).digest()
            is_new = key not in seen and not document.isspace()
            if is_new and num_chars < PYTHON_CORPUS_CHARS:
                seen.add(key)
                keyed[split].append((key, document))
                num_chars += len(document)
    splits = {split: [text for _, text in sorted(pairs)] for split, pairs in keyed.items()}
    return splits, num_unreadable


def check_own_text():
    """Raise ContractError unless there are shards for each split, perhaps a person's own."""
    missing = [s for s in ("train", "val", "test") if not is_valid(shard_paths, "data", s)]
    if missing:
        what = f"{folder('data')} has no parquet shard for {', '.join(missing)}"
        raise ContractError(f"{what}: add it, as docs/data.md says, or move that folder away")


def build_python():
    """Write the Python source of the running environment as parquet shards, unless done."""
    if folder("data").exists() and any(folder("data").iterdir()):  # ours come all at once
        check_own_text()
        return
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
    splits, num_unreadable = python_documents(roots)
    temporary = folder("data").with_name("data.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    stems = {"train": "shard_00000", "val": VAL_SHARD, "test": TEST_SHARD}
    for split, texts in splits.items():
        if not texts:
            raise ContractError(f"too little Python source below {roots}: no {split} documents")
        path = temporary / f"{stems[split]}.parquet"
        pq.write_table(pa.table({"text": texts}), path, GROUP_DOCUMENTS, compression="zstd")
    temporary.replace(folder("data"))
    print(f"python corpus written, without {num_unreadable} files that cannot be read")


def open_shard(path):
    """Return a parquet file with UTF-8 text in a column `text`, else raise ContractError."""
    try:
        file = pq.ParquetFile(path)
    except PermissionError as error:
        raise bad_shard(path, error.strerror) from None
    except (ValueError, OSError, pa.ArrowException):
        raise bad_shard(path, "it is no parquet file") from None
    names = file.schema_arrow.names
    if "text" not in names:
        raise bad_shard(path, f"it has no column `text`, but {', '.join(names)[:60]}")
    kind = file.schema_arrow.field("text").type
    text_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if text_kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise bad_shard(path, f"its column `text` is of type {kind}, not of UTF-8 strings")
    if file.metadata.num_rows == 0:
        raise bad_shard(path, "it has no rows")
    return file


def bad_shard(path, reason):
    """Return the ContractError about a file that is perhaps a person's own."""
    advice = "mend it, or move it away, then run `uv run prepare.py`"
    return ContractError(f"{path}: {reason}: {advice}")


def read_texts(path, group):
    """Yield the texts of a row group that are not empty, lists of at most GROUP_DOCUMENTS.

    Raises ContractError if the shard is no parquet of UTF-8 text in a column `text`.
    """
    with open_shard(path) as file:
        try:
            for batch in file.iter_batches(GROUP_DOCUMENTS, [group], columns=["text"]):
                texts = batch["text"].cast(pa.string())
                texts.validate(full=True)
                texts = [text for text in texts.to_pylist() if text]
                if texts:
                    yield texts
        except MemoryError:
            raise bad_shard(path, "its row groups are too large for this memory") from None
        except (ValueError, OSError, pa.ArrowException):
            raise bad_shard(path, "it is damaged, or its text is not UTF-8") from None


def row_groups(paths, downloads):
    """Yield (path, group, share) for each row group of these shards, in order.

    It waits for shards that are on their way. share: how much of all shards is yielded by then, 0
    to 1, estimated. Raises ContractError if a shard cannot be had or opened.
    """
    sizes = [path.stat().st_size if path.exists() else SHARD_BYTES for path in paths]
    for i, path in enumerate(paths):
        downloads.wait_for(path)
        with open_shard(path) as file:
            num_groups = file.num_row_groups
        for group in range(num_groups):
            downloads.check()
            bytes_done = sum(sizes[:i]) + (group + 1) / num_groups * sizes[i]
            yield path, group, bytes_done / sum(sizes)


# --- Tokenizer training ---------------------------------------------------------------------------


def checksum(content):
    """Return the sha256 of a value that JSON can write, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def training_texts(paths, downloads):
    """Yield the beginnings of the documents in these shards, TRAIN_CHARS characters at most."""
    progress = Progress("tokenizer", "M characters")
    for path, group, share in row_groups(paths, downloads):
        for texts in read_texts(path, group):
            if progress.done >= TRAIN_CHARS:
                break
            beginnings = [text[:TRAIN_DOCUMENT_CHARS] for text in texts]
            yield from beginnings
            num_chars = sum(map(len, beginnings))
            so_far = progress.done + num_chars
            in_all = min(so_far / share, TRAIN_CHARS)
            progress.update(num_chars, left=max(in_all - so_far, 0))
        if progress.done >= TRAIN_CHARS:
            break
    progress.update(0, final=True)
    say(f"tokenizer: choosing {VOCAB_SIZE} tokens by what was read")


def train_tokenizer(paths, downloads):
    """Train byte pair encoding on these shards, unless done; write it as plain JSON."""
    if is_valid(Tokenizer.from_directory):
        return
    num_tokens = VOCAB_SIZE - len(SPECIAL_TOKENS)
    trainer = rustbpe.Tokenizer()
    texts = training_texts(paths, downloads)
    trainer.train_from_iterator(texts, num_tokens, pattern=SPLIT_PATTERN)
    tokens = {rank: bytes(token) for token, rank in trainer.get_mergeable_ranks()}
    if len(tokens) < num_tokens:
        what = f"the training text fills {len(tokens)} of {num_tokens} tokens only"
        raise ContractError(f"{what}: add more text to {folder('data')}")
    content = {"contract": contract(), "tokens": [tokens[i].hex() for i in range(num_tokens)]}
    folder("tokenizer").mkdir(exist_ok=True)
    temporary = folder("tokenizer") / "tokenizer.tmp"
    temporary.write_text(json.dumps({"sha256": checksum(content), **content}, indent=0))
    temporary.replace(temporary.with_suffix(".json"))


# --- Token shards ---------------------------------------------------------------------------------


def read_tokens(path, tokenizer):
    """Yield the documents of a token shard, uint16 arrays in a memory-mapped file.

    Raises ContractError if the file is damaged or was written with another tokenizer.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        metadata = reader.schema.metadata or {}
        if metadata.get(b"tokenizer") != tokenizer.sha256.encode():
            raise ValueError
        for i in range(reader.num_record_batches):
            column = reader.get_batch(i).column(0)
            column.validate(full=True)
            values = np.from_dlpack(column.values)  # to_numpy would import pandas
            offsets = np.from_dlpack(column.offsets)
            if values.max(initial=0) >= tokenizer.vocab_size:
                raise ValueError
            for start, end in itertools.pairwise(offsets.tolist()):
                yield values[start:end]
    except (ValueError, OSError, pa.ArrowException):
        what = f"{path} is damaged or of another tokenizer"
        raise ContractError(f"{what}: delete it, run `uv run prepare.py`") from None


def read_first_document(path, tokenizer):
    """Return the first document of a token shard, None if it has none."""
    return next(read_tokens(path, tokenizer), None)


def is_tokenized(source, tokenizer):
    """Return whether a shard has its tokens by this tokenizer, and has not changed since.

    Tokens have the time of the file that they were made from.
    """
    path = token_path(source)
    if not (source.exists() and is_valid(read_first_document, path, tokenizer)):
        return False
    return path.stat().st_mtime_ns == source.stat().st_mtime_ns


def token_path(source):
    """Return where the tokens of a parquet shard belong."""
    return folder("tokens") / f"{source.stem}.arrow"


def encode_document(tokenizer, text):
    """Return BOS and the tokens of a text, uint16."""
    parts = [[tokenizer.bos_token_id]]
    for i in range(0, len(text), PIECE_CHARS):
        piece = text[i : i + PIECE_CHARS]
        parts.append(tokenizer.encoding.encode_to_numpy(piece, disallowed_special=()))
    return np.concatenate(parts).astype(np.uint16)


worker_tokenizer = None  # these two: in a process that encodes
worker_is_ending = None


def begin_worker(tokenizer, is_ending):
    """Make this a process that encodes: it leaves Ctrl-C to its parent, and ends when that does.

    is_ending: an event of multiprocessing, after which nothing more is encoded.
    """
    global worker_tokenizer, worker_is_ending
    worker_tokenizer = tokenizer
    worker_is_ending = is_ending
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where the server that forks did not inherit that
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait until the parent has ended, however it ended, then end this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_group(path, group):
    """Return [(tokens, offsets)] for each thousand documents of a row group, uint16 and int32."""
    encoded = []
    for texts in read_texts(path, group):
        if worker_is_ending.is_set():
            break
        documents = [encode_document(worker_tokenizer, text) for text in texts]
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int32)
        encoded.append((np.concatenate(documents), offsets))
    return encoded


@contextmanager
def interrupts_held_back():
    """Let Ctrl-C wait until the end of the block, and never reach the processes that it starts.

    A terminal sends it to them as well; one that has just begun would answer with a traceback.
    """
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits that
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def encoding_processes(tokenizer):
    """Start a pool of processes for encode_group, one a processor; end it, however this ends.

    On 2 cores two threads were 1.4 times as fast as one, and two processes 1.95 times.
    """
    context = multiprocessing.get_context("forkserver")  # a fork is not safe beside threads
    context.set_forkserver_preload(["pyarrow.parquet", "torch"])  # once, not in every process
    is_ending = context.Event()
    pool = ProcessPoolExecutor(num_processors(), context, begin_worker, (tokenizer, is_ending))
    try:
        with interrupts_held_back():
            wait([pool.submit(os.getpid) for _ in range(num_processors())])
        yield pool
    finally:
        is_ending.set()  # killing them while they send a result would leave the pool waiting
        pool.shutdown(cancel_futures=True)


def encode_shards(pool, paths, downloads):
    """Yield (path, share, what encode_group returns) for the row groups of shards, in order.

    share: see row_groups. Raises ContractError if a shard cannot be had or read.
    """
    pending = deque()
    for path, group, share in row_groups(paths, downloads):
        pending.append((path, share, pool.submit(encode_group, path, group)))
        if len(pending) > 3 * num_processors():
            path, share, future = pending.popleft()
            yield path, share, future.result()
    for path, share, future in pending:
        yield path, share, future.result()


def num_processors():
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def tokenize(tokenizer, paths, downloads):
    """Write each shard's documents as BOS + tokens, a record batch for a thousand, unless done."""
    folder("tokens").mkdir(exist_ok=True)
    for stale in set(folder("tokens").iterdir()) - set(map(token_path, paths)):
        stale.unlink()  # of text that has gone or has another name, and would be trained on
    paths = [path for path in paths if not is_tokenized(path, tokenizer)]
    if not paths:
        return
    schema = pa.schema({"tokens": pa.list_(pa.uint16())}, metadata={"tokenizer": tokenizer.sha256})
    progress = Progress("tokens", "M")
    with encoding_processes(tokenizer) as pool:
        encoded = encode_shards(pool, paths, downloads)
        for path, groups in itertools.groupby(encoded, key=itemgetter(0)):
            temporary = token_path(path).with_suffix(".tmp")
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for _, share, batches in groups:
                    for tokens, offsets in batches:
                        column = pa.ListArray.from_arrays(offsets, tokens)
                        writer.write_batch(pa.record_batch([column], schema=schema))
                    num_tokens = sum(len(tokens) for tokens, _ in batches)
                    so_far = progress.done + num_tokens
                    progress.update(num_tokens, so_far / share - so_far)
            source = path.stat()
            os.utime(temporary, ns=(source.st_atime_ns, source.st_mtime_ns))
            temporary.replace(token_path(path))
    progress.update(0, final=True)


def check_held_out_text(tokenizer):
    """Raise ContractError if there is less held-out text than evaluation scores."""
    for split in ("val", "test"):
        loader = Dataloader(tokenizer, 1, MAX_SEQ_LEN, split, "cpu")
        num_rows = sum(1 for _ in itertools.islice(loader.rows, loader.num_left))
        if num_rows < loader.num_left:
            (path,) = shard_paths("data", split)
            what = f"{path} fills {num_rows} of the {loader.num_left} rows that are scored"
            share = loader.num_left / max(num_rows, 1)
            raise ContractError(f"{what}: give it over {share:.1f} times as much text")


# --- Tokenizer ------------------------------------------------------------------------------------


class Tokenizer:
    """Byte pair encoding: vocab_size, bos_token_id, and int32 (vocab_size,) token_bytes."""

    def __init__(self, tokens, sha256):
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)},
        )
        self.sha256 = sha256
        self.vocab_size = self.encoding.n_vocab
        self.bos_token_id = len(tokens)
        lengths = [len(token) for token in tokens] + [0] * len(SPECIAL_TOKENS)
        self.token_bytes = torch.tensor(lengths, dtype=torch.int32)

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
            what = f"not prepared, {path}: {error.strerror}"
            raise ContractError(f"{what}: run `uv run prepare.py`") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ContractError(f"{path} is damaged: run `uv run prepare.py`") from None
        made_for = content["contract"]
        if made_for != contract():
            what = f"{path} is made for {made_for}, not {contract()}"
            raise ContractError(f"{what}: run `uv run prepare.py`")
        return cls([bytes.fromhex(token) for token in content["tokens"]], sha256)

    def encode(self, text):
        """Return the tokens of a text; the names of special tokens in it are plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        """Return the tokens of each text, with several threads."""
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids):
        """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)


# --- Dataloader and clock -------------------------------------------------------------------------


def pack(documents, row_len):
    """Yield rows of exactly row_len tokens, uint16, each beginning with a document.

    The longest buffered document that fits goes next; where none fits, the shortest is cropped, so
    one longer than a row waits for long. Nothing masks a row's documents from each other. After
    Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    documents = iter(documents)
    buffer = []  # sorted by length
    while True:
        row = np.empty(row_len, np.uint16)
        filled = 0
        while filled < row_len:
            for document in itertools.islice(documents, BUFFER_DOCUMENTS - len(buffer)):
                insort(buffer, document, key=len)
            if not buffer:
                return
            room = row_len - filled
            num_fitting = bisect_right(buffer, room, key=len)
            document = buffer.pop(max(num_fitting - 1, 0))[:room]
            row[filled : filled + len(document)] = document
            filled += len(document)
        yield row


class Clock:
    """The training clock of a process: it starts with the first training batch and never again."""

    def __init__(self):
        self.start = None  # time.monotonic() when the first training batch was handed out
        self.end = None  # time.monotonic() when the data ended
        self.num_tokens = 0  # handed out for training, by all loaders together
        self.processors = ()  # numbers of those that this process may use, on Linux
        self.processor_time = None  # at the start

    @property
    def elapsed(self):
        """Seconds since the start; 0 before it."""
        return 0.0 if self.start is None else time.monotonic() - self.start

    @property
    def is_over(self):
        """Whether the training time is used up."""
        return self.elapsed >= TIME_BUDGET

    def begin(self):
        """Start, unless already started."""
        if self.start is None:
            if sys.platform == "linux":
                self.processors = os.sched_getaffinity(0)
            self.processor_time = read_processor_time(self.processors)
            self.start = time.monotonic()

    def finish(self):
        """Note that the data has ended, unless already noted."""
        if self.end is None:
            self.end = time.monotonic()

    def share_taken(self):
        """Return the share of training's processor time that others took, 0 to 1."""
        now = read_processor_time(self.processors)
        return share_taken(self.processor_time, now, self.elapsed)


CLOCK = Clock()  # one a process, whatever the number of loaders


class Dataloader(Iterator):
    """Iterator over batches of packed rows; see make_dataloader."""

    def __init__(self, tokenizer, batch_size, seq_len, split, device):
        self.batch_size = batch_size
        self.split = split
        self.device = torch.device(device)
        self.epoch = 1
        self.num_left = math.inf if split == "train" else EVAL_TOKENS // seq_len  # rows
        self.rows = pack(self.documents(tokenizer), seq_len + 1)
        self.events = []  # of batches that the device may not have worked off

    def documents(self, tokenizer):
        """Yield the split's documents, once, or in endless epochs."""
        for self.epoch in itertools.count(1):
            for path in shard_paths("tokens", self.split):
                yield from read_tokens(path, tokenizer)
            if self.split != "train":
                return

    @property
    def elapsed(self):
        return CLOCK.elapsed

    @property
    def progress(self):
        return min(CLOCK.elapsed / TIME_BUDGET, 1.0)

    def wait_for_device(self):
        """Let the host be two batches ahead at most: the clock measures work done, not queued."""
        event = torch.get_device_module(self.device).Event()
        event.record()  # reached when all that was queued so far is worked off
        self.events.append(event)
        if len(self.events) > 1:
            self.events.pop(0).synchronize()

    def next_rows(self, num_rows):
        """Return the next rows on the device, int64 (num_rows, seq_len + 1)."""
        rows = list(itertools.islice(self.rows, num_rows))
        if len(rows) < num_rows:
            what = f"too little text in {folder('tokens')} for {self.split} rows"
            raise ContractError(f"{what}: run `uv run prepare.py`")
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        if self.device.type == "cuda":
            # Pinned anew each time: torch gives pinned memory out again only when its copy is done
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=batch.is_pinned())

    def __next__(self):
        is_training = self.split == "train"
        if is_training and self.device.type != "cpu":
            self.wait_for_device()
        if is_training and CLOCK.is_over:
            CLOCK.finish()
            raise StopIteration
        num_rows = min(self.batch_size, self.num_left)
        if num_rows == 0:
            raise StopIteration
        self.num_left -= num_rows
        batch = self.next_rows(num_rows)
        if is_training:
            CLOCK.begin()
            CLOCK.num_tokens += num_rows * (batch.size(1) - 1)
        # contiguous() would copy nothing where there is one row, and keep the longer row's stride:
        # a stride that the compiler has not seen makes it compile the model again
        inputs = batch[:, :-1].clone(memory_format=torch.contiguous_format)
        targets = batch[:, 1:].clone(memory_format=torch.contiguous_format)
        return inputs, targets


def make_dataloader(tokenizer, batch_size, seq_len, split, device):
    """Return an iterator over (inputs, targets), int64 (batch_size, seq_len) on the device.

    Targets are inputs shifted by one; every row begins with BOS and is full.
    split "train": endless epochs, until TIME_BUDGET is over; attributes epoch (from 1), elapsed
    (seconds since the process's first training batch), progress (elapsed / TIME_BUDGET, at most 1).
    split "val" or "test": the same rows once, at every batch size; the last batch may be short.
    Arms the hard wall if "train": at HARD_LIMIT the process ends, with stacks on stderr.
    Raises ContractError if there is an NVIDIA device that torch cannot use.
    """
    if split == "train":
        check_device()
        left = HARD_LIMIT - (time.monotonic() - PROCESS_START)
        faulthandler.dump_traceback_later(max(left, 0.1), exit=True, file=sys.__stderr__)
    return Dataloader(tokenizer, batch_size, seq_len, split, device)


# --- Machine --------------------------------------------------------------------------------------

# What torch.cuda.init() says where there is no device at all, and training on the CPU is right
NO_DEVICE = (
    "Torch not compiled with CUDA enabled",
    "Found no NVIDIA driver",
    "No CUDA GPUs are available",  # nor where CUDA_VISIBLE_DEVICES hides them
)


def check_device():
    """Raise ContractError if there is an NVIDIA device that torch cannot use.

    A run would else fail late, or go on slowly on the CPU. AUTORESEARCH_CORPUS=python says that the
    CPU is meant.
    """
    if torch.cuda.is_available():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # many lines about a device too old or too new
                torch.ones(1, device="cuda").add_(1).cpu()
        except torch.OutOfMemoryError:
            return  # the device works for somebody else, at least
        except RuntimeError as error:
            advice = "install a torch made for it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            raise unusable_device(error, advice) from None
    elif os.environ.get("AUTORESEARCH_CORPUS") != "python":
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            if not any(text in str(error) for text in NO_DEVICE):
                advice = "update the driver, or set AUTORESEARCH_CORPUS=python to use the CPU"
                raise unusable_device(error, advice) from None


def unusable_device(error, advice):
    """Return a ContractError with torch's reason, the first line of its error."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return ContractError(f"torch cannot use the NVIDIA device ({reason}): {advice}")


class ProcessorTime(NamedTuple):
    """Processor time up to now in seconds, summed over threads or processors; 0 if not known."""

    ran: float = 0.0  # by this process
    waited: float = 0.0  # by threads of this process that were ready to run
    others: float = 0.0  # by other processes, on the processors that this one may use
    stolen: float = 0.0  # from these processors, by the host of a virtual machine
    throttled: float = 0.0  # what the quota of this control group held back (cgroup v2)
    group_others: float = 0.0  # by other processes of this control group


def read_processor_time(processors, proc=Path("/proc"), cgroups=Path("/sys/fs/cgroup")):
    """Return the ProcessorTime of this process; processors: numbers of those that it may use."""
    try:
        ran, others, stolen = read_machine(processors, proc)
        waited = read_waiting(proc)
    except (OSError, ValueError):  # not Linux, or a sandbox that shows less than Linux does
        return ProcessorTime()
    try:
        throttled, group = read_group(proc, cgroups)
    except (OSError, ValueError, KeyError):  # no cgroup v2, or none that counts
        return ProcessorTime(ran, waited, others, stolen)
    return ProcessorTime(ran, waited, others, stolen, throttled, group - ran)


def read_machine(processors, proc):
    """Return the seconds that this process ran, that others ran, and that were stolen."""
    ticks_a_second = os.sysconf("SC_CLK_TCK")
    fields = (proc / "self/stat").read_text().rpartition(")")[2].split()  # from the third on
    ran = int(fields[11]) + int(fields[12])  # user and system, ended threads included
    busy = 0
    stolen = 0
    names = {f"cpu{number}" for number in processors}
    for line in (proc / "stat").read_text().splitlines():
        name, *counts = line.split()
        if name in names:
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    return ran / ticks_a_second, (busy - ran) / ticks_a_second, stolen / ticks_a_second


def read_waiting(proc):
    """Return the seconds that the threads of this process were ready to run and did not."""
    waited = 0
    for path in (proc / "self/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except OSError:  # a thread that has just ended
            continue
    return waited / 1e9


def read_group(proc, cgroups):
    """Return the seconds that a quota held this control group back, and that the group ran."""
    (path,) = re.findall(r"(?m)^0::/(.*)$", (proc / "self/cgroup").read_text())
    lines = (cgroups / path / "cpu.stat").read_text().splitlines()
    microseconds = dict(line.split() for line in lines)
    return int(microseconds["throttled_usec"]) / 1e6, int(microseconds["usage_usec"]) / 1e6


def share_taken(before, after, seconds):
    """Return the share of its time that others took from this process, 0 to 1.

    before, after: readings of ProcessorTime, so many seconds apart. Waiting for one's own threads,
    or because of one's own quota, is no neighbour's doing: others took no more than they ran.
    """
    pairs = zip(before, after, strict=True)
    spent = ProcessorTime(*(max(end - start, 0.0) for start, end in pairs))
    waited_for_a_processor = max(spent.waited - spent.throttled, 0.0)
    taken = min(waited_for_a_processor, spent.others)
    taken += min(spent.throttled, spent.group_others)
    taken += spent.stolen
    needed = max(spent.ran + taken, seconds)  # a process that waits for its GPU runs for less
    return taken / needed if taken else 0.0


def gpu_memory_of_others():
    """Return the GiB of GPU memory that is not this process's own; its CUDA context counts."""
    if not torch.cuda.is_available():
        return 0.0
    if torch.cuda.get_device_properties().is_integrated:
        return 0.0  # it shares the machine's memory, where files that were read count as used
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 2**30


def print_machine_state():
    """Print how much others had of the machine that this process trained on.

    Fixed interface: a line that begins with "machine busy:" makes the run invalid.
    """
    share = CLOCK.share_taken()
    memory = gpu_memory_of_others()
    state = "busy" if share > MAX_SHARE_TAKEN or memory > MAX_OTHERS_GIB else "quiet"
    what = f"took {share:.1%} of the processor time that training needed"
    if HAS_CUDA:
        what += f" and hold {memory:.1f} GiB of the GPU"
    print(f"machine {state}: others {what}")


# --- Metric ---------------------------------------------------------------------------------------


@torch.no_grad()
def score_batch(model, inputs, targets, vocab_size):
    """Return -ln p(target) and mean logit, float32 (2, B, T) on the CPU; refuse bad logits."""
    logits = model(inputs)
    expected = (*inputs.shape, vocab_size)
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


def copy_state(model):
    """Return {name: bytes} of the model's parameters and buffers, uint8 copies on the CPU."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {
        name: tensor.detach().to("cpu", copy=True).flatten().view(torch.uint8)
        for name, tensor in tensors
    }


def check_unchanged(model, state, inputs, targets, vocab_size, scores):
    """Raise ContractError if the model is not the one that gave these scores.

    state: copy_state(model) from then. What the model learned from text that it was scored on shows
    in its state, or in other scores for the same rows.
    """
    refusal = "the model is not the same at every call, and evaluation is no training"
    again = score_batch(model, inputs, targets, vocab_size)
    # Only now, after the same rows: a mask that a short batch made anew is as it was then
    after = copy_state(model)
    for name in {**state, **after}:
        is_same = name in state and name in after and torch.equal(state[name], after[name])
        if not is_same:
            raise ContractError(f"{refusal}: {name} changed while the model was scored")
    change = (again - scores).abs().max().item()
    if change > PROBE_TOLERANCE:
        nats = f"{scores[0].mean():.4f} nats a token, then {again[0].mean():.4f}"
        what = f"its logits moved by {change:.4f} when the first rows were scored again ({nats})"
        raise ContractError(f"{refusal}: {what}")


def check_causality(model, state, inputs, targets, vocab_size, scores):
    """Raise ContractError if what the model says at t depends on tokens after t.

    Every row is cut at another position; all tokens after the cut are changed, and nothing up to
    it may move. From cut to cut it is 2^k - 1 tokens, at MAX_SEQ_LEN a prime: a model that looks
    ahead at every second, third or sixteenth position only is cut at such a position, too.
    """
    B, T = inputs.shape
    generator = torch.Generator().manual_seed(SEED)
    positions = torch.arange(T)
    step = max(T // PROBE_ROWS - 1, 1)
    for first in range(0, PROBE_ROWS, B):
        cuts = (T - 2 - step * torch.arange(first, first + B)) % (T - 1)
        is_later = positions > cuts[:, None]  # (B, T)
        shift = torch.randint(1, vocab_size, (B, T), generator=generator) * is_later
        changed = (inputs + shift.to(inputs.device)) % vocab_size
        after = score_batch(model, changed, targets, vocab_size)
        has_moved = ((scores - after).abs() > PROBE_TOLERANCE).any(dim=0) & ~is_later
        if has_moved.any():
            check_unchanged(model, state, inputs, targets, vocab_size, scores)  # it would move, too
            row, position = has_moved.nonzero()[0].tolist()
            what = f"logits at {position} moved when only tokens after {cuts[row]} were changed"
            raise ContractError(f"the model is not causal: {what}")


def check_idle_time():
    """Raise ContractError if training went on after its data had ended."""
    end = CLOCK.end or CLOCK.start + TIME_BUDGET
    idle = time.monotonic() - end
    if idle > MAX_IDLE:
        what = f"evaluation began {idle:.0f} s after the training time was over"
        raise ContractError(f"{what}: at most {MAX_IDLE} s may pass between the two")


def print_clock():
    """Print what the process was given to train on; fixed interface: ratchet.py reads it."""
    seconds = (CLOCK.end or time.monotonic()) - CLOCK.start
    print(f"clock: {CLOCK.num_tokens} tokens in {seconds:.1f} seconds")


def print_changed_constants():
    """Name every constant of the contract that is not as shipped."""
    for name, value in SHIPPED.items():
        if globals()[name] != value:
            print(f"contract changed: {name} is {globals()[name]}, shipped as {value}")


def evaluate_bpb(model, tokenizer, batch_size, split="val"):
    """Return bits per byte on the first EVAL_TOKENS of a held-out split; lower is better.

    The sum of -ln p(target) over ln 2 times the sum of the targets' bytes; special tokens count in
    neither. Raises ContractError unless model(inputs) gives finite logits (B, T, vocab_size) that
    do not depend on later tokens, if the model is not the same at the end, and if training went on
    after its data had ended.
    """
    if CLOCK.start is not None:
        check_idle_time()
        print_machine_state()
        print_clock()
    print_changed_constants()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    first = None  # what was scored first, and the model's state by then
    sum_nats = 0.0
    sum_bytes = 0
    for inputs, targets in make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, split, device):
        scores = score_batch(model, inputs, targets, tokenizer.vocab_size)
        if first is None:
            first = (copy_state(model), inputs, targets, tokenizer.vocab_size, scores)
            check_causality(model, *first)
        num_bytes = tokenizer.token_bytes[targets.cpu()]
        sum_nats += scores[0].double()[num_bytes > 0].sum().item()
        sum_bytes += num_bytes.sum().item()
    check_unchanged(model, *first)
    model.train(was_training)
    return sum_nats / (math.log(2) * sum_bytes)


# --- FlashAttention-3 -----------------------------------------------------------------------------

FLASH_SECONDS = 300  # that its download may take


def flash_attention_3_folder():
    """Return the path of FlashAttention-3 for this torch: a link to its package, once fetched."""
    return CACHE_DIR / f"flash-attn3-torch-{torch.__version__}"


def download_flash_attention_3():
    """Download FlashAttention-3 from the Hub; return the path of its package.

    The client of the Hub picks the build for this torch, which takes no GPU, and executes nothing
    of it. It runs in a process of its own, because it may wait for an answer without end. Raises
    RuntimeError with the reason if there is no package.
    """
    # version=1 names a branch of that repository. The call fails unless the Hub trusts its owner
    install = 'kernels.install_kernel("kernels-community/flash-attn3", version=1)'
    command = [sys.executable, "-c", f"import kernels; print({install})"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FLASH_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"its download took over {FLASH_SECONDS} s") from None
    if done.returncode != 0:
        errors = re.findall(r"^[\w.]+: .+", done.stderr, flags=re.MULTILINE)
        raise RuntimeError(errors[0] if errors else f"its download ended with {done.returncode}")
    return Path(done.stdout.splitlines()[-1]).absolute()


def fetch_flash_attention_3():
    """Fetch FlashAttention-3, unless done; print one line if it cannot be had.

    It is wanted where a GPU is, and with climbmix, as a cluster's login node may have no GPU.
    """
    is_wanted = torch.cuda.is_available() or CORPUS == "climbmix"
    link = flash_attention_3_folder()
    if not is_wanted or (link / "metadata.json").exists():
        return
    print(f"FlashAttention-3 to download from {HF_ENDPOINT}", flush=True)
    try:
        temporary = link.with_name(f"{link.name}.{os.getpid()}")
        temporary.symlink_to(download_flash_attention_3())
        temporary.replace(link)
    except (RuntimeError, OSError) as error:
        advice = "run `uv run prepare.py` again to try again"
        print(f"no FlashAttention-3 ({error}): training uses flex_attention; {advice}")


# --- Command line ---------------------------------------------------------------------------------


def prepare_shards(wanted):
    """Download the shards that are wanted and not there, then train the tokenizer, and tokenize.

    Each shard is worked on as soon as it is there. Shards that are there and not wanted count, too.
    """
    folder("data").mkdir(exist_ok=True)
    missing = [path for path in wanted if not path.exists()]
    if missing:
        print(f"{len(missing)} shards of about 100 MB to download from {HF_ENDPOINT}", flush=True)
    paths = sorted({*wanted, *folder("data").glob("*.parquet")})
    training_paths = [path for path in paths if split_of(path) == "train"]
    downloads = Downloads(missing)
    try:
        downloads.begin()
        train_tokenizer(training_paths, downloads)
        tokenizer = Tokenizer.from_directory()
        tokenize(tokenizer, paths, downloads)
    finally:
        downloads.stop()
        Progress.clear()
    check_held_out_text(tokenizer)


def main():
    parser = argparse.ArgumentParser(description="Prepare data, tokenizer and tokens.")
    text = (
        f"training shards of climbmix: {NUM_TRAIN_SHARDS} by default, -1: all, 0: text of your own"
    )
    parser.add_argument("--num-shards", type=int, metavar="N", help=text)
    num_shards = parser.parse_args().num_shards
    if num_shards is not None and CORPUS != "climbmix":
        parser.error(f"--num-shards is for climbmix, and AUTORESEARCH_CORPUS is {CORPUS}")
    check_device()
    start = time.monotonic()
    home = CACHE_DIR / CORPUS
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            waits = "if another prepare.py is at work there, this one waits"
            print(f"preparing {CORPUS} in {home}; {waits}", flush=True)
            os.lockf(lock.fileno(), os.F_LOCK, 0)  # freed when its process ends, however it ends
            if CORPUS == "climbmix":
                wanted = climbmix_shards(num_shards)
            else:
                build_python()
                wanted = []
            prepare_shards(wanted)
            fetch_flash_attention_3()
    except OSError as error:
        why = f"{error.filename or home}: {error.strerror or error}"
        advice = "it needs a folder with room that it may write to; AUTORESEARCH_CACHE names one"
        raise ContractError(f"{why}: {advice}") from None
    except BrokenProcessPool:
        what = "a process that encodes was killed, perhaps because memory is short"
        raise ContractError(f"{what}: `uv run prepare.py` goes on from here") from None
    except KeyboardInterrupt:
        raise ContractError("interrupted: `uv run prepare.py` goes on from here") from None
    print(f"ready after {time.monotonic() - start:.0f} s, next: uv run train.py")


if __name__ == "__main__":
    main()
