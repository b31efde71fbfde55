"""analysis.ipynb on good, empty and broken results."""

import ast
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import matplotlib
import nbformat
import pytest
from matplotlib.text import Text
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NOTEBOOK = Path(__file__).parents[1] / "analysis.ipynb"
PROGRAM = NOTEBOOK.with_name("program.md")
NIGHT = NOTEBOOK.parent / "docs" / "nights" / "2026-11-25" / "results.tsv"  # real, on two machines
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
CODE = {
    cell["id"]: "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
}


@pytest.fixture(scope="module")
def functions():
    """Return what the notebook's function cell defines."""
    names = {}
    exec(compile(CODE["functions"], "functions", "exec"), names)
    return types.SimpleNamespace(**names)


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


def picture(functions, path):
    """Draw one results file as the notebook does and return its axes."""
    fig, ax = plt.subplots(figsize=(12, 6), dpi=150, layout="constrained")
    runs = functions.load(path)
    functions.draw(ax, path, runs)
    functions.add_labels(ax, runs)
    fig.canvas.draw()
    return ax


def plotted(ax, label):
    """Return the plotted points whose legend entry starts so, as a dict from run to height."""
    (line,) = [line for line in ax.lines if line.get_label().startswith(label)]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend(ax):
    """Return the legend's entries, counts included."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def run_all(monkeypatch, *paths):
    """Run every code cell in this process; return the tables that it displayed."""
    shown = []
    monkeypatch.setattr(plt, "show", lambda: None)
    names = {"display": shown.append}
    for cell_id, code in CODE.items():
        exec(compile(code, cell_id, "exec"), names)
        if cell_id == "settings" and paths:
            names["RESULTS"] = list(paths)
    return shown


# The file as committed


def test_committed_without_outputs():
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert book.cells[0].cell_type == "markdown" and len(code) == 6
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not any(cell.metadata for cell in book.cells)
    assert book.metadata.kernelspec.name == "python3"


def test_imports_pandas_and_matplotlib_only():
    imported = set()
    for node in ast.walk(ast.parse("\n".join(CODE.values()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"pandas", "matplotlib"}


# In a real kernel


def execute():
    """Run a copy of the notebook in a kernel in the current folder; return its cells by id."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(Path.cwd())}}
    # Sockets are files in this folder: two suites at once would race for TCP ports
    config = Config(KernelManager={"transport": "ipc"})
    NotebookClient(
        book, timeout=120, kernel_name="python3", resources=where, config=config
    ).execute()
    return {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}


def printed(outputs):
    """Return what a cell wrote to stdout; anything on stderr fails the test."""
    assert all(out.get("name") != "stderr" for out in outputs)
    return "".join(out.text for out in outputs if out.output_type == "stream")


def test_kernel_runs_a_good_night():
    repo = Repo()
    base = repo.commit(**{"train.py": "0", "prepare.py": "0", "pyproject.toml": "0"})
    better = repo.commit(**{"train.py": "1"})
    rows = [line.replace("0000001", base, 1) for line in BASELINE]
    write(*rows, row(better, 0.99, description="<script>alert(1)</script> costs $5 or $6"))
    outputs = execute()
    assert re.search(r"best +0\.990000 +" + better, printed(outputs["summary"]))
    (table,) = [out.data for out in outputs["kept"] if "data" in out]
    assert "<script>" not in table["text/html"] and "&lt;script&gt;" in table["text/html"]
    assert "mathjax_ignore" in table["text/html"]
    assert "image/png" in outputs["plot"][0].data
    assert plt.imread("progress.png").shape[:2] == (900, 1800)
    clean = "audit: 1 kept commits, all on the branch, train.py alone"
    assert printed(outputs["audit"]).splitlines() == ["results.tsv", clean]


def test_kernel_names_the_bad_line_and_shows_no_stack():
    write(*BASELINE, "cafecaf\tfast\t44.0\tkeep\tan idea")
    with pytest.raises(CellExecutionError) as failed:
        execute()
    message = "results.tsv line 5: could not convert string to float: 'fast'"
    assert failed.value.evalue == message
    assert failed.value.traceback.splitlines()[-1] == f"ResultsError: {message}"
    assert "in load(path)" not in str(failed.value)


# Every cell, in this process


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (BASELINE[:1], ["runs +1$", "nothing tried yet", "noise +unknown", "gain +0.000000"]),
        ([row(2, 0, "crash", memory_gb=0)], ["1 crashed", "keep rate +0.0%", "every run crashed"]),
        (
            [row(2, 0, "crash", memory_gb=0), *BASELINE],
            ["baseline +0.999800 +0000001, mean of 3"],
        ),
        ([*BASELINE, row(2, 1.2, "discard")], ["best +0.999800 +0000001", "noise +0.000721"]),
    ],
    ids=["single row", "all crashed", "crash first", "no progress"],
)
def test_all_cells_cope_with_little(monkeypatch, capsys, rows, said):
    write(*rows)
    (table,) = run_all(monkeypatch)
    assert len(table) == 0
    text = capsys.readouterr().out
    for pattern in said:
        assert re.search(pattern, text, re.MULTILINE), pattern
    assert Path("progress.png").stat().st_size > 1000


def test_several_files_give_a_panel_and_a_summary_each(monkeypatch, capsys):
    first, second = write(*night(), path="gpu $^$.tsv"), write(*BASELINE, path="gpu1.tsv")
    tables = run_all(monkeypatch, first, second)
    assert [len(table) > 0 for table in tables] == [True, False]
    titles = [ax.get_title(loc="left") for ax in plt.gcf().axes]
    assert [title for title in titles if "enlarged" not in title] == [first, second]
    text = capsys.readouterr().out
    for ax in plt.gcf().axes:
        assert_labels_are_legible(ax)
    assert text.count("  baseline ") == 2 and text.count("audit skipped") == 2


def test_hundred_thousand_runs_in_ten_seconds(monkeypatch):
    draw = random.Random(0)
    rows = list(BASELINE)
    for i in range(100_000):
        status = "keep" if i % 10 == 0 else "discard"
        rows.append(row(16 + i, 1 - i * 1e-6 + draw.random() * 0.01, status, "x" * 100))
    write(*rows)
    start = time.process_time()  # a busy machine is no fault of the notebook's
    (table,) = run_all(monkeypatch)
    assert time.process_time() - start < 10
    assert len(table) == 10_000
    assert_labels_are_legible(plt.gcf().axes[0])


# What is computed


def test_summary_counts_commits_and_not_runs(functions):
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
    text = functions.summary("r", functions.load(write(*rows)))
    # By hand: squares 6, 8 and 2, 2 and 2 of 0.0001 about the means 0.9998 and 0.9870, over 2 + 1
    for pattern in [
        "runs +10$",
        "rows +10: 6 kept, 2 discarded, 2 crashed$",
        "experiments +5: 2 kept, 2 discarded, 1 crashed$",
        "keep rate +40.0%$",
        "baseline +0.999800 +0000001, mean of 3$",
        "noise +0.000611$",
        "best +0.987000 +0000005, run 7: marginal$",
        "gain +0.012800 +1.28%, 20.9 times the noise$",
    ]:
        assert re.search(pattern, text, re.MULTILINE), pattern
    assert "note" not in text


def test_kept_changes_ranks_gains_and_flags_losses_and_noise(functions):
    rows = [
        *BASELINE,  # noise 0.000721; that of a difference of two runs 0.00102
        row(2, 0.9994, description="a gain of the noise on seed 42"),
        row(3, 0.9900, description="large"),
        row(4, 0.9700, "discard"),
        row(5, 0.9905, description="simpler, worse"),
        row(6, 0.9870, description="well above the noise"),
        row(7, 0.9870, description="simpler, equal"),
        row(8, 0.9910, description="a mistake"),
    ]
    runs = functions.load(write(*rows))
    kept = functions.kept_changes(runs)
    assert kept.index.tolist() == [f"000000{i}" for i in (3, 6, 2, 7, 5, 8)]
    assert kept.gain.tolist() == pytest.approx([0.0094, 0.0035, 0.001, 0, -0.0005, -0.004])
    assert kept.error.tolist() == pytest.approx([(2 * 52e-8) ** 0.5] * 6)
    remarks = ["", "", "within noise", "within noise", "worse, within noise", "worse"]
    assert kept.remark.tolist() == remarks
    assert kept.run.tolist() == [5, 8, 4, 9, 7, 10]
    assert "note         kept but worse than the parent: run 7, 10" in functions.summary("r", runs)


def test_kept_but_worse_is_said_without_a_known_noise(functions):
    runs = functions.load(write(row(1, 1.0), row(2, 0.999999), row(3, 1.0)))
    assert functions.kept_changes(runs).remark.tolist() == ["", "worse"]
    assert "kept but worse than the parent: run 3" in functions.summary("r", runs)


def test_gain_compares_the_same_seeds(functions):
    rows = [
        row(1, 0.980, description="baseline, seed 42"),  # the lucky seed
        row(1, 1.000, description="baseline, seed 43"),
        row(2, 0.979, description="wide"),
        row(3, 0.970, description="deep, seed 7"),
        row(2, 0.995, description="wide again, seed 43"),
    ]
    table, _ = functions.experiments(functions.load(write(*rows)))
    gains = table.set_index("commit").gain
    # wide ran under both seeds by now; no run of its under seed 7, so deep meets all of them
    assert gains["0000002"] == pytest.approx((0.980 + 1.000) / 2 - (0.979 + 0.995) / 2)
    assert gains["0000003"] == pytest.approx((0.979 + 0.995) / 2 - 0.970)
    for known in (rows[:3], [rows[0], *rows[2:]]):  # else wide alone has a seed 43
        table, _ = functions.experiments(functions.load(write(*known)))
        assert table.gain.iloc[1] == pytest.approx(0.001)


def test_best_is_the_last_kept_commit_with_its_fresh_runs(functions):
    rows = [
        *BASELINE,
        row(2, 0.9960),
        row(3, 0.9970, description="shorter"),
        row(3, 0.9974, description="shorter again, seed 43"),
        row(4, 0.9990, "discard"),
    ]
    text = functions.summary("r", functions.load(write(*rows)))
    assert re.search("best +0.997200 +0000003, run 5: shorter$", text, re.MULTILINE)


@pytest.mark.parametrize("seed", range(3))
def test_gains_of_single_runs_add_up_to_the_whole_way(functions, seed):
    rows = night(seed)[2:]
    kept = functions.kept_changes(functions.load(write(*rows)))
    first, *_, last = [line.split("\t")[1] for line in rows if "\tkeep\t" in line]
    assert kept.gain.sum() == pytest.approx(float(first) - float(last), abs=1e-9)


def test_lucky_baseline_seed_is_no_progress(functions):
    ax = picture(functions, write(*BASELINE, row(2, 0.9995), row(3, 0.9980), row(4, 0.9985)))
    (stairs,) = [line for line in ax.lines if line.get_label().startswith("running best")]
    assert stairs.get_xdata().tolist() == [1, 4, 5, 6, 6]
    assert stairs.get_ydata().tolist() == pytest.approx([0.9998, 0.9995, 0.998, 0.9985, 0.9985])


def test_crash_of_a_repeat_leaves_the_verdict(functions):
    rows = [*BASELINE, row(2, 0.9980), row(3, 0.9970, "discard"), row(2, 0, "crash")]
    kept = functions.kept_changes(functions.load(write(*rows)))
    assert kept.index.tolist() == ["0000002"]


def test_baseline_run_again_at_dawn_counts_as_repeat(functions):
    rows = [row(1, 1.0), row(2, 0.99), row(1, 1.0030), row(1, 1.0010, description="baseline")]
    rows = [
        rows[0].replace("an idea", "baseline"),
        rows[1],
        rows[2].replace("an idea", ""),
        rows[3],
    ]
    table, noise = functions.experiments(functions.load(write(*rows)))
    mean = (1.0 + 1.003 + 1.001) / 3
    squares = sum((value - mean) ** 2 for value in (1.0, 1.003, 1.001))
    assert noise == pytest.approx((squares / 2) ** 0.5)
    assert table.val_bpb.tolist() == pytest.approx([mean, 0.99])
    assert table.run.tolist() == [1, 2]


# The same as the rule's


def rule():
    """Return what the Python in program.md's Log defines before it reads the ledger."""
    log = PROGRAM.read_text("utf-8")
    names = {}
    exec(re.search(r"^# Log\n.*?<<'EOF'\n(.*?)^last, ", log, re.M | re.S)[1], names)
    return types.SimpleNamespace(**names)


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
    """Return the parts of NIGHT, one a machine, each run as one of ledger()."""
    parts = []
    for line in NIGHT.read_text("utf-8").splitlines()[1:]:
        commit, value, _, status, text = line.split("\t")
        seed = re.search(r", seed (\d+)$", text)
        if text == "baseline, seed 42":
            parts.append([])
        run = (int(commit, 16), int(seed[1]) if seed else 42, status, text, float(value))
        parts[-1].append(run)
    return parts


@pytest.mark.parametrize("runs", [*(ledger(random.Random(i)) for i in range(50)), *real_night()])
def test_noise_best_and_gains_are_the_rules(functions, runs):
    judge, pooled_noise = rule().judge, rule().pooled_noise
    rows = [row(commit, value, status, text) for commit, _, status, text, value in runs]
    loaded = functions.load(write(*rows))
    assert loaded.seed.tolist() == [run[1] for run in runs]
    table, noise = functions.experiments(loaded)

    by_commit, kept = {}, []
    for commit, run_seed, status, _, value in runs:
        if status != "crash":
            by_commit.setdefault(commit, []).append((run_seed, value))
        if status == "keep" and commit not in kept:
            kept.append(commit)
    rule_noise = pooled_noise({key: [bpb for _, bpb in x] for key, x in by_commit.items()})
    assert math.isnan(noise) if math.isnan(rule_noise) else noise == pytest.approx(rule_noise)
    table = table.set_index("commit")
    for parent, idea in itertools.pairwise(kept):
        shared = dict(by_commit[idea]).keys() & dict(by_commit[parent]).keys()  # as when it ruled
        ours = [run for run in by_commit[idea] if run[0] in shared] or by_commit[idea]
        _, gain, _ = judge(ours, by_commit[parent], rule_noise, False)
        assert table.gain[f"{idea:07x}"] == pytest.approx(gain, abs=1e-12)
    summary = functions.summary("r", loaded)
    for word, commit in [("baseline", kept[0]), ("best", kept[-1])]:
        value = sum(bpb for _, bpb in by_commit[commit]) / len(by_commit[commit])
        said = re.search(rf"^  {word} +(\S+) +(\w+)", summary, re.MULTILINE)
        assert said[2] == f"{commit:07x}"
        assert float(said[1]) == pytest.approx(value, abs=6e-7)


# Ledgers that people have


def told(functions, *rows, header=HEADER):
    """Return the parts of a file and the text that the notebook prints about them."""
    Path("results.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    parts = functions.split("results.tsv", functions.load("results.tsv"))
    return parts, "".join(functions.summary(path, runs) for path, runs in parts.items())


def test_rows_without_a_hash_stand_each_for_itself(functions):
    rows = [
        row("baseline", 1.0, description="baseline"),
        row("exp9", 0.99, description="wide"),
        row("exp9", 0.98, description="wide"),
        row("", 0.995, "discard"),
        row("", 0, "crash", memory_gb=0),
        row("HEAD~1", 1.1, "discard"),
        row("--help0", 1.1, "discard"),
    ]
    _, text = told(functions, *rows)
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
def test_columns_go_by_name(functions, header, line, note):
    parts, text = told(functions, line, header=header)
    (runs,) = parts.values()
    assert runs[["val_bpb", "status", "description"]].iloc[0].tolist() == [0.9, "keep", "wide"]
    assert runs.commit.iloc[0] == ("cafecaf" if "commit" in header else "")
    assert [line for line in text.splitlines() if "note" in line] == (
        [f"  note         {note}"] if note else []
    )


def test_baseline_is_a_status(functions):
    rows = [
        row(1, 1.0, "baseline", "as it is"),
        row(1, 1.001, "baseline", "as it is, seed 43"),
        row(2, 0.99),
    ]
    parts, text = told(functions, *rows)
    assert len(parts) == 1 and "note" not in text
    assert "1: 1 kept, 0 discarded, 0 crashed" in text
    assert re.search("baseline +1.000500 +0000001, mean of 2$", text, re.MULTILINE)


@pytest.mark.parametrize("value", ["0.000000", "0", "", "nan", "inf", "-", "N/A"])
def test_discard_without_a_value_is_a_crash(functions, value):
    _, text = told(functions, *BASELINE, f"abcdef1\t{value}\t44.0\tdiscard\tan idea", row(3, 0.99))
    assert "2: 1 kept, 0 discarded, 1 crashed" in text
    assert "note         discard without a val_bpb, counted as a crash: run 4\n" in text


def test_comments_and_repeated_headers_are_left_out(functions):
    parts, text = told(functions, *BASELINE, "# resumed", HEADER, row(3, 0.99))
    (runs,) = parts.values()
    assert len(runs) == 4
    assert "note         comment or header left out: line 5, 6\n" in text


def test_ideas_that_were_never_committed_are_kept_apart(functions):
    rows = [
        *BASELINE,
        row(1, 0.990, "keep", "wide"),
        row(1, 1.010, "discard", "deep"),
        row(1, 0.985, "keep", "warmdown"),
        row(1, 0, "crash", "huge", memory_gb=0),
        row(1, 0.985, "discard", "warmdown"),
    ]
    parts, text = told(functions, *rows)
    assert "5: 2 kept, 2 discarded, 1 crashed" in text
    assert re.search("baseline +0.999800 +0000001, mean of 3$", text, re.MULTILINE)
    assert re.search("noise +0.000721$", text, re.MULTILINE)
    assert re.search("best +0.985000 +0000001, run 6: warmdown$", text, re.MULTILINE)
    assert re.search("note +one commit, several ideas .*: 0000001$", text, re.MULTILINE)
    kept = functions.kept_changes(*parts.values())
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
def test_a_commit_of_two_ideas_is_warned_of(functions, one, other, num_kept):
    parts, text = told(functions, *BASELINE, row(2, 0.99, *one), row(2, 0.98, *other))
    kept = functions.kept_changes(*parts.values())
    assert kept.num_runs.tolist() == [1] * num_kept
    assert re.search("note +one commit, several ideas .*: 0000002$", text, re.MULTILINE)


@pytest.mark.parametrize("verdict", ["keep", "discard"])
def test_repeats_of_an_idea_and_of_a_champion_are_one(functions, verdict):
    rows = [
        row(1, 1.0, description="baseline"),
        row(1, 1.001, description="Start the night again, seed 43"),
        row(2, 0.99, verdict, "wide"),
        row(2, 0.992, verdict, "wide, seed 43"),
        row(1, 1.002, description="again"),
        row(1, 1.003, description="baseline run 2"),
        row(1, 1.004, description="Baseline (seed 45)"),
    ]
    parts, text = told(functions, *rows)
    table, _ = functions.experiments(*parts.values())
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
        [
            line.replace("keep", "baseline").replace("baseline on the other card", "ten minutes")
            for line in OTHER_CARD
        ],
    ],
    ids=["other commit", "same commit", "same words", "status"],
)
def test_a_second_baseline_is_measured_alone(functions, monkeypatch, capsys, second):
    rows = [*BASELINE, row(2, 0.9900), *second, row(3, 1.0850, description="deep"), row(2, 1.2)]
    write(*rows)
    tables = run_all(monkeypatch)
    assert [table.run.tolist() for table in tables] == [[4], [7, 8]]
    assert tables[1].gain.tolist() == pytest.approx([0.0010, 1.0850 - 1.2])
    text = capsys.readouterr().out
    assert "note         2 baselines, each measured alone: those of run 1, 5\n" in text
    values = re.findall(r"^  baseline +(\S+) .* of (\d)$", text, re.MULTILINE)
    assert values == [("0.999800", "3"), ("1.086200", "2")]
    titles = [ax.get_title(loc="left") for ax in plt.gcf().axes]
    assert titles == ["results.tsv", "results.tsv from run 5"]
    assert functions.kept_changes(functions.load("results.tsv")).run.tolist() == [4, 7, 8]


def test_baselines_of_other_machines_on_top_are_left_out(functions):
    parts, text = told(functions, *OTHER_CARD, *BASELINE, row(2, 0.99))
    (runs,) = parts.values()
    assert list(parts) == ["results.tsv"] and runs.index[0] == 3
    assert "note         baseline without an idea after it, left out: run 1\n" in text
    assert re.search("baseline +0.999800 ", text)


def test_an_idea_that_begins_with_the_word_baseline_is_an_idea(functions):
    for text in ("baseline + SwiGLU", "baseline with warmup", "Baseline-style init"):
        parts, _ = told(functions, *BASELINE, row(2, 0.99, description=text))
        (runs,) = parts.values()
        assert len(functions.kept_changes(runs)) == 1, text


def test_a_discarded_baseline_is_said(functions):
    _, text = told(functions, row(1, 1.0, "discard", "baseline"), row(2, 0.99))
    assert "note         the baseline, run 1, is marked discard\n" in text
    _, text = told(functions, *BASELINE, row(2, 0.99))
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
def test_odd_line_ends(functions, content):
    text = content.format(
        h=HEADER, a=row("abcdef1", 1, "keep", "one"), b=row(2, 0.9, "discard", "two")
    )
    Path("results.tsv").write_bytes(text.encode())
    runs = functions.load("results.tsv")
    columns = ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert runs[columns].to_dict("list") == {
        "commit": ["abcdef1", "0000002"],
        "val_bpb": [1.0, 0.9],
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
def test_hostile_descriptions_keep_their_row(functions, description, expected):
    runs = functions.load(write(row(1, 1), row(2, 0.9, description=description), row(3, 0.8)))
    assert runs.commit.tolist() == ["0000001", "0000002", "0000003"]
    assert runs.description[2] == expected


def test_hashes_that_look_like_numbers_stay_text(functions):
    assert functions.load(write(row("1234567", 1), row("00012e4", 0.9))).commit.tolist() == [
        "1234567",
        "00012e4",
    ]


def test_bytes_that_are_no_utf8_do_not_stop_it(functions):
    Path("results.tsv").write_bytes(f"{HEADER}\n{row(1, 1)}".encode() + b" \xff\xfe\n")
    assert functions.load("results.tsv").description[1].startswith("an idea ")


# Files that are wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("", "line 1: empty file"),
        ("\ufeff\n\n", "line 1: empty file"),
        (HEADER + "\n", "a header and no runs yet"),
        (HEADER.replace("\t", ",") + "\n", "line 1: header 'commit,val_bpb,"),
        (row(1, 1) + "\n", "line 1: header '0000001"),
        (
            "commit\tbpb\tstatus\tidea\n",
            "line 1: header 'commit\\tbpb\\tstatus\\tidea', no val_bpb, description",
        ),
        ("commit\tval_bpb\tstatus\tdescription\n", "a header and no runs yet"),
    ],
)
def test_bad_file_is_named(functions, content, message):
    if content is not None:
        Path("results.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(functions.ResultsError, match=f"^results.tsv:? {re.escape(message)}.*$"):
        functions.load("results.tsv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abcdef1\t0.99\t44.0\tkeep", "4 columns, expected 5"),
        ("abcdef1 0.99 44.0 keep an idea", "1 columns, expected 5"),
        ("abcdef1\t0.99\t44.0\tkept\tan idea", "status 'kept'"),
        ("abcdef1\t0.99\t44.0\t\tan idea", "status ''"),
        ("abcdef1\t0,99\t44.0\tkeep\tan idea", "could not convert string to float: '0,99'"),
        ("abcdef1\t0.99\t44 GB\tkeep\tan idea", "could not convert string to float: '44 GB'"),
        ("abcdef1\tbroken\t0.0\tcrash\tan idea", "could not convert string to float: 'broken'"),
        ("abcdef1\tnan\t44.0\tkeep\tan idea", "a keep with val_bpb 'nan'"),
        ("abcdef1\t-0.99\t44.0\tdiscard\tan idea", "a discard with val_bpb '-0.99'"),
        ("abcdef1\t\t44.0\tbaseline\tan idea", "a baseline with val_bpb ''"),
        ("abcdef1\t\t44.0\tkeep\tan idea", "a keep with val_bpb ''"),
        ("abcdef1\t-inf\t44.0\tkeep\tan idea", "a keep with val_bpb '-inf'"),
        ("abcdef1\t0.000000\t0.0\tkeep\tan idea", "a keep with val_bpb '0.000000'"),
        ("abcdef1\t0.99\t-1\tkeep\tan idea", "a keep with memory_gb '-1'"),
    ],
)
def test_bad_line_is_named(functions, line, message):
    path = write(*BASELINE, "", line, row(3, 0.9))
    with pytest.raises(functions.ResultsError) as failed:
        functions.load(path)
    assert str(failed.value).startswith(f"results.tsv line 6: {message}")
    assert "\n" not in str(failed.value)


def test_error_stays_short_however_long_the_line(functions):
    with pytest.raises(functions.ResultsError) as failed:
        functions.load(write("f\t1\t1\tkeep" + "p" * 100_000 + "\tx"))
    assert len(str(failed.value)) < 300


def test_all_bad_lines_are_named_at_once(functions):
    bad = [row(2, 0.9, "kept")] * 12
    with pytest.raises(functions.ResultsError) as failed:
        functions.load(write(*BASELINE, *bad[:7], row(3, 0.9), *bad[7:]))
    *named, last = str(failed.value).split("\n")
    numbers = [*range(5, 12), *range(13, 16)]
    assert [line.split(":")[0] for line in named] == [f"results.tsv line {n}" for n in numbers]
    assert last == "and 2 more"
    assert failed.value._render_traceback_()[0].startswith("ResultsError: results.tsv line 5: ")
    assert len(failed.value._render_traceback_()) == 11


def test_crash_may_leave_its_numbers_out(functions):
    runs = functions.load(write(*BASELINE, "abcdef1\t\tnan\tcrash\tout of memory"))
    assert math.isnan(runs.val_bpb[4])


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
            if line.get_label().startswith("discarded"):
                assert box.count_contains(ax.transData.transform(line.get_xydata()[:2000])) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_a_night_are_legible_and_nearly_complete(functions, seed):
    rows = night(seed)
    ax = picture(functions, write(*rows))
    assert_labels_are_legible(ax)
    num_kept = sum("\tkeep\t" in line for line in rows) - len(BASELINE)
    assert num_kept >= 10 and len(ax.texts) >= 0.8 * num_kept


def test_the_real_night_reads_without_a_note_and_names_all_that_was_kept(functions):
    runs = functions.load(NIGHT)
    assert not runs.attrs["notes"]
    parts = functions.split(NIGHT, runs)
    style = {"figsize": (12, 6 * len(parts)), "dpi": 150, "layout": "constrained"}
    fig, axes = plt.subplots(len(parts), **style)
    for ax, (path, runs) in zip(axes, parts.items(), strict=True):
        functions.draw(ax, path, runs)
    for ax, runs in zip(axes, parts.values(), strict=True):
        functions.add_labels(ax, runs)
    fig.canvas.draw()
    for ax, runs in zip(axes, parts.values(), strict=True):
        assert_labels_are_legible(ax)
        assert len(ax.texts) == len(functions.kept_changes(runs))


def test_the_committed_picture_is_of_the_real_night(monkeypatch):
    Path("results.tsv").write_bytes(NIGHT.read_bytes())
    run_all(monkeypatch)
    drawn, committed = plt.imread("progress.png"), plt.imread(NOTEBOOK.with_name("progress.png"))
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.01


def test_labels_of_fifteen_kept_in_a_row_are_legible(functions):
    rows = [
        row(2 + i, 0.99 - i * 2e-5, description=f"change {i} of a long list") for i in range(15)
    ]
    crowd = [row(50 + i, 1.0 - i * 1e-4, "discard") for i in range(60)]
    ax = picture(functions, write(*BASELINE, *rows, *crowd))
    assert_labels_are_legible(ax)
    assert len(ax.texts) >= 4
    # The largest gain is the last to go without
    assert "change 0 of a long list" in [text.get_text() for text in ax.texts]


def test_labels_are_literal_and_short(functions):
    hostile = [r"$\frac{", "$$", r"\$ 5^^", "a" * 500, "word " * 300, "", "{x} %s"]
    rows = [row(2 + i, 0.99 - 0.01 * i, description=text) for i, text in enumerate(hostile)]
    ax = picture(functions, write(*BASELINE, *rows))
    ax.figure.savefig("progress.png")
    texts = {text.get_text() for text in ax.texts}
    assert {r"$\frac{", "$$", r"\$ 5^^", "{x} %s"} <= texts
    assert "0000007" in texts, "an empty description leaves the hash"
    assert "a" * 39 + "…" in texts and max(map(len, texts)) == 40


def test_diverged_run_does_not_flatten_the_staircase(functions):
    rows = [
        *BASELINE,
        row(2, 0.98),
        row(3, 1e30, "discard"),
        row(4, 7.5, "discard"),
        row(5, 0.1, "discard"),
    ]
    ax = picture(functions, write(*rows))
    low, high = ax.get_ylim()
    assert 0.97 < low < 0.98 and 1.0004 < high < 1.02
    assert plotted(ax, "above the axis") == {5: high, 6: high}
    assert plotted(ax, "below the axis") == {7: low}
    assert not any(entry.startswith("discarded") for entry in legend(ax))
    assert {"above the axis (2)", "below the axis (1)", "kept (1)"} <= set(legend(ax))


def test_crash_is_drawn_at_the_foot_and_not_at_zero(functions):
    crash = row(9, 0, "crash", memory_gb=0)
    ax = picture(functions, write(crash, *BASELINE, row(2, 0.99), crash, row(3, 1.0, "discard")))
    low, high = ax.get_ylim()
    assert low > 0.98
    crashes = plotted(ax, "crashed")
    assert list(crashes) == [1, 6]
    assert all(low < height < low + 0.05 * (high - low) for height in crashes.values())
    assert plotted(ax, "kept") == {5: 0.99} and plotted(ax, "discarded") == {7: 1.0}


@pytest.mark.parametrize("rows", [BASELINE[:1], BASELINE, [*BASELINE, row(2, 0.9999)]])
def test_scale_without_progress_shows_the_baseline_and_its_noise(functions, rows):
    ax = picture(functions, write(*rows))
    low, high = ax.get_ylim()
    assert all(low < float(line.split("\t")[1]) < high for line in rows)
    assert 0.001 < high - low < 0.02


def test_scale_without_progress_shows_the_nearer_half_of_the_discarded(functions):
    rows = [row(1 + i, 1 + i / 1e5, "discard") for i in range(41)]
    ax = picture(functions, write(row(1, 1.0), *rows[1:]))
    assert 20 <= len(plotted(ax, "discarded")) < 30


def test_kept_runs_beyond_the_axis_are_triangles_once(functions):
    rows = [*BASELINE, row(2, 0.98), row(3, 1.5), row(4, 0.975), row(5, 3.0, "discard")]
    ax = picture(functions, write(*rows))
    high = ax.get_ylim()[1]
    assert high < 1.1
    assert plotted(ax, "kept, above the axis") == {5: high}
    assert plotted(ax, "above the axis") == {7: high}
    assert plotted(ax, "kept (") == {4: 0.98, 6: 0.975}
    marks = [run for line in ax.lines if line.get_marker() in "o^v" for run in line.get_xdata()]
    assert sorted(marks) == list(range(1, 8))


def test_repeats_stand_round_their_mean(functions):
    rows = [*BASELINE, row(2, 0.990), row(2, 0.992, description="an idea, seed 43")]
    ax = picture(functions, write(*rows))
    assert plotted(ax, "repeats") == {1: 1.0004, 2: 0.999, 3: 1.0, 4: 0.99, 5: 0.992}
    assert plotted(ax, "kept (") == {4: pytest.approx(0.991)}


def test_noise_is_a_band_about_the_best(functions):
    ax = picture(functions, write(*BASELINE, row(2, 0.99), row(3, 1.0, "discard")))
    (band,) = [area for area in ax.collections if area.get_label().startswith("± noise")]
    noise = 52e-8**0.5
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
    for run, best in [(1, 0.9998), (4, 0.9998), (4, 0.99), (5, 0.99)]:
        assert (run, round(best - noise, 6)) in corners and (run, round(best + noise, 6)) in corners
    low, high = ax.get_ylim()
    assert low < 0.99 - noise and 0.9998 + noise < high
    assert not picture(functions, write(row(1, 1.0), row(2, 0.9))).collections


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


def test_late_small_gains_are_visible_in_a_long_night(functions, monkeypatch):
    write(*long_night())
    run_all(monkeypatch)
    whole, late = plt.gcf().axes
    assert whole.get_title(loc="left") == "results.tsv"
    assert late.get_title(loc="left") == "results.tsv: from run 2 on, enlarged"
    assert plotted(whole, "baseline") == {1: 1.0}
    gains = late.transData.transform([(1, 0.9395), (1, 0.94)])[:, 1]
    assert gains[1] - gains[0] > 4 * plt.gcf().dpi / 72, "four points are as high as a dot"
    assert len(plotted(late, "kept (")) == 16
    assert len(late.texts) >= 12
    for ax in (whole, late):
        assert_labels_are_legible(ax)


@pytest.mark.parametrize("rows", [BASELINE, night()[:20], [*BASELINE, *OTHER_CARD]])
def test_short_nights_have_one_picture(functions, rows):
    runs = functions.load(write(*rows))
    assert functions.stretches(runs) == [1]


def test_nothing_within_noise_is_enlarged(functions):
    rows = [*BASELINE, *(row(2 + i, 0.9985 - i * 1e-4) for i in range(10))]
    assert functions.stretches(functions.load(write(*rows))) == [1]
    assert functions.stretches(functions.load(write(*rows[2:]))) == [1, 5]


def test_legend_does_not_narrow_the_picture(functions):
    rows = [*BASELINE, row(2, 0.99), row(3, 0.995, "discard"), row(4, 0, "crash", memory_gb=0)]
    rows += [row(5, 2.0), row(6, 2.0, "discard"), row(7, 0.1, "discard"), row(8, 0.989)]
    ax = picture(functions, write(*rows))
    assert len(legend(ax)) == 10
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
            Path(name).write_text(content)
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
def audit(functions, repo):
    """Return a function that audits rows that follow the repository's baseline."""

    def audit(*rows, branch="HEAD"):
        path = write(*(row(repo.base, 1.0) for _ in range(3)), *rows)
        return functions.audit(path, functions.load(path), branch)

    return audit


def test_audit_passes_a_clean_night(repo, audit):
    kept = [row(repo.commit(**{"train.py": f"{i}"}), 0.99 - i / 1000) for i in range(1, 4)]
    crash = row("fffffff", 0, "crash", memory_gb=0)
    gone = row("eeeeeee", 1.1, "discard")
    expected = ["audit: 3 kept commits, all on the branch, train.py alone"]
    assert audit(*kept, crash, gone) == expected
    assert audit(*kept, branch="night") == expected


def test_audit_names_a_kept_commit_that_touched_more(repo, audit):
    good = repo.commit(**{"train.py": "1"})
    cheat = repo.commit(**{"train.py": "2", "prepare.py": "easier"})
    other = repo.commit(**{"odd name.txt": "x"})
    nothing = repo.commit()
    assert audit(*(row(commit, 0.9) for commit in (good, cheat, other, nothing))) == [
        "audit: prepare.py differs between the baseline and HEAD",
        f"audit: {cheat} is kept but changed prepare.py, train.py, not train.py alone",
        f"audit: {other} is kept but changed odd name.txt, not train.py alone",
        f"audit: {nothing} is kept but changed nothing, not train.py alone",
    ]


def test_audit_sees_a_rename_as_two_files(repo, audit):
    repo.git("mv", "train.py", "model.py")
    renamed = repo.commit()
    (line,) = audit(row(renamed, 0.9))
    assert "model.py, train.py" in line


def test_audit_names_a_kept_commit_off_the_branch(repo, audit):
    lost = repo.commit(**{"train.py": "1"})
    repo.git("branch", "elsewhere")
    repo.git("reset", "--quiet", "--hard", "HEAD~1")
    unknown = "eeeeeee"
    assert audit(row(lost, 0.9), row(unknown, 0.8)) == [
        f"audit: {lost} is kept but not on HEAD",
        f"audit: {unknown} is kept but not on HEAD",
    ]
    assert audit(row(lost, 0.9), branch="elsewhere") == [
        "audit: 1 kept commits, all on the branch, train.py alone"
    ]


def test_audit_names_a_discarded_commit_never_reset(repo, audit):
    left = repo.commit(**{"train.py": "1"})
    assert audit(row(left, 1.1, "discard")) == [f"audit: {left} is discarded but still on HEAD"]


def test_audit_notes_a_contract_changed_outside_the_log(repo, audit):
    repo.commit(**{"pyproject.toml": "numpy"})
    assert audit() == ["audit: pyproject.toml differs between the baseline and HEAD"]


def test_audit_looks_at_what_a_merge_brought_in(repo, audit):
    repo.git("checkout", "--quiet", "-b", "side")
    repo.commit(**{"prepare.py": "easier"})
    repo.git("checkout", "--quiet", "night")
    repo.commit(**{"train.py": "1"})
    repo.git("merge", "--quiet", "--no-edit", "side")
    merge = repo.git("rev-parse", "--short=7", "HEAD")
    assert f"audit: {merge} is kept but changed prepare.py, not train.py alone" in audit(
        row(merge, 0.9)
    )


def test_audit_says_that_the_baseline_is_missing(functions, repo):
    kept = repo.commit(**{"train.py": "1"})
    path = write(row("eeeeeee", 1.0), row(kept, 0.9))
    assert functions.audit(path, functions.load(path), "HEAD") == [
        "audit: the baseline eeeeeee was not found on HEAD; is BRANCH right?"
    ]


def test_audit_reads_from_a_subfolder_and_under_odd_settings(functions, repo):
    for name in ("log.showSignature", "diff.relative", "diff.noprefix"):
        repo.git("config", name, "true")
    repo.git("config", "color.ui", "always")
    repo.git("config", "diff.renames", "copies")
    kept = repo.commit(**{"train.py": "1"})
    Path("logs").mkdir()
    path = write(row(repo.base, 1.0), row(kept, 0.9), path="logs/gpu0.tsv")
    clean = ["audit: 1 kept commits, all on the branch, train.py alone"]
    assert functions.audit(path, functions.load(path), "HEAD") == clean
    repo.commit(**{"prepare.py": "easier"})
    assert "prepare.py differs" in functions.audit(path, functions.load(path), "HEAD")[0]


def test_audit_of_a_worktree_uses_its_own_head(functions, repo):
    repo.git("worktree", "add", "--quiet", "-b", "night-gpu1", "gpu1")
    os.chdir("gpu1")
    kept = repo.commit(**{"train.py": "1"})
    os.chdir("..")
    path = write(row(repo.base, 1.0), row(kept, 0.9), path="gpu1/results.tsv")
    assert functions.audit(path, functions.load(path), "HEAD") == [
        "audit: 1 kept commits, all on the branch, train.py alone"
    ]


def test_audit_starts_as_many_processes_for_one_commit_as_for_thirty(repo, audit, monkeypatch):
    kept = [row(repo.commit(**{"train.py": f"{i}"}), 0.99) for i in range(1, 31)]
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    assert audit(*kept[:1])[0].startswith("audit: 1 kept")
    num_calls = len(calls)
    assert audit(*kept)[0].startswith("audit: 30 kept")
    assert len(calls) == 2 * num_calls <= 6


def test_audit_is_skipped_with_a_reason(functions, monkeypatch):
    runs = functions.load(write(*BASELINE))
    (line,) = functions.audit("results.tsv", runs, "HEAD")
    assert line.startswith("audit skipped: fatal: not a git repository")
    Repo().commit()
    (line,) = functions.audit("results.tsv", runs, "no-such-branch")
    assert line.startswith("audit skipped: fatal: bad revision 'no-such-branch'")
    monkeypatch.setenv("PATH", "")
    (line,) = functions.audit("results.tsv", runs, "HEAD")
    assert line.startswith("audit skipped: ") and "'git'" in line


def test_audit_skips_rows_without_a_commit_of_their_own(functions, repo, audit):
    kept = repo.commit(**{"train.py": "1"})
    skipped = "audit: rows without a commit of their own were skipped: run"
    assert audit(
        row(kept, 0.99), row("exp9", 0.98), row("", 0.97), row("eeeeeee", 1, "discard")
    ) == [
        "audit: 1 kept commits, all on the branch, train.py alone",
        f"{skipped} 5, 6",
    ]
    lines = audit(row(kept, 0.99, description="wide"), row(kept, 0.98, "discard", "deep"))
    assert lines[-1] == f"{skipped} 4, 5"
    path = write(row("baseline", 1.0), *(row(f"exp{i}", 1 - i / 100) for i in range(12)))
    assert functions.audit(path, functions.load(path), "HEAD") == [
        f"{skipped} 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..."
    ]


def test_audit_without_a_baseline_is_skipped(functions, repo):
    runs = functions.load(write(row(1, 0, "crash", memory_gb=0)))
    (line,) = functions.audit("results.tsv", runs, "HEAD")
    assert line.startswith("audit skipped: every run crashed")
