"""Read the ledgers of nights, count what was tried, and draw it; analysis.ipynb shows the result.

Sections: reading a ledger, ideas and parts, gains, tables, the picture.

A row of a ledger is a run. The runs of one commit are one idea, unless their words or verdicts say
that they are several. The first idea that did not crash is the baseline. ratchet.py says what
noise, gain and parent are, which number counts, and whether it should fall or rise.
"""

import itertools
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.path import Path as Curve
from matplotlib.transforms import Bbox

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ratchet

# --- Reading a ledger -----------------------------------------------------------------------------

COLUMNS = ["commit", "value", "memory_gb", "status", "description"]  # "value" is the metric
NAMES = {  # what people call the columns
    "commit": "commit, hash, sha, commit_hash, commit_sha, commit_id, git_hash, git_commit",
    "status": "status, verdict, decision, outcome",
    "kept": "kept, keep, accepted",  # yes or no, in place of a status
    "description": "description, desc, idea, change, experiment, hypothesis, notes, note, summary",
    "seed": "seed",
}
MEMORY = re.compile(r"((peak|max|gpu|cuda)_)*(mem|memory|vram|rss)(_(used|usage|peak|max))?(_\w+)?")
VERDICTS = {  # what people call the verdicts; a baseline is a keep
    "keep": "keep, kept, keeper, accept, accepted, best, better, improved, improvement, win, merge,"
    " merged, adopt, adopted",
    "discard": "discard, discarded, revert, reverted, reject, rejected, worse, regressed,"
    " regression, neutral, no improvement, no gain, no effect, not kept",
    "crash": "crash, crashed, error, oom, out of memory, timeout, timed out, nan, diverged, killed",
    "fail": "fail, failed, failure",  # a crash without a value, else a discard
    "baseline": "baseline",
    "unfinished": "missing, infra, rate limit, rate limited, info, note, parked, duplicate, tbd,"
    " pending, planned, queued, running, in progress, skip, skipped, todo, aborted, cancelled,"
    " canceled, interrupted, blocked, deferred, not run, n/a",
}
YES_OR_NO = {"yes": "keep", "true": "keep", "1": "keep"}
YES_OR_NO |= {"no": "discard", "false": "discard", "0": "discard"}
VERDICT_OF = {word: verdict for verdict, words in VERDICTS.items() for word in words.split(", ")}
NO_NUMBER = ("", "-", "n/a", "na", "none", "null", "fail", "failed", "crash", "error", "oom")
DECIMAL_COMMA = re.compile(r"-?(0,\d+|\d+,(\d{1,2}|\d{4,}))")  # else it may part the thousands
SUMMARY = re.compile(r"(?i)(total|summary|overall|mean|average|best so far)\b")
HEADING = re.compile(r"(?i)[#=~*_[-]|(phase|session|round|stage|night|day|part)\b|.*:\s*$")
REMARK = re.compile(r"(?i)resum|continu|restart|\bnote\b|todo|fixme|comment")
HASH = re.compile(r"[0-9a-f]{7,64}")


class ResultsError(ValueError):
    """A ledger that cannot be read; a notebook shows the message without a stack."""

    def _render_traceback_(self):
        return [f"ResultsError: {self}"]


class NotARun(ValueError):
    """A line that is left out, and why. `readable`: it says itself that it is no finished run."""

    def __init__(self, why, readable=False):
        super().__init__(why)
        self.readable = readable


@dataclass
class Row:
    """A run as the ledger has it; a crash has no value."""

    commit: str
    value: float
    memory_gb: float
    status: str  # keep, discard, crash or baseline
    description: str
    seed: int
    line: int = 0
    section: int = 0  # how many headings stand above it


@dataclass
class Notes:
    """What a reader of a ledger should know: lines by what was wrong with them."""

    lines: dict = field(default_factory=dict)
    num_unreadable: int = 0

    def add(self, what, line):
        """Note the line under what was wrong with it."""
        self.lines.setdefault(what, []).append(line)

    def texts(self):
        """Return a sentence a cause, of the first twelve causes."""
        texts = [f"{what}: line {brief(lines)}" for what, lines in self.lines.items()]
        if len(texts) > 12:
            texts[12:] = [f"and {len(texts) - 12} more causes to leave out a line"]
        return texts


def brief(names):
    """Join names by commas, the first ten of them."""
    shown = [str(name) for name in names[:10]]
    if len(names) > 10:
        shown.append("...")
    return ", ".join(shown)


def column_name(text):
    """Return a column's name as people mean it: "Val BPB" and "val_bpb" are one."""
    return re.sub(r"[\s-]+", "_", text.strip(' #*`"\r').lower())


def column_meanings(titles):
    """Return what each title of a header means: one of COLUMNS, "seed", "memory_mb", or itself.

    Where several titles could mean the same, the first name in NAMES counts.
    """
    names = [column_name(title) for title in titles]
    meanings = [title.strip() for title in titles]
    for meaning, known in NAMES.items():
        found = [name for name in known.split(", ") if name in names]
        if found:
            meanings[names.index(found[0])] = meaning
    memory = [i for i, name in enumerate(names) if MEMORY.fullmatch(name)]
    if memory:
        is_mb = names[memory[0]].endswith(("mb", "mib"))
        meanings[memory[0]] = "memory_mb" if is_mb else "memory_gb"
    metric = column_name(ratchet.METRIC)
    if metric in names:
        meanings[names.index(metric)] = "value"
    return meanings


def read_header(path, lines):
    """Return the meanings of the columns, and how many lines there are up to the header's end.

    A title may stand above the header. Without a header the columns are taken to be those that
    ratchet.py writes. Raises ResultsError where a column that is needed is not there.
    """
    for number, line in enumerate(lines[:10], start=1):
        meanings = column_meanings(line.rstrip("\r\t ").split("\t"))
        if "value" in meanings and ("status" in meanings or "kept" in meanings):
            return meanings, number
    line = lines[0]
    where = f"{path} line 1"
    try:
        parse(line.split("\t"), COLUMNS)
        return COLUMNS, 0
    except NotARun:
        pass
    if not line.strip():
        raise ResultsError(f"{where}: the file is empty, or its first line is")
    titles = [title.strip() for title in line.strip().split("\t")]
    if len(titles) == 1:
        raise ResultsError(f"{where}: a header with no tab in it, {line.strip()[:60]!r}")
    there = brief(titles)[:200]
    if "value" in column_meanings(titles):
        raise ResultsError(f"{where}: no column status; there are {there}")
    raise ResultsError(
        f"{where}: no column {ratchet.METRIC}; there are {there}."
        " If one of them is the metric, set ratchet.METRIC to it, and ratchet.LOWER_IS_BETTER"
    )


def plain_cell(text):
    """Return a cell without what spreadsheets and markdown put round it."""
    return text.strip().strip('*`"').strip()


def read_number(text):
    """Return a cell's number, NaN where it says that there is none; raise ValueError if neither."""
    if text.lower() in NO_NUMBER:
        return math.nan
    text = re.split(r"\s*(?:±|\+/-)", text)[0]  # a mean and its error
    if DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text)


def read_memory(text, unit):
    """Return a cell's memory in GB; NaN where it says none that can be read."""
    match = re.fullmatch(r"(\S+?)\s*(|GB|GiB|MB|MiB)", text, re.IGNORECASE)
    try:
        memory = read_number(match[1])
    except (TypeError, ValueError):
        return math.nan
    if not 0 <= memory < math.inf:
        return math.nan
    in_mb = match[2].upper().startswith("M") or (unit == "memory_mb" and not match[2])
    return memory / 1024 if in_mb else memory


def read_verdict(text):
    """Return the verdict that a status means, or "" for one that we do not know."""
    words = re.findall(r"[^\W_]+(?:/[^\W_]+)?", text.lower())
    whole = VERDICT_OF.get(" ".join(words))
    if whole or any(word in ("or", "not", "no") for word in words):
        return whole or ""
    # "keep (new best)", "screen_discard", "infra-fail", "discard (crash)"
    verdicts = list(dict.fromkeys(VERDICT_OF[word] for word in words if word in VERDICT_OF))
    if len(verdicts) == 1 or verdicts in (["discard", "crash"], ["unfinished", "fail"]):
        return verdicts[0]
    return ""


def parse(cells, names):
    """Return the Row that the cells of a line make; raise NotARun where they make none."""
    row = dict(zip(names, cells, strict=False))
    if not {"status", "kept"} & row.keys() or "value" not in row:
        raise NotARun(f"{len(cells)} columns in place of {len(names)}")
    commit = plain_cell(row.get("commit", ""))
    if SUMMARY.match(commit):
        raise NotARun("a summary", readable=True)
    status = plain_cell(row.get("status", row.get("kept")))
    verdict = read_verdict(status)
    if "status" not in row:
        verdict = YES_OR_NO.get(status.lower(), verdict)
    if not verdict:
        raise NotARun(f"status {status.lower()[:40]!r}")
    if verdict == "unfinished":
        raise NotARun(status.lower().replace("_", " ")[:40], readable=True)
    try:
        value = read_number(plain_cell(row["value"]))
    except ValueError:
        if verdict != "crash":
            raise NotARun(f"{ratchet.METRIC} {row['value'].strip()[:40]!r}") from None
        value = math.nan
    # Crashes are logged as zeros, and a zero would be the best of all
    if verdict == "crash" or not math.isfinite(value) or (value == 0 and ratchet.LOWER_IS_BETTER):
        value = math.nan
    if verdict == "fail":
        verdict = "crash" if math.isnan(value) else "discard"
    if verdict in ("keep", "baseline") and math.isnan(value):
        raise NotARun(f"a {verdict} without a {ratchet.METRIC}")

    unit = "memory_mb" if "memory_mb" in row else "memory_gb"
    memory_gb = read_memory(plain_cell(row.get(unit, "")), unit)
    if verdict == "crash":
        memory_gb = math.nan
    # What does not print could garble the terminal or the picture
    description = row.get("description", "")
    if not description.isprintable():
        description = "".join(c if c.isprintable() else " " for c in description)
    description = " ".join(description.split())
    seed = plain_cell(row.get("seed", ""))
    named = re.search(r"(?:, |\()seed (\d+)\)?$", description)
    if not seed.isdecimal():
        seed = named[1] if named else ratchet.SEEDS[0]
    return Row(commit, value, memory_gb, verdict, description, int(seed))


def read_line(line, names, notes, number):
    """Return the Row of a line, or None for a heading; raise NotARun for what is neither."""
    cells = line.split("\t", len(names) - 1)  # further tabs belong to the last column
    filled = [cell.strip() for cell in cells if cell.strip(' -"\r')]
    if line.startswith("#") and len(filled) > 1 and not re.fullmatch(r"#\d+", filled[0]):
        raise NotARun("a comment", readable=True)
    if len(filled) > 1 or (filled and "\t" in line and read_verdict(filled[0])):
        return parse(cells, names)
    text = filled[0] if filled else ""
    if not any(c.isalnum() for c in text):
        raise NotARun("not a run", readable=True)
    between = "\\t" if "\\t" in text else None
    cells = text.split(between, len(names) - 1)
    try:
        row = parse(cells, names)
        if not HASH.fullmatch(row.commit):
            raise NotARun("no hash")
    except NotARun:
        if REMARK.search(text):
            raise NotARun("a comment", readable=True) from None
        if HEADING.match(text):
            return None
        raise NotARun("not a run", readable=True) from None
    how = "a written \\t" if between else "spaces"
    notes.add(f"{how} in place of tabs, read nevertheless", number)
    return row


def read_rows(path, names, lines, notes):
    """Return the rows in the numbered lines; raise ResultsError if many of them cannot be read."""
    rows = []
    headings = []
    for number, line in lines:
        if not line.strip():
            continue
        if column_meanings(line.split("\t", 1)[:1]) == names[:1] and (
            column_meanings(line.rstrip("\r\t ").split("\t")) == names
        ):
            notes.add("another header, left out", number)
            continue
        try:
            row = read_line(line.rstrip("\r"), names, notes, number)
        except NotARun as error:
            notes.add(f"{error}, left out", number)
            notes.num_unreadable += not error.readable
            continue
        if row is None:
            headings.append(number)
        else:
            row.line = number
            row.section = len(headings)
            rows.append(row)
    total = len(rows) + notes.num_unreadable
    if 3 * notes.num_unreadable > total:
        why = "; ".join(text.replace(", left out", "") for text in notes.texts())
        bad = f"{notes.num_unreadable} of {total} rows"
        raise ResultsError(f"{path}: {bad} cannot be read: {why}"[:300])
    if not rows:
        raise ResultsError(f"{path}: no runs yet that are finished")
    return rows, headings


def drop_odd_signs(rows, notes):
    """Drop a few values below zero among many above it: losses, of which they would be the best."""
    negative = [row for row in rows if row.value < 0]
    if not ratchet.LOWER_IS_BETTER or len(negative) > len(rows) / 4:
        return rows
    for row in negative:
        notes.add(f"{ratchet.METRIC} below zero, unlike the others, left out", row.line)
    return [row for row in rows if not row.value < 0]


def drop_doubles(rows, notes):
    """Drop rows of a run that stands twice; its last verdict counts.

    The same run has the same commit, seed, value and memory. Its words may have been edited, unless
    its commit has many values: then it is many ideas that were never committed.
    """
    values = {}
    for row in rows:
        values.setdefault(row.commit, set()).add(row.value)
    seen = {}
    single = []
    for row in rows:
        key = (row.commit, row.seed, str(row.value), str(row.memory_gb))
        is_hash = HASH.fullmatch(row.commit)
        num_values = len(values[row.commit])
        if not is_hash or num_values > 3 or (row.status == "crash" and num_values > 1):
            key += (row.description,)
        before = seen.get(key) if is_hash or row.description else None
        if before is None:
            seen[key] = row
            single.append(row)
        elif before.status == row.status:
            notes.add("a run that stands twice, counted once", row.line)
        else:
            before.status = row.status
            notes.add("another verdict on the same run, counted in place of the first", row.line)
    return single


def read_text_lines(path):
    """Return the lines of a ledger, whatever program wrote it."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; is RESULTS right?") from None
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of a spreadsheet
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return text.split("\n")  # not splitlines: a form feed in a description ends no line


def load(path):
    """Read a ledger: one row a run, in order; attrs: path, and notes on what to beware of.

    Columns: commit, value (of the metric), memory_gb, status, description, seed, line, section,
    and those of tell_apart. Raises ResultsError, one line, if it cannot be read.
    """
    lines = read_text_lines(path)
    names, num_above = read_header(path, lines)
    notes = Notes()
    if num_above == 0:
        notes.add("no header: columns as ratchet.py writes them", 1)
    for number, line in enumerate(lines[: max(num_above - 1, 0)], start=1):
        if line.strip():
            notes.add("above the header, left out", number)
    numbered = list(enumerate(lines, start=1))[num_above:]
    rows, headings = read_rows(path, names, numbered, notes)
    rows = drop_odd_signs(rows, notes)
    rows = drop_doubles(rows, notes)
    runs = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="run"))

    failed = (runs.status == "discard") & runs.value.isna()
    runs.loc[failed, "status"] = "crash"
    shared, put_back = tell_apart(runs)
    sections_begun = set(runs.section[~runs.part.duplicated()])
    for section, line in enumerate(headings, start=1):
        begins = section in sections_begun
        notes.add("a heading, begins a part" if begins else "a heading, left out", line)
    known = {*COLUMNS, "kept", "memory_mb", "seed"}
    lacking = {"commit", "memory_gb", "description"} - set(names)
    if "memory_mb" in names:
        lacking.discard("memory_gb")
    others = {
        "columns not read:": [name for name in names if name not in known],
        "no column": [name for name in COLUMNS if name in lacking],
        f"discard without a {ratchet.METRIC}, counted as a crash: run": runs.index[failed],
        "one commit, several ideas (never committed?), each row for itself:": shared,
        "discards under the hash of a kept commit, each for itself:": put_back,
        "memory a thousand times another from here on (unit or machine?): run": memory_leaps(runs),
        "no more hashes from here on (another machine?): run": hashes_end(runs),
    }
    texts = [f"{what} {brief(found)}" for what, found in others.items() if len(found)]
    runs.attrs = {"path": str(path), "notes": notes.texts() + texts}
    return runs


def memory_leaps(runs):
    """Return the first run with some thousand times the memory of the one before it, in a list."""
    known = runs.memory_gb[runs.memory_gb > 0]
    ratio = known / known.shift()
    return known.index[(ratio > 300) | (ratio < 1 / 300)].tolist()[:1]


def hashes_end(runs):
    """Return the run after the last that has a hash, in a list, if two or more have one."""
    hashes = runs.index[runs.commit.str.fullmatch(HASH.pattern)]
    if len(hashes) < 2 or hashes[-1] == runs.index[-1]:
        return []
    return [hashes[-1] + 1]


# --- Ideas and parts ------------------------------------------------------------------------------

NO_BASELINE = (  # a word of these before "baseline": the line compares with one
    " than vs vs. versus over beat beats beating below above from to the on of with and no not"
    " match matches near like worse better revert reverted back restore under per for as a new"
    " improved improves improve stronger in at by since compared into same through against "
)


def names_baseline(text):
    """Tell whether the words name a run a baseline: "Mac Mini baseline", not "beats baseline"."""
    text = re.sub(r"(?i)^(re-?run|repeat(ed)?|another)( of)?( the)?\s+", "", text)
    match = re.match(r"(?i)((?:[\w.'/()-]+\s+){0,4})baseline\b(.*)", text)
    if not match:
        return False
    before = match[1].lower().split()
    after = match[2].lower()
    if before == ["new"] and after.startswith((" on ", " for ")):
        return True
    if any(f" {word} " in NO_BASELINE for word in before) or re.match(r"-\w|\s*[+&]", after):
        return False
    is_change = re.match(r"\s(with|without|plus|minus|but|and)\b", after)
    return bool(before) or not is_change


def plain_words(runs, is_baseline):
    """Return each run's words without what says that it is a repeat, and whether none are left."""
    words = runs.description.str.replace(r"(^|[, (]+)seed \d+\)?$", "", regex=True)
    again = words.str.contains(r"(?:^|\s)again$") | (words == "")
    words = words.str.replace(r"[, (]*\b(again|re-?run|repeat(ed)?)\)?$", "", regex=True)
    # "Baseline (run 2)" and "baseline re-measured" are the baseline
    repeat = r"(?i)seed\W*\d+|\b(?:re-?(run|measured?|check(ed)?)|run|repeat|again|\d\d?)\b|\W"
    plain = words[is_baseline].str.lower().str.replace(repeat, " ", regex=True)
    return words.mask(is_baseline, plain.str.split().str.join(" ")), again


def discards_put_back(runs, words, shared, commit):
    """Return a mask of the discards that stand under the hash of one kept idea.

    HEAD was put back to the kept commit before the row was written.
    """
    put_back = pd.Series(False, runs.index)
    for _, group in words[shared].groupby([runs.part[shared], commit[shared]]):
        is_kept = runs.status[group.index] == "keep"
        kept_words = group[is_kept].dropna().unique()
        others = group.index[~is_kept & ~group.isin(kept_words)]
        if len(kept_words) == 1 and len(others) == (~is_kept).sum():
            put_back[others] = True
    return put_back


def tell_apart(runs):
    """Add part, idea and own to runs; return commits of many ideas, and kept ones with discards.

    A part begins with a baseline of its own, or under a heading. Runs of one idea are repeats. Rows
    without a hash, and rows that share a commit but neither words nor verdict, are an idea each; a
    discard under the hash of a kept commit leaves it to the kept one. own: has its commit alone.
    """
    is_hash = runs.commit.str.fullmatch(HASH.pattern)
    alone = "run " + runs.index.astype(str)
    commit = runs.commit.where(is_hash, alone)
    is_baseline = (runs.status == "baseline") | runs.description.map(names_baseline)
    is_baseline |= ~is_hash & runs.commit.map(names_baseline)
    runs["status"] = runs.status.replace("baseline", "keep")
    words, again = plain_words(runs, is_baseline)
    runs["part"] = number_parts(runs, commit, words, again, is_baseline)

    told = pd.DataFrame({"words": words.mask(again)})
    told["verdict"] = runs.status.mask(is_baseline | (runs.status == "crash"))
    per_commit = told.groupby([runs.part, commit])
    shared = (per_commit.transform("nunique") > 1).any(axis=1)
    put_back = discards_put_back(runs, told.words, shared, commit)
    is_settled = put_back.groupby([runs.part, commit]).transform("any")
    shared &= ~is_settled
    runs["own"] = is_hash & ~shared & ~put_back
    idea = commit.mask(shared, (commit + " " + words).where(is_baseline, alone))
    idea = idea.mask(put_back, alone)
    runs["idea"] = pd.factorize(runs.part.astype(str) + " " + idea)[0]
    return commit[shared].unique().tolist(), commit[put_back].unique().tolist()


def number_parts(runs, commit, words, again, is_baseline):
    """Return the number of the part that each run is in, from 0.

    A heading begins a part if the run after it was kept: a discard was measured against what
    stands above the heading.
    """
    parts = []
    part = 0
    section = 0
    base = None  # commit and words of the baseline
    starts = is_baseline & (runs.status == "keep")
    for name, text, is_again, is_start, status, heading in zip(
        commit, words, again, starts, runs.status, runs.section, strict=True
    ):
        if status != "crash":
            known = base is not None and name == base[0] and (is_again or text == base[1])
            begins = is_start and not known
            if heading != section:
                begins |= status == "keep"
                section = heading
            if base is None:
                base = (name, text)
            elif begins:
                part += 1
                base = (name, text)
        parts.append(part)
    return parts


def split(runs):
    """Return the parts of a ledger by title, each with a baseline of its own."""
    path = runs.attrs["path"]
    parts = [part for _, part in runs.groupby("part")]
    tried = [part for part in parts if part.idea.nunique() > 1] or parts[-1:]
    notes = list(runs.attrs["notes"])
    if len(parts) > 1:
        starts = brief([part.index[0] for part in parts])
        notes.append(f"{len(parts)} baselines, each measured alone: those of run {starts}")
    left_out = [part.index[0] for part in parts if not any(part is one for one in tried)]
    if left_out:
        notes.append(f"baseline without an idea after it, left out: run {brief(left_out)}")
    for part in tried:
        part.attrs = {"path": path, "notes": notes if part is tried[0] else []}
    titles = [path, *(f"{path} from run {part.index[0]}" for part in tried[1:])]
    return dict(zip(titles, tried, strict=True))


# --- Gains ----------------------------------------------------------------------------------------


def experiments(runs):
    """Return one row an idea, the baseline first, and the noise at the end of the night or NaN.

    Columns: number (0 is the baseline), run (its first), commit, own, status, value (the mean of
    its runs, NaN for a crash), num_runs, memory_gb, description; of a kept idea the gain on the
    one kept before it, under the seeds of both, and the bar that the rule sets for such a gain,
    by the noise of that time.
    """
    runs = runs.reset_index()
    ideas = runs.groupby("idea", sort=False)
    table = ideas[["run", "commit", "own", "memory_gb", "description", "part"]].first()
    table["value"] = ideas.value.mean()
    table["num_runs"] = ideas.value.count()
    valid = runs[runs.status != "crash"]
    table["status"] = valid.groupby("idea").status.last()
    table["status"] = table.status.fillna("crash")
    tried = table[table.status != "crash"]
    table.loc[tried.index[~tried.part.duplicated()], "status"] = "baseline"
    table = table.sort_values("status", key=lambda s: s != "baseline", kind="stable")
    table["number"] = range(len(table))

    by_idea = {}
    repeats = []  # with their numbers; ideas that ran once say nothing of the noise
    is_repeated = table.num_runs > 1
    for run, idea, seed, value in zip(valid.run, valid.idea, valid.seed, valid.value, strict=True):
        by_idea.setdefault(idea, []).append(ratchet.Run(idea, seed, value))
        if is_repeated[idea]:
            repeats.append((run, by_idea[idea][-1]))
    noise = ratchet.noise_of([run for _, run in repeats])

    verdicts = {}
    steps = kept_of(table).sort_values("run", kind="stable")
    next_runs = dict(zip(table.index, table.run.shift(-1), strict=True))
    for parent, idea in itertools.pairwise(steps.index):
        if table.status[idea] == "keep":
            by_then = [run for number, run in repeats if not number >= next_runs[idea]]
            noise_then = ratchet.noise_of(by_then)
            if math.isnan(noise_then):
                noise_then = noise
            verdicts[idea] = compare(by_idea[idea], by_idea[parent], noise_then)
    for name in ("gain", "bar"):
        values = {idea: getattr(verdict, name) for idea, verdict in verdicts.items()}
        table[name] = pd.Series(values, dtype=float)
    return table, noise


def compare(idea, parent, noise):
    """Return the rule's Verdict on the runs of an idea, those under the parent's seeds if any."""
    seeds = {run.seed for run in parent}
    return ratchet.judge([run for run in idea if run.seed in seeds] or idea, parent, noise)


def kept_of(table):
    """Return the baseline and the kept ideas of an experiments table, in order."""
    return table[table.status.isin(["baseline", "keep"])]


def best_of(values):
    """Return the index of the best value."""
    return values.idxmin() if ratchet.LOWER_IS_BETTER else values.idxmax()


def shown(value, step):
    """Return a value as text, with digits enough to show a step of this size."""
    if not math.isfinite(step) or step == 0:
        step = abs(value) or 1.0
    digits = max(1 - math.floor(math.log10(abs(step))), 0)
    if abs(value) < 1000:
        digits = max(digits, 3)
    return f"{value:.{digits}f}" if digits < 7 else f"{value:.3g}"


# --- Tables ---------------------------------------------------------------------------------------


def summary(title, runs):
    """Return counts, keep rate, baseline, noise, best, gain and what to beware of as text."""
    table, noise = experiments(runs)
    kept, discarded, crashed = (
        (table.status == status).sum() for status in ("keep", "discard", "crash")
    )
    tried = kept + discarded + crashed
    rate = f"{kept / tried:.1%}" if tried else "nothing tried yet"
    notes = list(runs.attrs["notes"])
    lines = [
        title,
        f"  runs         {len(runs)}",
        f"  experiments  {tried}: {kept} kept, {discarded} discarded, {crashed} crashed",
        f"  keep rate    {rate}",
    ]
    steps = kept_of(table)
    if steps.empty:
        lines.append("  baseline     none: every run crashed")
    else:
        base = steps.iloc[0]
        best = steps.loc[best_of(steps.value)]
        last = steps.iloc[-1]
        gain = ratchet.gain_of(base.value, best.value)
        digits = 6 if abs(base.value) >= 1e-3 else 12
        known = "unknown: run the baseline with other seeds"
        if noise >= 0:
            known = f"{noise:.{digits}f}"
        share = f"  {gain / abs(base.value):.2%}" if base.value else ""
        times = f", {gain / noise:.1f} times the noise" if noise > 0 else ""

        def told(name, idea):
            words = f"run {idea.run}: {idea.description[:80]}"
            return f"  {name:<12} {idea.value:.{digits}f}  {idea.commit}, {words}"

        lines += [
            f"  baseline     {base.value:.{digits}f}  {base.commit}, mean of {base.num_runs}",
            f"  noise        {known}",
            told("best", best),
        ]
        if last.name != best.name:
            lines.append(told("last kept", last))
        lines.append(f"  gain         {gain:.{digits}f}{share}{times}")
        if (runs.status[runs.idea == base.name] == "discard").any():
            notes.append(f"the baseline, run {base.run}, is marked discard")
        worse = table[table.gain < 0]
        if len(worse):
            notes.append(f"kept but worse than the parent: run {brief(list(worse.run))}")
    return "\n".join([*lines, *(f"  note         {note}" for note in notes)]) + "\n"


def kept_changes(runs):
    """Return the kept ideas, largest gain first, with a remark where the gain may be chance."""
    table, _ = experiments(runs)
    kept = table[table.status == "keep"].sort_values("gain", ascending=False, kind="stable")
    kept["remark"] = ""
    kept.loc[kept.gain <= kept.bar, "remark"] = "below the bar"
    kept.loc[kept.gain < 0, "remark"] = "worse"
    kept.loc[(kept.gain < 0) & (kept.gain >= -kept.bar), "remark"] = "a little worse"
    columns = ["gain", "bar", "remark", "value", "memory_gb", "run", "num_runs", "description"]
    return kept.set_index("commit")[columns].rename(columns={"value": ratchet.METRIC})


def tried_by_axis(runs):
    """Return tries, keeps and best gain by the axis with which a line begins ("optimizer: ...")."""
    table, _ = experiments(runs)
    table = table[table.status != "baseline"]
    axis = table.description.map(ratchet.axis_of)
    # A colon is only a colon in "exp12: deeper", and where few lines have one
    named = (axis != "no axis") & (axis.str.len() < 30) & ~axis.str.contains(r"\d$")
    if named.sum() < len(table) / 2:
        named &= False
    groups = table[named].groupby(axis[named])
    columns = {
        "tries": groups.size(),
        "keeps": groups.status.agg(lambda status: (status == "keep").sum()),
        "best_gain": groups.gain.max(),
    }
    found = pd.DataFrame(columns).sort_values(["keeps", "tries"], ascending=False)
    return found.rename_axis("axis")


# --- The picture ----------------------------------------------------------------------------------

LABEL_CHARS = 30
MAX_LABELS = 30
LEGEND = ["kept", "best so far", "discarded", "crashed", "off the scale"]  # in this order
BLUE, GREY, RED = "#0072B2", "#A8A8A8", "#D55E00"  # distinct whatever one's colour vision


def label_of(idea, labels):
    """Return at most LABEL_CHARS of what an idea is, in whole words, or the person's own words."""
    if idea.status == "baseline":
        return "baseline"
    without_axis = re.sub(r"^[\w /-]{1,25}: ", "", idea.description)
    text = labels.get(idea.commit) or without_axis or idea.commit
    if len(text) <= LABEL_CHARS:
        return text
    clause = re.split(r"[,;:]\s|\s[(\u2013\u2014-]", text)[0].strip()
    if LABEL_CHARS / 2 <= len(clause) <= LABEL_CHARS:
        return clause
    words = text[:LABEL_CHARS].rsplit(" ", 1)[0]
    words = re.sub(r"(\s+(a|an|the|of|for|to|in|by|on|over|with|and|from|at|as))+$", "", words)
    return words[: LABEL_CHARS - 1] + "…"


def sentence(title, table):
    """Return the picture's title: what was tried, what was kept, and from where to where."""
    steps = kept_of(table)
    num_kept = (table.status == "keep").sum()
    text = f"{title}: {len(table) - len(steps) + num_kept} ideas, {num_kept} kept"
    if steps.empty:
        return text
    base = steps.value.iloc[0]
    best = steps.value[best_of(steps.value)]
    unit = "bits per byte" if ratchet.METRIC == "val_bpb" else ratchet.METRIC
    return f"{text}, {shown(base, base - best)} to {shown(best, base - best)} {unit}"


def view(values, steps, noise):
    """Return the lower and upper end of the vertical axis.

    steps: values of baseline and kept ideas, in order. They set the scale, so that one diverged
    run does not press them flat. Where most of them lie in the last tenth of the way, that tenth is
    shown alone, and the line comes in from outside.
    """
    sign = 1 if ratchet.LOWER_IS_BETTER else -1
    values = sign * values.dropna()
    steps = sign * steps
    noise = 0.0 if math.isnan(noise) else noise
    best = steps.min()
    first = steps.iloc[0]
    late = steps[steps - best <= (first - best) / 10]
    if len(late) > max(3, len(steps) / 2) and (first - best) / 10 > 3 * noise:
        first = late.max()
    # Without any progress, the nearer half of what was tried sets the scale
    nearer_half = min((values - best).abs().median(), abs(first) / 100)
    span = max(first - best, 1.1 * nearer_half) or abs(first) / 100 or 1.0
    low = best - max(0.25 * span, 3 * noise)
    most = min(values.quantile(0.75), first + span)  # of what was tried
    high = max(first + max(0.35 * span, 3 * noise), most)
    # The axis does not go on where no value can be
    if sign > 0 and values.min() >= 0:
        low = max(low, 0.0)
    if sign < 0 and values.between(-1, 0).all():
        low = max(low, -1.0)
    return (low, high) if sign > 0 else (-high, -low)


def draw(ax, table, noise):
    """Draw the experiments: kept, discarded and crashed, the running best, and the noise once."""
    steps = kept_of(table)
    last = table.number.iloc[-1]
    width = max(last, 1)
    small = 3 if len(table) < 300 else 2  # typographic points
    better = "lower" if ratchet.LOWER_IS_BETTER else "higher"
    ax.set(xlabel="experiment", ylabel=f"{ratchet.METRIC} ({better} is better)")
    ax.set_xlim(-0.02 * width, 1.03 * width)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.spines[["top", "right"]].set_visible(False)
    low = 0.0
    high = 1.0

    def mark(ideas, values, label, marker, color, **style):
        style = {"ms": small, "clip_on": False, "mew": 0.8} | style
        if len(ideas):
            ax.plot(ideas.number, values, marker, color=color, label=label, **style)

    if steps.empty:
        ax.set_yticks([])
    else:
        low, high = view(table.value, steps.value, noise)
        is_kept = table.status.isin(["baseline", "keep"])
        inside = table.value.between(low, high)
        discarded = table[inside & ~is_kept]
        mark(discarded, discarded.value, "discarded", "o", GREY)
        for edge, marker, is_beyond in [
            (high, "^", table.value > high),
            (low, "v", table.value < low),
        ]:
            for which, color in [(~is_kept, GREY), (is_kept, BLUE)]:
                beyond = table[is_beyond & which]
                mark(beyond, [edge] * len(beyond), "off the scale", marker, color, alpha=0.5)
        best = steps.value.cummin() if ratchet.LOWER_IS_BETTER else steps.value.cummax()
        x = [*steps.number, last]
        y = [*best, best.iloc[-1]]
        ax.plot(x, y, color=BLUE, lw=1.3, drawstyle="steps-post", label="best so far")
        dots = steps[steps.value.between(low, high)]
        mark(dots, dots.value, "kept", "o", BLUE, ms=small + 1.5)
        if noise > 0:
            style = {"color": "black", "lw": 1, "capsize": 3, "zorder": 3}
            at = [1.015 * width]
            ax.errorbar(at, y[-1:], noise, fmt="none", label=f"noise ± {noise:.2g}", **style)
    crashed = table[table.status == "crash"]
    mark(crashed, [low + (high - low) / 50] * len(crashed), "crashed", "x", RED)
    ax.set_ylim(low, high)


def picture(title, runs, labels=None):
    """Return a figure of the night, its kept ideas named; labels: {commit: the person's words}."""
    table, noise = experiments(runs)
    fig, ax = plt.subplots(figsize=(8, 4), dpi=200, layout="constrained")
    draw(ax, table, noise)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_size(8)
    ax.yaxis.label.set_size(8)
    text = sentence(title, table)
    ax.set_title(text, loc="left", fontsize=10 if len(text) < 85 else 8, pad=18, parse_math=False)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 8}
    handles, names = ax.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True))
    order = [label for label in LEGEND if label in entries]
    order += [label for label in entries if label not in LEGEND]
    style = {"frameon": False, "fontsize": 8, "handlelength": 1.2, "columnspacing": 1.2}
    ax.legend([entries[label] for label in order], order, **place, **style)
    add_labels(ax, table, labels or {})
    return fig


@dataclass
class Taken:
    """What a label may not cover, in pixels: dots, the line, other labels, what is outside."""

    frame: Bbox
    dots: list
    dot_size: float
    line: list  # the running best, corner by corner
    boxes: list = field(default_factory=list)
    leaders: list = field(default_factory=list)

    def on_line(self, box):
        """Tell whether the running best goes through the box."""
        x = self.line[:, 0]
        start, stop = x.searchsorted([box.x0, box.x1])
        near = self.line[max(start - 1, 0) : stop + 1]
        return len(near) > 1 and Curve(near).intersects_bbox(box, False)

    def allows(self, box, leader, num_covered):
        """Tell whether a label may stand in the box, with a leader to its dot."""
        return (
            self.frame.contains(*box.min)
            and self.frame.contains(*box.max)
            and not box.count_overlaps(self.boxes)
            and box.padded(self.dot_size).count_contains(self.dots) <= num_covered
            and not self.on_line(box)
            and not any(other.intersects_bbox(box, False) for other in self.leaders)
            and not any(other.intersects_path(leader, False) for other in self.leaders)
            and not any(leader.intersects_bbox(other, False) for other in self.boxes)
        )


def add_labels(ax, table, labels):
    """Name the kept ideas, largest gain first, then the baseline, where there is room.

    Call it last. A label is not drawn where its dot is out of the picture.
    """
    low, high = ax.get_ylim()
    kept = kept_of(table)
    kept = kept[kept.value.between(low, high)]
    kept = kept.sort_values("gain", ascending=False, kind="stable").head(MAX_LABELS)
    ax.figure.draw_without_rendering()  # settles the layout; from here on pixels hold
    scale = ax.figure.dpi / 72
    best = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    if not best:
        return
    dots = [dot for line in ax.lines if line not in best for dot in line.get_xydata()]
    dots = ax.transData.transform(dots[:: len(dots) // 2000 + 1] or [(0, 0)])
    line = best[0].get_path().transformed(ax.transData).vertices
    taken = Taken(ax.bbox.padded(-2 * scale), dots, 2 * scale, line)
    heights = [0, *range(8, 100, 4), *range(-8, -100, -4)]
    offsets = itertools.product([-48, -24, -7, 0, 7, 24, 48], heights)
    offsets = sorted(offsets, key=lambda offset: math.hypot(*offset))
    for idea in kept.itertuples():
        place_label(ax, idea, label_of(idea, labels), offsets, taken)


def place_label(ax, idea, text, offsets, taken):
    """Write a label at the first offset from its dot, in typographic points, that is free."""
    scale = ax.figure.dpi / 72
    style = {"fontsize": 8, "parse_math": False}  # a dollar is only a dollar
    trial = ax.text(idea.number, idea.value, text, **style)
    width, height = trial.get_window_extent().size
    trial.remove()
    dot = ax.transData.transform((idea.number, idea.value))
    for num_covered, (dx, dy) in itertools.product((0, 2), offsets):
        x, y = dot[0] + dx * scale, dot[1] + dy * scale
        # The leader ends at the text's nearest corner, or at the middle of an edge
        across = {-1: 1.0, 0: 0.5, 1: 0.0}[(dx > 0) - (dx < 0)]  # of the text's width
        up = {-1: 1.0, 0: 0.5, 1: 0.0}[(dy > 0) - (dy < 0)]
        box = Bbox.from_bounds(x - across * width, y - up * height, width, height)
        leader = Curve([dot, (x, y)])
        if not taken.allows(box.padded(2 * scale), leader, num_covered):
            continue
        taken.boxes.append(box.padded(2 * scale))
        taken.leaders.append(leader)
        arrow = {"arrowstyle": "-", "color": "#888888", "lw": 0.6, "relpos": (across, up)}
        ax.annotate(
            text,
            (idea.number, idea.value),
            xytext=(dx, dy),
            textcoords="offset points",
            ha={0.0: "left", 0.5: "center", 1.0: "right"}[across],
            va={0.0: "bottom", 0.5: "center", 1.0: "top"}[up],
            arrowprops=arrow if math.hypot(dx, dy) > 9 else None,
            **style,
        )
        return
