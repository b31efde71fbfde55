"""program.md's own shell blocks, run in a scratch clone by a scripted stand-in for the agent.

Every block runs as it stands, in a bash of its own; only variables at its top are set. In the fast
tests `uv` is a stub and train.py a canvas that prints figures; the last test runs the real one.
"""

import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (ROOT / "program.md").read_text()
BLOCKS = dict(re.findall(r"^```bash\n# (\w+)\n(.*?)^```$", PROGRAM, re.M | re.S))
TRACKED = [".gitignore", "README.md", "prepare.py", "program.md", "pyproject.toml", "train.py"]
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"

SUMMARY = """\
---
val_bpb:          {bpb}
training_seconds: 300.1
total_seconds:    325.9
peak_vram_mb:     {mb}
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8
"""

CANVAS = """\
import os, sys
BPB = {bpb}
MB = {mb}
seed = int(os.environ["AUTORESEARCH_SEED"])
print("step     1 (  0.1%) | loss 9.0102 | val_bpb: 0.1 | peak_vram_mb: 1", flush=True)
{last_words}
print({summary!r}.format(bpb="%.6f" % BPB[seed], mb=MB[seed]), end="")
"""

STUB_UV = """\
#!/usr/bin/env bash
echo "${{AUTORESEARCH_SEED-unset}} $*" >> calls.log
echo lock >> uv.lock
[ "$1" = run ] && shift && exec {python} {options} "$@"
"""


def canvas(bpb=(0.9979, 0.9975, 0.9983), mb=(45060.2, 45060.2, 45060.2), last_words=""):
    """Return a train.py that prints these figures for the seeds 42, 43 and 44."""
    bpb, mb = (dict(zip((42, 43, 44), values)) for values in (bpb, mb))  # noqa: B905
    return CANVAS.format(bpb=bpb, mb=mb, last_words=last_words, summary=SUMMARY)


def inline(start):
    """Return the one command in program.md's prose that begins so."""
    (command,) = {c for c in re.findall(r"`([^`\n]+)`", PROGRAM) if c.startswith(start)}
    return command


class Agent:
    """Stand-in for the agent: remembers nothing between two blocks but what program.md tells it."""

    def __init__(self, folder, stub_bin, **env):
        self.folder = folder
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH", "GIT_"))}
        who = {f"GIT_{r}_{k}": "agent" for r in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")}
        self.env = clean | who | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"} | env
        self.env["PATH"] = f"{stub_bin}{os.pathsep}{os.environ['PATH']}"

    def bash(self, script):
        """Run a script in a bash of its own and return (status, stdout and stderr)."""
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout

    def block(self, name, **variables):
        """Run a block of program.md, setting variables at its top and nothing else."""
        lines = BLOCKS[name].splitlines()
        top = next(i for i, line in enumerate(lines) if not re.match(r"\w+=", line))
        for variable, value in variables.items():
            (at,) = (i for i in range(top) if lines[i].startswith(f"{variable}="))
            lines[at] = f"{variable}={shlex.quote(str(value))}"
        return self.bash("\n".join(lines))

    def git(self, *args):
        status, out = self.bash(shlex.join(["git", *args]))
        assert status == 0, out
        return out.rstrip("\n")

    def head(self):
        return self.git("rev-parse", "HEAD")

    def short(self):
        return self.head()[:7]

    def rows(self):
        """Return the rows of results.tsv, the header checked and dropped."""
        header, *rows = (self.folder / "results.tsv").read_text().splitlines()
        assert header == HEADER
        return [tuple(row.split("\t")) for row in rows]

    def calls(self):
        return (self.folder / "calls.log").read_text().splitlines()

    def idea(self, idea, text):
        """Step 2 of the loop: edit train.py and commit."""
        (self.folder / "train.py").write_text(text)
        status, out = self.bash(inline("git commit -q -m").replace("<the idea>", idea))
        assert status == 0, out

    def attempt(self, idea, text, **log):
        """Steps 2, 3 and 5 of the loop; returns what Log said."""
        self.idea(idea, text)
        self.block("Run")
        return self.block("Log", **log)

    def copy(self, folder):
        twin = Agent(folder, "")
        twin.env = self.env
        shutil.copytree(self.folder, folder)
        return twin


def stub(folder, python, options=""):
    """Write a `uv` into a new folder, to stand first on PATH; return the folder."""
    folder.mkdir()
    (folder / "uv").write_text(STUB_UV.format(python=shlex.quote(python), options=options))
    (folder / "uv").chmod(0o755)
    return folder


def scratch(folder, stub_bin, train=None, **env):
    """Make a repository of the tracked files at the top, two commits; return its agent."""
    folder.mkdir()
    for name in TRACKED:
        shutil.copy(ROOT / name, folder / name)
    if train:
        (folder / "train.py").write_text(train)
    agent = Agent(folder, stub_bin, **env)
    agent.git("init", "-q", "-b", "main")
    (folder / ".git/info/exclude").write_text("calls.log\n")  # of the stub, not of program.md
    agent.git("commit", "-q", "--allow-empty", "-m", "first")
    agent.git("add", ".")
    agent.git("commit", "-q", "-m", "everything so far")
    return agent


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    return scratch(folder / "clone", stub(folder / "bin", sys.executable, "-S -E"), canvas())


@pytest.fixture
def fresh(fresh_clone, tmp_path):
    """An agent before Setup."""
    return fresh_clone.copy(tmp_path / "clone")


def set_up(agent):
    """Do Setup: Start, then the baseline; returns what each Log said."""
    status, out = agent.block("Start", TAG="nov21", LIMITS="20 experiments")
    assert status == 0, out
    said = []
    for seed in (42, 43, 44):
        status, out = agent.block("Run", seed=seed)
        assert status == 0, out
        said.append(agent.block("Log", description=f"baseline, seed {seed}"))
    return said


@pytest.fixture(scope="module")
def baseline_clone(fresh_clone, tmp_path_factory):
    agent = fresh_clone.copy(tmp_path_factory.mktemp("baseline") / "clone")
    agent.said = set_up(agent)
    return agent


@pytest.fixture
def agent(baseline_clone, tmp_path):
    """An agent after Setup, about to begin its first experiment. Floor 0.0008, best 0.9977."""
    return baseline_clone.copy(tmp_path / "clone")


# ------------------------------------------------------------------------------------------------
# The text


def test_budget():
    lines = PROGRAM.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100
    sections = re.findall(r"^## (.*)$", PROGRAM, re.M)
    assert sections == [
        "Setup",
        "Experimentation",
        "Output format",
        "Logging results",
        "The experiment loop",
        "Several GPUs",
    ]


def test_every_block_has_a_name_that_the_text_uses():
    assert PROGRAM.count("```bash") == len(BLOCKS) == PROGRAM.count("```") / 2
    prose = re.sub(r"^```.*?^```$", "", PROGRAM, flags=re.M | re.S)
    for name in BLOCKS.keys() - {"Worktree"}:
        assert re.search(rf"\*\*{name}\.?\*\*", prose), name


def test_everything_named_exists():
    prose = re.sub(r"^```.*?^```$", "", PROGRAM, flags=re.M | re.S)
    named = re.findall(r"`([^`\n]+)`", prose)
    files = {w for c in named for w in re.findall(r"[\w.-]+\.(?:py|md|toml|ipynb|tsv|log)\b", c)}
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"prepare.py", "train.py", "results.tsv", "run.log"} <= files
    for name in files:
        assert (ROOT / name).exists() or any(fnmatch(name, line) for line in ignored), name
    contract = (ROOT / "prepare.py").read_text()
    constants = {c for c in named if re.fullmatch(r"(?!AUTO)[A-Z]+(_[A-Z]+)*|[a-z]+(_[a-z]+)+", c)}
    assert {"TIME_BUDGET", "EVAL_TOKENS", "SEED", "evaluate_bpb"} <= constants
    for name in constants - {"CUDA_VISIBLE_DEVICES", *re.findall(r"^\w+", SUMMARY, re.M)}:
        assert re.search(rf"^ *(def )?{name}\b", contract, re.M), name
    for name in re.findall(r"\bAUTORESEARCH_[A-Z]+", PROGRAM):
        assert f'"{name}"' in contract
    assert 'print(f"contract changed: ' in contract  # so that Log sees it
    assert "`contract changed:`" in prose
    for key in re.findall(r"`(\w+):(?: +[0-9.]+)?`", prose):
        assert key == "exit_status" or f"{key}:" in SUMMARY
    example = inline("val_bpb:  ")
    assert re.fullmatch(r"(val_bpb: {10})\d\.\d{6}", example)  # value in column 19


def test_no_block_needs_the_network():
    for name, block in BLOCKS.items():
        assert not re.search(r"\b(curl|wget|pip|ssh|sudo|apt|brew|conda|npx)\b", block), name
        local = "branch diff log merge-base reset rev-parse status switch tag worktree"
        assert set(re.findall(r"\bgit ([a-z-]+)", block)) <= set(local.split()), name
        assert {c.strip() for c in re.findall(r"\buv .*?train\.py|\buv \S+ ?", block)} <= {
            "uv run train.py"
        }
        assert "tee" not in re.findall(r"\w+", block)


def test_grep_matches_two_summary_lines_and_nothing_else(tmp_path):
    (command,) = re.findall(r'grep "\^val_bpb[^;]*run\.log', BLOCKS["Run"])
    summary = SUMMARY.format(bpb="0.997900", mb="45060.2")
    noise = (
        "test_bpb:         0.9\n val_bpb: 0.1\nstep 1 | val_bpb: 1 | peak_vram_mb: 3\nval_bpbs\n"
    )
    (tmp_path / "run.log").write_text(noise + summary + noise)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "val_bpb:          0.997900\npeak_vram_mb:     45060.2\n"
    (tmp_path / "run.log").write_text("Traceback (most recent call last):\n" + noise)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------
# Setup


def test_start(fresh):
    base = fresh.head()
    status, out = fresh.block("Start", TAG="nov21", LIMITS="20 experiments, 07:00")
    assert status == 0, out
    assert fresh.git("branch", "--show-current") == "autoresearch/nov21"
    assert fresh.git("rev-parse", "base/autoresearch/nov21^{commit}") == fresh.head() == base
    assert "limits: 20 experiments, 07:00" in fresh.git("tag", "-n", "-l", "base/*")
    assert (fresh.folder / "results.tsv").read_text() == HEADER + "\n"
    assert fresh.git("status", "--porcelain") == ""


@pytest.mark.parametrize("obstacle", ["results", "edit", "staged", "branch"])
def test_start_overwrites_nothing(fresh, obstacle):
    results, train = fresh.folder / "results.tsv", fresh.folder / "train.py"
    if obstacle == "results":
        results.write_text("rows of last night\n")
    elif obstacle == "branch":
        fresh.git("branch", "autoresearch/nov21")
    else:
        train.write_text("print('an edit of the person')\n")
        if obstacle == "staged":
            fresh.git("add", "train.py")
    before = train.read_text(), results.exists() and results.read_text()
    status, out = fresh.block("Start")
    assert status != 0
    assert "not started" in out
    assert (train.read_text(), results.exists() and results.read_text()) == before
    assert fresh.git("branch", "--show-current") == "main"
    assert fresh.git("tag") == ""


def test_baseline(baseline_clone):
    agent, commit = baseline_clone, baseline_clone.short()
    assert agent.calls() == ["42 run train.py", "43 run train.py", "44 run train.py"]
    assert [status for status, _ in agent.said] == [0, 0, 0]
    assert agent.rows() == [
        (commit, "0.997900", "44.0", "keep", "baseline, seed 42"),
        (commit, "0.997500", "44.0", "keep", "baseline, seed 43"),
        (commit, "0.998300", "44.0", "keep", "baseline, seed 44"),
    ]
    assert agent.git("rev-list", "--count", "HEAD") == "2"
    assert agent.git("status", "--porcelain") == ""


def test_prepare_command():
    assert inline("uv run") == "uv run prepare.py"


# ------------------------------------------------------------------------------------------------
# The loop


def test_keep(agent):
    base = agent.head()
    status, out = agent.attempt("wider", canvas((0.9960,), (51200,)))
    assert status == 0
    assert out.endswith(": keep\n")
    assert agent.rows()[3:] == [(agent.short(), "0.996000", "50.0", "keep", "wider")]
    assert agent.calls()[3:] == ["42 run train.py"]  # one run was enough
    assert agent.git("rev-parse", "HEAD~1") == base
    assert agent.git("diff", "--name-only", base, "HEAD") == "train.py"
    assert agent.git("status", "--porcelain") == ""


def test_marginal_gain_is_repeated_then_kept(agent):
    status, out = agent.attempt("wider", canvas((0.9970, 0.9971), (51200, 50000)))
    assert status != 0  # no row yet
    assert out.endswith(": repeat\n")
    assert len(agent.rows()) == 3
    assert agent.block("Repeat")[0] == 0
    assert agent.calls()[3:] == ["42 run train.py", "43 run train.py"]
    status, out = agent.block("Log")
    assert status == 0
    assert out.endswith(": keep\n")
    assert agent.rows()[3:] == [(agent.short(), "0.997050", "50.0", "keep", "wider")]


def test_discard(agent):
    base, before = agent.head(), (agent.folder / "train.py").read_text()
    status, out = agent.attempt("worse", canvas((0.9990,)))
    assert status == 0
    assert out.endswith(": discard\n")
    commit = agent.short()
    assert agent.block("Reset")[0] == 0
    assert agent.head() == base
    assert (agent.folder / "train.py").read_text() == before
    assert agent.rows()[3:] == [(commit, "0.999000", "44.0", "discard", "worse")]
    assert len(agent.calls()) == 4  # one run was enough
    assert agent.git("status", "--porcelain") == ""


@pytest.mark.parametrize(("again", "mean"), [(0.9978, "0.997400"), (0.9973, "0.997150")])
def test_luck_is_not_kept(agent, again, mean):
    base = agent.head()
    status, out = agent.attempt("lucky seed", canvas((0.9970, again)))
    assert out.endswith(": repeat\n")
    agent.block("Repeat")
    status, out = agent.block("Log")
    assert status == 0
    assert out.endswith(": discard\n")
    assert agent.rows()[3][1:4] == (mean, "44.0", "discard")
    assert agent.block("Reset")[0] == 0
    assert agent.head() == base


def test_ugly_code_can_be_discarded_but_nothing_can_be_kept_by_decree(agent):
    agent.idea("ugly", canvas((0.9970, 0.9970)))
    agent.block("Run")
    status, out = agent.block("Log", verdict="keep")
    assert status != 0
    assert out.endswith(": repeat\n")
    status, out = agent.block("Log", verdict="discard", description="tiny gain, ugly")
    assert status == 0
    assert agent.rows()[3:] == [(agent.short(), "0.997000", "44.0", "discard", "tiny gain, ugly")]


def test_simpler_code_is_kept_at_equal_results(agent):
    equal = canvas((0.9980,))
    assert agent.attempt("remove a knob", equal)[1].endswith(": discard\n")
    assert agent.block("Reset")[0] == 0
    assert agent.attempt("remove a knob", equal, simpler="yes")[1].endswith(": keep\n")
    # Losses within the floor must not add up: the bar is the best that was ever kept
    assert agent.attempt("another", canvas((0.9982,)), simpler="yes")[1].endswith(": discard\n")


def test_crash_mended_then_kept(agent):
    base = agent.head()
    agent.idea("typo", "import oss\n")
    _, out = agent.block("Run")
    assert "val_bpb" not in out
    assert out == f"exit_status: 1 {agent.short()}\n"
    _, out = agent.bash(inline("tail"))
    assert "ModuleNotFoundError" in out
    (agent.folder / "train.py").write_text(canvas((0.9960,)))
    assert agent.bash(inline("git commit -q --amend"))[0] == 0
    assert agent.git("rev-parse", "HEAD~1") == base
    agent.block("Run")
    assert agent.block("Log")[0] == 0
    assert agent.rows()[3:] == [(agent.short(), "0.996000", "44.0", "keep", "typo")]


def test_crash(agent):
    base = agent.head()
    status, out = agent.attempt("hopeless", "raise SystemExit(3)\n")
    assert status != 0
    assert "no valid run" in out
    assert len(agent.rows()) == 3
    assert agent.block("Log", verdict="crash")[0] == 0
    assert agent.rows()[3:] == [(agent.short(), "0.000000", "0.0", "crash", "hopeless")]
    assert agent.block("Reset")[0] == 0
    assert agent.head() == base
    assert len(agent.rows()) == 4
    assert agent.git("status", "--porcelain") == ""


@pytest.mark.parametrize(
    "last_words",
    [
        "sys.exit(1)",
        "import os; os.kill(os.getpid(), 9)",
        "BPB[seed] = float('nan')",
        "print({summary!r}.format(bpb='0.9', mb=1))",
        "print('contract changed: TIME_BUDGET is 301, shipped as 300')",
        "import atexit; atexit.register(os._exit, 1); sys.stdout.reconfigure(line_buffering=True)",
    ],
    ids=["no summary", "killed", "nan", "two summaries", "contract changed", "status 1"],
)
@pytest.mark.parametrize("seed", [42, 43])
def test_invalid_run_gives_no_row(agent, last_words, seed):
    last_words = last_words.format(summary=SUMMARY)
    agent.idea("invalid", canvas((0.9970, 0.9970), last_words=f"if seed == {seed}: {last_words}"))
    agent.block("Run")
    if seed == 43:
        assert agent.block("Log")[1].endswith(": repeat\n")
        agent.block("Repeat")
    for verdict in ("rule", "keep", "discard"):
        status, out = agent.block("Log", verdict=verdict)
        assert status != 0
        assert "no valid run" in out
    assert len(agent.rows()) == 3


def test_run_cut_off_or_of_another_commit_gives_no_row(agent):
    log = agent.folder / "run.log"
    agent.attempt("one", canvas((0.9970,)))
    whole = log.read_text()
    log.write_text(whole.rsplit("exit_status", 1)[0])
    assert "no valid run" in agent.block("Log")[1]
    summary, end = SUMMARY.format(bpb="0.9", mb=1), whole.splitlines(keepends=True)[-1]
    log.write_text(summary + summary + end + end)  # two runs and two summaries, but both of one
    assert "no valid run" in agent.block("Log")[1]
    log.write_text(whole)
    assert agent.block("Log", verdict="discard")[0] == 0
    agent.block("Reset")
    agent.idea("two, never run", canvas((0.9960,)))
    assert "no valid run" in agent.block("Log")[1]
    assert len(agent.rows()) == 4


@pytest.mark.parametrize("name", ["prepare.py", "pyproject.toml", "train.py"])
@pytest.mark.parametrize("how", ["uncommitted", "staged", "committed"])
def test_a_changed_contract_is_not_kept(agent, name, how):
    agent.idea("cheat", canvas((0.5,)))
    with (agent.folder / name).open("a") as file:
        file.write("# an edit\n")
    if how != "uncommitted":
        agent.git("add", name)
    if how == "committed":
        agent.git("commit", "-q", "--amend", "--no-edit")
    agent.block("Run")
    status, out = agent.block("Log")
    if (name, how) == ("train.py", "committed"):  # the one edit that is allowed
        assert status == 0
        return
    assert status != 0
    assert "refused" in out
    assert len(agent.rows()) == 3
    assert agent.block("Log", verdict="keep")[0] != 0
    assert agent.block("Log", verdict="discard")[0] == 0


def test_no_keep_without_a_base(agent):
    agent.idea("base gone", canvas((0.5,)))
    agent.git("tag", "-d", "base/autoresearch/nov21")
    agent.block("Run")
    assert agent.block("Log")[0] != 0
    assert len(agent.rows()) == 3


def test_reset_takes_nothing_but_a_logged_failure(agent):
    def refused():
        before = agent.head()
        status, out = agent.block("Reset")
        assert "not reset" in out
        return status != 0 and agent.head() == before

    base = agent.head()
    assert refused()  # the base
    agent.attempt("good", canvas((0.9970, 0.9970)))
    assert refused()  # no row yet
    agent.block("Repeat")
    assert agent.block("Log")[0] == 0
    kept = agent.head()
    assert refused()  # kept
    agent.attempt("bad", canvas((0.9990,)))
    assert agent.block("Reset")[0] == 0
    assert agent.head() == kept
    assert refused()  # twice
    agent.git("reset", "-q", "--hard", base)
    agent.block("Log", verdict="crash")
    assert refused()  # below the base
    (agent.folder / "results.tsv").unlink()
    assert refused()


@pytest.mark.parametrize("text", ["tab\there\nline\r\nend", r"50% of \t '$HOME' `id` \\", "-n é"])
def test_any_description_is_one_field(agent, text):
    agent.idea("x", canvas((0.9990,)))
    agent.block("Run")
    assert agent.block("Log", description=text)[0] == 0
    expected = text.translate(str.maketrans("\t\r\n", "   "))
    assert agent.rows()[3:] == [(agent.short(), "0.999000", "44.0", "discard", expected)]


def test_look_tells_a_new_session_where_the_last_one_ended(agent):
    for idea, bpb in (("bad", 1.1), ("near", 0.9985), ("mid", 0.9999)):
        agent.attempt(idea, canvas((bpb,)))
        agent.block("Reset")
    status, out = agent.block("Look")
    assert status == 0
    assert "## autoresearch/nov21" in out
    assert "limits: 20 experiments" in out
    assert "baseline, seed 44" in out
    assert "last of 7 lines" in out
    near = out.split("near misses:\n")[1].splitlines()
    assert [line.split("\t")[4] for line in near] == ["near", "mid", "bad"]
    agent.idea("cut short", canvas((0.9960,)))
    (agent.folder / "train.py").write_text("half an edit")
    out = agent.block("Look")[1]
    assert "HEAD has no row" in out
    assert " M train.py" in out
    assert re.search(r"^[0-9a-f]{7} cut short$", out, re.M)
    agent.git("restore", "train.py")
    agent.block("Run")
    assert agent.block("Log")[0] == 0
    assert agent.rows()[-1][3:] == ("keep", "cut short")
    assert "HEAD has no row" not in agent.block("Look")[1]


def oracle(baseline, kept, runs, simpler):
    """Return what program.md's prose says of an experiment with these figures."""
    floor = max(baseline) - min(baseline)
    best = min([statistics.mean(baseline[:2]), *kept])
    gain = best - statistics.mean(runs)
    if simpler:
        return "keep" if gain > -floor / 2 else "discard"
    if len(runs) == 2:
        return "keep" if gain > 0.7 * floor else "discard"
    return "keep" if gain > floor else "repeat" if gain > floor / 2 else "discard"


def experiments():
    """Yield baseline, other kept rows, runs and simpler: each bar from both sides, then chance."""
    for bar, runs, simpler in ((1, 1, False), (0.5, 1, False), (0.7, 2, False), (-0.5, 1, True)):
        for aside in (-1e-5, 1e-5):  # of floor 0.0008 and best 0.9977
            yield [0.9979, 0.9975, 0.9983], [], [0.9977 - bar * 0.0008 + aside] * runs, simpler
    rng = random.Random(0)
    for _ in range(50):
        baseline = [round(rng.gauss(0.9978, 0.0004), 6) for _ in range(3)]
        kept = [round(rng.gauss(0.9974, 0.0004), 6) for _ in range(rng.choice((0, 0, 1, 3)))]
        runs = [round(rng.gauss(0.9971, 0.0006), 6) for _ in range(rng.choice((1, 2)))]
        yield baseline, kept, runs, rng.random() < 0.4


def test_rule_against_the_prose(agent):
    seen = set()
    commit, results = agent.short(), agent.folder / "results.tsv"
    for baseline, kept, runs, simpler in experiments():
        rows = [(b, "keep") for b in baseline + kept] + [(0.9, "discard"), (0, "crash")]
        table = [f"{commit}\t{b:.6f}\t44.0\t{status}\tkeep it" for b, status in rows]
        results.write_text("\n".join([HEADER, *table]) + "\n")
        log = (SUMMARY.format(bpb=f"{b:.6f}", mb=1024) + f"exit_status: 0 {commit}\n" for b in runs)
        (agent.folder / "run.log").write_text("".join(log))
        said = agent.block("Log", simpler="yes" if simpler else "no")[1]
        expected = oracle(baseline, kept, runs, simpler)
        assert said.endswith(f": {expected}\n"), (baseline, kept, runs, simpler, said)
        new = agent.rows()[len(rows) :]
        if expected == "repeat":
            assert new == []
        else:
            (row,) = new
            assert float(row[1]) == pytest.approx(statistics.mean(runs), abs=1e-6)
            assert row[2:4] == ("1.0", expected)
        seen.add((expected, simpler, len(runs)))
    assert len(seen) == 9  # every branch is reached


def test_worktrees_do_not_meet(fresh):
    for k in (0, 1):
        (fresh.folder / "uv.lock").write_text("lock\n")
        status, out = fresh.block("Worktree", k=k)
        assert status == 0, out
    for k in (0, 1):
        other = Agent(fresh.folder.parent / f"clone-gpu{k}", "")
        other.env = fresh.env
        assert (other.folder / "uv.lock").read_text() == "lock\n"
        assert other.block("Start", TAG=f"nov21-gpu{k}")[0] == 0
        assert other.git("branch", "--show-current") == f"autoresearch/nov21-gpu{k}"
        other.block("Run")
        assert other.block("Log", description=f"baseline on {k}")[0] == 0
        assert [row[4] for row in other.rows()] == [f"baseline on {k}"]
    assert not (fresh.folder / "results.tsv").exists()
    assert fresh.git("status", "--porcelain") == ""
    branches = fresh.git("branch", "--format=%(refname:short)").splitlines()
    assert branches == ["autoresearch/nov21-gpu0", "autoresearch/nov21-gpu1", "main"]


# ------------------------------------------------------------------------------------------------
# The real train.py

SHORT = """\
import runpy, sys
import prepare
for constants in vars(prepare), prepare.SHIPPED:
    constants.update(TIME_BUDGET=2, EVAL_TOKENS=2 * prepare.MAX_SEQ_LEN)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_real_train(prepared_cache, tmp_path):
    (tmp_path / "short.py").write_text(SHORT)
    bin_folder = stub(tmp_path / "bin", sys.executable, shlex.quote(str(tmp_path / "short.py")))
    text = re.sub(r"^DEPTH = .*$", "DEPTH = 1", (ROOT / "train.py").read_text(), flags=re.M)
    agent = scratch(
        tmp_path / "clone",
        bin_folder,
        text,
        AUTORESEARCH_CACHE=str(prepared_cache),
        AUTORESEARCH_CORPUS="python",
        PYTHONPATH=str(tmp_path / "clone"),
        PYTHONDONTWRITEBYTECODE="1",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",  # faster where other tests run beside this one
        TORCH_COMPILE_DISABLE="1",  # compiling takes longer than all the rest
    )
    assert agent.block("Start")[0] == 0
    status, out = agent.block("Run")
    log = (agent.folder / "run.log").read_text()
    assert status == 0, log
    found = re.fullmatch(
        r"val_bpb: {10}(\d+\.\d{6})\npeak_vram_mb: {5}(\d+\.\d)\nexit_status: 0 \w{7}\n", out
    )
    assert found, out
    keys = re.findall(r"^(\w+):", log.split("---\n")[1], re.M)
    assert keys == [*re.findall(r"^(\w+):", SUMMARY, re.M), "exit_status"]
    assert agent.block("Log", description="baseline, seed 42")[0] == 0
    memory_gb = f"{float(found[2]) / 1024:.1f}"
    assert agent.rows() == [(agent.short(), found[1], memory_gb, "keep", "baseline, seed 42")]
    base = agent.head()
    agent.idea("crash", text.replace("def main():", "def main():\n    raise MemoryError", 1))
    agent.block("Run")
    assert "MemoryError" in agent.bash(inline("tail"))[1]
    assert agent.block("Log")[0] != 0
    assert agent.block("Log", verdict="crash")[0] == 0
    assert agent.block("Reset")[0] == 0
    assert agent.head() == base
    assert [row[3] for row in agent.rows()] == ["keep", "crash"]
    assert agent.git("status", "--porcelain") == ""
