"""The referee of autoresearch: it runs an idea, decides whether it is kept, and keeps the ledger.

    uv run ratchet.py --help

Nobody edits this file during a night. It knows nothing of the model, and of the metric only the
name and which way is better.

The life of an experiment:
1. The agent edits train.py and calls `try`, which commits it on the last kept commit, the parent.
2. A copy of the commit is trained in a folder of its own, by a process that outlives the call.
   It writes its result last.
3. The rule compares the result with the parent's under the same seed: keep, discard, or repeat.
   To repeat, parent and idea both train once more with the next seed, and the mean decides.
4. Every run gets a row in results.tsv. Only then is an idea that failed taken off the branch.

What is known of a night lies here, and nowhere else:

    branch autoresearch/TAG          the kept commits
    tag base/autoresearch/TAG        the commit the night began with; its message holds the limits
    refs/autoresearch/TAG/COMMIT     every idea that was tried, kept or not
    results.tsv                      the ledger, one row a run
    runs/COMMIT-SEED/                a run: its own train.py, the base's prepare.py, log and result
    runs/wave.json                   the ideas of a wave that is going

Any command may be killed at any time. The next one looks at these and does what is left to do.

Sections: the rule, the ledger, git, runs, the night, verdicts, waves, verbs, command line.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ModuleNotFoundError:
    sys.exit("REFUSED this runs on Linux, on macOS, and on Windows inside WSL")

# --- The rule -------------------------------------------------------------------------------------
# docs/rule.md explains it; tools/simulate_rule.py chose the numbers.

METRIC = "val_bpb"  # what train.py's summary prints and what decides; with test_ for val_ in final
LOWER_IS_BETTER = True  # False for a metric that should rise
ANY_DECREASE = False  # True keeps whatever is better at all, however little, after one run

# The bars, in standard errors of the difference between an idea and its parent
LOW = 0.0  # after one run each: not above this is a discard
HIGH = 1.25  # after one run each: above this is a keep; between the two, both run once more
BAR = 0.4  # after two runs each: above this is a keep
SIMPLER = -0.5  # an idea that takes out code is kept above this

LAST_RUNS = 3  # runs of the parent that count, the latest ones
HALF_LIFE = 2  # repeats after which a repeat weighs half in the noise; math.inf: all weigh the same
PARENT_AGE_MINUTES = 75  # a parent that last ran longer ago runs again: machines drift


class Run(NamedTuple):
    """One finished run of a commit."""

    commit: str
    seed: int
    value: float  # of METRIC


class Verdict(NamedTuple):
    """What the rule says of an idea: "keep", "discard" or "repeat", its gain and what it needed."""

    word: str
    gain: float
    bar: float


def gain_of(before, after):
    """Return by how much `after` is better than `before`; positive is better."""
    if LOWER_IS_BETTER:
        return before - after
    return after - before


def distinct(runs):
    """Return the runs without those that stand there again: one row twice is one run."""
    return list(dict.fromkeys(runs))


def noise_of(runs):
    """Return the standard deviation of one run now, from all runs so far, in order of time.

    It is in the unit of METRIC, and nan where no commit ran twice.
    """
    squares = []  # of each repeat, in order; each estimates the variance by itself
    values = {}  # of each commit, so far
    for run in distinct(runs):
        earlier = values.setdefault(run.commit, [])
        if earlier:
            # The deviation of a value from the mean of n others has (n + 1) / n times its variance.
            # Without weights the mean of these squares is the pooled variance (Welford 1962).
            n = len(earlier)
            squares.append((run.value - statistics.fmean(earlier)) ** 2 * n / (n + 1))
        earlier.append(run.value)
    if not squares:
        return math.nan
    # As the model changes, so does its noise: a repeat weighs less, the more came after it.
    weights = [0.5 ** (age / HALF_LIFE) for age in reversed(range(len(squares)))]
    return math.sqrt(statistics.fmean(squares, weights))


def judge(idea, parent, noise, simpler=False):
    """Return the Verdict on an idea from its runs and its parent's, each in order of time.

    Only runs of the parent under the idea's seeds count, where there are any.
    """
    idea = distinct(idea)
    parent = distinct(parent)
    seeds = {run.seed for run in idea}
    same_seeds = [run for run in parent if run.seed in seeds]
    against = (same_seeds or parent)[-LAST_RUNS:]
    before = statistics.fmean(run.value for run in against)
    after = statistics.fmean(run.value for run in idea)
    gain = gain_of(before, after)

    error = noise * math.sqrt(1 / len(idea) + 1 / len(against))
    if ANY_DECREASE:
        error = 0.0
    settled = len(idea) > 1  # there is no third run
    low = error * (BAR if settled else LOW)
    bar = error * (BAR if settled else HIGH)
    if simpler:
        bar = error * SIMPLER
    # What takes out code is kept at equal results, too, where the metric knows no noise.
    if gain > bar or (simpler and gain == bar):
        return Verdict("keep", gain, bar)
    if gain <= low:
        return Verdict("discard", gain, bar)
    return Verdict("repeat", gain, bar)


# --- The ledger -----------------------------------------------------------------------------------

STATUSES = ("keep", "discard", "crash")
SEEDS = (42, 43, 44)  # of the baseline; an idea has the first one, and the second if unclear
SLOW = 0.95  # share of the steps that the same code has made before, below which a run is slow
PARENT_AGAIN = "parent again"  # describes a run of a kept commit beside an idea
NO_EFFECT = "; no effect"  # ends the description of an idea whose losses are its parent's
BESIDE = "; beat its bar beside "  # ends that of the second best of a wave, then the best one
HEADER = f"commit\t{METRIC}\tmemory_gb\tstatus\tdescription"
COLD_TRIES = 3  # an axis with fewer tries is cold
CLOSED_TRIES = 5  # an axis is closed after so many tries in a row without a gain


class Refused(Exception):
    """One line for the reader: what was wrong, and what to run."""


class NoNight(Refused):
    """There is no night in this folder, or another branch is checked out."""


class Row(NamedTuple):
    """One row of results.tsv: one run, or an idea given up after a crash."""

    commit: str  # its first seven digits
    value: float
    memory_gb: float
    status: str
    description: str  # without the seed at its end
    seed: int

    @property
    def run(self):
        return Run(self.commit, self.seed, self.value)


class Experiment(NamedTuple):
    """One idea of the ledger, measured against its parent."""

    commit: str
    idea: str
    status: str
    parent: str  # the commit that was the last kept one
    runs: list  # the idea's, empty after a crash
    parent_runs: list  # the parent's that stood in the ledger by then
    gain: float  # nan after a crash


def figure(number, significant=6):
    """Return a number with six decimals, or more where a small one would lose its digits."""
    decimals = 6
    if number and math.isfinite(number):
        decimals = max(6, significant - 1 - math.floor(math.log10(abs(number))))
    return f"{number:.{decimals}f}"


SEED_AT_END = re.compile(r", seed (\d+)$")  # of a row's description


def format_row(row):
    """Return a row as a line of results.tsv.

    The first seed is left out, but where parse_row would take the last words for another one.
    """
    words = " ".join(row.description.split())
    if row.seed != SEEDS[0] or words == "baseline" or SEED_AT_END.search(words):
        words += f", seed {row.seed}"
    value = figure(row.value)
    return f"{row.commit}\t{value}\t{row.memory_gb:.1f}\t{row.status}\t{words}\n"


def parse_row(line):
    """Return the Row of a line; raise ValueError that says what is wrong with it."""
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 5:
        raise ValueError(f"it has {len(fields)} columns, not 5")
    commit, value, memory_gb, status, description = fields
    if not re.fullmatch("[0-9a-f]{7,40}", commit):
        raise ValueError(f"{commit!r} is no commit")
    if status not in STATUSES:
        raise ValueError(f"the status {status!r} is none of {', '.join(STATUSES)}")
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is not finite")
    seed = SEED_AT_END.search(description)
    if seed:
        description = description[: seed.start()]
    number = int(seed[1]) if seed else SEEDS[0]
    return Row(commit[:7], float(value), float(memory_gb), status, description, number)


def read_ledger(path):
    """Return (rows, notes) of a ledger; a note names a line that was left out, and why."""
    rows = []
    seen = set()
    notes = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("commit\t")):
            continue
        try:
            row = parse_row(line)
        except ValueError as error:
            notes.append(f"{path.name} line {number} is left out: {error}")
            continue
        if row.status == "crash" or row not in seen:  # equal rows are one run
            rows.append(row)
        seen.add(row)
    return rows, notes


def append_rows(path, rows):
    """Append rows to the ledger, all of them or none."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        last = b"\n"
        if size:
            file.seek(size - 1)
            last = file.read(1)
        text = "".join(map(format_row, rows)).encode()
        try:
            file.write(text if last == b"\n" else b"\n" + text)
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk
            os.ftruncate(file.fileno(), size)
            raise


def replace_file(path, content):
    """Write bytes to a file; a reader sees the old ones or the new ones, and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def experiments_of(rows):
    """Return the Experiments of a ledger in order; its first row is of the base."""
    base = rows[0].commit if rows else None
    kept = base
    runs = {}  # so far, by commit
    found = {}
    for row in rows:
        if row.commit != base and row.commit not in found:
            parent_runs = list(runs.get(kept, ()))
            found[row.commit] = Experiment(
                row.commit, row.description, row.status, kept, [], parent_runs, math.nan
            )
        if row.status == "crash":
            continue
        runs.setdefault(row.commit, []).append(row.run)
        if row.commit in found and not row.description.startswith(PARENT_AGAIN):
            found[row.commit].runs.append(row.run)
        if row.status == "keep":
            kept = row.commit
    experiments = []
    for experiment in found.values():
        if experiment.runs and experiment.parent_runs:
            gain = judge(experiment.runs, experiment.parent_runs, 0.0).gain
            experiment = experiment._replace(gain=gain)
        experiments.append(experiment)
    return experiments


def axis_of(idea):
    """Return what an idea's words name as its axis, before the first colon."""
    axis, colon, _ = idea.partition(":")
    return " ".join(axis.lower().split()) if colon else "no axis"


# --- Git ------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent  # the recipe's folder; the repository may be larger
LEDGER = ROOT / "results.tsv"
RUNS = ROOT / "runs"
CANVAS = "train.py"
CONTRACT = ("prepare.py", "ratchet.py", "pyproject.toml")  # equal to the base's, all night
ME = "uv run ratchet.py"


def git_bytes(*words, stdin=None, env=None):
    """Return what git prints; raise Refused with its first line where it fails."""
    # No hook of the person's may edit a file between a commit and its run, or refuse a commit
    command = ["git", "-c", "core.hooksPath=/dev/null", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, env=env)
    except FileNotFoundError:
        raise Refused("git is not installed") from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().split("\n")
        raise Refused(f"git {words[0]} failed: {lines[0] or f'status {done.returncode}'}")
    return done.stdout


def git(*words, stdin=None, env=None):
    """Return what git prints, as text."""
    return git_bytes(*words, stdin=stdin, env=env).decode("utf-8", "replace").rstrip("\n")


def git_or_none(*words, **options):
    """Return what git prints, or None where it fails."""
    try:
        return git(*words, **options)
    except Refused:
        return None


def idea_ref(tag, commit):
    return f"refs/autoresearch/{tag}/{commit[:7]}"


def full_commit(tag, commit):
    """Return all forty digits of an idea of this night, or of any commit; raise Refused if none."""
    for name in (idea_ref(tag, commit), commit):
        found = git_or_none("rev-parse", "--quiet", "--verify", "--end-of-options", f"{name}^0")
        if found:
            return found
    raise Refused(f"there is no commit {commit}")


def subject(commit):
    """Return the words of an idea."""
    return " ".join(git("log", "-1", "--format=%B", commit).split()) or "no words"


def edited_files(commit="HEAD", *names):
    """Return the tracked files that differ from a commit's: the recipe's, or these names."""
    return git("diff", "--name-only", "--relative", commit, "--", *(names or ".")).splitlines()


def is_ancestor(old, new):
    return git_or_none("merge-base", "--is-ancestor", old, new) is not None


def takes_out_code(old, new):
    """Tell whether train.py has lost more lines than it has gained."""
    counts = git("diff", "--numstat", old, new, "--", CANVAS).split()
    if not counts:
        return False
    added, deleted = counts[:2]  # dashes for a binary file
    return added.isdigit() and int(deleted) > int(added)


# --- Runs -----------------------------------------------------------------------------------------
# A run is a folder in runs/ with its own train.py, the base's prepare.py, job.json (what to do),
# run.log, and result.json, which is written last. A process of its own, the runner, starts the
# training, waits for it and reads its log; it holds a lock on the file `alive` as long as it lives.

WALL = 2.0  # times HARD_LIMIT: a run that has hung before its own wall was armed is ended
HARD_LIMIT = 600  # seconds, where prepare.py names none
STOP_SECONDS = 15  # that a training has to end after a request, before it is killed
MIN_FREE_BYTES = 2**26  # of disk, without which no run begins
LOG_BYTES = 2**22  # of a log that are read: half from its beginning, half from its end
LINE = 150  # characters of a log's line that are shown
KILLED = {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGTERM}
FAILED = ("crash", "refused")  # results of runs that would fail again
PEOPLES_VARIABLES = ("AUTORESEARCH_SPLIT", "AUTORESEARCH_SEED")


class Need(NamedTuple):
    """A run that is wanted."""

    commit: str
    seed: int
    since: float = 0.0  # a run that was started before, in seconds of the epoch, does not count
    split: str = "val"


class Training(NamedTuple):
    """One run as it stands on disk."""

    folder: Path
    commit: str  # its first seven digits
    seed: int
    started: float  # seconds of the epoch
    slot: int
    word: str  # "going", "cut off" (its runner is dead), or the word of its result
    result: dict  # of read_result; empty without one

    @property
    def value(self):
        return float(figure(self.result["value"]))  # as the ledger has it


def read_json(path):
    """Return what a JSON file holds, or an empty dict where there is no file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}


def write_json(path, content):
    replace_file(path, json.dumps(content, indent=1).encode())


def unused(stem, suffix=""):
    """Return a path in runs/ that does not exist."""
    path = RUNS / f"{stem}{suffix}"
    number = 1
    while path.exists():
        number += 1
        path = RUNS / f"{stem}-{number}{suffix}"
    return path


def make_snapshot(night, need):
    """Make the folder of a run: the commit's train.py and the rest of the base; return it."""
    if shutil.disk_usage(RUNS).free < MIN_FREE_BYTES:
        raise Refused(f"the disk of {RUNS} is full: make room, then {ME} wait")
    split = "" if need.split == "val" else f"-{need.split}"
    folder = unused(f"{need.commit[:7]}-{need.seed}{split}")
    folder.mkdir()
    for file in git("ls-tree", "--name-only", night.base, "./").splitlines():
        if file.endswith(".py") and file not in (CANVAS, "ratchet.py"):
            (folder / file).write_bytes(git_bytes("show", f"{night.base}:./{file}"))
    (folder / CANVAS).write_bytes(git_bytes("show", f"{need.commit}:./{CANVAS}"))
    return folder


def lock_file(path, how=fcntl.LOCK_EX):
    """Return a file that holds a lock on path, or None if another process holds it."""
    try:
        file = path.open("rb")  # another user's lock file cannot be opened to write
    except FileNotFoundError:
        file = path.open("ab")
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def device_lock(launch, slot):
    """Return the path of the lock of the device that a training takes, None if a scheduler's.

    The lock is the machine's and not the clone's, so that two nights share no device.
    """
    if "{slot}" in launch:
        device = launch.replace("{slot}", str(slot))
    elif launch:
        return None
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        device = f"device {visible or 'cpu'}"
    name = hashlib.sha256(device.encode()).hexdigest()[:16]  # a device's name may hold a slash
    return Path(tempfile.gettempdir()) / f"autoresearch-{name}.lock"


def hard_limit(base):
    """Return the seconds after which the base's prepare.py ends a run."""
    text = git_or_none("show", f"{base}:./prepare.py") or ""
    return find(r"^HARD_LIMIT = ([0-9.]+)", text, default=HARD_LIMIT)


def start_run(night, need, slot, foreground):
    """Start a run in a session of its own; return its Training, None if the device is in use."""
    launch = night.facts["launch"]
    lock_path = device_lock(launch, slot)
    lock = lock_file(lock_path) if lock_path else None
    if lock_path and not lock:
        return None
    folder = make_snapshot(night, need)
    alive = lock_file(folder / "alive")
    command = shlex.split(launch.replace("{slot}", str(slot)))
    job = {
        "tag": night.tag,
        "commit": need.commit[:7],
        "seed": need.seed,
        "split": need.split,
        "metric": re.sub("^val_", f"{need.split}_", METRIC),
        "command": [*command, sys.executable, CANVAS],
        "slot": slot,
        "wall": None if launch else WALL * hard_limit(night.base),  # a scheduler has its own
        "expected": night.setting,
        "started": time.time(),
    }
    write_json(folder / "job.json", job)
    fds = [file.fileno() for file in (alive, lock) if file]
    runner = subprocess.Popen(
        [sys.executable, __file__, "_run", str(folder), *map(str, fds)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "runner.err").open("wb"),
        pass_fds=fds,
        start_new_session=not foreground,
    )
    if not foreground:
        runner.wait()  # it has left a child that goes on
    return Training(folder, job["commit"], need.seed, job["started"], slot, "going", {})


def be_runner(folder, *fds):
    """Be the runner of a run, whose locks are in these file descriptors."""
    # A client may end a call with all that descends from it, sessions of their own included: the
    # runner is a child whose parent has ended
    leads_session = os.getsid(0) == os.getpid()
    if leads_session:
        child = os.fork()
        if child:
            os._exit(0)
    folder = Path(folder)
    (folder / "alive").write_text(str(os.getpid()))
    # The training holds the device's lock, too: if this process dies, it still has the device
    run_training(folder, [int(fd) for fd in fds[1:]])


def run_training(folder, lock_fds):
    """Train in a run's folder and write the result."""
    job = read_json(folder / "job.json")
    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, signal.default_int_handler)  # raises KeyboardInterrupt
    env = os.environ | {"AUTORESEARCH_SEED": str(job["seed"])}
    if job["split"] != "val":
        env["AUTORESEARCH_SPLIT"] = job["split"]
    ended_by = {}
    log = folder / "run.log"
    with log.open("wb") as output:
        show_log(log)
        training = subprocess.Popen(
            job["command"],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=lock_fds,
        )
        try:
            training.wait(timeout=job["wall"])
        except KeyboardInterrupt:
            ended_by = {"word": "stopped", "why": "it was stopped by a person"}
        except subprocess.TimeoutExpired:
            why = "it hung before its own wall at HARD_LIMIT was armed"
            ended_by = {"word": "crash", "why": why}
        for request in (signal.SIGTERM, signal.SIGINT):
            signal.signal(request, signal.SIG_IGN)  # a second stop would lose the result
        if ended_by:
            training.terminate()
            try:
                training.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                training.kill()
                training.wait()
    result = read_result(read_log(log), training.returncode, job) | ended_by
    keep_log(log)
    write_json(folder / "result.json", result)


def show_log(log):
    """Let run.log in the root show the log of the run that is going."""
    link = ROOT / f".run.log.{os.getpid()}"
    try:
        link.symlink_to(log)
        link.replace(ROOT / "run.log")
    except OSError as error:  # a file system without links; the log is in its folder all the same
        print(f"no run.log in {ROOT}: {error}", file=sys.stderr)


def keep_log(log):
    """Put a copy in place of the link, so that `> run.log` by hand writes over no run's log."""
    shown = ROOT / "run.log"
    copy = ROOT / f".run.log.{os.getpid()}"
    if shown.is_symlink() and shown.resolve() == log.resolve():
        try:
            shutil.copyfile(log, copy)
            copy.replace(shown)
        except OSError as error:  # a full disk; the run counts all the same
            copy.unlink(missing_ok=True)
            print(f"no copy of the log in {ROOT}: {error}", file=sys.stderr)


def read_log(path):
    """Return the text of a log, without its middle if it is huge, one report a line."""
    with path.open("rb") as file:
        text = file.read(LOG_BYTES // 2)
        size = file.seek(0, os.SEEK_END)
        if size > LOG_BYTES // 2:
            file.seek(max(LOG_BYTES // 2, size - LOG_BYTES // 2))
            text += file.read()
    return text.decode("utf-8", "replace").replace("\r", "\n")


def find(pattern, text, convert=float, default=None):
    """Return the last match's first group, converted, or a default."""
    found = re.findall(pattern, text, re.M)
    return convert(found[-1]) if found else default


def last_words(text):
    """Return the line of a log that says how the run failed."""
    if re.search(r"^Timeout \(\d+:\d+:\d+", text, re.M):
        return "it ran past HARD_LIMIT"
    _, traceback, rest = text.rpartition("Traceback (most recent call last):\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if traceback:
        unindented = [line for line in rest.split("\n") if line and not line.startswith(" ")]
        lines = unindented[:1] or lines  # the error; what stands before it is the stack
    return lines[-1][:LINE] if lines else "it printed nothing"


def read_result(text, exit_status, job):
    """Return what a log says of its run, and whether it is valid: a dict for result.json.

    "word" is valid; busy (the machine was not the run's own); killed (from outside); refused (it
    cannot be compared with the baseline); or crash. "why" says more.
    """
    number = r"[-+]?(?:[0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?|nan|inf)"
    found = re.findall(rf"^(\w+): +({number})$", text, re.M)
    summary = {name: float(value) for name, value in found}
    values = [value for name, value in found if name == job["metric"]]
    memory = summary.get("peak_vram_mb", 0.0)
    # A run is compared with the baseline's only on the same device, with the same dtype and data
    setting = {}
    for line in re.findall(r"^(?:device: .*|corpus: \w+|attention: \S+(?=, ))", text, re.M):
        setting.setdefault(line.partition(":")[0], line)
    result = {
        "exit_status": exit_status,
        "value": summary.get(job["metric"], math.nan),
        "memory_mb": memory if math.isfinite(memory) else 0.0,
        "total_seconds": summary.get("total_seconds"),
        "steps": find(r"^num_steps: +(\d+)$", text, int),
        "setting": setting,
        "compile": find(r"^attention: .*, compile: (\w+)$", text, str),
        "losses": dict(re.findall(r"^step +(\d+) .*\| loss ([-+.\w]+)", text, re.M)),
        "notes": odd_speed(summary, find(r"^clock: (\d+) tokens in ", text)),
        "ended": time.time(),
    }
    changed = find(r"^(contract changed: .*)", text, str)
    busy = find(r"^(machine busy: .*)", text, str)
    differs = [key for key in job["expected"] if setting.get(key) != job["expected"][key]]
    word = "valid"
    why = ""
    if exit_status in KILLED:
        word = "killed"
        why = f"it was killed from outside (status {exit_status})"
    elif exit_status != 0:
        word = "crash"
        why = last_words(text)
    elif len(values) != 1 or not math.isfinite(result["value"]):
        word = "crash"
        said = " and ".join(values) or "missing"
        why = f"the summary's {job['metric']} is {said}, and has to be one finite number"
    elif changed:
        word = "refused"
        why = changed[:LINE]
    elif differs:
        word = "refused"
        said = setting.get(differs[0], f"{differs[0]}: not said")
        why = f"{said[:LINE]} (the baseline's is {job['expected'][differs[0]][:LINE]})"
    elif busy:
        word = "busy"
        why = busy[:LINE]
    return result | {"word": word, "why": why}


def odd_speed(summary, clock_tokens):
    """Return notes where a summary's tokens or speed cannot be what was run."""
    notes = []
    tokens = 1e6 * summary.get("total_tokens_M", math.nan)
    if clock_tokens:
        # A step that the clock cut short is in no summary, and the summary is rounded
        a_step = clock_tokens / max(summary.get("num_steps", 1), 1)
        if tokens > 1.01 * clock_tokens + 0.05e6 + a_step:  # fewer: not all was trained on
            said = f"the summary says {tokens / 1e6:g} M tokens"
            notes.append(f"{said}, the clock {clock_tokens / 1e6:.1f} M")
    if summary.get("mfu_percent", 0.0) > 100:
        notes.append("the speed is above the card's peak")
    return notes


def is_going(folder):
    """Tell whether a run's runner lives; it holds the lock until its result is written."""
    if not (folder / "alive").exists() or (folder / "result.json").exists():
        return False
    lock = lock_file(folder / "alive", fcntl.LOCK_SH)
    if lock:
        lock.close()
    return lock is None


def attempts(tag, commit, seed=None, since=0.0, split="val"):
    """Return the Trainings of a commit on a split in this night, in order of time.

    seed: only this one's; since: only those that started later. The second one under a seed that
    was killed counts as crashed.
    """
    found = []
    for path in RUNS.glob(f"{commit[:7]}-*/job.json"):
        job = read_json(path)
        if (job["tag"], job["split"]) != (tag, split) or seed not in (None, job["seed"]):
            continue
        going = is_going(path.parent)  # asked first: a run that ends now has a result then
        result = read_json(path.parent / "result.json")
        word = result.get("word") or ("going" if going else "cut off")
        said = (job[name] for name in ("commit", "seed", "started", "slot"))
        found.append(Training(path.parent, *said, word, result))
    found.sort(key=lambda training: training.started)
    killed = set()  # seeds
    for number, training in enumerate(found):
        if training.word == "killed":
            if training.seed in killed:  # twice is no accident: it may need too much memory
                found[number] = training._replace(word="crash")
            killed.add(training.seed)
    return [training for training in found if training.started > since]


# --- The night ------------------------------------------------------------------------------------


class Night:
    """What git, the ledger and the runs say of the night at this moment."""

    def __init__(self):
        branch = git_or_none("symbolic-ref", "--quiet", "--short", "HEAD")
        if branch is None:
            git("rev-parse", "--git-dir")  # if there is no repository, git says so
            raise NoNight(f"no branch is checked out: {ME} start TAG begins or goes on with one")
        prefix, _, self.tag = branch.partition("/")
        if prefix != "autoresearch" or not self.tag:
            said = f"no night here, on branch {branch}"
            raise NoNight(f"{said}: {ME} start TAG begins one, or goes on with one")
        self.facts = read_facts(self.tag)
        if self.facts is None:
            raise Refused(f"this night has no tag base/{branch}: {ME} start another TAG")
        self.base = git("rev-parse", f"refs/tags/base/{branch}^0")
        if not LEDGER.exists():
            raise Refused(f"no {LEDGER.name} here: put back the one of this night, or start anew")
        self.head = git("rev-parse", "HEAD")
        self.load_ledger()
        if self.rows and self.rows[0].commit != self.base[:7]:
            raise Refused(f"{LEDGER.name} is of another night: move it away")

    def load_ledger(self):
        """Read the rows, and find the last kept commit."""
        self.rows, self.notes = read_ledger(LEDGER)
        kept = [row.commit for row in self.rows if row.status == "keep"]
        self.kept = self.base
        if kept and kept[-1] != self.base[:7]:
            self.kept = full_commit(self.tag, kept[-1])
        self.experiments = experiments_of(self.rows)
        self.runs = [row.run for row in self.rows if row.status != "crash"]
        self.noise = noise_of(self.runs)

    def rows_of(self, commit):
        return [row for row in self.rows if row.commit == commit[:7]]

    def book(self, rows):
        append_rows(LEDGER, rows)
        self.load_ledger()

    def attempts(self, *need):
        return attempts(self.tag, *need)

    def valid(self, *need):
        """Return the valid runs that meet a Need, or its first fields, in order of time."""
        return [training for training in self.attempts(*need) if training.word == "valid"]

    @property
    def setting(self):
        """What the baseline's first valid run said of its device, dtype, corpus and attention."""
        for training in self.valid(self.base):
            return training.result["setting"]
        return {}

    @property
    def baseline_left(self):
        """The seeds of the baseline that have no row yet."""
        done = {row.seed for row in self.rows_of(self.base)}
        return [seed for seed in SEEDS if seed not in done]

    @property
    def fruitless(self):
        """How many experiments at the end of the ledger kept nothing."""
        kept = [number for number, e in enumerate(self.experiments, 1) if e.status == "keep"]
        return len(self.experiments) - max(kept, default=0)

    def over(self):
        """Return why no further experiment begins, or an empty string."""
        end = self.facts["until"]
        most = self.facts["experiments"]
        patience = self.facts["patience"]
        if self.facts.get("stopped"):
            return f"a person ended it at {show_time(self.facts['stopped'])}"
        if end and time.time() >= end:
            return f"the end was {show_time(end)}"
        if most and len(self.experiments) >= most:
            return f"all {most} experiments are done"
        if patience and self.fruitless >= patience:
            return f"{self.fruitless} experiments in a row kept nothing"
        return ""

    def check_contract(self):
        """Raise Refused where what nobody edits differs from the base, or is set from outside."""
        for name in PEOPLES_VARIABLES:
            if os.environ.get(name):
                raise Refused(f"{name} is set, which is for people alone: unset {name}")
        for name in edited_files(self.base, *CONTRACT):
            tag = f"base/autoresearch/{self.tag}"
            raise Refused(f"{name} differs from the base: git restore --source {tag} {name}")

    def idea_at_head(self):
        """Return the commit at HEAD if it is an idea on the last kept commit, None if none is.

        Notes that people commit beside train.py do not matter, before the idea or after a keep.
        """
        if self.head == self.kept:
            return None
        if not is_ancestor(self.kept, self.head):
            raise Refused(
                f"the branch does not contain the kept {self.kept[:7]}, and has to go on from it:"
                f" git reset --keep {self.kept[:7]}"
            )
        edits = git("rev-list", "--first-parent", f"{self.kept}..HEAD", "--", CANVAS).split()
        if not edits:
            return None
        if len(edits) > 1:
            raise Refused(
                f"{len(edits)} commits after the kept {self.kept[:7]} edit {CANVAS}, and one may:"
                f" git reset --keep {edits[-1][:7]}"
            )
        if edits != [self.head]:
            raise Refused(
                f"there are commits after the idea {edits[0][:7]}:"
                f" git reset --keep {edits[0][:7]} takes them off"
            )
        rest = (":(top)", f":(exclude){CANVAS}")
        others = git("diff", "--name-only", f"{self.head}^", self.head, "--", *rest).splitlines()
        if others:
            raise Refused(
                f"the idea {self.head[:7]} changes {others[0]}, and may change {CANVAS} alone:"
                f" git reset --soft {self.head[:7]}^"
            )
        return self.head


def read_facts(tag):
    """Return the limits and the launch command of a night, None if there is no such night."""
    ref = f"refs/tags/base/autoresearch/{tag}"
    text = git("for-each-ref", "--format=%(contents)", ref)
    return json.loads(text) if text else None


def write_facts(tag, commit, facts):
    """Tag the commit that a night begins with; the tag's message holds the facts."""
    name = f"base/autoresearch/{tag}"
    text = json.dumps(facts).encode()
    git("tag", "--no-sign", "--force", "-a", "-F", "-", name, commit, stdin=text)


def show_time(seconds):
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


@contextlib.contextmanager
def one_at_a_time():
    """Keep other calls of the ratchet in this folder waiting for the short while of a change."""
    RUNS.mkdir(exist_ok=True)
    with (RUNS / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- Verdicts -------------------------------------------------------------------------------------

POLL_SECONDS = (0.02, 1.0)  # between two looks at a run: at first, at most
DEVICE_SECONDS = 2.0  # between two tries to get a device that another training has
UNCLEAR = "unclear"  # a file in the folder of an idea's first run, if the rule said "repeat"


class Call:
    """One call of a verb: what it may do, what it has seen, what it says."""

    def __init__(self, again=f"{ME} wait", foreground=False, seconds=math.inf):
        self.again = again  # the command that goes on with what this call began
        self.may_run = False  # whether it may start a run
        self.foreground = foreground  # whether its runs are its children
        self.retry = False  # whether what crashed runs again as it is
        self.deadline = time.monotonic() + seconds
        self.about = None  # the idea whose verdict is asked for
        self.watched = set()  # folders of the runs that this call started or saw going
        self.going = []  # Trainings to wait for
        self.device_busy = False
        self.failed = None  # the Training that the answer is about, if it gave no number
        self.lines = []

    def say(self, line):
        self.lines.append(line)


class Answer(NamedTuple):
    """The last line of every call."""

    word: str
    text: str


def advance(call, step):
    """Repeat a step until there is an Answer or the call's time is over; return the Answer."""
    while True:
        with one_at_a_time():
            night = Night()
            night.check_contract()
            call.going = []
            call.device_busy = False
            answer = step(night, call)
        if answer and answer.word in ("NEXT", "OVER") and call.about and night.rows_of(call.about):
            answer = verdict_on(night, call.about)  # another call has booked it meanwhile
        if not answer and call.may_run and time.monotonic() < call.deadline:
            wait_for(call)
            continue
        if call.may_run and call.failed and call.failed.word == "crash":
            show_end_of_log(call, call.failed, lines=6)
        return answer or running(night, call)


def wait_for(call):
    """Sleep until one of the call's runs ends, or for a moment where the device is in use."""
    if not call.going:
        time.sleep(max(0.0, min(DEVICE_SECONDS, call.deadline - time.monotonic())))
        return
    pause = POLL_SECONDS[0]
    while all(is_going(t.folder) for t in call.going) and time.monotonic() < call.deadline:
        time.sleep(max(0.0, min(pause, call.deadline - time.monotonic())))
        pause = min(1.2 * pause, POLL_SECONDS[1])


def running(night, call):
    """Return the Answer while a run goes on: how long it will take yet."""
    if not call.going:
        return Answer("BUSY", f"another training has this device: {call.again}")
    at_most = "" if night.facts["launch"] else "at most "  # a scheduler may let it wait
    usual = hard_limit(night.base)
    for training in night.valid(night.base) + night.valid(night.kept):
        if training.result["total_seconds"]:
            at_most = ""
            usual = training.result["total_seconds"]
    left = max(0.0, call.going[0].started + usual - time.time())
    who = ", ".join(f"{training.commit} seed {training.seed}" for training in call.going)
    more = len(night.baseline_left) - len(call.going)
    if more > 0:
        who += f", then {more} more of the baseline"
    if night.head != night.kept and is_unclear(night, night.head):
        who += f" ({night.head[:7]} was unclear: it and its parent both run once more)"
    return Answer("RUNNING", f"{at_most}{left:.0f} s left of {who}: {call.again}")


def step(night, call):
    """Do what can be done now; return the Answer, or None while a run is awaited."""
    pending = settle(night, call)
    if night.baseline_left:
        going = any(training.word == "going" for training in night.attempts(night.base))
        if night.over() and not going:
            return Answer("OVER", f"{night.over()}; the baseline was not finished")
        needs = [Need(night.base, seed) for seed in night.baseline_left]
        failed = start_runs(night, call, needs)
        return outcome(night, call, failed, "the baseline")
    wave = read_wave()
    if wave:
        ideas = [commit for commit in wave["ideas"] if not night.rows_of(commit)]
    elif pending:
        ideas = [pending]
    else:
        return next_step(night)

    # What is to run before each of them can be decided?
    needs = {}  # by commit and seed: the parent runs once for all ideas
    decided = {}
    begun = False
    for idea in ideas:
        wanted, verdict, trainings = decide(night, idea)
        needs |= {(need.commit, need.seed): need for need in wanted}
        if verdict:
            decided[idea] = verdict, trainings
        begun = begun or any(t.word in ("valid", "going") for t in night.attempts(idea))
    names = ", ".join(idea[:7] for idea in ideas)
    if needs and night.over() and (night.facts.get("stopped") or not begun):
        said = f'{names} was not finished: {ME} drop "why" gives it up'
        if wave:
            said = f"a wave was not finished: {ME} start {night.tag} --renew goes on with it"
        return Answer("OVER", f"{night.over()}; {said}")

    failed = start_runs(night, call, needs.values(), wave.get("jobs", 1))
    # In a wave a crash is booked. Alone it stays at HEAD, where the agent mends it
    crashed = [idea for idea in ideas if wave and idea in failed and failed[idea].word in FAILED]
    if call.going or len(decided) + len(crashed) < len(ideas):
        disturbed = {commit: t for commit, t in failed.items() if commit not in crashed}
        return outcome(night, call, disturbed, names)

    # The row comes before the branch: a call that is killed in between is put right by settle
    rows = rows_of_ideas(night, call, decided, crashed)
    night.book(rows)
    settle(night, call)
    if rows[-1].status == "keep" and CANVAS in edited_files():
        call.say(f"{CANVAS} was edited meanwhile: the edit is on {night.kept[:7]} now")
    if wave:
        for row in rows:
            call.say(f"{row.commit} {row.status} {figure(row.value)} {row.description}"[:LINE])
        if read_wave():
            return step(night, call)  # the next round
        if night.kept != wave["parent"]:
            return verdict_on(night, night.kept)
    return verdict_on(night, full_commit(night.tag, rows[-1].commit))


def settle(night, call):
    """Do what was decided and is not done; return the idea at HEAD that has no row, or None.

    This books the parent's runs, moves the branch, and begins the next round of a wave.
    """
    book_parent(night, call)
    if night.head != night.kept and is_ancestor(night.head, night.kept):  # kept in a wave
        set_edit_aside(night.head, call)
        git("merge", "--quiet", "--ff-only", night.kept)
        night.head = git("rev-parse", "HEAD")
    idea = night.idea_at_head()
    if idea:
        git("update-ref", idea_ref(night.tag, idea), idea)  # so that git never forgets it
    if idea and night.rows_of(idea):
        put_back(night, call)
        idea = None
    call.about = call.about or idea
    wave = read_wave()
    if wave and all(night.rows_of(commit) for commit in wave["ideas"]):
        beside = f"{BESIDE}{night.kept[:7]}"
        again = [c for c in wave["ideas"] if beside in night.rows_of(c)[0].description]
        begin_wave(night, call, again, wave["jobs"], wave["parent"])
    return idea


def book_parent(night, call):
    """Book finished runs of the baseline, and of the kept commit beside an idea."""
    for training in night.valid(night.kept):
        booked = [(row.seed, row.value) for row in night.rows_of(night.kept)]
        if (training.seed, training.value) in booked:
            continue
        words = PARENT_AGAIN
        if night.kept == night.base and training.seed in night.baseline_left:
            words = "baseline"
        row = row_of(training, "keep", words)
        night.book([row])
        said = f"{row.commit} {words}, seed {row.seed}: {METRIC} {figure(row.value)}"
        call.say(said + speed_beside(night, training))


def speed_beside(night, training):
    """Return what to say of a run's steps beside those of the same code before, if it has any."""
    steps = training.result["steps"]
    if not steps:
        return ""
    others = [t for t in night.valid(training.commit) if t.started < training.started]
    before = [t.result["steps"] for t in others if t.result["steps"]]
    said = f", {steps} steps"
    if before and steps < SLOW * max(before):
        said += f" (up to {max(before)} before: the machine was slower, which makes noise)"
    return said


def put_back(night, call):
    """Take the commit at HEAD off the branch.

    An edit of train.py that came after it is put on the parent, or aside if it does not fit there.
    """
    gone = night.head
    parent = git("rev-parse", f"{gone}^")
    is_edited = CANVAS in edited_files()
    edit = edit_without(gone) if is_edited else None
    if edit is None:
        if is_edited:
            call.say(f"your edit changes what {gone[:7]} had changed, and fits on nothing else")
        set_edit_aside(gone, call)
        git("reset", "--quiet", "--keep", parent)
    else:
        # The file first: cut off here, the next call merges it again and gets the same
        replace_file(ROOT / CANVAS, edit)
        git("reset", "--quiet", "--mixed", parent)
        where = f"on {parent[:7]} now, without the change of {gone[:7]}"
        call.say(f"{CANVAS} was edited meanwhile: the edit is {where}: read it again")
    night.head = parent


def edit_without(commit):
    """Return train.py as edited, but without the change of a commit; None in a conflict."""
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        new = Path(folder) / "new"
        old.write_bytes(git_bytes("show", f"{commit}:./{CANVAS}"))
        new.write_bytes(git_bytes("show", f"{commit}^:./{CANVAS}"))
        try:
            return git_bytes("merge-file", "-p", "-q", str(new), str(old), str(ROOT / CANVAS))
        except Refused:
            return None


def set_edit_aside(commit, call):
    """Save an uncommitted edit of train.py under runs/, and give train.py back as committed."""
    if CANVAS in edited_files():
        aside = unused(f"edited-{commit[:7]}", ".py")
        shutil.copyfile(ROOT / CANVAS, aside)
        git("checkout", "--quiet", "HEAD", "--", CANVAS)
        call.say(f"the edit of {CANVAS} is saved in runs/{aside.name}, and taken out of it")


def decide(night, idea):
    """Return (needs, verdict, trainings) of an idea: what is to run first, or the Verdict."""
    first = next(iter(night.valid(idea, SEEDS[0])), None)
    second = next(iter(night.valid(idea, SEEDS[1])), None)
    since = (first.started if first else time.time()) - 60 * PARENT_AGE_MINUTES
    needs = []
    if not night.valid(night.kept, None, since):
        needs.append(Need(night.kept, SEEDS[0], since))
    if not first:
        needs.append(Need(idea, SEEDS[0]))
    if needs:
        return needs, None, []
    trainings = [first, second] if second else [first]
    parent = [row.run for row in night.rows_of(night.kept)]
    runs = [Run(idea[:7], training.seed, training.value) for training in trainings]
    noise = noise_of(night.runs + runs)
    verdict = judge(runs, parent, noise, takes_out_code(night.kept, idea))
    if not second:
        if verdict.word == "repeat" and not same_losses(night, first):
            # On disk, so that it holds: the noise may have changed when the second runs are done
            (first.folder / UNCLEAR).touch()
        if is_unclear(night, idea):
            needs = [Need(night.kept, SEEDS[1], first.started), Need(idea, SEEDS[1])]
            return [need for need in needs if not night.valid(*need)], None, trainings
    if verdict.word == "repeat":  # no effect, or no noise to judge by even after two runs
        verdict = verdict._replace(word="discard")
    return [], verdict, trainings


def is_unclear(night, idea):
    """Tell whether the first run of an idea decided nothing."""
    return any((training.folder / UNCLEAR).exists() for training in night.valid(idea, SEEDS[0]))


def same_losses(night, training):
    """Tell whether a run reported its parent's losses under the same seed, to the last digit."""
    ours = training.result["losses"]
    for other in night.valid(night.kept, training.seed):
        theirs = other.result["losses"]
        common = ours.keys() & theirs.keys()
        beyond_first = [number for number in common if int(number) > 1]  # steps
        if len(beyond_first) >= 2 and all(ours[number] == theirs[number] for number in common):
            return True
    return False


def start_runs(night, call, needs, jobs=1):
    """Start the runs that are needed, at most `jobs` at once; return {commit: failed Training}.

    An idea that crashed does not run again by itself. What was disturbed does, in the next call.
    """
    failed = {}
    waiting = []
    for need in needs:
        last = next(reversed(night.attempts(*need)), None)
        if last is None:
            waiting.append(need)
            continue
        is_idea = need.commit not in (night.base, night.kept)
        known = last.word in FAILED and is_idea and not call.retry
        if last.word == "going":
            call.going.append(last)
            call.watched.add(last.folder)
        elif known or last.folder in call.watched:
            failed[need.commit] = last
        else:
            waiting.append(need)
    was_stopped = any(training.word == "stopped" for training in failed.values())
    if night.kept in failed or was_stopped or not call.may_run:
        return failed  # nothing is decided without the parent, or begun against a person's will
    waiting = [need for need in waiting if need.commit not in failed]
    slots = sorted(set(range(jobs)) - {training.slot for training in call.going})
    for need, slot in zip(waiting, slots, strict=False):
        training = start_run(night, need, slot, call.foreground)
        if training is None:
            call.device_busy = True
            break
        call.watched.add(training.folder)
        call.going.append(training)
    return failed


def why_cut_off(training):
    """Return why a run has no result."""
    path = training.folder / "runner.err"
    if path.exists():
        said = path.read_text("utf-8", "replace").strip()
        if "Traceback" in said:
            return f"its runner failed: {said.splitlines()[-1]}"[:LINE]
    return "its runner was killed, or the machine went down"


def outcome(night, call, failed, what):
    """Return None if runs are to be awaited, else the Answer on a failed one or on what waits."""
    if call.going or (call.device_busy and call.may_run):
        return None
    if not failed:
        return Answer("NEXT", f"{what} waits for its run: {call.again}")
    commit, call.failed = next(iter(failed.items()))
    word = call.failed.word
    why = call.failed.result.get("why", why_cut_off(call.failed))
    role = {night.kept: "the parent ", night.base: "the baseline "}.get(commit, "")
    who = f"{role}{commit[:7]} seed {call.failed.seed}"
    if word not in FAILED:
        return Answer("BUSY", f"{who}: {why}; nothing is booked: {call.again} runs it again")
    if commit in (night.base, night.kept):  # no edit of the agent's is to blame
        return Answer(
            "CRASH", f"{why} ({who}, which is no idea of yours: {call.again} runs it again)"
        )
    if word == "refused":
        return Answer("REFUSED", f"{who} cannot be compared: {why}: mend it and try, or drop")
    return Answer("CRASH", f"{why} ({who}: mend it and try again, or drop it)")


def next_step(night):
    """Return the Answer where nothing is pending."""
    is_edited = CANVAS in edited_files()
    if night.over():
        said = f"{night.over()}; {len(night.experiments)} experiments"
        if is_edited:
            said += f'; the edit of {CANVAS} was not tried: {ME} drop "why" puts it aside'
        return Answer("OVER", said)
    if is_edited:
        return Answer("NEXT", f'{CANVAS} is edited: {ME} try "axis: idea", or drop "why"')
    return Answer("NEXT", f'edit {CANVAS}, then: {ME} try "axis: idea"')


def row_of(training, status, description):
    memory_gb = training.result["memory_mb"] / 1024
    return Row(training.commit, training.value, memory_gb, status, description, training.seed)


def crash_row(idea, words):
    return Row(idea[:7], 0.0, 0.0, "crash", words, SEEDS[0])


def rows_of_ideas(night, call, decided, crashed):
    """Return the rows of ideas on one parent, the best one last: only that one is kept."""
    rows = [crash_row(idea, subject(idea)) for idea in crashed]
    ideas = sorted(decided, key=lambda i: (decided[i][0].word == "keep", decided[i][0].gain))
    for idea in ideas:
        verdict, trainings = decided[idea]
        status = verdict.word
        words = subject(idea)
        if status == "keep" and idea != ideas[-1]:
            status = "discard"
            words += f"{BESIDE}{ideas[-1][:7]}"
        for note in sorted({note for t in trainings for note in t.result["notes"]}):
            words += f" [{note}]"  # for a person's eyes: no verdict depends on it
            call.say(f"odd: {note}")
        if status == "discard" and same_losses(night, trainings[0]):
            words += NO_EFFECT
        rows += [row_of(training, status, words) for training in trainings]
    return rows


def verdict_on(night, commit):
    """Return the Answer that the ledger gives on an idea, with the bar and the noise of now."""
    found = [e for e in night.experiments if e.commit == commit[:7]]
    if not found:
        return Answer("DISCARD", f"{commit[:7]} was dropped, and nothing is booked")
    experiment = found[0]
    word = experiment.status.upper()
    if not experiment.runs:
        return Answer("DISCARD", f"{commit[:7]} is booked as a crash: {experiment.idea}"[:LINE])
    if experiment.idea.endswith(NO_EFFECT):
        return Answer(word, "no effect: every loss is its parent's; is the edit reached?")
    simpler = takes_out_code(full_commit(night.tag, experiment.parent), commit)
    verdict = judge(experiment.runs, experiment.parent_runs, night.noise, simpler)
    text = f"gain {figure(verdict.gain, 3)} bar {figure(verdict.bar, 3)}"
    text += f" noise {figure(night.noise, 3)}, {METRIC} {figure(mean_value(experiment.runs))}"
    if len(experiment.runs) > 1:
        text += f" (mean of {len(experiment.runs)} seeds)"
    if simpler:
        text += ", less code"
    ours = night.valid(commit)
    theirs = night.valid(experiment.parent, ours[-1].seed) if ours else []
    for key, unit in (("steps", "steps"), ("compile", "to compile")):
        if theirs and ours[-1].result[key] != theirs[-1].result[key]:
            text += f", {ours[-1].result[key]} {unit} (the parent {theirs[-1].result[key]})"
    return Answer(word, text)


def mean_value(runs):
    return statistics.fmean(run.value for run in runs)


# --- Waves ----------------------------------------------------------------------------------------
# Several ideas on one parent, each a run of its own. The best one is kept. The others that beat
# their bars are put on top of it and run again, in a next round.


def read_wave():
    """Return a wave's {"ideas", "jobs": how many at once, "parent": at first}, {} without one."""
    return read_json(RUNS / "wave.json")


def begin_wave(night, call, commits, jobs, parent):
    """Put ideas on HEAD and write them down as a wave; return those that apply, name the others."""
    ideas = []
    for commit in commits:
        idea = idea_on_head(night, commit)
        if idea is None:
            call.say(f"{commit[:7]} does not apply to {night.head[:7]} and is left out")
            continue
        git("update-ref", idea_ref(night.tag, idea), idea)
        ideas.append(idea)
    if ideas:
        wave = {"ideas": ideas, "jobs": jobs, "parent": parent}
        write_json(RUNS / "wave.json", wave)
    else:
        (RUNS / "wave.json").unlink(missing_ok=True)
    return ideas


def idea_on_head(night, commit):
    """Return an idea's commit on HEAD, the same one if it is there already; None in a conflict."""
    parent = git("rev-parse", f"{commit}^")
    if parent == night.head:
        return commit
    tree = tree_with(night.head, parent, commit)
    if tree is None:
        return None
    return git("commit-tree", "--no-gpg-sign", "-p", night.head, "-m", subject(commit), tree)


def tree_with(head, old, new):
    """Return head's tree with the change of train.py from old to new; None in a conflict."""
    # diff-tree: the person's settings of `git diff` (colours, prefixes) change nothing in it
    patch = git_bytes("diff-tree", "-p", "--full-index", "--binary", old, new, "--", CANVAS)
    with tempfile.TemporaryDirectory() as folder:  # an index of its own: the work tree rests
        env = os.environ | {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git("read-tree", head, env=env)
        merge = ("apply", "--cached", "--3way", "--whitespace=nowarn")
        if git_or_none(*merge, stdin=patch, env=env) is None:
            return None
        return git("write-tree", env=env)


# --- Verbs ----------------------------------------------------------------------------------------

CALL_SECONDS = 540  # after which try and wait answer RUNNING; clients end calls after ten minutes
UNLIMITED = ("wave", "final")  # verbs for people, which answer when all is done
IDEA_CHARACTERS = 200


def verb_start(options, call):
    tag = options.tag
    if git_or_none("check-ref-format", f"refs/heads/autoresearch/{tag}") is None or "/" in tag:
        raise Refused(f"{tag!r} makes no name of a branch: use letters and digits, such as nov26")
    branch = f"autoresearch/{tag}"
    limits = ("experiments", "until", "patience")
    facts = {name: getattr(options, name) for name in (*limits, "launch")}
    with one_at_a_time():
        git("rev-parse", "HEAD")  # where there is no repository, git says so
        if git_or_none("rev-parse", "--quiet", "--verify", f"refs/heads/{branch}") is None:
            begin_night(tag, facts)
        else:
            if options.renew:
                facts["launch"] = options.launch or (read_facts(tag) or facts)["launch"]
                write_facts(tag, f"refs/tags/base/{branch}^0", facts)
            elif any(facts.values()):
                call.say(f"{branch} has begun before: its limits stay (--renew: for the person)")
            if git_or_none("symbolic-ref", "--quiet", "--short", "HEAD") != branch:
                refuse_edits(edited_files())
                git("switch", "--quiet", branch)
    call.say(limits_line(Night()))
    call.may_run = True
    return advance(call, step)


def begin_night(tag, facts):
    """Check that a night can begin here; write tag, ledger and branch, in this order."""
    refuse_edits(name for name in edited_files() if name.endswith((".py", ".toml")))
    if git_or_none("var", "GIT_COMMITTER_IDENT") is None:
        raise Refused(
            "git has no name and email for you:"
            " git config user.name NAME, and git config user.email EMAIL"
        )
    if LEDGER.exists() and read_ledger(LEDGER)[0]:
        raise Refused(f"{LEDGER.name} is of another night: move it away")
    write_facts(tag, "HEAD", facts)
    LEDGER.write_text(HEADER + "\n", "utf-8")
    git("switch", "--quiet", "--create", f"autoresearch/{tag}")


def refuse_edits(names):
    """Raise Refused if there is a name of a file among these."""
    for name in names:
        raise Refused(f"{name} has uncommitted edits: commit or undo them")


def read_idea(options):
    """Return the words of an idea, "" if none were given; raise Refused if they have no axis."""
    if options.file and options.idea:
        raise Refused("give the idea as words or in a file, not both")
    text = options.idea or ""
    if options.file:
        text = Path(options.file).read_text("utf-8", "replace")
    elif text == "-":
        text = sys.stdin.read()
    text = " ".join(text.split())
    if text and not re.match(r"[^:]{1,40}:\s*\S", text):
        raise Refused(f'the idea begins with its axis: {ME} try "optimizer: {text[:40]}"')
    if len(text) > IDEA_CHARACTERS:
        raise Refused(f"the idea has {len(text)} characters, at most {IDEA_CHARACTERS} are a line")
    return text


def settled_night(call):
    """Return (night, answer) with all done that needs no run; raise Refused while a run goes on."""
    night = Night()
    night.check_contract()
    answer = step(night, call)
    if answer is None:
        raise Refused(f"a run is going: {ME} wait")
    return night, answer


def verb_try(options, call):
    words = read_idea(options)
    with one_at_a_time():
        night, before = settled_night(call)
        if before.word == "OVER":
            return before
        if before.word in ("KEEP", "DISCARD"):
            call.say(f"the last idea is settled first: {before.word} {before.text}")
            if night.over():
                return next_step(night)
        idea = night.idea_at_head()
        if before.word == "NEXT" and (idea or read_wave() or night.baseline_left):
            raise Refused(before.text)
        if idea and CANVAS not in edited_files():
            if words not in ("", subject(idea)):
                raise Refused(f"{CANVAS} has no edit since {idea[:7]}, which failed: mend it")
            call.retry = True
            call.about = idea
        else:
            call.about = commit_idea(night, call, idea, words)
    call.may_run = True
    return advance(call, step)


def commit_idea(night, call, crashed, words):
    """Commit train.py on the last kept commit, in place of an idea that crashed; return it."""
    if CANVAS not in edited_files():
        raise Refused(f"{CANVAS} has no edit: edit it first")
    if not words and not crashed:
        raise Refused(f'say what the idea is: {ME} try "axis: idea"')
    amend = []
    if crashed:
        amend = ["--amend"]
        old = subject(crashed)
        if words not in ("", old):  # another idea: the old one is given up
            night.book([crash_row(crashed, old)])
            call.say(f"{crashed[:7]} is booked as a crash: {old}"[:LINE])
        words = words or old
    options = ("--quiet", "--no-gpg-sign", *amend)
    git("commit", *options, "-F", "-", "--", CANVAS, stdin=words.encode())
    return git("rev-parse", "HEAD")


def verb_wait(options, call):
    call.may_run = True
    return advance(call, step)


def verb_drop(options, call):
    why = " ".join(options.why.split())
    if not why:
        raise Refused(f'say why: {ME} drop "too much code for its gain"')
    with one_at_a_time():
        night, _ = settled_night(call)
        if read_wave():
            raise Refused(f"a wave is not finished: {ME} wait")
        idea = night.idea_at_head()
        if idea:
            return drop_pending(night, call, idea, why)
        if CANVAS in edited_files():
            set_edit_aside(night.head, call)
            said = f"{CANVAS} is as committed again, and nothing is booked"
            if night.experiments and night.experiments[-1].status == "keep":
                said += f"; {night.kept[:7]} stays kept"
                if not night.over():
                    said += ": drop again to take it back"
            return Answer("DISCARD", said)
        if night.over():
            raise Refused("the night is over, and nothing is left over: what is kept stays kept")
        return drop_kept(night, call, why)


def drop_pending(night, call, idea, why):
    """Book an idea that has no verdict, as far as it has run, and put it back."""
    words = f"{subject(idea)}; dropped: {why}"
    ours = night.valid(idea)
    if ours:
        night.book([row_of(training, "discard", words) for training in ours])
    elif any(training.word in FAILED for training in night.attempts(idea)):
        night.book([crash_row(idea, words)])
    put_back(night, call)
    return verdict_on(night, idea)


def drop_kept(night, call, why):
    """Turn the last keep into a discard, if nothing came after it."""
    last = night.experiments[-1] if night.experiments else None
    if not last or last.status != "keep":
        raise Refused("there is nothing to drop: no idea is pending, and the last one is not kept")
    commit = night.kept
    if night.head != commit:
        raise Refused(
            f"there are commits after the kept {last.commit}:"
            f" git reset --keep {last.commit} takes them off"
        )
    lines = []
    for line in LEDGER.read_text("utf-8").splitlines(keepends=True):
        if line.startswith(last.commit):
            row = parse_row(line)
            words = f"{row.description}; dropped: {why}"
            line = format_row(row._replace(status="discard", description=words))
        lines.append(line)
    replace_file(LEDGER, "".join(lines).encode())
    night.load_ledger()
    put_back(night, call)
    return verdict_on(night, commit)


def verb_look(options, call):
    try:
        answer = advance(call, step)
    except NoNight as error:
        return Answer("NEXT", str(error))
    night = Night()
    notes = night.notes[:1]
    said = notes + call.lines[len(notes) - 2 :]
    call.lines = said + look_lines(night, num_near=2 - len(said))
    return answer


def limits_line(night):
    """Return what the night may still do."""
    parts = []
    if night.facts["experiments"]:
        parts.append(f"{len(night.experiments)} of {night.facts['experiments']} experiments")
    else:
        parts.append(f"{len(night.experiments)} experiments, no limit")
    if night.facts["until"]:
        left = night.facts["until"] - time.time()
        hours = f"{left // 3600:.0f} h {left % 3600 // 60:.0f} min left"
        if night.over():
            hours = "over"
        parts.append(f"until {show_time(night.facts['until'])}, {hours}")
    if night.facts["patience"]:
        parts.append(f"nothing kept in {night.fruitless} of {night.facts['patience']}")
    return f"{night.tag}: {'; '.join(parts)}"


def look_lines(night, num_near):
    """Return what a session that knows nothing has to know, with so many of the near misses.

    Without those, they are at most 12 lines.
    """
    lines = [limits_line(night)]
    base = [row.run for row in night.rows if row.commit == night.base[:7]]
    if not base:
        return lines
    if night.baseline_left:
        done = len(SEEDS) - len(night.baseline_left)
        lines.append(f"{METRIC} {figure(mean_value(base))} after {done} of {len(SEEDS)} baselines")
        return lines
    kept = [e for e in night.experiments if e.status == "keep"]
    lines.append(score_line(night, base, len(kept)))
    for experiment in sorted(kept, key=lambda e: -e.gain)[:3]:
        gain = f"+{figure(experiment.gain, 3)}"
        lines.append(shorten(f"kept {experiment.commit} {gain} {experiment.idea}"))
    lines += axis_lines(night)
    for experiment in near_misses(night)[:num_near]:
        needed = judge(experiment.runs, experiment.parent_runs, night.noise).bar
        gain = f"+{figure(experiment.gain, 3)} of {figure(needed, 3)}"
        lines.append(shorten(f"near {experiment.commit} {gain} {experiment.idea}"))
    for row in night.rows[-2:]:
        commit, value, memory_gb, status, words = format_row(row).rstrip("\n").split("\t")
        lines.append(shorten(f"row  {commit} {value} {memory_gb} GB {status} {words}"))
    others = [name for name in edited_files() if name != CANVAS]
    if others:
        lines.append(shorten(f"edited and left alone: {', '.join(others)}"))
    return lines


def score_line(night, base, num_kept):
    """Return where the score stands, and what an idea has to gain to be kept after one run."""
    line = f"{METRIC} {figure(mean_value(base))} at first (mean of {len(base)})"
    parent = [row.run for row in night.rows_of(night.kept)]
    if num_kept:
        now = f"{figure(mean_value(parent))} at {night.kept[:7]}"
        line += f", {now} (mean of {len(parent)})" if len(parent) > 1 else f", {now} (one run)"
    line += f"; {num_kept} kept; noise {figure(night.noise, 3)}"
    needed = judge([Run("", SEEDS[0], 0.0)], parent, night.noise).bar
    if math.isfinite(needed):
        line += f": a gain above {figure(needed, 3)} is kept at once"
    return line


def shorten(line, most=90):
    return line if len(line) <= most else f"{line[: most - 3]}..."


def near_misses(night):
    """Return the discarded ideas that gained something, the largest gain first."""
    found = [e for e in night.experiments if e.status == "discard" and e.gain > 0]
    found = [e for e in found if not e.idea.endswith(NO_EFFECT)]
    return sorted(found, key=lambda e: -e.gain)


def axis_lines(night, most=4):
    """Return a line an axis: tries, keeps, best gain, cold or closed; the latest axes first."""
    by_axis = {}
    for experiment in night.experiments:
        axis = axis_of(experiment.idea)
        by_axis[axis] = [*by_axis.pop(axis, ()), experiment]  # the latest axis comes last
    lines = []
    counts = []
    for axis, tried in reversed(by_axis.items()):
        keeps = sum(e.status == "keep" for e in tried)
        gains = [e.gain for e in tried if e.runs]
        best = f"best gain {figure(max(gains), 3)}" if gains else "no gain measured"
        state = ""
        if len(tried) < COLD_TRIES:
            state = ", cold"
        elif len(tried) >= CLOSED_TRIES and all(e.status != "keep" for e in tried[-CLOSED_TRIES:]):
            state = ", closed"
        lines.append(shorten(f"axis {axis}: {len(tried)} tried, {keeps} kept, {best}{state}"))
        count = f"{axis} {keeps}/{len(tried)}"
        counts.append(f"{count} (closed)" if state == ", closed" else count)
    if len(lines) > most:
        rest = ", ".join(counts[most - 1 :])
        lines = [*lines[: most - 1], f"axes before, kept/tried: {rest}"]
    return lines


def verb_show(options, call):
    with one_at_a_time():
        night = Night()
        commit = full_commit(night.tag, options.commit)
    if commit == night.base:
        said = f"{commit[:7]} is the base"
        runs = [row.run for row in night.rows_of(commit)]
        if runs:
            said += f", {METRIC} {figure(mean_value(runs))} (mean of {len(runs)} runs)"
        for training in night.attempts(commit)[-1:]:
            show_end_of_log(call, training, lines=8)
        return Answer("NEXT", said)
    call.say(f"{commit[:7]} {subject(commit)}")
    diff = git("diff-tree", "-p", f"{commit}^", commit, "--", CANVAS).splitlines()[4:]
    room = max(options.lines - 12, 4)
    for line in diff[:room]:
        call.say(line[:LINE])
    if len(diff) > room:
        call.say(f"... {len(diff) - room} more lines: {ME} show --lines N {commit[:7]}")
    for training in night.attempts(commit)[-1:]:
        show_end_of_log(call, training, lines=8)
    if night.rows_of(commit):
        return verdict_on(night, commit)
    return Answer("NEXT", f"{commit[:7]} has no result that counts: {ME} look")


def show_end_of_log(call, training, lines):
    """Say how a run's log ends; what stands in it is data, and nobody's orders."""
    path = training.folder / "run.log"
    if path.exists():
        shown = [line for line in read_log(path).split("\n") if line.strip()]
        for line in shown[-lines:]:
            call.say(f"| {line[:100]}")


def verb_stop(options, call):
    for folder in [path.parent for path in RUNS.glob("*/job.json")]:
        asked = False
        while is_going(folder):
            runner = (folder / "alive").read_text()  # empty until the runner is up
            if runner and not asked:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(int(runner), signal.SIGTERM)
                asked = True
                call.say(f"stopped {folder.name}")
            time.sleep(POLL_SECONDS[0])
    if options.night:
        with one_at_a_time():
            night = Night()
            write_facts(night.tag, night.base, night.facts | {"stopped": int(time.time())})
        said = "the night is over; a run that was ended is not counted"
        return Answer("OVER", f"{said}: {ME} look says what is left over")
    return Answer("NEXT", f"nothing was booked: {ME} wait runs it again, {ME} drop gives it up")


def verb_wave(options, call):
    with one_at_a_time():
        night, _ = settled_night(call)
        if read_wave() or night.baseline_left or night.idea_at_head():
            raise Refused(f"finish what is pending first: {ME} wait")
        if night.over():
            return Answer("OVER", night.over())
        refuse_edits(name for name in edited_files() if name == CANVAS)
        commits = list(dict.fromkeys(full_commit(night.tag, name) for name in options.commits))
        for commit in commits:
            files = git("diff", "--name-only", "--relative", f"{commit}^", commit).splitlines()
            if files != [CANVAS]:
                what = ", ".join(files) or "nothing"
                raise Refused(f"{commit[:7]} is no idea: it changes {what}")
            if night.rows_of(commit) and git("rev-parse", f"{commit}^") == night.head:
                raise Refused(f"{commit[:7]} was tried on {night.head[:7]}: {ME} show {commit[:7]}")
        jobs = options.jobs or (len(commits) if night.facts["launch"] else 1)
        if not begin_wave(night, call, commits, jobs, night.kept):
            raise Refused(f"none of these applies to {night.head[:7]}")
    call.may_run = True
    return advance(call, step)


def verb_final(options, call):
    call.may_run = True
    return advance(call, step_final)


def step_final(night, call):
    """Score base and winner on the test shard; return the Answer, None while runs are awaited."""
    if not night.over():
        raise Refused(f"the night goes on: end it first with {ME} stop --night")
    if night.kept == night.base:
        raise Refused("nothing was kept, so there is nothing to compare with the base")
    pairs = []
    for seed in SEEDS:
        pairs.append([Need(commit, seed, split="test") for commit in (night.base, night.kept)])
    left = [need for pair in pairs for need in pair if not night.valid(*need)]
    if left:
        return outcome(night, call, start_runs(night, call, left), f"{len(left)} runs")
    gains = []
    for pair in pairs:
        base, winner = (night.valid(*need)[-1].value for need in pair)
        gains.append(gain_of(base, winner))
        seed = pair[0].seed
        call.say(f"seed {seed}: base {figure(base)}, {night.kept[:7]} {figure(winner)}")
    spread = statistics.stdev(gains)
    text = f"test gain {figure(statistics.fmean(gains), 3)}, deviation {figure(spread, 3)}"
    return Answer("OVER", f"{text} over {len(SEEDS)} seeds; it is in no ledger")


# --- Command line ---------------------------------------------------------------------------------

MAX_LINES = 15  # of an answer
ANSWERS = {  # the first word of the last line: the exit status, and what it means
    "KEEP": (0, "the idea is kept"),
    "NEXT": (0, "nothing is running; what to do next"),
    "REFUSED": (2, "nothing is booked; why, and what to do about it"),
    "DISCARD": (3, "the idea is booked and put back"),
    "CRASH": (4, "the run failed: mend train.py and try again, or drop the idea"),
    "BUSY": (5, "the run was disturbed or the device is in use; nothing is booked; wait"),
    "RUNNING": (6, "the run goes on; wait"),
    "OVER": (7, "a limit is reached or a person ended the night; or final has its result"),
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        raise Refused(f"{message}; see {ME} --help")


def positive(text):
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def moment(text):
    """Return the time that HH:MM or a date with HH:MM means, in seconds of the epoch."""
    now = datetime.now()
    try:
        if len(text) <= len("HH:MM"):
            end = datetime.combine(now, datetime.strptime(text, "%H:%M").time())
            if end <= now:
                end += timedelta(days=1)
        else:
            end = datetime.strptime(text, "%Y-%m-%d %H:%M")
    except ValueError:
        message = f"{text!r} is neither HH:MM nor 'YYYY-MM-DD HH:MM'"
        raise argparse.ArgumentTypeError(message) from None
    if end <= now:
        raise argparse.ArgumentTypeError(f"{text!r} has passed; it is {now:%Y-%m-%d %H:%M}")
    return int(end.timestamp())


def make_parser():
    answers = [f"  {status} {word:8} {text}" for word, (status, text) in ANSWERS.items()]
    begins = "The last line of every answer begins with one word, which sets the exit status:"
    parser = Parser(
        prog="ratchet.py",
        description="Run a night of experiments: train, judge, book, keep or put back.",
        epilog="\n".join([begins, *answers]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def add(name, help_text, runs=False):
        verb = verbs.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if runs:
            verb.add_argument("--foreground", action="store_true", help="train as a child process")
            usual = f"{CALL_SECONDS}; no limit in the foreground"
            if name in UNLIMITED:
                usual = "no limit"
            help_text = f"answer RUNNING after so many ({usual})"
            verb.add_argument("--seconds", type=float, metavar="N", help=help_text)
        return verb

    start = add("start", "begin a night, or go on with one; run the baseline", runs=True)
    start.add_argument("tag", help="the night's name, such as nov26")
    start.add_argument("--experiments", type=positive, metavar="N", help="end after N ideas")
    start.add_argument("--until", type=moment, metavar="HH:MM", help="end at this local time")
    start.add_argument(
        "--patience", type=positive, metavar="N", help="end after N ideas in a row without a keep"
    )
    start.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help="what goes in front of each training; {slot} is the number of a device, from 0",
    )
    start.add_argument("--renew", action="store_true", help="give a night these limits instead")
    attempt = add("try", "commit train.py, train, judge, keep or put back", runs=True)
    attempt.add_argument("idea", nargs="?", help='"axis: idea", one line; - reads it from stdin')
    attempt.add_argument("--file", help="a file that holds the idea")
    add("wait", "go on with what is running or was cut off", runs=True)
    drop = add("drop", "give up a crash, or take back a keep that is ugly for its gain")
    drop.add_argument("why")
    add("look", "limits, kept ideas, axes, near misses, last rows, the next command")
    show = add("show", "the diff of anything that was tried, and the end of its log")
    show.add_argument("commit")
    show.add_argument("--lines", type=positive, default=60, help="at most so many (60)")
    stop = add("stop", "for the person: end the run that is going and book nothing")
    stop.add_argument("--night", action="store_true", help="end the night, too")
    wave = add("wave", "for the person: several ideas at once; the keeps are combined", runs=True)
    wave.add_argument("commits", nargs="+", metavar="COMMIT")
    wave.add_argument("--jobs", type=positive, metavar="N", help="trainings at once")
    add("final", "for the person: base and winner on the test shard, three seeds each", runs=True)
    return parser


def interrupted(call):
    """Return the Answer after Ctrl-C, which has also reached what runs in the foreground."""
    end = time.monotonic() + STOP_SECONDS + 1
    while call.foreground and time.monotonic() < end:
        if not any(is_going(training.folder) for training in call.going):
            return Answer("NEXT", f"what was started is ended: {call.again} runs it again")
        time.sleep(POLL_SECONDS[0])
    return Answer("RUNNING", f"what was started goes on: {call.again}, or {ME} stop")


def main():
    words = sys.argv[1:]
    if words[:1] == ["_run"]:  # not for people
        be_runner(*words[1:])
        return 0
    call = Call()
    most = MAX_LINES
    try:
        options = make_parser().parse_args(words)
        if hasattr(options, "seconds"):
            unlimited = options.foreground or options.verb in UNLIMITED
            default = math.inf if unlimited else CALL_SECONDS
            seconds = default if options.seconds is None else options.seconds
            again = f"{ME} {'final' if options.verb == 'final' else 'wait'}"
            call = Call(again, options.foreground, seconds)
        if options.verb == "show":
            most = options.lines
        answer = globals()[f"verb_{options.verb}"](options, call)
    except Refused as error:
        answer = Answer("REFUSED", str(error))
    except OSError as error:
        answer = Answer("REFUSED", f"{error.filename or 'ratchet.py'}: {error.strerror or error}")
    except KeyboardInterrupt:
        answer = interrupted(call)
    first = max(len(call.lines) - (most - 1), 0)
    for line in call.lines[first:]:
        print(line)
    print(answer.word, " ".join(answer.text.split()))
    return ANSWERS[answer.word][0]


if __name__ == "__main__":
    sys.exit(main())
