"""analysis.ipynb, tools/report.py and tools/audit.py on good, odd, empty and broken ledgers."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import nbformat
import pytest
from conftest import PATIENCE_SECONDS
from ledgers import LEDGERS
from matplotlib.text import Text
from nbclient import NotebookClient
from traitlets.config import Config

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import audit  # noqa: E402
import report  # noqa: E402

import ratchet  # noqa: E402

NOTEBOOK = ROOT / "analysis.ipynb"
NIGHT = ROOT / "docs" / "nights" / "2026-11-25"  # real, on two machines
NIGHT_2 = ROOT / "docs" / "nights" / "2026-11-27"  # real, on one
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Work in an empty folder, with no git or IPython settings of the user's."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    for role, field in itertools.product(("AUTHOR", "COMMITTER"), ("NAME", "EMAIL")):
        monkeypatch.setenv(f"GIT_{role}_{field}", "agent@localhost")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def row(commit, val_bpb, status="keep", description="an idea", memory_gb=44.0):
    """Return a line of results.tsv; a number stands for the commit that it is the hash of."""
    commit = f"{commit:07x}" if isinstance(commit, int) else commit
    return f"{commit}\t{val_bpb:.6f}\t{memory_gb:.1f}\t{status}\t{description}"


def write(*rows, path="results.tsv"):
    """Write a results file and return its path."""
    Path(path).write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return path


BASELINE = [
    row(1, 1.0004, description="baseline, seed 42"),
    row(1, 0.9990, description="baseline, seed 43"),
    row(1, 1.0000, description="baseline, seed 44"),
]


def noise_of(*ideas):
    """Return the rule's noise of runs in order: ideas is a list of values for each."""
    return ratchet.noise_of([ratchet.Run(str(i), 42, x) for i, xs in enumerate(ideas) for x in xs])


def night(seed=0, num_runs=100):
    """Return the rows of a plausible night: about 15 kept, 77 discarded and 8 crashed."""
    draw, best, rows = random.Random(seed), 1.0, list(BASELINE)
    ideas = ["warmdown ratio 0.7", "SwiGLU in place of relu squared, four times wide", "depth 9"]
    for i in range(num_runs):
        kind = draw.choices(["keep", "discard", "crash"], [15, 77, 8])[0]
        if kind == "keep":
            best -= 0.0003 + draw.expovariate(1 / 0.0015)
        excess = abs(draw.gauss(0, 0.004)) if kind == "discard" else 0
        figures = (
            (0, kind, ideas[i % 3], 0) if kind == "crash" else (best + excess, kind, ideas[i % 3])
        )
        rows.append(row(16 + i, *figures))
    return rows


def picture(path):
    """Draw one results file as the notebook does and return its axes."""
    fig = report.picture(path, report.load(path))
    fig.canvas.draw()
    return fig.axes[0]


def plotted(ax, label):
    """Return the plotted points of such a legend entry, as a dict from experiment to height."""
    lines = [line for line in ax.lines if line.get_label() == label]
    return {x: y for line in lines for x, y in zip(*line.get_data(), strict=True)}


def legend(ax):
    """Return the legend's entries."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def named(ax):
    """Return the labels of kept ideas."""
    return [text.get_text() for text in ax.texts if text.get_text() != "baseline"]


def read(*rows, header=HEADER):
    """Return the parts of a file and the text that the notebook prints about them."""
    Path("results.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    parts = report.split(report.load("results.tsv"))
    return parts, "".join(report.summary(title, runs) for title, runs in parts.items())


# The notebook as committed, and in a real kernel


def test_committed_without_outputs():
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert book.cells[0].cell_type == "markdown"
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not any(cell.metadata for cell in book.cells)
    assert book.metadata.kernelspec.name == "python3"


def printed(outputs):
    """Return what a cell wrote to stdout; anything on stderr fails the test."""
    assert all(out.get("name") != "stderr" for out in outputs)
    return "".join(out.text for out in outputs if out.output_type == "stream")


@pytest.mark.slow
def test_a_kernel_runs_all_of_the_notebook():
    repo = Repo()
    base = repo.commit(**{"train.py": "0", "prepare.py": "0", "pyproject.toml": "0"})
    better = repo.commit(**{"train.py": "import ctypes"})
    rows = [line.replace("0000001", base, 1) for line in BASELINE]
    write(*rows, row(better, 0.99, description="safety: <script>alert(1)</script> costs $5 or $6"))
    Path("tools").symlink_to(ROOT / "tools")
    book = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(Path.cwd())}}
    # Sockets are files in this folder: two suites at once would race for TCP ports
    config = Config(KernelManager={"transport": "ipc"})
    client = NotebookClient(
        book, timeout=PATIENCE_SECONDS, kernel_name="python3", resources=where, config=config
    )
    client.execute()
    outputs = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    assert re.search(r"best +0\.990000 +" + better, printed(outputs["summary"]))
    kept, axes = (out.data for out in outputs["kept"] if "data" in out)
    assert "<script>" not in kept["text/html"] and "&lt;script&gt;" in kept["text/html"]
    assert "mathjax_ignore" in kept["text/html"]
    assert "safety" in axes["text/plain"]
    assert "image/png" in outputs["plot"][0].data
    assert plt.imread("progress.png").shape[:2] == (800, 1600)
    assert printed(outputs["audit"]).splitlines() == [
        "results.tsv",
        "audit: 1 kept commits, all on the branch, train.py alone",
        f"worth a look: {better} line 1, ctypes: import ctypes",
    ]


def test_an_error_shows_its_line_and_no_stack():
    with pytest.raises(report.ResultsError) as failed:
        report.load("results.tsv")
    assert str(failed.value) == "results.tsv: No such file or directory; is RESULTS right?"
    assert failed.value._render_traceback_() == [f"ResultsError: {failed.value}"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (BASELINE[:1], ["runs +1$", "nothing tried yet", "noise +unknown", "gain +0.000000"]),
        ([row(2, 0, "crash", memory_gb=0)], ["1 crashed", "keep rate +0.0%", "every run crashed"]),
        (
            [row(2, 0, "crash", memory_gb=0), *BASELINE],
            ["baseline +0.999800 +0000001, mean of 3"],
        ),
        (
            [*BASELINE, row(2, 1.2, "discard")],
            ["best +0.999800 +0000001", f"noise +{noise_of([1.0004, 0.999, 1.0]):.6f}$"],
        ),
    ],
    ids=["single row", "all crashed", "crash first", "no progress"],
)
def test_a_night_with_little_in_it(rows, said):
    parts, text = read(*rows)
    (runs,) = parts.values()
    assert len(report.kept_changes(runs)) == len(report.tried_by_axis(runs)) == 0
    for pattern in said:
        assert re.search(pattern, text, re.MULTILINE), pattern
    report.picture("a night", runs).savefig("progress.png")
    assert Path("progress.png").stat().st_size > 1000


def long_ledger(num_runs):
    draw, rows = random.Random(0), list(BASELINE)
    for i in range(num_runs):
        status = "keep" if i % 10 == 0 else "discard"
        rows.append(row(16 + i, 1 - i * 1e-6 + draw.random() * 0.01, status, "x" * 100))
    return write(*rows)


@pytest.mark.slow
def test_ten_times_the_runs_take_little_more_than_ten_times_as_long():
    seconds = []
    for num_runs in (2_000, 20_000):
        path = long_ledger(num_runs)
        start = time.process_time()
        runs = report.load(path)
        report.summary(path, runs)
        table, noise = report.experiments(runs)
        report.draw(plt.figure().add_subplot(), table, noise)
        seconds.append(time.process_time() - start)
    assert (table.status == "keep").sum() == 2_000
    assert seconds[1] < 30 * seconds[0]  # a hundred times, were it of the second order


# What is computed


def test_summary_counts_commits_and_not_runs():
    rows = [
        *BASELINE,
        row(2, 0.9880, description="wide"),
        row(3, 1.2000, "discard"),
        row(4, 0, "crash", memory_gb=0),
        row(5, 0.9872, "keep", "marginal"),
        row(5, 0.9868, "keep", "marginal, seed 43"),
        row(6, 0, "crash", memory_gb=0),
        row(6, 0.9990, "discard"),
    ]
    text = report.summary("r", report.load(write(*rows)))
    noise = noise_of([1.0004, 0.9990, 1.0], [0.9872, 0.9868])
    for pattern in [
        "runs +10$",
        "experiments +5: 2 kept, 2 discarded, 1 crashed$",
        "keep rate +40.0%$",
        "baseline +0.999800 +0000001, mean of 3$",
        f"noise +{noise:.6f}$",
        "best +0.987000 +0000005, run 7: marginal$",
        f"gain +0.012800 +1.28%, {0.0128 / noise:.1f} times the noise$",
    ]:
        assert re.search(pattern, text, re.MULTILINE), pattern
    assert "note" not in text


def test_kept_changes_ranks_gains_and_flags_losses_and_what_may_be_chance():
    bar = ratchet.HIGH * 2**0.5 * noise_of([1.0004, 0.9990, 1.0])  # of one run against one
    rows = [
        *BASELINE,
        row(2, 1.0004 - bar / 2, description="less than the bar on seed 42"),
        row(3, 0.9900, description="large"),
        row(4, 0.9700, "discard"),
        row(5, 0.9900 + bar / 2, description="simpler, worse"),
        row(6, 0.9800, description="well above the bar"),
        row(7, 0.9800, description="simpler, equal"),
        row(8, 0.9800 + 2 * bar, description="a mistake"),
    ]
    runs = report.load(write(*rows))
    kept = report.kept_changes(runs)
    assert kept.index.tolist() == [f"000000{i}" for i in (6, 3, 2, 7, 5, 8)]
    gains = [0.01 + bar / 2, 0.0104 - bar / 2, bar / 2, 0, -bar / 2, -2 * bar]
    assert kept.gain.tolist() == pytest.approx(gains, abs=2e-6)  # six decimals in the ledger
    assert kept.bar.tolist() == pytest.approx([bar] * 6)
    remarks = ["", "", "below the bar", "below the bar", "a little worse", "worse"]
    assert kept.remark.tolist() == remarks
    assert kept.run.tolist() == [8, 5, 4, 9, 7, 10]
    assert "note         kept but worse than the parent: run 7, 10" in report.summary("r", runs)


def test_kept_but_worse_is_said_without_a_known_noise():
    runs = report.load(write(row(1, 1.0), row(2, 0.999999), row(3, 1.0)))
    assert report.kept_changes(runs).remark.tolist() == ["", "worse"]
    assert "kept but worse than the parent: run 3" in report.summary("r", runs)


def test_gain_compares_the_same_seeds():
    rows = [
        row(1, 0.980, description="baseline, seed 42"),  # the lucky seed
        row(1, 1.000, description="baseline, seed 43"),
        row(2, 0.979, description="wide"),
        row(3, 0.970, description="deep, seed 7"),
        row(2, 0.995, description="wide again, seed 43"),
    ]
    table, _ = report.experiments(report.load(write(*rows)))
    gains = table.set_index("commit").gain
    # wide ran under both seeds by now; no run of its under seed 7, so deep meets all of them
    assert gains["0000002"] == pytest.approx((0.980 + 1.000) / 2 - (0.979 + 0.995) / 2)
    assert gains["0000003"] == pytest.approx((0.979 + 0.995) / 2 - 0.970)
    for known in (rows[:3], [rows[0], *rows[2:]]):  # else wide alone has a seed 43
        table, _ = report.experiments(report.load(write(*known)))
        assert table.gain.iloc[1] == pytest.approx(0.001)


def test_best_is_the_lowest_kept_and_the_last_is_called_that():
    rows = [
        *BASELINE,
        row(2, 0.9960, description="deep"),
        row(3, 0.9970, description="shorter"),
        row(3, 0.9974, description="shorter again, seed 43"),
        row(4, 0.9900, "discard"),
    ]
    _, text = read(*rows)
    assert re.search("best +0.996000 +0000002, run 4: deep$", text, re.MULTILINE)
    assert re.search("last kept +0.997200 +0000003, run 5: shorter$", text, re.MULTILINE)
    assert re.search("gain +0.003800 ", text)
    _, text = read(*rows[:4])
    assert "last kept" not in text


@pytest.mark.parametrize(
    ("values", "best"),
    [((0.91, 0.93, 0.92), "0.930000"), ((-0.5, 1.2, 0.3), "1.200000"), ((2e3, 3e4, 9), "30000.")],
)
def test_a_number_that_should_rise(monkeypatch, values, best):
    monkeypatch.setattr(ratchet, "LOWER_IS_BETTER", False)
    monkeypatch.setattr(ratchet, "METRIC", "score")
    rows = [row(i, value) for i, value in enumerate(values, start=1)]
    parts, text = read(*rows, header=HEADER.replace("val_bpb", "score"))
    (runs,) = parts.values()
    assert re.search(f"best +{best}", text)
    kept = report.kept_changes(runs)
    assert kept.score.tolist() == [values[1], values[2]]
    assert kept.gain.tolist() == pytest.approx([values[1] - values[0], values[2] - values[1]])
    ax = report.picture("r", runs).axes[0]
    assert plotted(ax, "best so far") == {0: values[0], 1: values[1], 2: values[1]}
    assert ax.get_ylim()[1] > values[1] > ax.get_ylim()[0]


@pytest.mark.parametrize("values", [(4e-7, 2e-7), (-3.2, -3.5), (11683.0, 9000.0)])
def test_numbers_of_any_size_from_ledger_to_picture(monkeypatch, values):
    monkeypatch.setattr(ratchet, "METRIC", "error")
    header = HEADER.replace("val_bpb", "error")
    rows = [f"000000{i}\t{value!r}\t1\tkeep\tan idea" for i, value in enumerate(values, start=1)]
    parts, text = read(*rows, header=header)
    (runs,) = parts.values()
    said = re.search(r"baseline +(\S+) .*best +(\S+) .*gain +(\S+) ", text, re.DOTALL)
    assert [float(x) for x in said.groups()] == pytest.approx([*values, values[0] - values[1]])
    ax = report.picture("r", runs).axes[0]
    first, last = (float(x) for x in re.findall(r" (\S+) to (\S+) error", ax.get_title("left"))[0])
    assert (first, last) == pytest.approx(values, rel=0.02)
    low, high = ax.get_ylim()
    assert low < values[1] < values[0] < high


def test_axes_are_counted_as_the_lines_begin():
    rows = [
        *BASELINE,
        row(2, 0.990, description="optimizer: longer warmdown"),
        row(3, 0.995, "discard", "optimizer: no warmdown"),
        row(4, 0.985, description="optimizer: Muon for all"),
        row(5, 0, "crash", "Data order: longest first"),
        row(6, 0.999, "discard", "as in the paper: a table of bigrams, see there"),
        row(7, 0.999, "discard", "no axis"),
    ]
    parts, _ = read(*rows)
    (runs,) = parts.values()
    axes = report.tried_by_axis(runs)
    assert axes.tries.to_dict() == {"optimizer": 3, "data order": 1, "as in the paper": 1}
    assert axes.keeps.to_dict() == {"optimizer": 2, "data order": 0, "as in the paper": 0}
    parts, _ = read(*rows, *(row(20 + i, 0.999, "discard") for i in range(8)))
    assert report.tried_by_axis(*parts.values()).empty, "most lines have none"
    parts, _ = read(*BASELINE, *(row(9 + i, 0.99, "keep", f"exp{i}: wide") for i in range(5)))
    assert report.tried_by_axis(*parts.values()).empty, "a number of its own is no axis"
    assert axes.best_gain["optimizer"] == pytest.approx(1.0004 - 0.990)
    assert report.kept_changes(runs).description.iloc[0] == "optimizer: longer warmdown"


@pytest.mark.parametrize("seed", range(3))
def test_gains_of_single_runs_add_up_to_the_whole_way(seed):
    rows = night(seed)[2:]
    kept = report.kept_changes(report.load(write(*rows)))
    first, *_, last = [line.split("\t")[1] for line in rows if "\tkeep\t" in line]
    assert kept.gain.sum() == pytest.approx(float(first) - float(last), abs=1e-9)


def test_lucky_baseline_seed_is_no_progress():
    ax = picture(write(*BASELINE, row(2, 0.9995), row(3, 0.9980), row(4, 0.9985)))
    (stairs,) = [line for line in ax.lines if line.get_label() == "best so far"]
    assert stairs.get_xdata().tolist() == [0, 1, 2, 3, 3]
    assert stairs.get_ydata().tolist() == pytest.approx([0.9998, 0.9995, 0.998, 0.998, 0.998])


def test_crash_of_a_repeat_leaves_the_verdict():
    rows = [*BASELINE, row(2, 0.9980), row(3, 0.9970, "discard"), row(2, 0, "crash")]
    kept = report.kept_changes(report.load(write(*rows)))
    assert kept.index.tolist() == ["0000002"]


def test_baseline_run_again_at_dawn_counts_as_repeat():
    rows = [row(1, 1.0), row(2, 0.99), row(1, 1.0030), row(1, 1.0010, description="baseline")]
    rows = [
        rows[0].replace("an idea", "baseline"),
        rows[1],
        rows[2].replace("an idea", ""),
        rows[3],
    ]
    table, noise = report.experiments(report.load(write(*rows)))
    mean = (1.0 + 1.003 + 1.001) / 3
    assert noise == pytest.approx(noise_of([1.0, 1.003, 1.001]))
    assert table.value.tolist() == pytest.approx([mean, 0.99])
    assert table.run.tolist() == [1, 2]


# The same as the rule's


def ledger(draw):
    """Return random rows as the loop writes them: single runs, repeats with the parent, crashes."""
    num_baselines = draw.choice([1, 3])
    runs = [(1, 42 + i, "keep", f"baseline, seed {42 + i}") for i in range(num_baselines)]
    subject = {1: "the base"}
    champion, kept = 1, [1]
    next_seed = {1: 42 + num_baselines}
    for commit in range(2, 2 + draw.randrange(40)):
        subject[commit] = f"idea {commit}"
        status = draw.choice(["keep", "discard", "discard", "crash"])
        runs.append((commit, 42, status, subject[commit]))
        next_seed[commit] = 43
        if status != "crash" and draw.random() < 0.5:
            runs.append((champion, 43, "keep", "parent again, seed 43"))
            runs.append((commit, 43, status, f"{subject[commit]}, seed 43"))
        elif draw.random() < 0.2:
            runs.insert(-1, (champion, 42, "keep", "parent again"))
        if status == "keep":
            champion = commit
            kept.append(commit)
        if draw.random() < 0.1:  # by hand
            seed, commit = draw.randrange(44, 50), draw.choice(kept)
            runs.append((commit, seed, "keep", f"{subject[commit]} again, seed {seed}"))
    values = [round(draw.gauss(1, 0.001), 6) * (status != "crash") for _, _, status, _ in runs]
    return [(*run, value) for run, value in zip(runs, values, strict=True)]


def real_night():
    """Return the parts of the night on record, one a machine, each run as one of ledger()."""
    parts = []
    for line in (NIGHT / "results.tsv").read_text("utf-8").splitlines()[1:]:
        commit, value, _, status, text = line.split("\t")
        seed = re.search(r", seed (\d+)$", text)
        if text == "baseline, seed 42":
            parts.append([])
        run = (int(commit, 16), int(seed[1]) if seed else 42, status, text, float(value))
        parts[-1].append(run)
    return parts


@pytest.mark.parametrize("runs", [*(ledger(random.Random(i)) for i in range(30)), *real_night()])
def test_noise_and_gains_are_the_rules_on_these_runs(runs):
    rows = [row(commit, value, status, text) for commit, _, status, text, value in runs]
    loaded = report.load(write(*rows))
    assert loaded.seed.tolist() == [run[1] for run in runs]
    table, noise = report.experiments(loaded)

    by_commit, kept, valid, num_before = {}, [], [], {}
    for commit, seed, status, _, value in runs:
        num_before.setdefault(commit, len(valid))
        if status != "crash":
            valid.append(ratchet.Run(f"{commit:07x}", seed, value))
            by_commit.setdefault(commit, []).append(valid[-1])
        if status == "keep" and commit not in kept:
            kept.append(commit)
    assert noise == pytest.approx(ratchet.noise_of(valid), nan_ok=True)
    table = table.set_index("commit")
    order = list(num_before)
    for parent, idea in itertools.pairwise(kept):
        following = order[order.index(idea) + 1 :]
        end = num_before[following[0]] if following else len(valid)
        noise_then = ratchet.noise_of(valid[:end])
        seeds = {run.seed for run in by_commit[parent]}  # as when the idea was judged
        ours = [run for run in by_commit[idea] if run.seed in seeds] or by_commit[idea]
        verdict = ratchet.judge(
            ours, by_commit[parent], noise if math.isnan(noise_then) else noise_then
        )
        assert table.gain[f"{idea:07x}"] == pytest.approx(verdict.gain, abs=1e-12)
        assert table.bar[f"{idea:07x}"] == pytest.approx(verdict.bar, abs=1e-12, nan_ok=True)


# Ledgers that people have


@pytest.mark.parametrize("ledger", LEDGERS, ids=[ledger.name for ledger in LEDGERS])
def test_ledgers_are_read_as_a_person_reads_them(monkeypatch, ledger):
    monkeypatch.setattr(ratchet, "METRIC", ledger.metric)
    monkeypatch.setattr(ratchet, "LOWER_IS_BETTER", ledger.lower_is_better)
    Path("results.tsv").write_bytes(ledger.text.replace("|", "\t").encode())
    if ledger.refused:
        with pytest.raises(report.ResultsError) as failed:
            report.load("results.tsv")
        assert "\n" not in str(failed.value)
        assert [word for word in ledger.refused if word not in str(failed.value)] == []
        return
    found, notes = [], []
    for title, runs in report.split(report.load("results.tsv")).items():
        table, _ = report.experiments(runs)
        counts = [(table.status == status).sum() for status in ("keep", "discard", "crash")]
        steps = report.kept_of(table)
        ends = (None, None)
        if len(steps):
            ends = steps.value.iloc[0], steps.value[report.best_of(steps.value)]
        found.append((*counts, *(x if x is None else float(f"{x:.6g}") for x in ends)))
        notes += re.findall("^  note +(.*)", report.summary(title, runs), re.MULTILINE)
    assert tuple(found) == ledger.parts
    assert [word for word in ledger.notes if not any(word in note for note in notes)] == []
    assert [note for note in notes if not any(word in note for word in ledger.notes)] == []


def test_rows_without_a_hash_stand_each_for_itself():
    rows = [
        row("baseline", 1.0, description="baseline"),
        row("exp9", 0.99, description="wide"),
        row("exp9", 0.98, description="wide"),
        row("", 0.995, "discard"),
        row("", 0, "crash", memory_gb=0),
        row("HEAD~1", 1.1, "discard"),
        row("--help0", 1.1, "discard"),
    ]
    _, text = read(*rows)
    assert "experiments  6: 2 kept, 3 discarded, 1 crashed" in text
    assert re.search("baseline +1.000000 +baseline, mean of 1$", text, re.MULTILINE)
    assert re.search("best +0.980000 +exp9, run 3: wide$", text, re.MULTILINE)
    assert "noise        unknown" in text


@pytest.mark.parametrize(
    ("header", "line", "note"),
    [
        ("status\tdescription\tval_bpb\tmemory_gb\tcommit", "keep\twide\t0.9\t4.0\tcafecaf", None),
        ("commit\tval_bpb\tstatus\tdescription", "cafecaf\t0.9\tkeep\twide", "no column memory_gb"),
        ("val_bpb\tstatus\tdescription", "0.9\tkeep\twide", "no column commit, memory_gb"),
        (
            f"{HEADER}\tmfu\tnum_steps",
            "cafecaf\t0.9\t4.0\tkeep\twide\t39.8\t953",
            "columns not read: mfu, num_steps",
        ),
        (f"{HEADER}\tmfu", "cafecaf\t0.9\t4.0\tkeep\twide", "columns not read: mfu"),
        (f"{HEADER}\t", "cafecaf\t0.9\t\tkeep\twide\t", None),
    ],
)
def test_columns_go_by_name(header, line, note):
    parts, text = read(line, header=header)
    (runs,) = parts.values()
    assert runs[["value", "status", "description"]].iloc[0].tolist() == [0.9, "keep", "wide"]
    assert runs.commit.iloc[0] == ("cafecaf" if "commit" in header else "")
    assert [line for line in text.splitlines() if "note" in line] == (
        [f"  note         {note}"] if note else []
    )


@pytest.mark.parametrize("value", ["0.000000", "0", "", "nan", "inf", "-", "N/A"])
def test_discard_without_a_value_is_a_crash(value):
    _, text = read(*BASELINE, f"abcdef1\t{value}\t44.0\tdiscard\tan idea", row(3, 0.99))
    assert "2: 1 kept, 0 discarded, 1 crashed" in text
    assert "note         discard without a val_bpb, counted as a crash: run 4\n" in text


def test_ideas_that_were_never_committed_are_kept_apart():
    rows = [
        *BASELINE,
        row(1, 0.990, "keep", "wide"),
        row(1, 1.010, "discard", "deep"),
        row(1, 0.985, "keep", "warmdown"),
        row(1, 0, "crash", "huge", memory_gb=0),
        row(1, 0.986, "discard", "warmdown"),
    ]
    parts, text = read(*rows)
    assert "5: 2 kept, 2 discarded, 1 crashed" in text
    assert re.search("baseline +0.999800 +0000001, mean of 3$", text, re.MULTILINE)
    assert re.search(f"noise +{noise_of([1.0004, 0.999, 1.0]):.6f}$", text, re.MULTILINE)
    assert re.search("best +0.985000 +0000001, run 6: warmdown$", text, re.MULTILINE)
    assert re.search("note +one commit, several ideas .*: 0000001$", text, re.MULTILINE)
    kept = report.kept_changes(*parts.values())
    assert kept.gain.tolist() == pytest.approx([1.0004 - 0.990, 0.005])
    assert kept.num_runs.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("one", "other", "num_kept"),
    [
        (("keep", "wide"), ("keep", "deep"), 2),
        (("keep", "wide 0.7"), ("keep", "wide 0.8"), 2),
        (("keep", "wide"), ("discard", "wide"), 1),
        (("keep", "wide"), ("discard", "wide, seed 43"), 1),
    ],
)
def test_a_commit_of_two_ideas_is_warned_of(one, other, num_kept):
    parts, text = read(*BASELINE, row(2, 0.99, *one), row(2, 0.98, *other))
    kept = report.kept_changes(*parts.values())
    assert kept.num_runs.tolist() == [1] * num_kept
    assert re.search("note +one commit, several ideas .*: 0000002$", text, re.MULTILINE)


@pytest.mark.parametrize("verdict", ["keep", "discard"])
def test_repeats_of_an_idea_and_of_a_champion_are_one(verdict):
    rows = [
        row(1, 1.0, description="baseline"),
        row(1, 1.001, description="Start the night again, seed 43"),
        row(2, 0.99, verdict, "wide"),
        row(2, 0.992, verdict, "wide, seed 43"),
        row(1, 1.002, description="again"),
        row(1, 1.003, description="baseline run 2"),
        row(1, 1.004, description="Baseline (seed 45)"),
    ]
    parts, text = read(*rows)
    table, _ = report.experiments(*parts.values())
    assert table.num_runs.tolist() == [5, 2]
    assert "note" not in text


OTHER_CARD = [
    row(9, 1.0860, description="baseline on the other card"),
    row(9, 1.0864, description="baseline on the other card, seed 43"),
]


@pytest.mark.parametrize(
    "second",
    [
        OTHER_CARD,
        [line.replace("0000009", "0000001") for line in OTHER_CARD],
        [line.replace(" on the other card", "") for line in OTHER_CARD],
        [line.replace("baseline on the other card", "H200 baseline, fp8") for line in OTHER_CARD],
        [
            line.replace("keep", "baseline").replace("baseline on the other card", "ten minutes")
            for line in OTHER_CARD
        ],
    ],
    ids=["other commit", "same commit", "same words", "named machine", "status"],
)
def test_a_second_baseline_is_measured_alone(second):
    rows = [*BASELINE, row(2, 0.9900), *second, row(3, 1.0850, description="deep"), row(2, 1.2)]
    parts, text = read(*rows)
    tables = [report.kept_changes(runs) for runs in parts.values()]
    assert [table.run.tolist() for table in tables] == [[4], [7, 8]]
    assert tables[1].gain.tolist() == pytest.approx([0.0010, 1.0850 - 1.2])
    assert "note         2 baselines, each measured alone: those of run 1, 5\n" in text
    values = re.findall(r"^  baseline +(\S+) .* of (\d)$", text, re.MULTILINE)
    assert values == [("0.999800", "3"), ("1.086200", "2")]
    assert list(parts) == ["results.tsv", "results.tsv from run 5"]
    assert report.kept_changes(report.load("results.tsv")).run.tolist() == [4, 7, 8]


def test_baselines_of_other_machines_on_top_are_left_out():
    parts, text = read(*OTHER_CARD, *BASELINE, row(2, 0.99))
    (runs,) = parts.values()
    assert list(parts) == ["results.tsv"] and runs.index[0] == 3
    assert "note         baseline without an idea after it, left out: run 1\n" in text
    assert re.search("baseline +0.999800 ", text)


def test_an_idea_that_begins_with_the_word_baseline_is_an_idea():
    for text in ("baseline + SwiGLU", "baseline with warmup", "Baseline-style init"):
        parts, _ = read(*BASELINE, row(2, 0.99, description=text))
        (runs,) = parts.values()
        assert len(report.kept_changes(runs)) == 1, text


def test_a_discarded_baseline_is_said():
    _, text = read(row(1, 1.0, "discard", "baseline"), row(2, 0.99))
    assert "note         the baseline, run 1, is marked discard\n" in text
    _, text = read(*BASELINE, row(2, 0.99))
    assert "marked" not in text


# Odd but legitimate files


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff{h}\n{a}\n{b}\n",
        "{h}\r\n{a}\r\n{b}\r\n",
        "{h}\n{a}\n{b}",
        "{h}\n{a}\n{b}\n\n \n\r\n",
        "{h}\n\n{a}\n\n{b}",
    ],
    ids=["byte order mark", "Windows", "no last newline", "blank at the end", "blank between"],
)
def test_odd_line_ends(content):
    text = content.format(
        h=HEADER, a=row("abcdef1", 1, "keep", "one"), b=row(2, 0.9, "discard", "two")
    )
    Path("results.tsv").write_bytes(text.encode())
    runs = report.load("results.tsv")
    columns = ["commit", "value", "memory_gb", "status", "description"]
    assert runs[columns].to_dict("list") == {
        "commit": ["abcdef1", "0000002"],
        "value": [1.0, 0.9],
        "memory_gb": [44.0, 44.0],
        "status": ["keep", "discard"],
        "description": ["one", "two"],
    }


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ('"never closed, with commas', '"never closed, with commas'),
        ('both "halves", quoted', 'both "halves", quoted'),
        ("a tab\tin the\ttext", "a tab in the text"),
        ("form\x0cfeed, next\x85line,\u2028separator", "form feed, next line, separator"),
        ("\x1b[2Jclears the \x00 screen, \u202eturns text", "[2Jclears the screen, turns text"),
        ("", ""),
        ("NA", "NA"),
        ("größer, 大", "größer, 大"),
    ],
)
def test_hostile_descriptions_keep_their_row(description, expected):
    runs = report.load(write(row(1, 1), row(2, 0.9, description=description), row(3, 0.8)))
    assert runs.commit.tolist() == ["0000001", "0000002", "0000003"]
    assert runs.description[2] == expected


def test_hashes_that_look_like_numbers_stay_text():
    assert report.load(write(row("1234567", 1), row("00012e4", 0.9))).commit.tolist() == [
        "1234567",
        "00012e4",
    ]


def test_bytes_that_are_no_utf8_do_not_stop_it():
    Path("results.tsv").write_bytes(f"{HEADER}\n{row(1, 1)}".encode() + b" \xff\xfe\n")
    assert report.load("results.tsv").description[1].startswith("an idea ")


# Files and lines that are wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("", "line 1: the file is empty"),
        ("\ufeff\n\n", "line 1: the file is empty"),
        (HEADER + "\n", "no runs yet"),
        (HEADER.replace("\t", ",") + "\n", "line 1: a header with no tab in it, 'commit,val_bpb,"),
        ("commit\tbpb\tstatus\tidea\n", "line 1: no column val_bpb; there are commit, bpb, status"),
        ("commit\tval_bpb\tidea\n", "line 1: no column status; there are commit, val_bpb, idea"),
        (HEADER + "\nabcdef1\t-\t-\trunning\tan idea\n", "no runs yet that are finished"),
        ("x" * 10_000 + "\t" + "y" * 10_000, "line 1: no column val_bpb; there are xxx"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(content, message):
    if content is not None:
        Path("results.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(report.ResultsError, match=f"^results.tsv:? {re.escape(message)}.*$") as e:
        report.load("results.tsv")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("abcdef1 0.99 44.0 perhaps an idea", "not a run"),
        ("abcdef1\t0.99\t44.0", "3 columns in place of 5"),
        ("abcdef1\t0.99\t44.0\tkeep or not\tan idea", "status 'keep or not'"),
        ("abcdef1\t0.99\t44.0\tkeep/discard\tan idea", "status 'keep/discard'"),
        ("abcdef1\t0.99\t44.0\t\tan idea", "status ''"),
        ("abcdef1\t1,234\t44.0\tkeep\tan idea", "val_bpb '1,234'"),
        ("abcdef1\tbroken\t0.0\tkeep\tan idea", "val_bpb 'broken'"),
        ("abcdef1\tnan\t44.0\tkeep\tan idea", "a keep without a val_bpb"),
        ("abcdef1\t-0.99\t44.0\tdiscard\tan idea", "val_bpb below zero, unlike the others"),
        ("abcdef1\t\t44.0\tbaseline\tan idea", "a baseline without a val_bpb"),
        ("abcdef1\t-inf\t44.0\tkeep\tan idea", "a keep without a val_bpb"),
        ("abcdef1\t0.000000\t0.0\tkeep\tan idea", "a keep without a val_bpb"),
        ("f\t1\t1\tperhaps" + "p" * 100_000 + "\tx", f"status 'perhaps{'p' * 33}'"),
    ],
)
def test_a_bad_line_is_left_out_with_a_note(line, note):
    parts, text = read(*BASELINE, "", line, row(3, 0.9))
    (runs,) = parts.values()
    assert runs.commit.tolist() == ["0000001"] * 3 + ["0000003"]
    assert f"note         {note}, left out: line 6\n" in text


@pytest.mark.parametrize("memory", ["44 pounds", "-1", "inf", "many"])
def test_memory_that_cannot_be_read_costs_no_run(memory):
    parts, _ = read(*BASELINE, f"abcdef1\t0.99\t{memory}\tkeep\tan idea")
    (runs,) = parts.values()
    assert math.isnan(runs.memory_gb[4]) and runs.value[4] == 0.99


def test_a_file_of_which_a_third_is_bad_is_refused():
    bad = [row(2 + i, 0.9, "perhaps") for i in range(6)]
    good = [row(20 + i, 0.9) for i in range(11)]
    with pytest.raises(report.ResultsError) as failed:
        report.load(write(*good, *bad))
    message = "results.tsv: 6 of 17 rows cannot be read: status 'perhaps': line 13, 14, "
    assert str(failed.value).startswith(message)
    assert len(report.load(write(*good, *bad[1:]))) == 11


def test_crash_may_leave_its_numbers_out():
    runs = report.load(write(*BASELINE, "abcdef1\t\tnan\tcrash\tout of memory"))
    assert math.isnan(runs.value[4])


# The picture


def pixels_along(points):
    """Return pixels along a polyline, one every three or closer."""
    pixels = []
    for p, q in itertools.pairwise(points):
        num = int(math.dist(p, q) / 3) + 1
        pixels += [
            [a + (b - a) * i / num for a, b in zip(p, q, strict=True)] for i in range(num + 1)
        ]
    return pixels


def cross(one, other):
    """Tell whether two segments cross, by the side on which each leaves the other's ends."""

    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) > (q[1] - p[1]) * (r[0] - p[0])

    return all(side(*a, b[0]) != side(*a, b[1]) for a, b in [(one, other), (other, one)])


def assert_labels_are_legible(ax):
    """Check by the rendered boxes that labels and leaders are inside and clear of one another."""
    frame = ax.get_window_extent()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    leaders = []
    for text, box in zip(ax.texts, boxes, strict=True):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, "cut off at a side"
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1, "cut off above or below"
        x, y = ax.transData.transform(text.xy)
        end = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        leaders.append(((x, y), end))
    for (one, to_one), (two, to_two) in itertools.combinations(zip(boxes, leaders, strict=True), 2):
        assert not one.overlaps(two)
        assert not one.count_contains(pixels_along(to_two))
        assert not two.count_contains(pixels_along(to_one))
        assert not cross(to_one, to_two)
    if not boxes:
        return
    (stairs,) = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    stairs = pixels_along(ax.transData.transform(stairs.get_path().vertices[:2000]))
    for box in boxes:
        assert not box.count_contains(stairs), "on the running best"
        for line in ax.lines:
            if line.get_label() == "discarded":
                assert box.count_contains(ax.transData.transform(line.get_xydata()[:2000])) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_a_night_are_legible_and_nearly_complete(seed):
    rows = night(seed)
    ax = picture(write(*rows))
    assert_labels_are_legible(ax)
    num_kept = sum("\tkeep\t" in line for line in rows) - len(BASELINE)
    assert num_kept >= 10 and len(named(ax)) >= 0.75 * num_kept


@pytest.mark.parametrize(
    ("night", "part", "path", "title"),
    [
        (
            NIGHT,
            0,
            NIGHT / "zen3.png",
            "The first machine, a Zen 3: 9 ideas, 4 kept, 1.969 to 1.202 bits per byte",
        ),
        (
            NIGHT,
            1,
            NIGHT / "zen4.png",
            "One night on 2 CPU cores: 16 ideas, 6 kept, 1.123 to 1.061 bits per byte",
        ),
        (
            NIGHT_2,
            0,
            ROOT / "progress.png",
            "One night on 2 CPU cores: 26 ideas, 10 kept, 1.123 to 0.977 bits per byte",
        ),
    ],
    ids=["Zen 3", "Zen 4", "Xeon"],
)
def test_the_committed_picture_is_of_the_real_night(night, part, path, title):
    runs = report.load(night / "results.tsv")
    assert not runs.attrs["notes"]
    runs = list(report.split(runs).values())[part]
    labels = json.loads((night / "labels.json").read_text("utf-8"))
    figure = report.picture(title.split(":")[0], runs, labels)
    figure.savefig("drawn.png")
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == title
    assert_labels_are_legible(ax)
    assert set(named(ax)) == {labels[commit] for commit in report.kept_changes(runs).index}
    drawn, committed = plt.imread("drawn.png"), plt.imread(path)
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.01


def test_labels_of_fifteen_kept_in_a_row_are_legible():
    rows = [
        row(2 + i, 0.99 - i * 2e-5, description=f"change {i} of a long list") for i in range(15)
    ]
    crowd = [row(50 + i, 1.0 - i * 1e-4, "discard") for i in range(60)]
    ax = picture(write(*BASELINE, *rows, *crowd))
    assert_labels_are_legible(ax)
    assert len(named(ax)) >= 4
    # The largest gain is the last to go without
    assert "change 0 of a long list" in named(ax)


def test_labels_are_literal_short_and_of_whole_words():
    hostile = [r"$\frac{", "$$", r"\$ 5^^", "a" * 500, "word " * 300, "", "{x} %s"]
    hostile += ["optimizer: Muon for the head", "Take the scale by neuron out of Muon"]
    hostile += [
        "Warm down for longer, as the loss still falls",
        "halve batch to 2**17 (more steps)",
    ]
    hostile += ["something long " * 3]
    rows = [row(2 + i, 0.99 - 0.01 * i, description=text) for i, text in enumerate(hostile)]
    runs = report.load(write(*BASELINE, *rows))
    fig = report.picture("a night", runs, {f"{2 + len(hostile) - 1:07x}": "my own words"})
    fig.savefig("progress.png")
    texts = set(named(fig.axes[0]))
    assert {r"$\frac{", "$$", r"\$ 5^^", "{x} %s", "my own words"} <= texts
    assert "0000007" in texts, "an empty description leaves the hash"
    assert {"Muon for the head", "Take the scale by neuron out…"} <= texts
    assert {"Warm down for longer", "halve batch to 2**17"} <= texts
    assert "a" * 29 + "…" in texts and max(map(len, texts)) <= 30


def test_diverged_run_does_not_flatten_the_staircase():
    rows = [
        *BASELINE,
        row(2, 0.98),
        row(3, 1e30, "discard"),
        row(4, 7.5, "discard"),
        row(5, 0.1, "discard"),
    ]
    ax = picture(write(*rows))
    low, high = ax.get_ylim()
    assert 0.97 < low < 0.98 and 1.0004 < high < 1.03
    assert plotted(ax, "off the scale") == {2: high, 3: high, 4: low}
    assert "discarded" not in legend(ax)
    assert legend(ax).count("off the scale") == 1 and "kept" in legend(ax)


def test_crash_is_drawn_at_the_foot_and_not_at_zero():
    crashes = [row(i, 0, "crash", memory_gb=0) for i in (8, 9)]
    rows = [crashes[0], *BASELINE, row(2, 0.99), crashes[1], row(3, 1.0, "discard")]
    ax = picture(write(*rows))
    low, high = ax.get_ylim()
    assert low > 0.98
    crashed = plotted(ax, "crashed")
    assert list(crashed) == [1, 3], "the baseline is number 0, whatever crashed before it"
    assert all(low < height < low + 0.05 * (high - low) for height in crashed.values())
    assert plotted(ax, "kept") == {0: pytest.approx(0.9998), 2: 0.99}
    assert plotted(ax, "discarded") == {4: 1.0}


@pytest.mark.parametrize("rows", [BASELINE[:1], BASELINE, [*BASELINE, row(2, 0.9999)]])
def test_scale_without_progress_shows_the_baseline_and_its_noise(rows):
    ax = picture(write(*rows))
    low, high = ax.get_ylim()
    assert all(low < float(line.split("\t")[1]) < high for line in rows)
    assert 0.001 < high - low < 0.02


def test_scale_without_progress_shows_the_nearer_half_of_the_discarded():
    rows = [row(1 + i, 1 + i / 1e5, "discard") for i in range(41)]
    ax = picture(write(row(1, 1.0), *rows[1:]))
    assert 20 <= len(plotted(ax, "discarded")) < 35


def test_kept_beyond_the_axis_are_triangles_once():
    rows = [*BASELINE, row(2, 0.98), row(3, 1.5), row(4, 0.975), row(5, 3.0, "discard")]
    ax = picture(write(*rows))
    high = ax.get_ylim()[1]
    assert high < 1.1
    assert plotted(ax, "off the scale") == {2: high, 4: high}
    assert plotted(ax, "kept") == {0: pytest.approx(0.9998), 1: 0.98, 3: 0.975}
    marks = [run for line in ax.lines if line.get_marker() in "o^v" for run in line.get_xdata()]
    assert sorted(marks) == list(range(5))


@pytest.mark.parametrize("worse", [1.004, 1.006, 1.008, 1.010, 1.012])
def test_what_cannot_be_seen_has_no_label(worse):
    ax = picture(write(*BASELINE, row(2, 0.98), row(3, worse), row(4, 0.975)))
    low, high = ax.get_ylim()
    assert all(low <= text.xy[1] <= high for text in ax.texts)
    assert len(named(ax)) == 2 + (worse <= high)


def test_repeats_are_left_out_for_their_mean():
    rows = [*BASELINE, row(2, 0.990), row(2, 0.992, description="an idea, seed 43")]
    ax = picture(write(*rows))
    assert plotted(ax, "kept") == {0: pytest.approx(0.9998), 1: pytest.approx(0.991)}


def test_noise_is_drawn_once_at_the_end_of_the_line():
    rows = [*BASELINE, row(2, 0.99), row(3, 1.0, "discard")]
    ax = picture(write(*rows))
    _, noise = report.experiments(report.load("results.tsv"))
    ((bar,),) = [container[2] for container in ax.containers]
    (segment,) = bar.get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.99 - noise, 0.99 + noise])
    assert segment[0, 0] > 2
    low, high = ax.get_ylim()
    assert low < 0.99 - noise and 0.9998 + noise < high
    assert f"noise ± {noise:.2g}" in legend(ax)
    assert not picture(write(row(1, 1.0), row(2, 0.9))).containers


def long_night():
    """Return 400 rows: a first gain of 0.06, then one of 0.0005 every 25 runs."""
    draw, best, rows = random.Random(0), 0.94, [row(1, 1.0), row(2, 0.94, description="half batch")]
    for i in range(398):
        if i % 25 == 24:
            best -= 0.0005
        status = "keep" if i % 25 == 24 else "discard"
        excess = 0 if status == "keep" else abs(draw.gauss(0, 0.004))
        rows.append(row(16 + i, best + excess, status, f"idea {i}"))
    return rows


def test_a_large_first_gain_does_not_hide_the_later_ones():
    ax = picture(write(*long_night()))
    assert re.search(": 399 ideas, 16 kept, 1.000 to 0.932 ", ax.get_title(loc="left"))
    gains = ax.transData.transform([(1, 0.9345), (1, 0.935)])[:, 1]
    assert gains[1] - gains[0] > 4 * ax.figure.dpi / 72, "four points are as high as a dot"
    assert plotted(ax, "best so far")[0] == 1.0 and ax.get_ylim()[1] < 0.96
    assert len(named(ax)) >= 10
    assert_labels_are_legible(ax)


@pytest.mark.parametrize(("num_early", "is_shown"), [(1, False), (12, True)])
def test_the_whole_way_is_shown_unless_most_was_kept_at_its_end(num_early, is_shown):
    early = [row(1 + i, 2.0 - i / num_early) for i in range(num_early)]
    late = [row(50 + i, 1.0 - i / 1000) for i in range(10)]
    ax = picture(write(*early, *late))
    assert (ax.get_ylim()[1] > 2.0) == is_shown


@pytest.mark.parametrize("values", [(0.05, 0.01), (3.0, 0.2), (1e-6, 1e-9)])
def test_the_axis_does_not_go_below_zero_where_no_value_does(values):
    rows = [f"000000{i}\t{value}\t1\tkeep\tan idea" for i, value in enumerate(values)]
    assert picture(write(*rows)).get_ylim()[0] >= 0


def test_accuracy_ends_at_one(monkeypatch):
    monkeypatch.setattr(ratchet, "LOWER_IS_BETTER", False)
    low, high = picture(write(row(1, 0.5), row(2, 0.99))).get_ylim()
    assert low < 0.5 and 0.99 < high <= 1.0


def test_legend_does_not_narrow_the_picture():
    rows = [*BASELINE, row(2, 0.99), row(3, 0.995, "discard"), row(4, 0, "crash", memory_gb=0)]
    rows += [row(5, 2.0), row(6, 2.0, "discard"), row(7, 0.1, "discard"), row(8, 0.989)]
    ax = picture(write(*rows))
    assert len(legend(ax)) == 6
    assert ax.bbox.width > 0.85 * ax.figure.bbox.width
    box, title = ax.get_legend().get_window_extent(), ax._left_title.get_window_extent()
    assert box.x1 <= ax.figure.bbox.x1 and box.y1 <= title.y0 + 2


# The audit


class Repo:
    """A git repository in the current folder, on branch `night`."""

    def __init__(self):
        self.git("init", "--quiet", "--initial-branch=night")

    def git(self, *words):
        return subprocess.run(
            ["git", *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, **files):
        """Write files, commit all of them and return the short hash."""
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content, encoding="utf-8")
            self.git("add", name)
        self.git("commit", "--quiet", "--allow-empty", "--message=an idea")
        return self.git("rev-parse", "--short=7", "HEAD")


@pytest.fixture
def repo():
    """Return a repository with a baseline commit, its hash in `base`."""
    repo = Repo()
    repo.base = repo.commit(**{"train.py": "0", "prepare.py": "0", "pyproject.toml": "0"})
    return repo


@pytest.fixture
def check(repo):
    """Return a function that audits rows that follow the repository's baseline."""

    def check(*rows, branch="HEAD"):
        path = write(*(row(repo.base, 1.0 + i / 1000) for i in range(3)), *rows)
        return audit.audit(report.load(path), branch)

    return check


def test_audit_passes_a_clean_night(repo, check):
    kept = [row(repo.commit(**{"train.py": f"{i}"}), 0.99 - i / 1000) for i in range(1, 4)]
    crash = row("fffffff", 0, "crash", memory_gb=0)
    gone = row("eeeeeee", 1.1, "discard")
    expected = ["audit: 3 kept commits, all on the branch, train.py alone"]
    assert check(*kept, crash, gone) == expected
    assert check(*kept, branch="night") == expected


def test_audit_names_a_kept_commit_that_touched_more(repo, check):
    good = repo.commit(**{"train.py": "1"})
    cheat = repo.commit(**{"train.py": "2", "prepare.py": "easier"})
    other = repo.commit(**{"odd name.txt": "x"})
    nothing = repo.commit()
    assert check(*(row(commit, 0.9) for commit in (good, cheat, other, nothing))) == [
        "audit: prepare.py differs between the baseline and HEAD",
        f"audit: {cheat} is kept but changed prepare.py, train.py, not train.py alone",
        f"audit: {other} is kept but changed odd name.txt, not train.py alone",
        f"audit: {nothing} is kept but changed nothing, not train.py alone",
    ]


def test_audit_sees_a_rename_as_two_files(repo, check):
    repo.git("mv", "train.py", "model.py")
    renamed = repo.commit()
    (line,) = check(row(renamed, 0.9))
    assert "model.py, train.py" in line


def test_audit_names_a_kept_commit_off_the_branch(repo, check):
    lost = repo.commit(**{"train.py": "1"})
    repo.git("branch", "elsewhere")
    repo.git("reset", "--quiet", "--hard", "HEAD~1")
    unknown = "eeeeeee"
    assert check(row(lost, 0.9), row(unknown, 0.8)) == [
        f"audit: {lost} is kept but not on HEAD",
        f"audit: {unknown} is kept but not on HEAD",
    ]
    assert check(row(lost, 0.9), branch="elsewhere") == [
        "audit: 1 kept commits, all on the branch, train.py alone"
    ]


def test_audit_names_a_discarded_commit_never_reset(repo, check):
    left = repo.commit(**{"train.py": "1"})
    assert check(row(left, 1.1, "discard")) == [f"audit: {left} is discarded but still on HEAD"]


def test_audit_notes_a_contract_changed_outside_the_log(repo, check):
    repo.commit(**{"pyproject.toml": "numpy"})
    assert check() == ["audit: pyproject.toml differs between the baseline and HEAD"]


def test_audit_looks_at_what_a_merge_brought_in(repo, check):
    repo.git("checkout", "--quiet", "-b", "side")
    repo.commit(**{"prepare.py": "easier"})
    repo.git("checkout", "--quiet", "night")
    repo.commit(**{"train.py": "1"})
    repo.git("merge", "--quiet", "--no-edit", "side")
    merge = repo.git("rev-parse", "--short=7", "HEAD")
    assert f"audit: {merge} is kept but changed prepare.py, not train.py alone" in check(
        row(merge, 0.9)
    )


def test_audit_says_that_the_baseline_is_missing(repo):
    kept = repo.commit(**{"train.py": "1"})
    path = write(row("eeeeeee", 1.0), row(kept, 0.9))
    assert audit.audit(report.load(path), "HEAD") == [
        "audit: the baseline eeeeeee was not found on HEAD; is BRANCH right?"
    ]


def test_audit_reads_from_a_subfolder_and_under_odd_settings(repo):
    for name in ("log.showSignature", "diff.relative", "diff.noprefix"):
        repo.git("config", name, "true")
    repo.git("config", "color.ui", "always")
    repo.git("config", "diff.renames", "copies")
    kept = repo.commit(**{"train.py": "1"})
    Path("logs").mkdir()
    path = write(row(repo.base, 1.0), row(kept, 0.9), path="logs/gpu0.tsv")
    clean = ["audit: 1 kept commits, all on the branch, train.py alone"]
    assert audit.audit(report.load(path), "HEAD") == clean
    repo.commit(**{"prepare.py": "easier"})
    assert "prepare.py differs" in audit.audit(report.load(path), "HEAD")[0]


def test_audit_of_a_worktree_uses_its_own_head(repo):
    repo.git("worktree", "add", "--quiet", "-b", "night-gpu1", "gpu1")
    os.chdir("gpu1")
    kept = repo.commit(**{"train.py": "1"})
    os.chdir("..")
    path = write(row(repo.base, 1.0), row(kept, 0.9), path="gpu1/results.tsv")
    assert audit.audit(report.load(path), "HEAD") == [
        "audit: 1 kept commits, all on the branch, train.py alone"
    ]


def test_audit_starts_as_many_processes_for_one_commit_as_for_thirty(repo, check, monkeypatch):
    kept = [row(repo.commit(**{"train.py": f"{i}"}), 0.99) for i in range(1, 31)]
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    assert check(*kept[:1])[0].startswith("audit: 1 kept")
    num_calls = len(calls)
    assert check(*kept)[0].startswith("audit: 30 kept")
    assert len(calls) == 2 * num_calls


def test_audit_is_skipped_with_a_reason(monkeypatch):
    runs = report.load(write(*BASELINE))
    (line,) = audit.audit(runs, "HEAD")
    assert line.startswith("audit skipped: fatal: not a git repository")
    Repo().commit()
    (line,) = audit.audit(runs, "no-such-branch")
    assert line.startswith("audit skipped: fatal: ") and "no-such-branch" in line
    monkeypatch.setenv("PATH", "")
    (line,) = audit.audit(runs, "HEAD")
    assert line.startswith("audit skipped: ") and "'git'" in line


def test_audit_skips_rows_without_a_commit_of_their_own(repo, check):
    kept = repo.commit(**{"train.py": "1"})
    skipped = "audit: rows without a commit of their own were skipped: run"
    assert check(
        row(kept, 0.99), row("exp9", 0.98), row("", 0.97), row("eeeeeee", 1, "discard")
    ) == [
        "audit: 1 kept commits, all on the branch, train.py alone",
        f"{skipped} 5, 6",
    ]
    for verdict, runs in [("keep", "4, 5"), ("discard", "5")]:
        lines = check(row(kept, 0.99, description="wide"), row(kept, 0.98, verdict, "deep"))
        assert lines[-1] == f"{skipped} {runs}"
    path = write(row("baseline", 1.0), *(row(f"exp{i}", 1 - i / 100) for i in range(12)))
    assert audit.audit(report.load(path), "HEAD") == [
        f"{skipped} 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..."
    ]


def test_audit_without_a_baseline_is_skipped(repo):
    runs = report.load(write(row(1, 0, "crash", memory_gb=0)))
    (line,) = audit.audit(runs, "HEAD")
    assert line.startswith("audit skipped: every run crashed")


@pytest.mark.parametrize("folder", ["recipe", "deep/er", "."])
@pytest.mark.parametrize("ledger", ["", "logs/"])
def test_audit_of_a_recipe_in_a_subfolder(folder, ledger):
    repo = Repo()
    files = {f"{folder}/{name}": "0" for name in ("train.py", "prepare.py", "logs/x")}
    base = repo.commit(**files, **{"other/train.py": "0"})
    kept = repo.commit(**{f"{folder}/train.py": "1"})
    path = f"{folder}/{ledger}results.tsv"
    write(row(base, 1.0), row(kept, 0.9), path=path)
    clean = ["audit: 1 kept commits, all on the branch, train.py alone"]
    assert audit.audit(report.load(path), "HEAD") == clean
    changed = repo.commit(**{f"{folder}/prepare.py": "easier", "prepare.py": "of another recipe"})
    write(row(base, 1.0), row(kept, 0.9), row(changed, 0.8), path=path)
    name = f"{folder}/prepare.py".removeprefix("./")
    differs, more = audit.audit(report.load(path), "HEAD")
    assert differs == f"audit: {name} differs between the baseline and HEAD"
    assert f"{changed} is kept but changed" in more and name in more


def test_audit_of_a_ledger_outside_the_recipes_folder():
    repo = Repo()
    base = repo.commit(**{"recipe/train.py": "0", "recipe/prepare.py": "0"})
    kept = repo.commit(**{"recipe/train.py": "1"})
    path = write(row(base, 1.0), row(kept, 0.9))
    clean = ["audit: 1 kept commits, all on the branch, train.py alone"]
    assert audit.audit(report.load(path), "HEAD") == clean


def test_audit_notes_a_changed_referee(repo, check):
    repo.commit(**{"ratchet.py": "BAR = -9"})
    assert check() == ["audit: ratchet.py differs between the baseline and HEAD"]


# Worth a look

CANVAS = """
import os
import torch
import torch.nn as nn
import prepare

class GPT(nn.Module):
    def forward(self, idx):
        if self.training:
            idx = idx + 1
        return idx

def main():
    tokenizer = prepare.Tokenizer.from_directory()
    loader = prepare.make_dataloader(tokenizer, 4, 8, "train", "cpu")
    model = GPT()
    for inputs, targets in loader:
        if loader.progress < 1:
            model(inputs)
    os.environ["A"] = "1"
    return prepare.evaluate_bpb(model, tokenizer, 4)
"""


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("open('log.txt', 'a').write('x')", "files"),
        ("text = __import__('pathlib').Path('x').read_text()", "files"),
        ("import pickle", "files"),
        ("torch.save(model, 'model.pt')", "torch.save and load"),
        ("from torch import load; load('model.pt')", "torch.save and load"),
        ("import numpy as np; np.save('x', 1)", "files"),
        ("if os.getenv('AUTORESEARCH_SPLIT'): pass", "environment"),
        ("from os import environ; environ['B'] = '2'", "environment"),
        ("import ctypes", "ctypes"),
        ("import subprocess as s; s.run(['ls'])", "other programs"),
        ("os.system('ls')", "other programs"),
        ("from socket import create_connection", "network"),
        ("import threading; threading.Thread(target=main).start()", "threads"),
        ("prepare.TIME_BUDGET = 600", "assigned in prepare or torch"),
        ("prepare.TIME_BUDGET += 1", "assigned in prepare or torch"),
        ("loader.clock_start = 0", "assigned in prepare or torch"),
        ("type(loader).clock_start, x = 0, 1", "assigned in prepare or torch"),
        ("del loader.events[0]", "assigned in prepare or torch"),
        ("setattr(prepare, 'TIME_BUDGET', 600)", "assigned in prepare or torch"),
        ("vars(prepare)['TIME_BUDGET'] = 600", "assigned in prepare or torch"),
        ("prepare.__dict__.update(TIME_BUDGET=600)", "assigned in prepare or torch"),
        ("import prepare as p; p.TIME_BUDGET = 600", "assigned in prepare or torch"),
        ("clock = prepare.Dataloader; clock.clock_start = 0", "assigned in prepare or torch"),
        ("torch.nn.functional.cross_entropy = min", "assigned in prepare or torch"),
        ("import torch.nn.functional as F; F.softmax = min", "assigned in prepare or torch"),
        ("nn.Module.__call__ = min", "assigned in prepare or torch"),
        ("model.register_forward_hook(min)", "hooks"),
        ("nn.modules.module.register_module_forward_pre_hook(min)", "hooks"),
        ("if not torch.is_grad_enabled(): pass", "eval mode"),
        ("x = torch.is_inference_mode_enabled()", "eval mode"),
        ("late = not model.training", "eval mode"),
        ("def eval(self): pass", "eval mode"),
        ("exec('x = 1')", "inner parts of Python"),
        ("import sys; sys.modules['prepare'] = None", "inner parts of Python"),
        ("import inspect", "inner parts of Python"),
        ("x = prepare.read_tokens", "prepare"),
        ("from prepare import shard_paths; shard_paths('tokens', 'val')", "prepare"),
    ],
)
def test_what_a_change_adds_is_worth_a_look(line, kind):
    after = CANVAS.replace("    model = GPT()\n", f"    model = GPT()\n    {line}\n")
    assert ("    " + line) in after
    found = audit.added_by(CANVAS, after)
    number = after[: after.index(line)].count("\n") + 1
    assert (number, kind, line) in found
    assert {where for where, _, _ in found} == {number}, "what was there before is not told"


@pytest.mark.parametrize(
    "after",
    [
        CANVAS,
        CANVAS.replace("model = GPT()", "network = GPT().eval()"),
        CANVAS.replace("def main", "def helper(x):\n    return x.load, x[0].dump\n\ndef main"),
        CANVAS.replace("idx = idx + 1", "idx[0] = torch.zeros(1)"),
        CANVAS.replace(
            "model(inputs)", "inputs[0] = inputs[1]\n            scale = loader.progress"
        ),
        CANVAS.replace("        if self.training:", "        y = idx\n\n        if self.training:"),
        CANVAS.replace("    return prepare.", "    prepare.evaluate_bpb\n    return prepare."),
        CANVAS.replace("import os\n", "").replace("import torch\n", "import torch\nimport os\n"),
    ],
)
def test_what_was_there_or_is_harmless_is_not_told(after):
    assert audit.added_by(CANVAS, after) == []


def test_a_second_question_for_the_eval_mode_is_told_on_its_own_line():
    after = CANVAS.replace("return idx\n", "return idx if self.training else 0 * idx\n")
    assert audit.added_by(CANVAS, after) == [
        (11, "eval mode", "return idx if self.training else 0 * idx")
    ]


def test_worth_a_look_reads_kept_commits_and_the_ones_before_them(repo):
    plain = repo.commit(**{"train.py": CANVAS})
    hook = repo.commit(**{"train.py": CANVAS + "GPT().register_forward_hook(min)\n"})
    both = repo.commit(**{"train.py": CANVAS + "GPT().register_forward_hook(min)\nopen('größe')\n"})
    broken = repo.commit(**{"train.py": "def"})
    rows = [row(repo.base, 1.0), row(plain, 0.99), row(hook, 0.98), row(both, 0.97)]
    discard = row(repo.commit(**{"train.py": "import socket"}), 1.1, "discard")
    runs = report.load(write(*rows, discard, row(broken, 0.96), row("eeeeeee", 0.95)))
    lines = audit.worth_a_look(runs, "HEAD")
    told = [line for line in lines if hook in line or both in line]
    assert told == [
        f"worth a look: {hook} line 22, hooks: GPT().register_forward_hook(min)",
        f"worth a look: {both} line 23, files: open('größe')",
    ]
    assert any(f"{broken}: train.py is no Python" in line for line in lines)
    assert "worth a look: eeeeeee: git has no train.py of it" in lines
    assert not any("socket" in line for line in lines)
    first = [line for line in lines if plain in line]
    assert any("environment" in line for line in first), "the base is the number 0"


def test_worth_a_look_starts_as_many_processes_for_one_commit_as_for_ten(repo, monkeypatch):
    kept = [row(repo.commit(**{"train.py": f"{i}"}), 1 - i / 100) for i in range(1, 11)]
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    for rows in (kept[:1], kept):
        runs = report.load(write(row(repo.base, 1.0), *rows))
        expected = [f"worth a look: nothing in {len(rows)} kept changes"]
        assert audit.worth_a_look(runs, "HEAD") == expected
    assert len(calls) == 2 * 3


def test_worth_a_look_is_skipped_with_a_reason():
    (line,) = audit.worth_a_look(report.load(write(*BASELINE)), "HEAD")
    assert line.startswith("worth a look: skipped: fatal: not a git repository")
