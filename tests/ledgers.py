"""Made-up ledgers of the kinds that people have, each with its right reading, written by hand.

A bar stands for a tab, so that the columns can be seen. A part of a ledger is read as
(kept, discarded, crashed, baseline, best), the values to six significant digits; its baseline
counts as none of the three. A ledger that cannot be read is `refused`, in a line that says so.
"""

from typing import NamedTuple


class Ledger(NamedTuple):
    """A ledger, how to read it, and what it says."""

    name: str
    text: str  # a bar in place of each tab
    parts: tuple = ()  # (kept, discarded, crashed, baseline, best) of each part
    notes: tuple = ()  # each of these words is in one of the notes, and every note has some
    refused: tuple = ()  # each of these words is in the message
    metric: str = "val_bpb"
    lower_is_better: bool = True


HEADER = "commit|val_bpb|memory_gb|status|description\n"
BASE = "aaaaaa1|1.000000|44.0|keep|baseline\n"
NIGHT = (
    HEADER
    + BASE
    + """\
bbbbbb1|0.990000|44.0|keep|wider
bbbbbb2|1.010000|44.0|discard|deeper
bbbbbb3|0.000000|0.0|crash|ten times wider
"""
)
READ = ((1, 1, 1, 1.0, 0.99),)  # what NIGHT says

LEDGERS = [
    # As the recipe writes it, and what editors and copies do to it
    Ledger("plain", NIGHT, READ),
    Ledger("Windows line ends", NIGHT.replace("\n", "\r\n"), READ),
    Ledger("byte order mark", "\ufeff" + NIGHT, READ),
    Ledger("no last newline", NIGHT.rstrip("\n"), READ),
    Ledger("blank lines", NIGHT.replace("\nbbb", "\n\n \nbbb"), READ),
    Ledger("a tab at every end", NIGHT.replace("\n", "|\n"), READ),
    Ledger(
        "three seeds of the baseline",
        HEADER
        + """\
aaaaaa1|1.000000|44.0|keep|baseline, seed 42
aaaaaa1|1.002000|44.0|keep|baseline, seed 43
aaaaaa1|1.004000|44.0|keep|baseline, seed 44
bbbbbb1|0.990000|44.0|keep|wider
""",
        ((1, 0, 0, 1.002, 0.99),),
    ),
    Ledger(
        "a parent again and a repeat",
        HEADER
        + BASE
        + """\
bbbbbb1|0.990000|44.0|keep|wider
aaaaaa1|1.004000|44.0|keep|parent again, seed 43
bbbbbb1|0.994000|44.0|keep|wider, seed 43
""",
        ((1, 0, 0, 1.002, 0.992),),
    ),
    Ledger(
        "the word baseline in place of a hash",
        HEADER
        + """\
baseline|0.997900|44.0|keep|baseline
bea057b|0.986041|43.9|keep|halve batch
187e419|0.990603|60.2|discard|add 5% warmup
""",
        ((1, 1, 0, 0.9979, 0.986041),),
    ),
    Ledger(
        "a description with quotes and tabs",
        HEADER + BASE + 'bbbbbb1|0.990000|44.0|keep|"wider|and "deeper\n',
        ((1, 0, 0, 1.0, 0.99),),
    ),
    Ledger(
        "every cell in quotes, by a spreadsheet",
        HEADER.replace("|", '"|"').replace("commit", '"commit').replace("tion\n", 'tion"\n')
        + '"aaaaaa1"|"1.000000"|"44.0"|"keep"|"baseline"\n'
        + '"bbbbbb1"|"0.990000"|"44.0"|"keep"|"wider"\n',
        ((1, 0, 0, 1.0, 0.99),),
    ),
    Ledger(
        "decimal commas, by a spreadsheet",
        HEADER + "aaaaaa1|1,000000|44,0|keep|baseline\nbbbbbb1|0,990000|44,0|keep|wider\n",
        ((1, 0, 0, 1.0, 0.99),),
    ),
    Ledger("line ends of old Macs", NIGHT.replace("\n", "\r"), READ),
    Ledger("spaces round the cells", NIGHT.replace("|", " | "), READ),
    Ledger("the header twice", HEADER + NIGHT, READ, notes=("another header",)),
    Ledger("a title", "# Results\n\n" + NIGHT, READ, notes=("above the header",)),
    Ledger(
        "between marks of code",
        "```\n" + NIGHT + "```\n",
        READ,
        notes=("above the header", "not a run"),
    ),
    Ledger(
        "a description over two lines",
        NIGHT.replace("|wider\n", "|wider,\nby a half and with a new init\n"),
        READ,
        notes=("not a run",),
    ),
    Ledger(
        "numbers of experiments with a #",
        "exp|commit|val_bpb|status|action\n#0|aaaaaa1|1.0|keep|none\n#1|bbbbbb1|0.99|keep|none\n",
        ((1, 0, 0, 1.0, 0.99),),
        notes=("columns not read: exp, action", "memory_gb"),
    ),
    Ledger(
        "values with their errors",
        NIGHT.replace("0.990000", "0.99 ± 0.001").replace("1.000000", "1.0 +/- 0.001"),
        READ,
    ),
    Ledger(
        "no description where it was empty",
        HEADER + BASE + "bbbbbb1|0.990000|44.0|keep\nbbbbbb2|1.010000|44.0|discard\n",
        ((1, 1, 0, 1.0, 0.99),),
    ),
    # Verdicts in other words
    Ledger("capitals", NIGHT.replace("keep", "KEEP").replace("discard", "Discard"), READ),
    Ledger("past tense", NIGHT.replace("keep", "kept").replace("discard", "discarded"), READ),
    Ledger(
        "reverted and failed", NIGHT.replace("discard", "reverted").replace("crash", "FAIL"), READ
    ),
    Ledger(
        "failed, with a value: it ran to its end",
        HEADER + BASE + "bbbbbb1|1.020000|44.0|FAIL|deeper\nbbbbbb2|0.990000|44.0|best|wider\n",
        ((1, 1, 0, 1.0, 0.99),),
    ),
    Ledger(
        "new best, no improvement, out of memory",
        HEADER
        + BASE
        + """\
bbbbbb1|0.990000|44.0|new best|wider
bbbbbb2|0.992000|44.0|no improvement|deeper
bbbbbb3|0|0|OOM|ten times wider
bbbbbb4|nan|0|timeout|a hundred layers
""",
        ((1, 1, 2, 1.0, 0.99),),
    ),
    Ledger(
        "signs beside the words",
        NIGHT.replace("|keep", "|✅ keep")
        .replace("|discard", "|❌ DISCARD")
        .replace("|crash", "|💥 crash"),
        READ,
    ),
    Ledger(
        "bold words", NIGHT.replace("keep", "**keep**").replace("0.990000", "**0.990000**"), READ
    ),
    Ledger(
        "a word and a remark",
        NIGHT.replace("keep|wider", "keep (new best)|wider").replace("|crash", "|crash: OOM"),
        READ,
    ),
    Ledger(
        "baseline as a status",
        HEADER + BASE.replace("keep|baseline", "baseline|as it is") + NIGHT[len(HEADER + BASE) :],
        READ,
    ),
    Ledger(
        "yes and no",
        "commit|val_bpb|kept|description\naaaaaa1|1.0|yes|baseline\nbbbbbb1|0.99|yes|wider\n"
        "bbbbbb2|1.01|no|deeper\n",
        ((1, 1, 0, 1.0, 0.99),),
        notes=("memory_gb",),
    ),
    Ledger(
        "accepted or not, by a number",
        "sha|val_bpb|accepted|note\naaaaaa1|1.0|1|baseline\nbbbbbb1|0.99|1|a\nbbbbbb2|1.01|0|b\n",
        ((1, 1, 0, 1.0, 0.99),),
        notes=("memory_gb",),
    ),
    Ledger(
        "words joined",
        HEADER
        + BASE
        + """\
bbbbbb1|0.990000|44.0|ADOPTED-WIN|wider
bbbbbb2|1.010000|44.0|screen_discard|deeper
bbbbbb3|FAILED|-|discard (crash)|ten times wider
bbbbbb4|0.000000|0.0|infra-fail|no container
bbbbbb5|0.990000|44.0|duplicate|wider
""",
        READ,
        notes=("infra-fail", "duplicate", "counted as a crash"),
    ),
    # Rows that are no finished run
    Ledger(
        "infra and rate limits",
        NIGHT
        + """\
bbbbbb4|0.000000|0.0|infra|the node went away
bbbbbb5|0.000000|0.0|rate_limited|no answer
bbbbbb6|0.000000|0.0|infra|the node went away
""",
        READ,
        notes=("infra, left out: line 6, 8", "rate limited, left out: line 7"),
    ),
    Ledger(
        "info, parked, missing",
        NIGHT + "-|-|-|info|switched to another agent\nbbbbbb4|-|-|parked|MoE\n-|-|-|missing|\n",
        READ,
        notes=("info", "parked", "missing"),
    ),
    Ledger(
        "a run that still goes", NIGHT + "bbbbbb4|||running|tie embeddings\n", READ, ("running",)
    ),
    Ledger(
        "a discard without a value",
        NIGHT + "bbbbbb4|-|44.0|discard|diverged\n",
        ((1, 1, 2, 1.0, 0.99),),
        notes=("counted as a crash: run 5",),
    ),
    Ledger(
        "a keep without a value",
        NIGHT + "bbbbbb4|nan|44.0|keep|tie embeddings\n",
        READ,
        notes=("a keep without a val_bpb, left out: line 6",),
    ),
    Ledger("a keep of zero", NIGHT + "bbbbbb4|0.000000|0.0|keep|tie\n", READ, ("line 6",)),
    Ledger("an unknown word", NIGHT + "bbbbbb4|0.95|44.0|maybe|tie\n", READ, ("'maybe'",)),
    Ledger("a value in words", NIGHT + "bbbbbb4|about 1|44.0|keep|tie\n", READ, ("'about 1'",)),
    Ledger("one value with a wrong sign", NIGHT + "bbbbbb4|-0.98|44|keep|tie\n", READ, ("line 6",)),
    Ledger(
        "a stray line of a shell",
        NIGHT.replace("bbbbbb2", "$ git log --oneline\nbbbbbb2"),
        READ,
        notes=("line 4",),
    ),
    Ledger(
        "a conflict that git left",
        NIGHT.replace("bbbbbb2", "<<<<<<< HEAD\nbbbbbb2")
        + "=======\nbbbbbb2|1.010000|44.0|discard|deeper\n>>>>>>> theirs\n",
        READ,
        notes=("not a run", "twice"),
    ),
    Ledger("a row out of comments", NIGHT + "# bbbbbb4|0.9|44.0|keep|tie\n", READ, ("comment",)),
    Ledger(
        "one row with spaces in place of tabs",
        NIGHT + "bbbbbb4 0.980000 44.0 keep tie the embeddings\n",
        ((2, 1, 1, 1.0, 0.98),),
        notes=("spaces",),
    ),
    Ledger(
        "one row with a written \\t",
        NIGHT + "bbbbbb4\\t0.980000\\t44.0\\tkeep\\ttie the embeddings\n",
        ((2, 1, 1, 1.0, 0.98),),
        notes=("\\t",),
    ),
    Ledger(
        "sums at the foot",
        NIGHT + "\nTotal: 4 runs, best 0.99\nTOTAL|0.99||best|3 experiments\n",
        READ,
        notes=("not a run", "a summary"),
    ),
    Ledger("a chatty end", NIGHT + "Done! The best is 0.990000.\n", READ, notes=("not a run",)),
    Ledger("a crash with its last loss", NIGHT.replace("0.000000|0.0|cr", "3.21|44.0|cr"), READ),
    # Several nights, budgets and machines in one file
    Ledger(
        "a section with another budget",
        NIGHT
        + """\
=== ten minutes from here ===
bbbbbb1|0.960000|44.0|keep|wider, ten minutes
bbbbbb5|0.950000|44.0|keep|deeper
""",
        ((1, 1, 1, 1.0, 0.99), (1, 0, 0, 0.96, 0.95)),
        notes=("line 6", "baselines"),
    ),
    Ledger(
        "a section in a row of its own",
        NIGHT
        + """\
-|-|-|-|## Phase 2: H200
cccccc1|0.900000|60.0|keep|as it was
cccccc2|0.910000|60.0|discard|deeper
""",
        ((1, 1, 1, 1.0, 0.99), (0, 1, 0, 0.9, 0.9)),
        notes=("line 6", "baselines"),
    ),
    Ledger(
        "a section that is only another day",
        NIGHT
        + """\
# Day 2
bbbbbb4|0.995000|44.0|discard|tie embeddings
bbbbbb5|0.980000|44.0|keep|longer warmdown
""",
        ((2, 2, 1, 1.0, 0.98),),
        notes=("line 6",),
    ),
    Ledger(
        "resumed",
        NIGHT + "# resumed after the power cut\nbbbbbb5|0.980000|44.0|keep|longer warmdown\n",
        ((2, 1, 1, 1.0, 0.98),),
        notes=("line 6",),
    ),
    Ledger("twice by cat", NIGHT + NIGHT, READ, notes=("header", "twice")),
    Ledger(
        "cat of a night and its edited, longer copy",
        NIGHT
        + NIGHT.replace("wider", "wider, by half").replace("deeper", "one layer more")
        + "bbbbbb4|0.980000|44.0|keep|tie embeddings\n",
        ((2, 1, 1, 1.0, 0.98),),
        notes=("header", "twice"),
    ),
    Ledger(
        "cat of two nights",
        NIGHT
        + HEADER
        + """\
cccccc1|1.200000|44.0|keep|baseline
cccccc2|1.100000|44.0|keep|wider
""",
        ((1, 1, 1, 1.0, 0.99), (1, 0, 0, 1.2, 1.1)),
        notes=("header", "baselines"),
    ),
    Ledger(
        "another machine's baseline by its name",
        NIGHT
        + """\
cccccc1|1.500000|8.0|keep|Mac Mini baseline with smaller batch
cccccc2|1.400000|8.0|keep|wider
cccccc3|1.390000|8.0|keep|deeper, better than the baseline
""",
        ((1, 1, 1, 1.0, 0.99), (2, 0, 0, 1.5, 1.39)),
        notes=("baselines",),
    ),
    Ledger(
        "a new baseline on a new machine",
        NIGHT + "cccccc1|1.2|80|keep|new baseline on H200\ncccccc2|1.1|80|keep|wider\n",
        ((1, 1, 1, 1.0, 0.99), (1, 0, 0, 1.2, 1.1)),
        notes=("baselines",),
    ),
    Ledger(
        "the baseline measured again",
        NIGHT + "aaaaaa1|1.004000|44.0|keep|baseline re-measured\n",
        ((1, 1, 1, 1.002, 0.99),),
    ),
    Ledger(
        "a rerun by that name",
        HEADER + BASE + "bbbbbb1|0.990|44|keep|wider\nbbbbbb1|0.992|44|keep|wider (rerun)\n",
        ((1, 0, 0, 1.0, 0.991),),
    ),
    Ledger(
        "a rerun by other words: it cannot be told from a second idea, and is noted",
        HEADER + BASE + "bbbbbb1|0.990|44|keep|wider\nbbbbbb1|0.992|44|keep|the same once more\n",
        ((2, 0, 0, 1.0, 0.99),),
        notes=("one commit, several ideas", "worse"),
    ),
    Ledger(
        "better than the baseline",
        HEADER
        + BASE
        + """\
bbbbbb1|0.990000|44.0|keep|wider: better than the baseline
bbbbbb2|0.980000|44.0|keep|beats baseline by 0.02
bbbbbb3|0.985000|44.0|keep|back to the baseline batch
""",
        ((3, 0, 0, 1.0, 0.98),),
        notes=("worse",),
    ),
    Ledger(
        "memory a thousand times larger",
        NIGHT + "bbbbbb4|0.980000|45056.0|keep|tie\nbbbbbb5|0.985|45056.0|discard|untie\n",
        ((2, 2, 1, 1.0, 0.98),),
        notes=("memory",),
    ),
    Ledger(
        "hashes that stop being hashes",
        NIGHT + "exp5|0.980000|44.0|keep|tie\nexp6|0.985000|44.0|discard|untie\n",
        ((2, 2, 1, 1.0, 0.98),),
        notes=("hash",),
    ),
    Ledger(
        "a verdict given twice, the second time against it",
        NIGHT + "bbbbbb1|0.990000|44.0|discard|wider: too ugly\n",
        ((0, 2, 1, 1.0, 1.0),),
        notes=("verdict",),
    ),
    # What is best, what is whose
    Ledger(
        "the last kept is not the best",
        HEADER
        + BASE
        + "bbbbbb1|0.990000|44.0|keep|wider\nbbbbbb2|0.991000|44.0|keep|simpler, a little worse\n",
        ((2, 0, 0, 1.0, 0.99),),
        notes=("worse",),
    ),
    Ledger(
        "a discard under the hash that HEAD was put back to",
        HEADER
        + BASE
        + """\
bbbbbb1|0.990000|44.0|keep|wider
bbbbbb1|1.010000|44.0|discard|deeper
bbbbbb1|1.020000|44.0|discard|warmup
bbbbbb2|0.980000|44.0|keep|tie
""",
        ((2, 2, 0, 1.0, 0.98),),
        notes=("discards under the hash of a kept commit, each for itself: bbbbbb1",),
    ),
    Ledger(
        "never committed",
        HEADER
        + BASE
        + """\
aaaaaa1|0.990000|44.0|keep|wider
aaaaaa1|1.010000|44.0|discard|deeper
aaaaaa1|0.980000|44.0|keep|tie
""",
        ((2, 1, 0, 1.0, 0.98),),
        notes=("aaaaaa1",),
    ),
    Ledger(
        "crashes only",
        HEADER + "aaaaaa1|0.000000|0.0|crash|baseline\nbbbbbb1|0.0|0.0|crash|wider\n",
        ((0, 0, 2, None, None),),
    ),
    # Other columns
    Ledger(
        "columns in another order, and more of them",
        "timestamp|status|val_bpb|description|commit|num_steps|memory_gb\n"
        "22:01|keep|1.0|baseline|aaaaaa1|953|44.0\n22:07|keep|0.99|wider|bbbbbb1|901|44.0\n",
        ((1, 0, 0, 1.0, 0.99),),
        notes=("timestamp, num_steps",),
    ),
    Ledger(
        "names in title case",
        NIGHT.replace(HEADER, "Commit|Val BPB|Memory GB|Status|Description\n"),
        READ,
    ),
    Ledger(
        "names of other words",
        NIGHT.replace(HEADER, "hash|val_bpb|peak_vram_gb|verdict|idea\n"),
        READ,
    ),
    Ledger(
        "a hypothesis besides the description",
        "commit|hypothesis|val_bpb|memory_gb|status|description\n"
        "aaaaaa1|a baseline for all|1.0|44.0|keep|baseline\n"
        "bbbbbb1|better than baseline|0.99|44.0|keep|wider\n",
        ((1, 0, 0, 1.0, 0.99),),
        notes=("columns not read: hypothesis",),
    ),
    Ledger(
        "memory in megabytes",
        NIGHT.replace("memory_gb", "peak_vram_mb").replace("44.0", "45056.0"),
        READ,
    ),
    Ledger("memory with its unit", NIGHT.replace("44.0", "44.0 GB"), READ),
    Ledger(
        "a column of seeds",
        "commit|seed|val_bpb|memory_gb|status|description\n"
        "aaaaaa1|1|1.000000|44.0|keep|baseline\naaaaaa1|2|1.004000|44.0|keep|baseline\n"
        "bbbbbb1|1|0.990000|44.0|keep|wider\nbbbbbb1|2|0.990000|44.0|keep|wider\n",
        ((1, 0, 0, 1.002, 0.99),),
    ),
    Ledger(
        "no column for the commit",
        "val_bpb|status|description\n1.0|keep|baseline\n0.99|keep|wider\n1.01|discard|deeper\n",
        ((1, 1, 0, 1.0, 0.99),),
        notes=("commit, memory_gb",),
    ),
    Ledger("no header", NIGHT.removeprefix(HEADER), READ, notes=("no header",)),
    # Another number, once it is named
    Ledger("loss", NIGHT.replace("val_bpb", "val_loss"), READ, metric="val_loss"),
    Ledger(
        "accuracy",
        "commit|accuracy|memory_gb|status|description\naaaaaa1|0.91|4.0|keep|baseline\n"
        "bbbbbb1|0.93|4.0|keep|wider\nbbbbbb2|0.90|4.0|discard|deeper\n"
        "bbbbbb3|0.92|4.0|keep|simple\n",
        ((2, 1, 0, 0.91, 0.93),),
        notes=("worse",),
        metric="accuracy",
        lower_is_better=False,
    ),
    Ledger(
        "accuracy in percent",
        "commit|acc|status|description\naaaaaa1|91%|keep|baseline\nbbbbbb1|93.0%|keep|wider\n",
        ((1, 0, 0, 0.91, 0.93),),
        notes=("memory_gb",),
        metric="acc",
        lower_is_better=False,
    ),
    Ledger(
        "a Sharpe ratio, with a discard of zero and one below",
        "commit|sharpe|status|description\naaaaaa1|0.40|keep|baseline\nbbbbbb1|0.00|discard|a\n"
        "bbbbbb2|-0.70|discard|b\nbbbbbb3|1.20|keep|c\nbbbbbb4|nan|crash|d\n",
        ((1, 2, 1, 0.4, 1.2),),
        notes=("memory_gb",),
        metric="sharpe",
        lower_is_better=False,
    ),
    Ledger(
        "tokens a second",
        "commit|tokens/s|memory_gb|status|description\naaaaaa1|11683|4|keep|baseline\n"
        "bbbbbb1|13801|4|keep|fuse\nbbbbbb2|12000|4|discard|unroll\n",
        ((1, 1, 0, 11683, 13801),),
        metric="tokens/s",
        lower_is_better=False,
    ),
    Ledger(
        "a tiny error",
        "commit|mse|status|description\naaaaaa1|4e-7|keep|baseline\nbbbbbb1|2e-7|keep|wider\n",
        ((1, 0, 0, 4e-7, 2e-7),),
        notes=("memory_gb",),
        metric="mse",
    ),
    Ledger(
        "an energy below zero",
        "commit|energy|status|description\naaaaaa1|-3.2|keep|baseline\nbbbbbb1|-3.5|keep|wider\n"
        "bbbbbb2|-3.1|discard|deeper\n",
        ((1, 1, 0, -3.2, -3.5),),
        notes=("memory_gb",),
        metric="energy",
    ),
    # What cannot be read
    Ledger(
        "another number, not named",
        NIGHT.replace("val_bpb", "val_loss"),
        refused=("no column val_bpb", "commit, val_loss, memory_gb, status, description", "METRIC"),
    ),
    Ledger("commas", NIGHT.replace("|", ","), refused=("line 1", "tab")),
    Ledger("nothing", "", refused=("empty",)),
    Ledger("a header alone", HEADER, refused=("no runs",)),
    Ledger(
        "no verdicts",
        "commit|val_bpb|description\naaaaaa1|1.0|baseline\nbbbbbb1|0.99|wider\n",
        refused=("no column status",),
    ),
    Ledger(
        "verdicts that nobody can guess",
        NIGHT.replace("keep", "A").replace("discard", "B"),
        refused=("3 of 4", "'a'"),
    ),
    Ledger(
        "pass, which may mean that it ran",
        NIGHT.replace("keep", "pass").replace("discard", "fail"),
        refused=("2 of 4", "'pass'"),
    ),
    Ledger(
        "thousands of a unit that is not said",
        "commit|val_bpb|status|description\naaaaaa1|1,234|keep|baseline\n"
        "bbbbbb1|1,134|keep|wider\n",
        refused=("2 of 2", "'1,234'"),
    ),
]
