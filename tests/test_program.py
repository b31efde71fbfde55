"""program.md's own shell blocks, run in a scratch clone by a scripted stand-in for the agent.

Every block runs as it stands, in a bash of its own; only variables at its top are set. In the fast
tests `uv` is a stub and train.py a canvas that prints figures; the last test runs the real one.
"""

import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (ROOT / "program.md").read_text()
BLOCKS = dict(re.findall(r"^```bash\n# (\w+)\n(.*?)^```$", PROGRAM, re.M | re.S))
README = (ROOT / "README.md").read_text()
WAVE = re.search(r"^## Many devices\n.*?\n\n((?:    [^\n]*\n)+)", README, re.M | re.S)[1]
RULE = {}  # what Log judges by
exec(re.search(r"<<'EOF'\n(.*?)^last, ", BLOCKS["Log"], re.M | re.S)[1], RULE)
TRACKED = [".gitignore", "README.md", "prepare.py", "program.md", "pyproject.toml", "train.py"]
VALID = re.compile(r"^exit_status: 0 \w{7} seed \d+ [0-9.]+ [0-9.]+$", re.M)  # ends a run
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
echo lock >> uv.lock
shift
[ "$1" = python ] && shift && exec {python} "$@"
echo "${{AUTORESEARCH_SEED-unset}} run $*" >> calls.log
exec {python} {options} "$@"
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
        twin.env = dict(self.env)
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
    """An agent after Setup, about to begin its first experiment. Noise 0.0004, mean 0.9979."""
    return baseline_clone.copy(tmp_path / "clone")


# ------------------------------------------------------------------------------------------------
# The text

PROSE = re.sub(r"^```.*?^```$", "", PROGRAM, flags=re.M | re.S)
SHORTHAND = next(line.strip() for line in PROGRAM.splitlines() if line.startswith("    seed="))


def test_budget():
    lines = PROGRAM.splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 100
    sections = re.findall(r"^## (.*)$", PROGRAM, re.M)
    assert sections == [
        "Setup",
        "Experimentation",
        "Output format",
        "Logging results",
        "The experiment loop",
        "Several devices",
    ]


def test_every_block_has_a_name_that_the_text_uses():
    fences = re.findall(r"^```\w*$", PROGRAM, re.M)
    assert fences == ["```bash", "```"] * len(BLOCKS)
    for name in BLOCKS:
        assert re.search(rf"\*\*{name}\*\*", PROSE), name


def test_everything_named_exists():
    named = re.findall(r"`([^`\n]+)`", PROSE)
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
    for line in ('print(f"contract changed: ', 'print(f"machine {state}: ', 'state = "busy" if '):
        assert line in contract  # so that Run sees it
    assert "`contract changed:`" in PROSE and "`machine busy:`" in PROSE
    for key in re.findall(r"`(\w+):(?: +[0-9.]+)?`", PROSE):
        assert key == "exit_status" or f"{key}:" in SUMMARY
    example = inline("val_bpb:  ")
    assert re.fullmatch(r"(val_bpb: {10})\d\.\d{6}", example)  # value in column 19


def test_no_minutes_that_a_changed_budget_would_belie():
    assert not re.search(r"\b(\d+|one|five|six|seven|ten|fifteen) (seconds|minutes)", PROSE)


def test_no_block_needs_the_network():
    for name, block in BLOCKS.items():
        assert not re.search(r"\b(curl|wget|pip|ssh|sudo|apt|brew|conda|npx)\b", block), name
        assert not re.search(r"\bgit (fetch|pull|push|clone|remote)\b", block), name
        assert set(re.findall(r"\buv run (\S+)", block)) <= {"train.py", "python"}, name
        assert "tee" not in re.findall(r"\w+", block)


# ------------------------------------------------------------------------------------------------
# Setup


def test_start(fresh):
    base = fresh.head()
    status, out = fresh.block("Start", TAG="nov21", LIMITS="20 experiments")
    assert status == 0, out
    assert fresh.git("branch", "--show-current") == "autoresearch/nov21"
    assert fresh.git("rev-parse", "base/autoresearch/nov21^{commit}") == fresh.head() == base
    assert fresh.git("tag", "-n", "-l", "base/*").endswith("limits: 20 experiments")
    assert (fresh.folder / "results.tsv").read_text() == HEADER + "\n"
    assert fresh.git("status", "--porcelain") == ""


@pytest.mark.parametrize("hours", [-2, -1, 1, 2])
def test_a_time_without_a_date_is_the_next_such_time(fresh, hours):
    time = datetime.now() + timedelta(hours=hours)
    end = time if time > datetime.now() else time + timedelta(days=1)
    status, out = fresh.block("Start", LIMITS=f"20 experiments, {time:%H:%M}")
    assert status == 0, out
    tag = fresh.git("tag", "-n", "-l", "base/*")
    assert tag.endswith(f"limits: 20 experiments, {time:%H:%M}, until {end:%Y-%m-%d %H:%M}")
    assert "20 left" in fresh.block("Look")[1]


def test_a_limit_with_a_date_is_taken_as_it_is(fresh):
    status, out = fresh.block("Start", LIMITS="until 2999-01-02 03:04")
    assert status == 0, out
    assert "until 2999-01-02 03:04" in fresh.git("tag", "-n", "-l", "base/*")


def untouched(agent):
    """Tell whether nothing of Start is there."""
    branches = agent.git("branch", "--format=%(refname:short)").splitlines()
    return "autoresearch/nov21" not in branches and not agent.git("tag")


def test_a_limit_that_has_passed_starts_nothing(fresh):
    status, out = fresh.block("Start", LIMITS="until 2020-01-02 03:04")
    assert status != 0
    assert out.count("\n") == 1 and "not started: no time to come" in out
    assert untouched(fresh)
    assert not (fresh.folder / "results.tsv").exists()


@pytest.mark.parametrize("limits", ["until 7:00", "until 7 am", "until the morning"])
def test_a_limit_that_cannot_be_read_starts_nothing(fresh, limits):
    status, out = fresh.block("Start", LIMITS=limits)
    assert status != 0
    assert out == f"not started: no time to come: {limits}\n"
    assert untouched(fresh)


@pytest.mark.parametrize("obstacle", ["results", "edit", "staged", "branch"])
def test_start_overwrites_nothing(fresh, obstacle):
    results, train = fresh.folder / "results.tsv", fresh.folder / "train.py"
    if obstacle == "results":
        results.write_text(f"{HEADER}\na row of last night\n")
    elif obstacle == "branch":
        fresh.git("branch", "autoresearch/nov21")
    else:
        train.write_text("print('an edit of the person')\n")
        if obstacle == "staged":
            fresh.git("add", "train.py")
    before = train.read_text(), results.exists() and results.read_text()
    status, out = fresh.block("Start")
    assert status != 0
    assert out.startswith("not started: ") and out.count("\n") == 1
    assert (train.read_text(), results.exists() and results.read_text()) == before
    assert fresh.git("branch", "--show-current") == "main"
    assert fresh.git("tag") == ""


def test_start_needs_an_identity_first(fresh):
    fresh.env = {k: v for k, v in fresh.env.items() if not k.startswith(("GIT_AUTHOR", "GIT_COMM"))}
    fresh.git("config", "user.useConfigOnly", "true")
    status, out = fresh.block("Start")
    assert status != 0
    assert "user.name and user.email" in out
    assert untouched(fresh)
    fresh.git("config", "user.email", "agent@localhost")
    fresh.git("config", "user.name", "agent")
    assert fresh.block("Start")[0] == 0


def test_start_in_a_folder_that_is_none(fresh):
    (fresh.folder / "sub").mkdir()
    sub = Agent(fresh.folder / "sub", "")
    sub.env = fresh.env
    status, out = sub.block("Start")
    assert status != 0
    assert "prepare.py" in out
    assert untouched(fresh)
    assert not (sub.folder / "results.tsv").exists()


def test_start_says_what_git_says(fresh):
    fresh.env["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"  # git's own switch for "dubious ownership"
    status, out = fresh.block("Start")
    assert status != 0
    assert "dubious ownership" in out
    del fresh.env["GIT_TEST_ASSUME_DIFFERENT_OWNER"]
    assert untouched(fresh)


def test_start_with_git_read_only_leaves_nothing(fresh):
    shutil.rmtree(fresh.folder / ".git/refs/tags")  # as in a sandbox that cannot create a ref
    (fresh.folder / ".git/refs/tags").write_text("")
    status, out = fresh.block("Start")
    assert status != 0
    assert "not started: git refused" in out
    (fresh.folder / ".git/refs/tags").unlink()
    assert untouched(fresh)
    assert fresh.block("Start")[0] == 0


def test_logs_of_another_night_on_the_same_base_are_not_taken(agent):
    (agent.folder / "results.tsv").rename(agent.folder / "results-before.tsv")
    assert agent.block("Start", TAG="nov22")[0] == 0
    assert "no valid run" in agent.block("Log")[1]
    before = len(agent.calls())
    assert agent.block("Run")[0] == 0
    assert len(agent.calls()) == before + 1
    assert agent.block("Log")[0] == 0
    assert [row[4] for row in agent.rows()] == ["baseline, seed 42"]


def test_baseline(baseline_clone):
    agent, commit = baseline_clone, baseline_clone.short()
    assert agent.calls() == ["42 run train.py", "43 run train.py", "44 run train.py"]
    assert [status for status, _ in agent.said] == [0, 0, 0]
    assert agent.rows() == [
        (commit, "0.997900", "44.0", "keep", "baseline, seed 42"),
        (commit, "0.997500", "44.0", "keep", "baseline, seed 43"),
        (commit, "0.998300", "44.0", "keep", "baseline, seed 44"),
    ]
    assert not any("gain" in out or "noise" in out for _, out in agent.said)  # nothing to gain yet
    assert agent.git("rev-list", "--count", "HEAD") == "2"
    assert agent.git("status", "--porcelain") == ""


def test_the_log_and_not_the_agent_knows_the_seed(fresh):
    fresh.block("Start")
    for seed in (42, 43):
        fresh.block("Run", seed=seed)
        assert fresh.block("Log", description="baseline, seed 42")[0] == 0
    assert [row[4] for row in fresh.rows()] == ["baseline, seed 42", "baseline, seed 43"]


def test_prepare_command():
    assert inline("uv run") == "uv run prepare.py"


def test_a_block_runs_by_its_name(fresh):
    for line in ("TAG=nov25 LIMITS='2 experiments' Start", "seed=43 Run", "Log", "Look"):
        *variables, name = line.rsplit(" ", 1)
        command = re.sub(r"^seed=43", " ".join(variables), SHORTHAND).replace("# Run", f"# {name}")
        status, out = fresh.bash(command)
        assert status == 0, out
    assert fresh.git("branch", "--show-current") == "autoresearch/nov25"
    assert "2 left" in out
    assert [row[4] for row in fresh.rows()] == ["baseline, seed 43"]


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


@pytest.mark.parametrize(("again", "verdict"), [(0.9970, "keep"), (0.9979, "discard")])
def test_between_parent_and_idea_run_once_more(agent, again, verdict):
    base = agent.short()
    status, out = agent.attempt("wider", canvas((0.9973, again), (51200, 50000)))
    assert status != 0  # no row yet
    assert out.endswith(": repeat\n")
    assert len(agent.rows()) == 3
    before = agent.head(), (agent.folder / "train.py").read_text()
    assert agent.block("Repeat")[0] == 0
    assert (agent.head(), (agent.folder / "train.py").read_text()) == before
    assert agent.calls()[3:] == ["42 run train.py", "43 run train.py", "43 run train.py"]
    status, out = agent.block("Log")
    assert status == 0
    assert out.endswith(f": {verdict}\n")
    assert agent.rows()[3:] == [
        (base, "0.997500", "44.0", "keep", "parent again, seed 43"),
        (agent.short(), "0.997300", "50.0", verdict, "wider"),
        (agent.short(), f"{again:.6f}", "48.8", verdict, "wider, seed 43"),
    ]
    assert agent.git("status", "--porcelain") == ""
    assert (agent.block("Reset")[0] == 0) == (verdict == "discard")


def test_a_parent_that_was_disturbed_in_repeat_runs_again_and_loses_no_keep(agent):
    """The parent's row, though of a later run, must not come after the verdict."""
    busy = "if seed == 43 and not os.path.exists('quiet'): print('machine busy: 40%')"
    agent.attempt("kept", canvas((0.9960, 0.9960), last_words=busy))
    agent.attempt("between", canvas((0.9955, 0.9951)))
    calls = len(agent.calls())
    assert agent.block("Repeat")[0] != 0
    assert len(agent.calls()) == calls + 1  # the idea does not run after a parent that is not valid
    assert "no valid run" in agent.block("Log")[1]
    (agent.folder / ".git/info/exclude").write_text("calls.log\nquiet\n")
    (agent.folder / "quiet").touch()
    assert agent.block("Repeat")[0] == 0
    assert agent.block("Log")[1].endswith(": keep\n")
    assert [row[3:] for row in agent.rows()[4:]] == [
        ("keep", "parent again, seed 43"),
        ("keep", "between"),
        ("keep", "between, seed 43"),
    ]
    kept = agent.head()
    assert agent.block("Reset")[0] != 0
    assert agent.head() == kept


def test_a_baseline_that_died_in_warm_up_is_no_measure_of_the_next(fresh):
    seen, lines = [], on_device().splitlines()
    lines.insert(2, "if not os.path.exists('mended'): sys.exit(1)")  # attention: was not said yet
    (fresh.folder / "train.py").write_text(canvas(last_words="\n".join(lines)))
    fresh.git("commit", "-qam", "the person's GPU")
    (fresh.folder / ".git/info/exclude").write_text("calls.log\nmended\n")
    fresh.block("Start")
    seen.append(fresh.block("Run")[0])
    (fresh.folder / "mended").touch()
    seen.append(fresh.block("Run")[0])
    assert seen == [1, 0] and len(fresh.calls()) == 2
    assert fresh.block("Log")[0] == 0
    assert [row[4] for row in fresh.rows()] == ["baseline, seed 42"]


def test_seeds_are_compared_like_with_like(agent):
    """Seed 43 was the lucky one of the baseline; an idea no better than its parent is not kept."""
    out = agent.attempt("no better", canvas((0.9979, 0.9975)))[1]
    assert out.endswith(": discard\n")
    assert "gain 0.000000" in out


def test_a_parent_that_ran_long_ago_runs_again_first(agent):
    base = agent.short()
    log = agent.folder / f"run-{base}.log"

    def runs_of(subject, minutes):
        os.utime(log, (time.time() - 60 * minutes,) * 2)
        calls = len(agent.calls())
        assert agent.attempt(subject, canvas((0.9990,)))[0] == 0
        return agent.calls()[calls:]

    assert runs_of("one", 70) == ["42 run train.py"]
    assert agent.block("Reset")[0] == 0
    assert runs_of("another", 80) == ["42 run train.py"] * 2
    assert [(row[0], *row[3:]) for row in agent.rows()[4:]] == [
        (base, "keep", "parent again"),
        (agent.short(), "discard", "another"),
    ]
    assert time.time() - log.stat().st_mtime < 60


def test_a_disturbed_run_of_a_parent_of_long_ago_does_not_count(agent):
    busy = "if os.path.exists('loud'): print('machine busy: 40%')"
    agent.attempt("kept", canvas((0.9960,), last_words=busy))
    (agent.folder / ".git/info/exclude").write_text("calls.log\nloud\n")
    (agent.folder / "loud").touch()
    os.utime(agent.folder / f"run-{agent.short()}.log", (time.time() - 4800,) * 2)
    calls = len(agent.calls())
    assert agent.attempt("next", canvas((0.9990,)))[0] != 0
    assert len(agent.calls()) == calls + 1
    (agent.folder / "loud").unlink()
    assert agent.block("Run")[0] == 0
    assert len(agent.calls()) == calls + 3  # the parent once more, and now the idea
    assert agent.block("Log")[1].endswith(": discard\n")
    assert [row[3:] for row in agent.rows()[4:]] == [("keep", "parent again"), ("discard", "next")]


def test_ugly_code_can_be_discarded_but_nothing_can_be_kept_by_decree(agent):
    agent.idea("ugly", canvas((0.9975, 0.9975)))
    agent.block("Run")
    status, out = agent.block("Log", verdict="keep")
    assert status != 0
    assert out.endswith(": repeat\n")
    status, out = agent.block("Log", verdict="discard", description="tiny gain, ugly")
    assert status == 0
    assert agent.rows()[3:] == [(agent.short(), "0.997500", "44.0", "discard", "tiny gain, ugly")]


def test_simpler_code_is_kept_at_equal_results(agent):
    equal = canvas((0.9980,))
    assert agent.attempt("remove a knob", equal)[1].endswith(": discard\n")
    assert agent.block("Reset")[0] == 0
    assert agent.attempt("remove it again", equal, simpler="yes")[1].endswith(": keep\n")
    # What the next idea is measured against is its parent, and not a better one before it
    assert "gain 0.000100" in agent.attempt("a bit better", canvas((0.9979,)))[1]


def test_crash_mended_then_kept(agent):
    base = agent.head()
    agent.idea("typo", "import oss\n")
    _, out = agent.block("Run")
    assert "val_bpb" not in out
    assert f"exit_status: 1 {agent.short()}" in out
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


def test_a_crash_needs_a_run_that_crashed(agent):
    agent.idea("never run", canvas((0.9960,)))
    assert agent.block("Log", verdict="crash")[0] != 0
    agent.block("Run")
    assert agent.block("Log", verdict="crash")[0] != 0  # its run is valid
    assert len(agent.rows()) == 3
    assert agent.block("Log")[0] == 0
    assert agent.rows()[3][3] == "keep"


SLOW = "import time; open('up', 'w').close(); time.sleep({})"
LAST_WORDS = {
    "no summary": "sys.exit(1)",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "nan": "BPB[seed] = float('nan')",
    "two summaries": "print({summary!r}.format(bpb='0.9', mb=1))",
    "contract changed": "print('contract changed: TIME_BUDGET is 301, shipped as 300')",
    "status 1": "import atexit; atexit.register(os._exit, 1); "
    "sys.stdout.reconfigure(line_buffering=True)",
    "machine busy": "print('machine busy: 38% of the time waited for a processor')",
}


@pytest.mark.parametrize("last_words", LAST_WORDS.values(), ids=LAST_WORDS.keys())
@pytest.mark.parametrize("seed", [42, 43])
def test_invalid_run_gives_no_row(agent, last_words, seed):
    last_words = last_words.format(summary=SUMMARY)
    agent.idea("invalid", canvas((0.9975, 0.9975), last_words=f"if seed == {seed}: {last_words}"))
    agent.block("Run")
    if seed == 43:
        assert agent.block("Log")[1].endswith(": repeat\n")
        agent.block("Repeat")
    for verdict in ("rule", "keep", "discard"):
        status, out = agent.block("Log", verdict=verdict)
        assert status != 0
        assert "no valid run" in out
    assert len(agent.rows()) == 3
    assert agent.block("Log", verdict="crash")[0] == 0


def test_a_starved_run_is_run_again(agent):
    busy = "if not os.path.exists('quiet'): print('machine busy: 38%')"
    agent.idea("slow machine", canvas((0.9960,), last_words=busy))
    assert "machine busy: 38%" in agent.block("Run")[1]
    assert "machine busy: 38%" in agent.block("Log")[1]
    (agent.folder / ".git/info/exclude").write_text("calls.log\nquiet\n")
    (agent.folder / "quiet").touch()
    assert agent.block("Run")[0] == 0
    assert agent.block("Log")[1].endswith(": keep\n")
    assert len(agent.rows()) == 4


def on_device(device="H100", corpus="climbmix", attention="flash-attn3", seed="{seed}"):
    return f"""print(f"attention: no {attention} at first, looking on")
print(f"device: {device}, torch 2.15.0, bfloat16\\ncorpus: {corpus}, seed {seed}, 8192 tokens")
print("attention: {attention}, compile: yes")"""


@pytest.mark.parametrize(
    "other", [{}, {"device": "cpu"}, {"corpus": "python"}, {"attention": "flex"}], ids=str
)
def test_a_run_on_another_device_is_not_valid(fresh, other):
    (fresh.folder / "train.py").write_text(canvas(last_words=on_device()))
    fresh.git("commit", "-qam", "the person's GPU")
    set_up(fresh)
    assert len(fresh.rows()) == 3
    out = fresh.attempt("an idea", canvas((0.99,), last_words=on_device(**other)))[1]
    assert ("no valid run" in out) == bool(other)
    assert all(value in out for value in other.values())
    assert len(fresh.rows()) == (3 if other else 4)


def test_run_shows_what_the_parent_did(fresh):
    (fresh.folder / "train.py").write_text(canvas(last_words=on_device()))
    fresh.git("commit", "-qam", "the person's GPU")
    set_up(fresh)
    slower = canvas((0.99,), last_words=on_device()).replace("953", "400")
    fresh.idea("slower", slower)
    out = fresh.block("Run")[1]
    assert re.search(r"^parent num_steps: +953$", out, re.M)
    assert re.search(r"^num_steps: +400$", out, re.M)
    assert "parent attention: flash-attn3, compile: yes" in out


# ------------------------------------------------------------------------------------------------
# What a bad night brings


@pytest.mark.parametrize("why", ["nothing to commit", "index.lock", "no identity"])
def test_a_commit_that_fails_books_nothing_to_its_parent(agent, why):
    agent.attempt("kept", canvas((0.9960,)))
    kept = agent.head()
    if why == "index.lock":
        (agent.folder / ".git/index.lock").touch()
    if why == "no identity":
        agent.env |= {"GIT_AUTHOR_EMAIL": "", "GIT_COMMITTER_NAME": "", "GIT_COMMITTER_EMAIL": ""}
        agent.git("config", "user.useConfigOnly", "true")
    if why != "nothing to commit":
        (agent.folder / "train.py").write_text(canvas((0.9990,)))
    commit = inline("git commit -q -m").replace("<the idea>", "worse")
    assert agent.bash(commit)[0] != 0
    before, calls = agent.rows(), agent.calls()
    for block in ("Run", "Log", "Reset", "Repeat"):  # an agent that does not look
        status, out = agent.block(block)
        assert status != 0 or block == "Run", block
        assert out.count("\n") == 1, out
    assert (agent.rows(), agent.calls()) == (before, calls)
    assert agent.head() == kept


def test_commits_of_the_loop_use_neither_hooks_nor_keys(agent):
    hook = agent.folder / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    agent.git("config", "commit.gpgsign", "true")
    agent.git("config", "tag.gpgsign", "true")
    agent.git("config", "user.signingkey", "none")
    out = agent.attempt("worse", "import oss\n")[1]
    assert "no valid run" in out
    (agent.folder / "train.py").write_text(canvas((0.9960,)))
    assert agent.bash(inline("git commit -q --amend"))[0] == 0
    agent.block("Run")
    assert agent.block("Log")[1].endswith(": keep\n")
    agent.git("switch", "-q", "main")
    (agent.folder / "results.tsv").unlink()
    assert agent.block("Start", TAG="signed")[0] == 0


def test_nothing_is_run_that_is_not_committed(agent):
    before = len(agent.calls())
    (agent.folder / "train.py").write_text(canvas((0.5,)))
    for name in ("train.py", "prepare.py"):
        status, out = agent.block("Run")
        assert status != 0
        assert "uncommitted" in out
        (agent.folder / "prepare.py").write_text("easier\n")
        agent.git("restore", "train.py")
        assert name
    agent.git("restore", "prepare.py")
    rule = (agent.folder / "program.md").read_text().replace("HIGH, BAR", "BAR, HIGH")
    (agent.folder / "program.md").write_text(rule)
    assert "uncommitted" in agent.block("Run")[1]
    assert len(agent.calls()) == before


def test_what_the_notebook_draws_in_the_night_stops_nothing_and_stays(fresh):
    names = ("progress.png", "analysis.ipynb")

    def touch():
        for name in names:
            with (fresh.folder / name).open("a") as file:
                file.write("more\n")

    for name in names:
        (fresh.folder / name).write_text("tracked\n")
    fresh.git("add", *names)
    fresh.git("commit", "-q", "-m", "a picture")
    touch()
    set_up(fresh)
    touch()
    fresh.attempt("worse", canvas((0.9990,)))
    assert fresh.block("Reset")[0] == 0
    assert fresh.rows()[-1][3] == "discard"
    for name in names:
        assert (fresh.folder / name).read_text().endswith("more\nmore\n")
    assert fresh.git("diff", "--name-only", "HEAD", "train.py") == ""


@pytest.mark.parametrize("name", ["prepare.py", "pyproject.toml"])
def test_a_changed_contract_is_refused(agent, name):
    agent.idea("cheat", canvas((0.5,)))
    with (agent.folder / name).open("a") as file:
        file.write("# an edit\n")
    agent.git("commit", "-q", "-a", "--amend", "--no-edit")
    for block in ("Run", "Log"):
        status, out = agent.block(block)
        assert status != 0
        assert "refused" in out
    assert len(agent.rows()) == 3


def test_two_verdicts_on_one_commit_are_refused(agent):
    agent.attempt("good", canvas((0.9960,)))
    before = agent.rows()
    for variables in ({}, {"verdict": "discard"}, {"verdict": "crash"}):
        assert agent.block("Log", **variables)[0] != 0
    assert agent.rows() == before
    agent.attempt("bad", canvas((0.9990,)))
    before = agent.rows()
    for block in ("Log", "Run"):
        status, out = agent.block(block)
        assert status != 0
        assert "Reset" in out
    assert agent.rows() == before


def test_two_ideas_in_a_row_are_refused(agent):
    agent.idea("one", canvas((0.9960,)))
    agent.idea("two", canvas((0.9950,)))
    for block in ("Run", "Log"):
        status, out = agent.block(block)
        assert status != 0
        assert "HEAD is not one off" in out
    assert len(agent.rows()) == 3


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def in_background(agent, name):
    return subprocess.Popen(
        ["bash", "-c", BLOCKS[name]],
        cwd=agent.folder,
        env=agent.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_a_commit_made_during_a_run_gets_none_of_its_numbers(agent):
    agent.idea("slow", canvas((0.9960,), last_words=SLOW.format(2)))
    first = agent.short()
    run = in_background(agent, "Run")
    wait_for(agent.folder / "up")
    agent.git("reset", "-q", "--hard", "HEAD~1")
    agent.idea("another", canvas((0.9990,)))
    status, out = agent.block("Run")
    assert status != 0
    assert "a run is going" in out
    assert run.wait(20) == 0
    assert "no valid run" in agent.block("Log")[1]
    assert len(agent.rows()) == 3
    assert f"exit_status: 0 {first}" in (agent.folder / f"run-{first}.log").read_text()
    agent.block("Run")
    assert agent.block("Log")[1].endswith(": discard\n")


def test_an_orphan_keeps_the_device_and_gives_nobody_its_result(agent):
    agent.idea("slow", canvas((0.9960,), last_words=SLOW.format(3)))
    run = in_background(agent, "Run")
    wait_for(agent.folder / "up")
    run.kill()  # the shell alone: the training lives on
    run.wait()
    status, out = agent.block("Run")
    assert status != 0
    assert "a run is going" in out
    assert "no valid run" in agent.block("Log")[1]
    for _ in range(100):
        if agent.block("Run")[0] == 0:
            break
        time.sleep(0.1)
    assert agent.block("Log")[1].endswith(": keep\n")
    assert len(agent.rows()) == 4
    assert len(agent.calls()) == 5  # the orphan's and one more


def test_a_job_goes_in_front_of_each_training(agent, tmp_path):
    via = tmp_path / "via"
    via.write_text('#!/bin/sh\necho "$1: $3 $4 $5" >> via.log\nshift\nexec "$@"\n')
    via.chmod(0o755)
    agent.env["job"] = f"{via} device"
    agent.attempt("between", canvas((0.9975, 0.9970)))
    assert agent.block("Repeat")[0] == 0
    assert (agent.folder / "via.log").read_text() == 3 * "device: run train.py \n"


MEETS = """import pathlib, time
pathlib.Path("{folder}/{me}").touch()
for _ in range(200):
    time.sleep(0.05 * (not pathlib.Path("{folder}/{other}").exists()))
assert pathlib.Path("{folder}/{other}").exists(), "alone"
"""


def test_a_wave(agent, tmp_path):
    """By README's lines; two of the ideas end only if they run at the same time."""
    kept, ideas = agent.head(), []
    meet = [MEETS.format(folder=tmp_path, me=me, other=3 - me) for me in (1, 2)]
    for bpb, words in ((0.9960, meet[0]), (0.9950, meet[1]), (0.9940, "raise MemoryError")):
        agent.idea(f"to {bpb}", canvas((bpb,), last_words=words))
        ideas.append(agent.short())
        agent.git("reset", "-q", "--hard", kept)
    lines, count = re.subn('job="srun [^"]*"', "job=env", WAVE)
    assert count == 1
    status, out = agent.bash(f"ideas='{' '.join(ideas)}'\n{lines}")
    assert status == 0, out
    assert agent.head() == kept and len(agent.rows()) == 3
    assert agent.git("worktree", "list").count("\n") == 0 and not list(agent.folder.glob("wave-*"))
    assert agent.git("status", "--porcelain") == ""
    worse, best, broken = ideas
    for idea, log in ((broken, "crash"), (worse, "discard"), (best, "rule")):
        agent.git("reset", "-q", "--hard", idea)
        status, out = agent.block("Log", verdict=log)
        assert status == 0, out
    assert [row[0] for row in agent.rows()[3:]] == [broken, worse, best]
    assert [row[3] for row in agent.rows()[3:]] == ["crash", "discard", "keep"]
    assert "to 0.996" in agent.block("Look")[1].partition("near misses:")[2]
    agent.git("cherry-pick", "--no-gpg-sign", "-X", "theirs", worse)
    assert agent.block("Run")[0] == 0
    assert agent.block("Log")[1].endswith(": discard\n")
    assert agent.rows()[-1][3:] == ("discard", "to 0.996")


def test_reset_takes_nothing_but_a_logged_failure(agent):
    def refused():
        before = agent.head()
        status, out = agent.block("Reset")
        assert "not reset" in out
        return status != 0 and agent.head() == before

    assert refused()  # the base
    agent.attempt("between", canvas((0.9975, 0.9970)))
    assert refused()  # no row yet
    agent.block("Repeat")
    assert agent.block("Log")[0] == 0
    kept = agent.head()
    assert refused()  # kept
    agent.attempt("bad", canvas((0.9990,)))
    (agent.folder / "train.py").write_text("the next idea, begun too early\n")
    assert refused()
    agent.git("restore", "train.py")
    assert agent.block("Reset")[0] == 0
    assert agent.head() == kept
    assert refused()  # twice
    with (agent.folder / "results.tsv").open("a") as file:  # a ledger that says both
        file.write(f"{kept[:7]}\t0.999000\t44.0\tdiscard\tkept before\n")
    assert refused()
    (agent.folder / "results.tsv").unlink()
    assert agent.block("Reset")[0] != 0 and agent.head() == kept


@pytest.mark.parametrize("where", ["detached", "main", "subfolder", "no ledger", "no base"])
def test_blocks_in_a_wrong_place_say_so(agent, where):
    if where == "detached":
        agent.git("switch", "-q", "--detach")
    elif where == "main":
        agent.git("switch", "-q", "main")
    elif where == "no base":
        agent.git("tag", "-d", "base/autoresearch/nov21")
    elif where == "no ledger":
        (agent.folder / "results.tsv").unlink()
    else:
        (agent.folder / "sub").mkdir()
        env, agent = agent.env, Agent(agent.folder / "sub", "")
        agent.env = env
    for block in BLOCKS.keys() - {"Start"}:
        status, out = agent.block(block)
        assert status != 0, block
        assert out.count("\n") == 1, out
        assert "program.md" in out or "git switch to its branch" in out


def test_a_ledger_without_its_last_newline(agent):
    results = agent.folder / "results.tsv"
    results.write_text(results.read_text().rstrip("\n"))
    assert agent.attempt("wider", canvas((0.9960,)))[0] == 0
    assert [row[4] for row in agent.rows()[2:]] == ["baseline, seed 44", "wider"]


@pytest.mark.parametrize("text", ["tab\there\nline\r\nend", r"50% of \t '$HOME' `id` \\", "-n é"])
def test_any_description_is_one_field(agent, text):
    agent.idea("x", canvas((0.9990,)))
    agent.block("Run")
    assert agent.block("Log", description=text)[0] == 0
    expected = text.translate(str.maketrans("\t\r\n", "   "))
    assert agent.rows()[3:] == [(agent.short(), "0.999000", "44.0", "discard", expected)]


def test_look_tells_a_new_session_where_the_last_one_ended(agent):
    agent.attempt("near", canvas((0.99785,)))
    agent.block("Reset")
    agent.attempt("better", canvas((0.9960,)))
    for idea, bpb in (("lower, but not nearer", 0.99598), ("worse", 0.9999)):
        agent.attempt(idea, canvas((bpb,)))
        agent.block("Reset")
    status, out = agent.block("Look")
    assert status == 0
    assert "## autoresearch/nov21" in out
    assert "limits: 20 experiments" in out and "16 left" in out
    assert "baseline, seed 44" in out
    near = out.split("near misses:\n")[1].splitlines()
    assert [line.split("\t")[5] for line in near] == ["near", "lower, but not nearer"]
    agent.idea("cut short", canvas((0.9940,)))
    (agent.folder / "train.py").write_text("half an edit")
    out = agent.block("Look")[1]
    assert "HEAD has no row" in out
    assert " M train.py" in out and "uncommitted" in out
    assert re.search(r"^[0-9a-f]{7} cut short$", out, re.M)
    agent.git("restore", "train.py")
    agent.block("Run")
    assert agent.block("Log")[0] == 0
    assert agent.rows()[-1][3:] == ("keep", "cut short")
    assert "has no row" not in agent.block("Look")[1]


@pytest.mark.parametrize("limits", ["1 experiment", "5 experiments, until 2001-02-03 04:05"])
def test_look_ends_the_night(agent, limits):
    agent.git("tag", "-f", "-a", "-m", f"limits: {limits}", "base/autoresearch/nov21")
    assert (agent.block("Look")[0] == 0) == (limits == "1 experiment")
    agent.attempt("bad", canvas((0.9990,)))
    status, out = agent.block("Look")
    assert status != 0
    assert "the night is over" in out


class Cut(Exception):
    """The session ends here."""


def session(agent, ideas, cuts):
    """Do what program.md says as a session that knows nothing of others.

    It is cut short after every step that none was cut short after before.
    """

    def step(function, *args, **kwargs):
        _, out = function(*args, **kwargs)
        state = function.__name__, args, agent.short(), len(agent.rows())
        if state not in cuts:
            cuts.append(state)
            raise Cut
        return out

    if agent.git("branch", "--show-current") == "main":
        step(agent.block, "Start")
    base = agent.git("rev-parse", "--short=7", "base/autoresearch/nov21^{commit}")
    while True:
        rows, head = agent.rows(), agent.short()
        of_head = {row[3] for row in rows if row[0] == head}
        if agent.git("status", "--porcelain", "-uno"):
            agent.git("restore", ".")
        elif head == base and len(seeds := [r for r in rows if r[4].startswith("baseline")]) < 3:
            step(agent.block, "Run", seed=42 + len(seeds))
            step(agent.block, "Log")
        elif of_head & {"discard", "crash"}:
            step(agent.block, "Reset")
        elif of_head:
            tried = {row[4].split(",")[0] for row in rows}
            idea = next((idea for idea in ideas if idea not in tried), None)
            if idea is None:
                return

            def edit(idea):
                return 0, (agent.folder / "train.py").write_text(ideas[idea])

            step(edit, idea)
            step(agent.bash, inline("git commit -q -m").replace("<the idea>", idea))
        else:
            out = step(agent.block, "Run")
            verdict = "rule" if VALID.search(out) else "crash"
            if step(agent.block, "Log", verdict=verdict).endswith(": repeat\n"):
                step(agent.block, "Repeat")
                step(agent.block, "Log")


def test_a_night_cut_short_after_every_step_goes_on(fresh):
    ideas = {
        "better": canvas((0.9960, 0.9961)),
        "crash": "import oss\n",
        "worse": canvas((0.9990, 0.9990)),
        "between": canvas((0.9955, 0.9951)),
    }
    cuts = []
    for _ in range(100):
        try:
            session(fresh, ideas, cuts)
            break
        except Cut:
            pass
    assert len(cuts) > 25
    assert [row[3:] for row in fresh.rows()] == [
        ("keep", "baseline, seed 42"),
        ("keep", "baseline, seed 43"),
        ("keep", "baseline, seed 44"),
        ("keep", "better"),
        ("crash", "crash"),
        ("discard", "worse"),
        ("keep", "parent again, seed 43"),
        ("keep", "between"),
        ("keep", "between, seed 43"),
    ]
    assert fresh.git("log", "--format=%s", "main..").splitlines() == ["between", "better"]


@pytest.mark.parametrize("whose", ["parent", "idea"])
def test_repeat_cut_short_goes_on(agent, whose):
    slow = f"if seed == 43 and not os.path.exists('up'): {SLOW.format(60)}"
    slow = {whose: slow}
    agent.attempt("kept", canvas((0.9960, 0.9960), last_words=slow.get("parent", "")))
    agent.attempt("between", canvas((0.9958, 0.9957), last_words=slow.get("idea", "")))
    repeat = in_background(agent, "Repeat")
    wait_for(agent.folder / "up")
    os.killpg(repeat.pid, signal.SIGKILL)
    repeat.wait()
    if whose == "parent":  # its train.py is still there
        assert "uncommitted" in agent.block("Repeat")[1]
        agent.git("restore", "train.py")
    calls = len(agent.calls())
    assert agent.block("Repeat")[0] == 0
    assert len(agent.calls()) - calls == (2 if whose == "parent" else 1)
    assert agent.block("Log")[0] == 0
    assert [row[4] for row in agent.rows()[4:]] == [
        "parent again, seed 43",
        "between",
        "between, seed 43",
    ]


# ------------------------------------------------------------------------------------------------
# The rule


def oracle(runs, champion, idea, simpler):
    """Return what the rule says of an idea, given {commit: [(seed, val_bpb), ...]}."""
    every = [[bpb for _, bpb in values] for values in runs.values()]
    spread = sum(len(v) * statistics.pvariance(v) for v in every)
    free = sum(len(v) - 1 for v in every)
    noise = math.sqrt(spread / free) if free else math.nan
    theirs = [bpb for seed, bpb in runs[champion] if seed in {seed for seed, _ in runs[idea]}]
    theirs = (theirs or [bpb for _, bpb in runs[champion]])[-3:]
    ours = [bpb for _, bpb in runs[idea]]
    gain = statistics.mean(theirs) - statistics.mean(ours)
    error = noise * math.sqrt(1 / len(ours) + 1 / len(theirs))
    if simpler and gain > RULE["SIMPLER"] * error:
        return gain, "keep"
    if not simpler and gain > (RULE["BAR"] if len(ours) == 2 else RULE["HIGH"]) * error:
        return gain, "keep"
    unclear = math.isnan(noise) or gain > RULE["LOW"] * error
    return gain, "repeat" if len(ours) == 1 and unclear else "discard"


def test_rule_against_the_prose():
    draw, seen = random.Random(0), set()
    for _ in range(500):
        runs = {}
        for i in range(draw.choice((1, 2, 5))):
            seeds = draw.choice(([42], [42, 43], [42, 43, 44], [43, 44], [42, 43, 43, 42, 42]))
            runs[f"c{i}"] = [(seed, draw.gauss(0.9978, 0.0004)) for seed in seeds]
        champion = draw.choice([*runs])
        seeds = draw.choice(([42], [42, 43]))
        runs["idea"] = [(seed, draw.gauss(0.9975, 0.0006)) for seed in seeds]
        simpler = draw.random() < 0.3
        gain, verdict = oracle(runs, champion, "idea", simpler)
        noise = RULE["pooled_noise"]({c: [b for _, b in v] for c, v in runs.items()})
        got, got_gain, _ = RULE["judge"](runs["idea"], runs[champion], noise, simpler)
        assert got_gain == pytest.approx(gain, abs=1e-12)
        assert got == verdict
        seen.add((got, simpler, len(seeds)))
    assert len(seen) >= 8


def test_noise_is_unknown_until_something_ran_twice():
    unknown = RULE["pooled_noise"]({"a": [1.0], "b": [2.0]})
    assert math.isnan(unknown)
    for bpb in (0.9, 1.1):
        assert RULE["judge"]([(42, bpb)], [(42, 1.0)], unknown)[0] == "repeat"
    assert RULE["pooled_noise"]({"a": [1.0, 1.2], "b": [2.0]}) == pytest.approx(math.sqrt(0.02))


# ------------------------------------------------------------------------------------------------
# The real train.py

SHORT = """\
import runpy, sys
import prepare
for constants in vars(prepare), prepare.SHIPPED:
    constants.update(TIME_BUDGET=2, EVAL_TOKENS=2 * prepare.MAX_SEQ_LEN, MAX_LACKED=1)
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
    found = dict(re.findall(r"^(\w+): +(.*)$", out, re.M))
    shown = "attention val_bpb total_seconds peak_vram_mb num_steps exit_status"
    assert set(found) == set(shown.split()), out
    assert found["attention"] == "sdpa, compile: yes"
    keys = re.findall(r"^(\w+):", log.split("---\n")[1], re.M)
    assert keys == [*re.findall(r"^(\w+):", SUMMARY, re.M), "exit_status"]
    assert agent.block("Log")[0] == 0
    memory_gb = f"{float(found['peak_vram_mb']) / 1024:.1f}"
    commit = agent.short()
    assert agent.rows() == [(commit, found["val_bpb"], memory_gb, "keep", "baseline, seed 42")]
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
