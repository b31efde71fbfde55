"""Every state of a night, played by the ratchet's own command line in a scratch repository.

train.py is a stand-in that prints what a run prints, in milliseconds; prepare.py and pyproject.toml
are stubs. Every call is a process of its own, as the agent's are.
"""

import errno
import json
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
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE_SECONDS

import ratchet

ROOT = Path(__file__).resolve().parent.parent
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
STATUS = {"KEEP": 0, "NEXT": 0, "REFUSED": 2, "DISCARD": 3, "CRASH": 4}
STATUS |= {"BUSY": 5, "RUNNING": 6, "OVER": 7}

CANVAS = """\
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
VALUES = {values}
MB = {mb}
seed = int(os.environ["AUTORESEARCH_SEED"])
here = Path({here!r})
with (here / "calls.log").open("a") as calls:
    calls.write(f"{{seed}} {{Path.cwd().name}}\\n")
print("device: {device}, torch 2.15.0, bfloat16")
print("corpus: {corpus}, seed", seed)
print("attention: no flash-attn3, using flex")
print("attention: {attention}, compile: yes")
for step in (1, 20, 40):
    loss = {loss}
    print(f"step {{step:5d}} (  9.9%) | loss {{loss:.4f}} | val_bpb: 0.1", flush=True)
{last_words}
print('''---
val_bpb:          %s
training_seconds: 300.1
total_seconds:    325.9
peak_vram_mb:     %s
mfu_percent:      {mfu}
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8''' % (VALUES[seed], MB))
"""


class Agent:
    """Somebody at the command line of a clone, who remembers nothing between two calls."""

    def __init__(self, folder, env):
        self.folder = folder
        self.env = env

    def start_process(self, *words, **options):
        return subprocess.Popen(
            [sys.executable, str(self.folder / "ratchet.py"), *words],
            cwd=self.folder,
            env=self.env,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def call(self, *words, given=None, lines=15):
        """Call the ratchet; return the last line's word, and all that was said."""
        stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
        process = self.start_process(*words, stdin=stdin)
        out, _ = process.communicate(given, timeout=PATIENCE_SECONDS)
        last = out.rstrip("\n").rpartition("\n")[2]
        word = last.split(" ")[0]
        assert word in STATUS, out
        assert process.returncode == STATUS[word], out
        assert out.count("\n") <= lines, out
        return word, out

    def git(self, *words, check=True):
        command = ["git", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    def head(self):
        return self.git("rev-parse", "HEAD")[:7]

    def rows(self):
        """Return the rows of results.tsv, the header checked and dropped."""
        header, *rows = (self.folder / "results.tsv").read_text().splitlines()
        assert header == HEADER
        return [tuple(row.split("\t")) for row in rows]

    def told(self, start=3):
        """Return (status, description) of the rows after the baseline."""
        return [row[3:] for row in self.rows()[start:]]

    def calls(self):
        """Return "seed commit-seed" of every training, in order."""
        path = self.folder / "calls.log"
        return path.read_text().splitlines() if path.exists() else []

    def canvas(self, values=(0.9979, 0.9975, 0.9983), last_words="", **settings):
        """Return a train.py that prints these figures for the seeds 42, 43 and 44."""
        defaults = {"mb": "45060.2", "device": "H100", "corpus": "climbmix", "mfu": "39.80"}
        defaults |= {"attention": "flex", "here": str(self.folder), "loss": "VALUES[seed] / step"}
        values = dict(zip((42, 43, 44), values, strict=False))
        return CANVAS.format(values=values, last_words=last_words, **(defaults | settings))

    def edit(self, *values, text=None, **settings):
        (self.folder / "train.py").write_text(text or self.canvas(values, **settings))

    def attempt(self, idea, *values, text=None, **settings):
        """Edit train.py and try it."""
        self.edit(*values, text=text, **settings)
        return self.call("try", idea)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)

    def runs(self, commit):
        return sorted((self.folder / "runs").glob(f"{commit}-*"))

    def age(self, commit, minutes):
        """Let the runs of a commit have been so long ago."""
        for folder in self.runs(commit):
            job = json.loads((folder / "job.json").read_text())
            job["started"] -= 60 * minutes
            (folder / "job.json").write_text(json.dumps(job))


def environment(folder):
    kept = ("PATH", "HOME", "LANG")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env |= {
        f"GIT_{who}_{key}": "agent" for who in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")
    }
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "TZ": "UTC"}
    return env | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def scratch(folder, sub="", **settings):
    """Make a repository with the ratchet and stubs in it; return its agent."""
    top = folder / "clone"
    recipe = top / sub
    recipe.mkdir(parents=True)
    agent = Agent(recipe, environment(folder))
    shutil.copy(ROOT / "ratchet.py", recipe)
    shutil.copy(ROOT / ".gitignore", recipe)
    agent.write("prepare.py", "HARD_LIMIT = 600  # seconds\n")
    agent.write("pyproject.toml", "[project]\nname = 'stub'\n")
    agent.write("notes.md", "a note\n")
    agent.edit(0.9979, 0.9975, 0.9983, **settings)
    agent.git("init", "-q", "-b", "main", str(top))
    exclude = top / ".git/info/exclude"
    exclude.parent.mkdir(exist_ok=True)
    exclude.write_text("calls.log\nquiet\nup\ngo\n")
    agent.git("add", ".")
    agent.git("commit", "-q", "-m", "everything so far")
    return agent


@pytest.fixture(scope="module")
def at_baseline(tmp_path_factory):
    """A clone whose night has a baseline; only `agent` may use it."""
    folder = tmp_path_factory.mktemp("night")
    agent = scratch(folder)
    agent.said = agent.call("start", "nov21", "--experiments", "20")
    return agent


@pytest.fixture
def agent(at_baseline):
    """An agent about to begin its first experiment. Noise 0.0004, mean 0.9979.

    The clone stands at one path for all tests, which train.py knows; what it was comes back.
    """
    saved = at_baseline.folder.with_name("saved")
    if not saved.exists():
        shutil.copytree(at_baseline.folder, saved, symlinks=True)
    shutil.rmtree(at_baseline.folder)
    shutil.copytree(saved, at_baseline.folder, symlinks=True)
    return Agent(at_baseline.folder, dict(at_baseline.env))


@pytest.fixture
def fresh(tmp_path):
    """An agent before the night."""
    return scratch(tmp_path)


def one_line(answer, word):
    """Tell whether an answer is one line that begins with this word."""
    return answer[0] == word and answer[1].count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Beginning


@pytest.mark.slow
def test_start(fresh):
    base = fresh.git("rev-parse", "HEAD")
    assert fresh.call("start", "nov21", "--experiments", "20")[0] == "NEXT"
    assert fresh.git("branch", "--show-current") == "autoresearch/nov21"
    assert fresh.git("rev-parse", "base/autoresearch/nov21^{commit}") == base
    assert fresh.git("rev-parse", "HEAD") == base
    assert fresh.git("status", "--porcelain") == ""
    assert "0 of 20" in fresh.call("look")[1]


def test_baseline(at_baseline):
    base = at_baseline.git("rev-parse", "base/autoresearch/nov21^0")[:7]
    assert at_baseline.said[0] == "NEXT"
    assert at_baseline.said[1].count(", 953 steps") == 3
    assert at_baseline.rows() == [
        (base, "0.997900", "44.0", "keep", "baseline, seed 42"),
        (base, "0.997500", "44.0", "keep", "baseline, seed 43"),
        (base, "0.998300", "44.0", "keep", "baseline, seed 44"),
    ]


@pytest.mark.parametrize("minutes", [-90, 90])
def test_a_time_without_a_date_is_the_next_such_time(minutes):
    now = datetime.now()
    end = now + timedelta(minutes=minutes)
    found = datetime.fromtimestamp(ratchet.moment(f"{end:%H:%M}"))
    assert timedelta(0) < found - now <= timedelta(days=1)
    assert (found.hour, found.minute) == (end.hour, end.minute)


@pytest.mark.slow
def test_the_end_is_shown_with_date_and_zone(fresh):
    fresh.env["TZ"] = "XYZ-5:30"
    out = fresh.call("start", "nov21", "--until", "2999-01-02 03:04")[1]
    assert "2999-01-02 03:04 XYZ" in out
    fresh.env["TZ"] = "UTC"
    assert "2999-01-01 21:34 UTC" in fresh.call("look")[1]


def untouched(agent):
    """Tell whether nothing of a night is there."""
    branches = agent.git("branch", "--format=%(refname:short)")
    return branches == "main" and not agent.git("tag")


@pytest.mark.parametrize(
    "limits",
    [
        ("--until", "8 hours"),
        ("--until", "7 am"),
        ("--until", "2020-01-02 03:04"),
        ("--experiments", "50 runs"),
        ("--experiments", "0"),
        ("--experiments", "-3"),
        ("--patience", "many"),
        ("--expriments", "50"),
        ("--exp", "50"),
    ],
    ids=" ".join,
)
def test_a_limit_that_cannot_be_read_starts_nothing(fresh, limits):
    assert one_line(fresh.call("start", "nov21", *limits), "REFUSED")
    assert untouched(fresh)
    assert not (fresh.folder / "results.tsv").exists()


@pytest.mark.parametrize("obstacle", ["results", "edit", "staged", "prepare"])
def test_start_overwrites_nothing(fresh, obstacle):
    results = fresh.folder / "results.tsv"
    name = "prepare.py" if obstacle == "prepare" else "train.py"
    if obstacle == "results":
        results.write_text(f"{HEADER}\n1234567\t0.9\t1.0\tkeep\tlast night's\n")
    else:
        fresh.write(name, "print('an edit of the person')\n")
        if obstacle == "staged":
            fresh.git("add", "train.py")
    before = (fresh.folder / name).read_text(), results.exists() and results.read_text()
    assert one_line(fresh.call("start", "nov21"), "REFUSED")
    assert ((fresh.folder / name).read_text(), results.exists() and results.read_text()) == before
    assert untouched(fresh)


def test_start_goes_on_with_a_night_and_keeps_its_limits(agent):
    agent.git("switch", "-q", "main")
    word, out = agent.call("start", "nov21", "--experiments", "99")
    assert word == "NEXT"
    assert "0 of 20" in out
    for limit in (["--experiments", "99"], ["--launch", "env"]):
        assert "its limits stay" in agent.call("start", "nov21", *limit)[1]
    assert agent.git("branch", "--show-current") == "autoresearch/nov21"
    assert len(agent.calls()) == 3
    assert "0 of 99" in agent.call("start", "nov21", "--experiments", "99", "--renew")[1]
    assert len(agent.rows()) == 3


@pytest.mark.slow
def test_start_needs_an_identity_first(fresh):
    fresh.env = {k: v for k, v in fresh.env.items() if not k.startswith(("GIT_AUTHOR", "GIT_COMM"))}
    fresh.git("config", "user.useConfigOnly", "true")
    answer = fresh.call("start", "nov21")
    assert one_line(answer, "REFUSED") and "user.email" in answer[1]
    assert untouched(fresh)
    fresh.git("config", "user.email", "agent@localhost")
    fresh.git("config", "user.name", "agent")
    assert fresh.call("start", "nov21")[0] == "NEXT"


@pytest.mark.slow
def test_start_with_git_read_only_leaves_nothing(fresh):
    shutil.rmtree(fresh.folder / ".git/refs/tags")  # as in a sandbox that cannot create a ref
    (fresh.folder / ".git/refs/tags").write_text("")
    assert one_line(fresh.call("start", "nov21"), "REFUSED")
    (fresh.folder / ".git/refs/tags").unlink()
    assert untouched(fresh)
    assert fresh.call("start", "nov21")[0] == "NEXT"


@pytest.mark.parametrize("tag", ["a b", "../x", "-x", "a/b", ""])
def test_a_tag_that_is_no_name_is_refused(fresh, tag):
    assert fresh.call("start", tag)[0] == "REFUSED"
    assert untouched(fresh)


@pytest.mark.slow
def test_runs_of_another_night_on_the_same_base_are_not_taken(agent):
    (agent.folder / "results.tsv").rename(agent.folder / "results-before.tsv")
    agent.git("switch", "-q", "main")
    assert agent.call("start", "nov22")[0] == "NEXT"
    assert len(agent.calls()) == 6
    assert len(agent.rows()) == 3
    (agent.folder / "results-before.tsv").replace(agent.folder / "results.tsv")
    assert agent.call("look")[0] == "NEXT"  # same base, so these rows fit this night as well


def test_another_nights_ledger_is_refused(agent):
    agent.write("results.tsv", f"{HEADER}\n1234567\t0.9\t1.0\tkeep\tlast night's\n")
    assert one_line(agent.call("look"), "REFUSED")


@pytest.mark.slow
def test_a_baseline_that_crashes_runs_again(fresh):
    fresh.edit(0.9979, 0.9975, 0.9983, last_words="(here / 'go').exists() or exit(1)")
    fresh.git("commit", "-qam", "needs something")
    assert fresh.call("start", "nov21")[0] == "CRASH"
    assert fresh.rows() == []
    assert fresh.call("wait")[0] == "CRASH"
    fresh.write("go", "")
    assert fresh.call("wait")[0] == "NEXT"
    assert [row[4] for row in fresh.rows()] == [f"baseline, seed {seed}" for seed in (42, 43, 44)]


@pytest.mark.slow
def test_a_night_that_is_over_trains_no_baseline(fresh):
    fresh.edit(
        0.9979, 0.9975, 0.9983, last_words=f"if seed == 43:\n    {SLOW}".replace("\nw", "\n    w")
    )
    fresh.git("commit", "-qam", "slow")
    call = fresh.start_process("start", "nov21")
    wait_for(fresh.folder / "up")
    assert fresh.call("stop", "--night")[0] == "OVER"
    call.communicate()
    assert fresh.rows()[0][4] == "baseline, seed 42"
    trained = fresh.calls()
    for words in (["wait"], ["look"], ["start", "nov21"], ["try", "width: wider"]):
        word, said = fresh.call(*words)
        assert word == "OVER" and "baseline" in said, said
    assert fresh.calls() == trained
    fresh.write("go", "")
    assert fresh.call("start", "nov21", "--renew")[0] == "NEXT"
    assert len(fresh.rows()) == 3


@pytest.mark.slow
def test_the_baseline_says_how_many_runs_are_left(fresh):
    fresh.edit(0.9979, 0.9975, 0.9983, last_words=SLOW)
    fresh.git("commit", "-qam", "slow")
    word, said = fresh.call("start", "nov21", "--seconds", "0")
    assert word == "RUNNING" and "seed 42, then 2 more of the baseline" in said
    fresh.write("go", "")
    assert fresh.call("wait")[0] == "NEXT"


def test_no_experiment_before_the_baseline_is_done(fresh):
    fresh.edit(0.9979, 0.9975, 0.9983, last_words="(here / 'go').exists() or exit(1)")
    fresh.git("commit", "-qam", "needs something")
    fresh.call("start", "nov21")
    head = fresh.head()
    assert fresh.attempt("width: wider", 0.9)[0] == "REFUSED"
    assert fresh.head() == head


# ------------------------------------------------------------------------------------------------
# An experiment


def test_keep(agent):
    base = agent.git("rev-parse", "HEAD")
    assert agent.attempt("width: wider", 0.9960, mb=51200)[0] == "KEEP"
    assert agent.rows()[3:] == [(agent.head(), "0.996000", "50.0", "keep", "width: wider")]
    assert len(agent.calls()) == 4  # one run was enough
    assert agent.git("rev-parse", "HEAD~1") == base
    assert agent.git("diff", "--name-only", base, "HEAD") == "train.py"
    assert agent.git("status", "--porcelain") == ""


def test_discard(agent):
    base = agent.head()
    before = (agent.folder / "train.py").read_text()
    assert agent.attempt("width: wider", 0.9990)[0] == "DISCARD"
    assert agent.head() == base
    assert (agent.folder / "train.py").read_text() == before
    assert agent.told() == [("discard", "width: wider")]
    assert len(agent.calls()) == 4
    assert agent.git("status", "--porcelain") == ""
    commit = agent.rows()[-1][0]
    refs = agent.git("for-each-ref", "--format=%(refname:short) %(objectname)")
    assert f"autoresearch/nov21/{commit} {commit}" in refs  # so that git keeps it


@pytest.mark.parametrize(("again", "word"), [(0.9970, "KEEP"), (0.9979, "DISCARD")])
def test_between_parent_and_idea_run_once_more(agent, again, word):
    base = agent.head()
    assert agent.attempt("width: wider", 0.9973, again, mb=51200)[0] == word
    commit = agent.rows()[-1][0]
    assert agent.calls()[3:] == [f"42 {commit}-42", f"43 {base}-43-2", f"43 {commit}-43"]
    status = word.lower()
    assert agent.rows()[3:] == [
        (commit, "0.997300", "50.0", status, "width: wider"),
        (commit, f"{again:.6f}", "50.0", status, "width: wider, seed 43"),
    ]  # the parent's value was that of its baseline: equal rows are one run
    assert (agent.head() == commit) == (word == "KEEP")


@pytest.mark.slow
def test_a_parents_second_run_has_a_row(agent):
    agent.attempt("width: wider", 0.9960, 0.9961)
    kept = agent.head()
    assert agent.attempt("width: more", 0.9958, 0.9952)[0] == "KEEP"
    assert agent.rows()[4:] == [
        (kept, "0.996100", "44.0", "keep", "parent again, seed 43"),
        (agent.head(), "0.995800", "44.0", "keep", "width: more"),
        (agent.head(), "0.995200", "44.0", "keep", "width: more, seed 43"),
    ]


@pytest.mark.slow
def test_what_is_unclear_is_not_decided_by_its_parents_second_run_alone(agent):
    """The parent's second run changes the noise, and with it the bar of a single run."""
    agent.attempt("width: wider", 0.9960, 0.9960)
    assert agent.attempt("width: more", 0.9954, 0.9970)[0] == "DISCARD"
    assert [row[4] for row in agent.rows()[5:]] == ["width: more", "width: more, seed 43"]


def try_what_is_unclear(agent):
    """Return an idea whose first run decides nothing; its second one and its parent's hang."""
    slow_second = "if seed == 43:\n    " + "\n    ".join(SLOW.splitlines())
    agent.attempt("width: wider", 0.9960, 0.9960, last_words=slow_second)
    agent.edit(0.9958, 0.9970, last_words=slow_second)
    assert agent.call("try", "--seconds", "0", "width: more")[0] == "RUNNING"
    idea = agent.head()
    wait_for(agent.runs(idea)[0] / "result.json")
    return idea


@pytest.mark.slow
def test_a_run_that_goes_on_because_an_idea_was_unclear_says_so(agent):
    idea = try_what_is_unclear(agent)
    word, said = agent.call("wait", "--seconds", "0")
    assert word == "RUNNING" and f"({idea} was unclear: " in said
    agent.write("go", "")
    assert agent.call("wait")[0] == "DISCARD"


def test_seeds_are_compared_like_with_like(agent):
    """Seed 43 was the lucky one of the baseline; an idea no better than its parent is not kept."""
    word, out = agent.attempt("width: same", 0.9979, 0.9975, loss="1.5 / step")
    assert word == "DISCARD"
    assert "gain 0.000000 " in out


@pytest.mark.slow
def test_a_parent_that_ran_long_ago_runs_again_first(agent):
    base = agent.head()
    agent.age(base, 70)
    assert agent.attempt("width: one", 0.9990)[0] == "DISCARD"
    assert len(agent.calls()) == 4
    agent.age(base, 10)
    assert agent.attempt("width: another", 0.9991)[0] == "DISCARD"
    assert [call[:10] for call in agent.calls()[4:]] == [
        f"42 {base}",
        f"42 {agent.rows()[-1][0]}",
    ]


@pytest.mark.slow
def test_a_disturbed_run_of_a_parent_of_long_ago_does_not_count(agent):
    agent.attempt("width: kept", 0.9960, last_words=BUSY_ONCE.replace("not ", ""))
    kept = agent.head()
    agent.age(kept, 80)
    agent.write("quiet", "")  # here it means noise
    assert agent.attempt("width: next", 0.9990)[0] == "BUSY"
    assert len(agent.calls()) == 5
    (agent.folder / "quiet").unlink()
    assert agent.call("wait")[0] == "DISCARD"
    assert len(agent.calls()) == 7  # the parent once more, and now the idea
    assert agent.told(4) == [("discard", "width: next")]


def test_the_answer_says_where_a_run_went_on_otherwise(agent):
    text = agent.canvas((0.9960,)).replace("953", "400").replace("compile: yes", "compile: no")
    out = agent.attempt("width: slower", text=text)[1]
    assert "400 steps (the parent 953)" in out and "no to compile (the parent yes)" in out


@pytest.mark.slow
def test_simpler_code_is_kept_at_equal_results(agent):
    equal = agent.canvas((0.9981, 0.9981))
    assert agent.attempt("knobs: another", text=equal)[0] == "DISCARD"
    less = equal.replace('print("attention: no flash-attn3, using flex")\n', "")
    word, out = agent.attempt("knobs: none", text=less)
    assert word == "KEEP" and "less code" in out
    # What the next idea is measured against is its parent, and not a better one before it
    better = less.replace("0.9981", "0.9976")
    assert "gain 0.000500" in agent.attempt("width: a bit", text=better)[1]


@pytest.mark.slow
def test_ugly_code_can_be_dropped_after_its_keep(agent):
    agent.attempt("width: wider", 0.9960)
    kept = agent.head()
    assert agent.attempt("width: ugly", 0.9950)[0] == "KEEP"
    assert agent.call("drop", "40 lines for this")[0] == "DISCARD"
    assert agent.head() == kept
    assert agent.told() == [
        ("keep", "width: wider"),
        ("discard", "width: ugly; dropped: 40 lines for this"),
    ]
    assert agent.git("status", "--porcelain") == ""
    assert agent.call("drop", "again")[0] == "REFUSED"  # the last experiment is no keep
    assert agent.head() == kept


def test_drop_takes_nothing_but_the_last_keep(agent):
    head = agent.head()
    assert one_line(agent.call("drop", "the base"), "REFUSED")
    assert one_line(agent.call("drop", " "), "REFUSED")
    assert agent.head() == head
    agent.edit(0.5)
    assert agent.call("drop", "a bad beginning")[0] == "DISCARD"  # of an edit alone
    assert agent.git("status", "--porcelain") == ""
    assert "0.5" in next((agent.folder / "runs").glob("edited-*.py")).read_text()
    assert len(agent.rows()) == 3


def test_crash_mended_then_kept(agent):
    base = agent.git("rev-parse", "HEAD")
    word, out = agent.attempt("width: typo", text="import oss\n")
    assert word == "CRASH"
    assert "CRASH ModuleNotFoundError: No module named 'oss'" in out
    assert len(agent.rows()) == 3
    assert agent.attempt("width: typo", 0.9960)[0] == "KEEP"
    assert agent.git("rev-parse", "HEAD~1") == base
    assert agent.told() == [("keep", "width: typo")]


@pytest.mark.slow
def test_a_crash_given_up(agent):
    base = agent.head()
    agent.attempt("width: hopeless", text="raise SystemExit(3)\n")
    commit = agent.head()
    assert agent.call("wait")[0] == "CRASH"
    assert agent.call("look")[0] == "CRASH"
    assert len(agent.calls()) == 3
    assert agent.call("drop", "no idea why")[0] == "DISCARD"
    words = "width: hopeless; dropped: no idea why"
    assert agent.rows()[3:] == [(commit, "0.000000", "0.0", "crash", words)]
    assert agent.head() == base
    assert agent.git("status", "--porcelain") == ""


def test_another_idea_after_a_crash_gives_it_up(agent):
    base = agent.git("rev-parse", "HEAD")
    agent.attempt("width: hopeless", text="raise SystemExit(3)\n")
    assert agent.attempt("optimizer: other", 0.9960)[0] == "KEEP"
    assert agent.told() == [("crash", "width: hopeless"), ("keep", "optimizer: other")]
    assert agent.git("rev-parse", "HEAD~1") == base


def test_a_crash_runs_again_as_it_is(agent):
    text = agent.canvas((0.9960,), last_words="(here / 'go').exists() or exit(1)")
    assert agent.attempt("width: flaky", text=text)[0] == "CRASH"
    agent.write("go", "")
    assert agent.call("try", "width: flaky")[0] == "KEEP"
    assert agent.told() == [("keep", "width: flaky")]


BUSY_ONCE = "if not (here / 'quiet').exists(): print('machine busy: 38%')"
FAILS = {
    "no summary": ("sys.exit(1)", "CRASH"),
    "nan": ("VALUES[seed] = float('nan')", "CRASH"),
    "two summaries": ("print('val_bpb:          0.9')", "CRASH"),
    "contract changed": ("print('contract changed: TIME_BUDGET is 301, not 300')", "REFUSED"),
    "status 1": (
        "import atexit; atexit.register(os._exit, 1); sys.stdout.reconfigure(line_buffering=True)",
        "CRASH",
    ),
    "stacks": ("print('Timeout (0:10:00)!\\nThread 0x1:\\n  File x'); os._exit(1)", "CRASH"),
    "machine busy": ("print('machine busy: lacked 38%')", "BUSY"),
    "killed": ("os.kill(os.getpid(), 9)", "BUSY"),
    "another device": ("print()", "REFUSED"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILS)
@pytest.mark.parametrize("seed", [42, 43])
def test_a_run_without_a_number_gives_no_row(agent, case, seed):
    words, word = FAILS[case]
    text = agent.canvas((0.9975, 0.9975), last_words=f"if seed == {seed}: {words}")
    if case == "another device":
        text = text.replace('"device: H100', f'"device: cpu" if seed == {seed} else "device: H100')
    assert agent.attempt("width: odd", text=text)[0] == word
    assert len(agent.rows()) == 3
    assert agent.call("drop", "it is odd")[0] == "DISCARD"
    statuses = [status for status, _ in agent.told()]
    if seed == 43:
        assert statuses == ["discard"]
    else:
        assert statuses == ([] if word == "BUSY" else ["crash"])
    assert agent.git("status", "--porcelain") == ""


@pytest.mark.parametrize("words", ["print('machine busy: lacked 38%')", "os.kill(os.getpid(), 9)"])
def test_a_disturbed_run_is_run_again(agent, words):
    text = agent.canvas((0.9960,), last_words=f"if not (here / 'quiet').exists(): {words}")
    assert agent.attempt("width: wider", text=text)[0] == "BUSY"
    agent.write("quiet", "")
    assert agent.call("wait")[0] == "KEEP"
    assert len(agent.rows()) == 4
    assert len(agent.calls()) == 5


def test_what_is_killed_twice_has_crashed(agent):
    text = agent.canvas((0.9960,), last_words="os.kill(os.getpid(), 9)")
    assert agent.attempt("memory: all of it", text=text)[0] == "BUSY"
    assert agent.call("wait")[0] == "CRASH"


@pytest.mark.slow
def test_a_disturbed_parent_is_run_again_and_loses_no_keep(agent):
    busy = "if seed == 43 and not (here / 'quiet').exists(): print('machine busy: 40%')"
    agent.attempt("width: kept", 0.9960, 0.9960, last_words=busy)
    kept = agent.head()
    word, out = agent.attempt("width: between", 0.9955, 0.9951)
    assert word == "BUSY" and f"the parent {kept} seed 43" in out
    assert f"43 {agent.head()}" not in " ".join(agent.calls())  # the idea waits for its parent
    agent.write("quiet", "")
    word, out = agent.call("wait")
    assert word == "KEEP" and "(mean of 2 seeds)" in out
    assert agent.git("rev-parse", "HEAD~1")[:7] == kept
    assert agent.told(4) == [
        ("keep", "parent again, seed 43"),
        ("keep", "width: between"),
        ("keep", "width: between, seed 43"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["device", "corpus", "attention"])
def test_a_run_that_cannot_be_compared_is_refused(agent, setting):
    word, out = agent.attempt("width: wider", 0.5, **{setting: "other"})
    assert word == "REFUSED"
    assert "other" in out
    assert len(agent.rows()) == 3
    assert agent.attempt("width: wider", 0.9960)[0] == "KEEP"
    assert agent.told() == [("keep", "width: wider")]


@pytest.mark.parametrize("name", ["AUTORESEARCH_SPLIT", "AUTORESEARCH_SEED"])
def test_variables_for_people_alone_are_refused(agent, name):
    agent.env[name] = "test"
    answer = agent.attempt("width: wider", 0.9)
    assert one_line(answer, "REFUSED") and name in answer[1]
    assert len(agent.calls()) == 3


@pytest.mark.slow
def test_an_edit_without_effect_is_named(agent):
    word, out = agent.attempt("width: dead knob", 0.9976, loss="0.9979 / step")
    assert word == "DISCARD" and "no effect" in out
    assert agent.told() == [("discard", "width: dead knob; no effect")]
    assert len(agent.calls()) == 4  # no second run is spent on it
    # With another loss at one step it is an idea like others, which needs a second run
    agent.attempt("width: live knob", 0.9976, 0.9976, loss="0.9979 / step if step < 40 else 0.1")
    assert len(agent.calls()) > 5


def test_equal_losses_with_a_clear_gain_are_a_keep(agent):
    """Averaged weights, for example, are scored and not trained."""
    assert agent.attempt("averaging: ema", 0.9960, loss="0.9979 / step")[0] == "KEEP"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"last_words": "print('clock: 120000000 tokens in 300.0 seconds')"}, "499.6 M"),
        ({"mfu": "130.00"}, "peak"),
        ({"last_words": "print('clock: 499000000 tokens in 300.0 seconds')"}, ""),
        ({"last_words": "print('clock: 900000000 tokens in 300.0 seconds')"}, ""),  # read, no more
    ],
)
def test_an_impossible_speed_is_named(agent, settings, said):
    word, out = agent.attempt("speed: unbelievable", 0.9960, **settings)
    assert word == "KEEP"
    assert ("odd: " in out) == bool(said)
    description = agent.rows()[-1][4]
    assert said in description
    assert (description == "speed: unbelievable") == (not said)


@pytest.mark.slow
def test_an_idea_needs_an_axis_and_an_edit(agent):
    agent.edit(0.9960)
    head = agent.head()
    for words in ("wider", ": wider", "width:", "width: " + "x" * 300):
        assert one_line(agent.call("try", words), "REFUSED")
    assert one_line(agent.call("try"), "REFUSED")
    agent.git("checkout", "-q", "train.py")
    assert one_line(agent.call("try", "width: wider"), "REFUSED")
    assert agent.head() == head


IDEAS = ("data: tab\there\nline\r\nend", r"data: 50% of \t '$HOME' `id` \\", "data: -n é", "a:#b")


@pytest.mark.slow
@pytest.mark.parametrize("text", IDEAS)
def test_any_idea_is_one_field(agent, text):
    told = []
    for number, way in enumerate(("word", "stdin", "file")):
        agent.edit(0.9990 + number / 10000)
        if way == "word":
            agent.call("try", text)
        elif way == "stdin":
            agent.call("try", "-", given=text)
        else:
            agent.write("runs/idea.txt", text)
            agent.call("try", "--file", "runs/idea.txt")
        told.append(("discard", " ".join(text.split())))
        assert agent.told() == told


# ------------------------------------------------------------------------------------------------
# What a bad night brings


@pytest.mark.slow
@pytest.mark.parametrize("why", ["index.lock", "no identity"])
def test_a_commit_that_fails_books_nothing(agent, why):
    agent.attempt("width: kept", 0.9960)
    kept, before = agent.head(), agent.rows()
    if why == "index.lock":
        (agent.folder / ".git/index.lock").touch()
    else:
        agent.env |= {"GIT_AUTHOR_EMAIL": "", "GIT_COMMITTER_NAME": "", "GIT_COMMITTER_EMAIL": ""}
        agent.git("config", "user.useConfigOnly", "true")
    assert one_line(agent.attempt("width: worse", 0.9990), "REFUSED")
    assert (agent.head(), agent.rows(), len(agent.calls())) == (kept, before, 4)
    (agent.folder / ".git/index.lock").unlink(missing_ok=True)
    agent.env |= {
        f"GIT_{who}_{k}": "x" for who in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")
    }
    assert agent.call("try", "width: worse")[0] == "DISCARD"


def test_hooks_and_keys_stop_nothing(agent):
    for name in ("pre-commit", "commit-msg", "prepare-commit-msg", "post-commit"):
        agent.write(f".git/hooks/{name}", "#!/bin/sh\necho edited >> train.py\nexit 1\n")
        (agent.folder / f".git/hooks/{name}").chmod(0o755)
    for key in ("commit.gpgsign", "tag.gpgsign"):
        agent.git("config", key, "true")
    agent.git("config", "user.signingkey", "none")
    assert agent.attempt("width: typo", text="import oss\n")[0] == "CRASH"
    assert agent.attempt("width: typo", 0.9960)[0] == "KEEP"
    assert agent.git("status", "--porcelain") == ""


def test_a_formatter_changes_no_run_and_is_named(agent):
    base = agent.head()
    edits = "(here / 'train.py').write_text('exit(9)  # formatted')"
    word, out = agent.attempt("width: wider", 0.9990, last_words=edits)
    assert word == "DISCARD"
    assert "edited" in out
    assert agent.head() == base
    assert agent.git("status", "--porcelain") == ""
    saved = next((agent.folder / "runs").glob("edited-*.py"))
    assert saved.read_text() == "exit(9)  # formatted"
    word, out = agent.attempt("width: wider", 0.9960, last_words=edits)
    assert word == "KEEP"
    assert "edited" in out
    assert "formatted" in (agent.folder / "train.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["KEEP", "DISCARD"])
def test_the_next_idea_is_prepared_during_a_run(agent, word):
    """Its edit comes to stand on what the verdict leaves, and alone is its commit's change."""
    begin = agent.canvas((0.9979, 0.9975, 0.9983))
    middle = f"width = 1\n{SLOW}\n"
    value = {"KEEP": 0.9960, "DISCARD": 0.9990}[word]
    running = agent.canvas((value,) * 3, last_words=middle)
    agent.write("train.py", running)
    assert agent.call("try", "--seconds", "0", "width: wider")[0] == "RUNNING"
    wait_for(agent.folder / "up")
    agent.write("train.py", f"depth = 2\n{running}")
    agent.write("go", "")
    answer, said = agent.call("wait")
    assert answer == word and "the edit is on" in said and "saved" not in said
    assert ("without the change of" in said) == (word == "DISCARD")
    left = running if word == "KEEP" else begin
    assert (agent.folder / "train.py").read_text() == f"depth = 2\n{left}"
    assert agent.call("look")[0] == "NEXT"
    assert agent.call("try", "depth: deeper")[0] in ("KEEP", "DISCARD")
    idea = agent.rows()[-1][0]
    assert agent.git("diff", "--shortstat", f"{idea}^", idea).endswith("1 insertion(+)")


@pytest.mark.slow
def test_an_edit_of_the_lines_of_a_discarded_idea_is_saved(agent):
    begin = (agent.folder / "train.py").read_text()
    agent.edit(0.9990, 0.9990, 0.9990, last_words=SLOW)
    assert agent.call("try", "--seconds", "0", "width: wider")[0] == "RUNNING"
    wait_for(agent.folder / "up")
    prepared = agent.canvas((0.5, 0.5, 0.5), last_words=SLOW)
    agent.write("train.py", prepared)
    agent.write("go", "")
    word, said = agent.call("wait")
    assert word == "DISCARD" and "saved in runs/" in said and "the edit is on" not in said
    assert "fits on nothing else" in said
    assert (agent.folder / "train.py").read_text() == begin
    assert next((agent.folder / "runs").glob("edited-*.py")).read_text() == prepared


@pytest.mark.slow
def test_a_prepared_edit_survives_a_crash_that_is_given_up(agent):
    begin = (agent.folder / "train.py").read_text()
    running = agent.canvas(last_words=f"width = 1\n{SLOW}\nimport oss")
    agent.write("train.py", running)
    assert agent.call("try", "--seconds", "0", "width: typo")[0] == "RUNNING"
    wait_for(agent.folder / "up")
    agent.write("train.py", f"depth = 2\n{running}")
    agent.write("go", "")
    assert agent.call("wait")[0] == "CRASH"
    word, said = agent.call("drop", "no use")
    assert word == "DISCARD" and "without the change of" in said
    assert (agent.folder / "train.py").read_text() == f"depth = 2\n{begin}"


@pytest.mark.slow
def test_what_was_not_tried_when_the_night_ended_is_named(agent):
    assert agent.attempt("width: wider", 0.9960)[0] == "KEEP"
    kept = agent.head()
    agent.call("stop", "--night")
    agent.edit(0.5)
    for words in (("try", "width: more"), ("look",)):
        word, said = agent.call(*words)
        assert word == "OVER" and "was not tried" in said
    word, said = agent.call("drop", "no time was left")
    assert word == "DISCARD" and f"{kept} stays kept" in said
    assert (agent.head(), agent.git("status", "--porcelain")) == (kept, "")
    word, said = agent.call("look")
    assert word == "OVER" and "drop" not in said


@pytest.mark.slow
def test_an_idea_that_the_end_of_the_night_cut_off_is_named(agent):
    base = agent.head()
    agent.edit(0.9960, last_words=SLOW)
    assert agent.call("try", "--seconds", "0", "width: wider")[0] == "RUNNING"
    idea = agent.head()
    wait_for(agent.folder / "up")
    agent.call("stop", "--night")
    word, said = agent.call("look")
    assert word == "OVER" and f"{idea} was not finished: uv run ratchet.py drop" in said
    assert agent.call("drop", "no time was left")[0] == "DISCARD"
    assert (agent.head(), agent.git("status", "--porcelain")) == (base, "")
    assert len(agent.rows()) == 3


@pytest.mark.slow
def test_a_night_that_a_person_ended_finishes_no_unclear_idea(agent):
    idea = try_what_is_unclear(agent)
    assert agent.call("wait", "--seconds", "0")[0] == "RUNNING"  # the second pair
    wait_for(agent.folder / "up")
    agent.call("stop", "--night")
    calls = len(agent.calls())
    word, said = agent.call("wait")
    assert word == "OVER" and f"{idea} was not finished" in said
    assert len(agent.calls()) == calls
    assert agent.call("drop", "no time was left")[0] == "DISCARD"
    assert agent.told()[-1] == ("discard", "width: more; dropped: no time was left")


@pytest.mark.slow
def test_the_verdict_that_ends_the_night_begins_no_other_idea(agent):
    agent.call("start", "nov21", "--experiments", "1", "--renew")
    running = agent.canvas((0.9960, 0.9960, 0.9960), last_words=SLOW)
    agent.write("train.py", running)
    assert agent.call("try", "--seconds", "0", "width: wider")[0] == "RUNNING"
    idea = agent.head()
    agent.write("go", "")
    wait_for(agent.runs(idea)[0] / "result.json")
    agent.write("train.py", f"depth = 2\n{running}")
    word, said = agent.call("try", "depth: deeper")
    assert word == "OVER" and "KEEP" in said and "was not tried" in said
    assert agent.head() == idea
    assert (agent.folder / "train.py").read_text() == f"depth = 2\n{running}"


@pytest.mark.parametrize("name", ["prepare.py", "pyproject.toml", "ratchet.py"])
@pytest.mark.parametrize("committed", [False, True])
def test_a_changed_contract_is_refused(agent, name, committed):
    with (agent.folder / name).open("a") as file:
        file.write("# an edit\n")
    if committed:
        agent.git("commit", "-qam", "more")
    answer = agent.attempt("cheat: easier", 0.5)
    assert one_line(answer, "REFUSED") and name in answer[1]
    assert (len(agent.rows()), len(agent.calls())) == (3, 3)


def test_a_contract_that_changes_during_a_run_is_refused_and_changes_no_run(agent):
    changes = "(here / 'prepare.py').write_text('easier')"
    assert agent.attempt("cheat: easier", 0.9960, last_words=changes)[0] == "REFUSED"
    assert len(agent.rows()) == 3
    agent.git("restore", "prepare.py")
    assert agent.call("wait")[0] == "KEEP"
    assert len(agent.calls()) == 4


@pytest.mark.slow
def test_notes_are_never_lost(agent):
    with (agent.folder / "notes.md").open("a") as notes:
        notes.write("not committed\n")
    assert agent.attempt("width: worse", 0.9990)[0] == "DISCARD"
    assert "not committed" in (agent.folder / "notes.md").read_text()
    assert "notes.md" in agent.call("look")[1]
    agent.git("commit", "-qam", "notes")
    assert agent.attempt("width: worse still", 0.9991)[0] == "DISCARD"
    assert agent.git("log", "-1", "--format=%s") == "notes"
    agent.git("rm", "-q", "notes.md")  # staged
    assert agent.attempt("width: wider", 0.9960)[0] == "KEEP"
    assert agent.git("diff", "--name-only", "HEAD~1", "HEAD") == "train.py"
    assert agent.git("status", "--porcelain") == "D  notes.md"


def test_an_idea_committed_by_hand_is_run(agent):
    agent.edit(0.9960)
    agent.git("commit", "-qam", "wider by hand")
    assert agent.call("look")[0] == "NEXT"
    assert len(agent.calls()) == 3
    assert agent.attempt("width: another", 0.9950)[0] == "REFUSED"
    agent.git("checkout", "-q", "train.py")
    assert agent.call("wait")[0] == "KEEP"
    assert agent.told() == [("keep", "wider by hand")]


@pytest.mark.parametrize("case", ["two ideas", "a note on it", "another file", "elsewhere"])
def test_what_is_no_idea_of_the_kept_commit_is_refused(agent, case):
    agent.edit(0.9960)
    agent.git("commit", "-qam", "one")
    if case == "two ideas":
        agent.edit(0.9950)
        agent.git("commit", "-qam", "two")
    elif case == "a note on it":
        agent.write("notes.md", "more")
        agent.git("commit", "-qam", "note")
    elif case == "another file":
        agent.write("notes.md", "more")
        agent.git("commit", "-qa", "--amend", "--no-edit")
    else:
        assert agent.call("wait")[0] == "KEEP"
        agent.git("reset", "-q", "--hard", "HEAD~1")
        agent.edit(0.9940)
        agent.git("commit", "-qam", "elsewhere")
    before = agent.rows(), agent.head()
    for words in (["look"], ["wait"], ["try", "width: x"], ["drop", "x"]):
        assert one_line(agent.call(*words), "REFUSED")
    assert (agent.rows(), agent.head()) == before
    advice = re.search(r"git (reset --keep \w+)", agent.call("look")[1])
    if advice:  # it helps
        agent.git(*advice[1].split())
        assert agent.call("look")[0] in ("NEXT", "KEEP")
    assert bool(advice) == (case != "another file")


def wait_for(path):
    end = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


SLOW = """(here / "up").touch()
while not (here / "go").exists(): time.sleep(0.02)"""


@pytest.mark.slow
def test_a_training_outlives_its_call(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow", start_new_session=True)
    wait_for(agent.folder / "up")
    os.killpg(call.pid, signal.SIGKILL)  # as a client does that ends a call
    call.communicate()
    assert agent.call("wait", "--seconds", "0.1")[0] == "RUNNING"
    assert agent.call("look")[0] == "RUNNING"
    for words in (["try", "width: x"], ["drop", "x"]):
        assert one_line(agent.call(*words), "REFUSED")
    agent.write("go", "")
    assert agent.call("wait")[0] == "KEEP"
    assert len(agent.calls()) == 4
    assert agent.told() == [("keep", "width: slow")]


def tree_of(root):
    """Return a process and all that descend from it now."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    tree = [root]
    for parent in tree:
        tree += [pid for pid, ppid in pairs if ppid == parent]
    return tree


def test_a_training_outlives_all_that_descends_from_its_call(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    for pid in tree_of(call.pid):  # as a client does at the end of its own session
        os.kill(pid, signal.SIGKILL)
    call.communicate()
    agent.write("go", "")
    assert agent.call("wait")[0] == "KEEP"
    assert len(agent.calls()) == 4


@pytest.mark.slow
def test_two_calls_that_wait_for_one_run_give_one_answer(agent):
    agent.edit(0.9990, last_words=SLOW)
    calls = [agent.start_process("try", "width: slow")]
    wait_for(agent.folder / "up")
    calls += [agent.start_process("wait") for _ in range(3)]
    time.sleep(1)
    agent.write("go", "")
    said = [call.communicate()[0].splitlines()[-1] for call in calls]
    assert said[0].startswith("DISCARD gain")
    late = [line for line in said if line != said[0]]  # such a call finds nothing to wait for
    assert len(late) < 3
    assert all(line.startswith("NEXT edit") for line in late)
    assert len(agent.rows()) == 4


@pytest.mark.slow
def test_a_commit_made_during_a_run_gets_none_of_its_numbers(agent):
    agent.edit(0.9960, last_words=SLOW)
    agent.start_process("try", "--seconds", "0", "width: slow").communicate()
    wait_for(agent.folder / "up")
    agent.git("reset", "-q", "--hard", "HEAD~1")
    agent.edit(0.9990)
    agent.git("commit", "-qam", "another by hand")
    assert agent.call("wait", "--seconds", "0.1")[0] == "BUSY"
    agent.write("go", "")
    assert agent.call("wait")[0] == "DISCARD"
    assert agent.told() == [("discard", "another by hand")]


@pytest.mark.slow
def test_an_orphan_keeps_the_device_and_gives_nobody_its_result(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    folder = agent.runs(agent.head())[0]
    (folder / "runner.err").write_text("Traceback (most recent call last):\nOSError: no room\n")
    os.kill(int((folder / "alive").read_text()), signal.SIGKILL)  # the runner: training lives on
    answer = call.communicate()[0].splitlines()[-1]
    assert answer.startswith("BUSY") and "its runner failed: OSError: no room" in answer
    assert agent.call("wait", "--seconds", "0.1")[0] == "BUSY"
    agent.write("go", "")
    assert agent.call("wait")[0] == "KEEP"
    assert len(agent.rows()) == 4
    assert len(agent.calls()) == 5  # the orphan's and one more


def test_a_run_that_ends_while_it_is_asked_for_is_not_taken_for_dead(tmp_path, monkeypatch):
    folder = tmp_path / "abcdef0-42"
    folder.mkdir()
    job = {"tag": "nov21", "commit": "abcdef0", "seed": 42, "split": "val"}
    job |= {"started": 1.0, "slot": 0}
    (folder / "job.json").write_text(json.dumps(job))

    def is_going(folder):
        going = not (folder / "result.json").exists()
        (folder / "result.json").write_text('{"word": "valid"}')
        return going

    monkeypatch.setattr(ratchet, "RUNS", tmp_path)
    monkeypatch.setattr(ratchet, "is_going", is_going)
    (training,) = ratchet.attempts("nov21", "abcdef0")
    assert training.word != "cut off"


def test_foreground(agent):
    agent.edit(0.9960)
    assert agent.call("try", "--foreground", "width: wider")[0] == "KEEP"


@pytest.mark.slow
def test_an_interrupt_ends_what_runs_in_the_foreground(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "--foreground", "width: slow", start_new_session=True)
    wait_for(agent.folder / "up")
    os.killpg(call.pid, signal.SIGINT)  # as Ctrl-C does
    answer = call.communicate()[0].splitlines()[-1]
    assert answer.startswith("NEXT what was started is ended")
    assert (agent.runs(agent.head())[0] / "result.json").exists()
    agent.write("go", "")
    assert agent.call("wait")[0] == "KEEP"
    assert len(agent.rows()) == 4


def test_the_parents_steps_are_those_under_the_ideas_seed(agent):
    base = agent.git("rev-parse", "--short=7", "base/autoresearch/nov21^0")
    for seed, steps in ((42, 500), (43, 459), (44, 510)):
        path = agent.folder / "runs" / f"{base}-{seed}" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": steps}))
    assert "953 steps (the parent 500)" in agent.attempt("width: wider", 0.9)[1]


def test_a_run_that_was_slower_than_the_same_code_before_is_said(agent):
    def said(*steps):
        runs = [
            SimpleNamespace(commit="ba5e000", started=started, result={"steps": number})
            for started, number in enumerate(steps)
        ]
        night = SimpleNamespace(valid=lambda commit: runs)
        return [ratchet.speed_beside(night, run) for run in runs]

    assert said(500, 459, None, 510) == [
        ", 500 steps",
        ", 459 steps (up to 500 before: the machine was slower, which makes noise)",
        "",
        ", 510 steps",
    ]


def test_look_says_what_an_idea_has_to_gain(agent):
    _, out = agent.call("look")
    assert "0.997900 at first (mean of 3); 0 kept" in out
    found = re.search(r"noise (\S+): a gain above (\S+) is kept at once", out)
    noise, needed = map(float, found.groups())
    assert needed == pytest.approx(ratchet.HIGH * noise * 2**0.5, rel=0.01)
    assert agent.attempt("width: enough", 0.9979 - 1.02 * needed)[0] == "KEEP"
    assert len(agent.rows()) == 4
    assert "(mean of 3), 0.997" in agent.call("look")[1]


def test_once_the_night_is_over_drop_takes_no_keep_back(agent):
    agent.attempt("width: wider", 0.9960)
    kept = agent.head()
    agent.call("stop", "--night")
    word, out = agent.call("drop", "no time was left")
    assert word == "REFUSED" and "nothing is left over" in out and "--renew" not in out
    assert agent.head() == kept
    agent.call("start", "nov21", "--renew")
    assert agent.call("drop", "too ugly")[0] == "DISCARD"
    assert agent.head() != kept


def test_a_runner_that_failed_says_why(tmp_path):
    training = SimpleNamespace(folder=tmp_path)
    killed = ratchet.why_cut_off(training)
    (tmp_path / "runner.err").write_text("no run.log in /here: a note")
    assert ratchet.why_cut_off(training) == killed
    error = "OSError: [Errno 28] No space left on device"
    (tmp_path / "runner.err").write_text(f"Traceback (most recent call last):\n  line\n{error}\n")
    assert ratchet.why_cut_off(training) == f"its runner failed: {error}"


@pytest.mark.slow
def test_a_person_stops_a_run(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    assert agent.call("stop")[0] == "NEXT"
    assert call.communicate()[0].splitlines()[-1].startswith("BUSY")
    assert len(agent.rows()) == 3
    agent.write("go", "")
    assert agent.call("wait")[0] == "KEEP"


@pytest.mark.slow
def test_a_person_stops_the_night(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    assert agent.call("stop", "--night")[0] == "OVER"
    call.communicate()
    for verb in ("wait", "look"):
        word, said = agent.call(verb)
        assert word == "OVER" and "a person ended it" in said, said
    agent.write("go", "")
    assert agent.call("start", "nov21", "--renew")[0] == "KEEP"  # goes on where it was


def other_clone(agent, tmp_path, **env):
    """Return a second clone on this machine, with a night."""
    folder = tmp_path / "other"
    shutil.copytree(agent.folder, folder, symlinks=True)
    return Agent(folder, agent.env | env)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), [("0", "0"), ("MIG-GPU-1/2/0", "MIG-GPU-1/2/0,1")])
def test_a_second_clone_waits_for_the_device(agent, tmp_path, ours, theirs):
    agent.env["CUDA_VISIBLE_DEVICES"] = ours
    other = other_clone(agent, tmp_path, CUDA_VISIBLE_DEVICES=theirs)
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    other.edit(0.9960)
    assert other.call("try", "--seconds", "0.1", "width: wider")[0] == "BUSY"
    other.env["CUDA_VISIBLE_DEVICES"] = "7"
    assert other.call("wait")[0] == "KEEP"
    agent.write("go", "")
    assert call.communicate()[0].splitlines()[-1].startswith("KEEP")


@pytest.mark.slow
def test_a_launch_command_goes_in_front_of_each_training(fresh, tmp_path):
    via = tmp_path / "via it"
    via.write_text('#!/bin/sh\necho "$1 $2 $4" >> calls.log\nshift 2\nexec "$@"\n')
    via.chmod(0o755)
    fresh.call("start", "nov21", "--launch", f"'{via}' 'on device' {{slot}}")
    fresh.attempt("width: wider", 0.9960)
    runs = sorted((fresh.folder / "runs").glob("*/calls.log"))
    assert [path.read_text() for path in runs] == 4 * ["on device 0 train.py\n"]


def test_the_log_of_the_run_is_run_log(agent):
    agent.edit(0.9960, last_words=SLOW)
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    assert "step    40" in (agent.folder / "run.log").read_text()
    agent.write("go", "")
    call.communicate()
    assert "val_bpb:" in (agent.folder / "run.log").read_text()
    agent.write("run.log", "")  # by hand, as the README shows
    assert "val_bpb:" in (agent.runs(agent.head())[0] / "run.log").read_text()


@pytest.mark.parametrize("end", ["", "\\r", "\\rstep", "\\r\\n"])
def test_a_result_does_not_depend_on_how_its_log_ends(agent, end):
    text = agent.canvas((0.9960,)) + f"print(end={end!r})".replace("\\\\", "\\")
    assert agent.attempt("width: wider", text=text.replace("8'''", "8\\r\\n'''"))[0] == "KEEP"


def test_a_huge_log_is_read_from_both_ends(agent):
    flood = "print(('x' * 99 + chr(10)) * 60000)"
    assert agent.attempt("width: wider", 0.9960, last_words=flood)[0] == "KEEP"


# ------------------------------------------------------------------------------------------------
# Where it runs, and what it reads


@pytest.mark.parametrize("where", ["detached", "main", "no ledger", "no tag", "no repository"])
def test_in_a_wrong_place_it_says_so(agent, where):
    if where == "detached":
        agent.git("switch", "-q", "--detach")
    elif where == "main":
        agent.git("switch", "-q", "main")
    elif where == "no tag":
        agent.git("tag", "-d", "base/autoresearch/nov21")
    elif where == "no ledger":
        (agent.folder / "results.tsv").unlink()
    else:
        shutil.rmtree(agent.folder / ".git")
    for words in (["wait"], ["try", "width: x"], ["drop", "x"], ["show", "HEAD"]):
        assert one_line(agent.call(*words), "REFUSED")
    is_elsewhere = where in ("detached", "main")
    assert one_line(agent.call("look"), "NEXT" if is_elsewhere else "REFUSED")
    if is_elsewhere:  # the orders forbid git, so that it names none
        assert "uv run ratchet.py start TAG" in agent.call("look")[1]
        assert "git" not in agent.call("look")[1]
        assert agent.call("start", "nov21")[0] == "NEXT"


def test_without_git_it_says_so(agent, tmp_path):
    agent.env["PATH"] = str(tmp_path)
    answer = agent.call("look")
    assert one_line(answer, "REFUSED") and "git is not installed" in answer[1]


def test_it_says_what_git_says(fresh):
    fresh.env["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"  # git's own switch for "dubious ownership"
    assert "dubious ownership" in fresh.call("start", "nov21")[1]


@pytest.mark.parametrize("words", [["tyr", "x: y"], [], ["try", "a: b", "c"], ["look", "--all"]])
def test_a_mistyped_call_is_one_line(agent, words):
    assert one_line(agent.call(*words), "REFUSED")


def test_from_another_folder(agent, tmp_path):
    agent.edit(0.9960)
    command = [sys.executable, str(agent.folder / "ratchet.py"), "try", "width: wider"]
    out = subprocess.run(command, cwd=tmp_path, env=agent.env, capture_output=True, text=True)
    assert out.stdout.startswith("KEEP")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_recipe_in_a_subfolder_of_a_larger_repository(tmp_path):
    agent = scratch(tmp_path, sub="recipes/gpt two")
    top = tmp_path / "clone"
    (top / "other.txt").write_text("another project's\n")
    (top / "train.py").write_text("another train.py\n")
    agent.git("add", str(top / "other.txt"), str(top / "train.py"))
    agent.git("commit", "-q", "-m", "a larger repository")
    (top / "other.txt").write_text("edited\n")
    assert agent.call("start", "nov21")[0] == "NEXT"
    base = agent.head()
    assert agent.attempt("width: worse", 0.9990)[0] == "DISCARD"
    assert agent.attempt("width: wider", 0.9960)[0] == "KEEP"
    assert agent.git("diff", "--name-only", base, "HEAD") == "recipes/gpt two/train.py"
    assert (top / "other.txt").read_text() == "edited\n"
    worse = agent.rows()[3][0]
    word, out = agent.call("wave", worse)
    assert word == "REFUSED" and "does not apply" in out  # other lines than those it changed
    assert agent.git("status", "--porcelain") == " M other.txt"


@pytest.mark.slow
def test_in_a_worktree(agent, tmp_path):
    agent.git("worktree", "add", "-q", "--detach", str(tmp_path / "tree"), "main")
    other = Agent(tmp_path / "tree", agent.env)
    assert other.call("start", "nov22")[0] == "NEXT"
    assert other.attempt("width: wider", text=agent.canvas((0.9960,)))[0] == "KEEP"
    assert agent.call("look")[0] == "NEXT"
    assert len(agent.rows()) == 3


def test_windows_line_ends(agent):
    agent.git("config", "core.autocrlf", "true")
    (agent.folder / "train.py").write_bytes(agent.canvas((0.9960,)).replace("\n", "\r\n").encode())
    results = agent.folder / "results.tsv"
    results.write_bytes(results.read_bytes().replace(b"\n", b"\r\n"))
    assert agent.call("try", "width: wider")[0] == "KEEP"
    rows, notes = ratchet.read_ledger(results)
    assert [row.description for row in rows[2:]] == ["baseline", "width: wider"]
    assert notes == []


def test_a_ledger_without_its_last_newline(agent):
    results = agent.folder / "results.tsv"
    results.write_text(results.read_text().rstrip("\n"))
    assert agent.attempt("width: wider", 0.9960)[0] == "KEEP"
    assert [row[4] for row in agent.rows()[2:]] == ["baseline, seed 44", "width: wider"]


def test_a_stray_line_in_the_ledger_is_left_out_and_named(agent):
    results = agent.folder / "results.tsv"
    results.write_text(results.read_text() + "a note of mine\nabc\t1\t1\tkeep\tx\n\n")
    assert "line 5" in agent.call("look")[1]
    assert agent.attempt("width: wider", 0.9960)[0] == "KEEP"
    assert "a note of mine" in results.read_text()


def test_a_row_that_stands_twice_is_one_run(agent):
    results = agent.folder / "results.tsv"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines + lines[1:2]))
    rows, _ = ratchet.read_ledger(results)
    assert len(rows) == 3


def test_a_full_disk_loses_nothing(agent, monkeypatch):
    results = agent.folder / "results.tsv"
    before = results.read_text()
    row = ratchet.Row("abcdef0", 0.9, 1.0, "keep", "x", 42)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        ratchet.append_rows(results, [row])
    assert results.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "better", "lower"),
    [
        ((2e-7, 2.1e-7, 1.9e-7), 1.2e-7, True),
        ((-3.5, -3.51, -3.49), -3.6, True),
        ((123456.5, 123457.5, 123455.5), 120000.0, True),
        ((0.71, 0.712, 0.708), 0.75, False),
        ((-1e-9, -1.1e-9, -0.9e-9), -1e-10, False),
    ],
)
def test_any_number_as_the_metric(tmp_path, values, better, lower):
    agent = scratch(tmp_path)
    text = (agent.folder / "ratchet.py").read_text()
    agent.write("ratchet.py", text.replace("LOWER_IS_BETTER = True", f"LOWER_IS_BETTER = {lower}"))
    no_memory = agent.canvas(values).replace("peak_vram_mb:     %s\n", "").replace(", MB))", "))")
    agent.write("train.py", no_memory.replace("% (VALUES[seed])", "% (VALUES[seed],)"))
    agent.git("commit", "-qam", "another number")
    assert agent.call("start", "nov21")[0] == "NEXT"
    assert [float(row[1]) for row in agent.rows()] == pytest.approx(values, rel=1e-5)
    assert {row[2] for row in agent.rows()} == {"0.0"}
    base = agent.folder / "train.py"
    old = base.read_text()
    base.write_text(old.replace(f"42: {values[0]}", f"42: {better}"))
    assert agent.call("try", "any: better")[0] == "KEEP"
    base.write_text(old.replace(f"42: {values[0]}", f"42: {3 * values[0] - 2 * better}"))
    assert agent.call("try", "any: worse")[0] == "DISCARD"
    assert float(agent.rows()[3][1]) == pytest.approx(better, rel=1e-5)


def test_figures_keep_the_digits_of_small_numbers():
    draw = random.Random(0)
    for _ in range(1000):
        number = draw.choice((-1, 1)) * 10 ** draw.uniform(-12, 6)
        text = ratchet.figure(number)
        assert re.fullmatch(r"-?\d+\.\d{6,}", text)
        assert float(text) == pytest.approx(number, rel=1e-5)
    assert ratchet.figure(0.9979) == "0.997900"
    assert ratchet.figure(0) == "0.000000"


# ------------------------------------------------------------------------------------------------
# Looking


@pytest.mark.slow
def test_look_tells_a_new_session_where_the_last_one_ended(agent):
    agent.attempt("width: near", 0.99785, 0.9975, loss="2 / step")
    agent.attempt("width: better", 0.9960)
    agent.attempt("optimizer: worse", 0.9999)
    kept = agent.head()
    word, out = agent.call("look")
    assert word == "NEXT"
    assert "nov21: 3 of 20 experiments" in out
    assert re.search(rf"^kept {kept} \+0\.001900 width: better$", out, re.M)
    assert re.search(r"^near \w{7} \+0\.0000\d+ of 0\.000\d+ width: near$", out, re.M)
    assert re.search(r"^row  \w{7} 0\.999900 44\.0 GB discard optimizer: worse$", out, re.M)
    agent.edit(0.5)
    assert 'try "axis: idea"' in agent.call("look")[1]


def rows_of(ideas):
    """Return a ledger of a baseline and ideas, each (description, status, value)."""
    rows = [
        ratchet.Row("ba5e000", 1.0 + s, 1.0, "keep", "baseline", 42 + i)
        for i, s in enumerate((0.0, 0.01, -0.01))
    ]
    for number, (words, status, value) in enumerate(ideas):
        rows.append(ratchet.Row(f"{number:07x}", value, 1.0, status, words, 42))
    return rows


def test_axes():
    ideas = [("a: x", "discard", 1.01)] * 4 + [("b: x", "keep", 0.9)] + [("a: x", "discard", 0.89)]
    ideas += [("c: x", "crash", 0.0)] * 3
    night = SimpleNamespace(experiments=ratchet.experiments_of(rows_of(ideas)))
    c, a, b = ratchet.axis_lines(night)
    assert a.startswith("axis a: 5 tried, 0 kept, best gain 0.01") and a.endswith("closed")
    assert b.startswith("axis b: 1 tried, 1 kept, best gain 0.1") and b.endswith("cold")
    assert c == "axis c: 3 tried, 0 kept, no gain measured"
    night.experiments += ratchet.experiments_of(
        rows_of([(f"{i}: x", "discard", 2) for i in "defg"])
    )
    lines = ratchet.axis_lines(night)
    assert len(lines) == 4
    assert lines[-1] == "axes before, kept/tried: d 0/1, c 0/3, a 0/5 (closed), b 1/1"


def test_gains_of_a_ledger_against_an_oracle():
    """Each idea against the kept commit before it, under the same seed."""
    draw = random.Random(1)
    for _ in range(50):
        rows = rows_of([])
        expected = {}
        runs = {"ba5e000": dict(zip((42, 43, 44), (1.0, 1.01, 0.99), strict=True))}
        kept = "ba5e000"
        for number in range(20):
            commit = f"{number:07x}"
            value = draw.uniform(0.5, 1.5)
            status = draw.choice(("keep", "discard", "discard", "crash"))
            rows.append(ratchet.Row(commit, value, 1.0, status, "x: y", 42))
            expected[commit] = math.nan if status == "crash" else runs[kept][42] - value
            runs[commit] = {42: value}
            if status == "keep":
                kept = commit
        found = {e.commit: e.gain for e in ratchet.experiments_of(rows)}
        assert found == pytest.approx(expected, nan_ok=True)


def test_the_answers_of_an_experiment_are_short(agent):
    ideas = [f"axis number {i}: {'a long description of an idea ' * 5}{i}" for i in range(14)]
    rows = []
    for i, idea in enumerate(ideas):
        status = "keep" if i % 3 == 0 else "discard"
        commit = f"{i + 1:07x}"
        value = 0.99 - i // 3 / 1000 - (i % 3) / 10000
        rows.append(ratchet.Row(commit, value, 44.0, status, idea, 42))
        agent.git("update-ref", f"refs/autoresearch/nov21/{commit}", "HEAD")
    ratchet.append_rows(agent.folder / "results.tsv", rows)
    agent.write("notes.md", "edited")
    agent.edit(0.5)
    _, tried = agent.call("try", f"axis: {'a long description of an idea ' * 5}")
    _, looked = agent.call("look")
    assert looked.count("\n") == 15
    assert len((tried + looked).encode()) < 2000
    with (agent.folder / "results.tsv").open("a") as ledger:
        ledger.write("a stray line\n")
    agent.edit(0.4)
    _, looked = agent.call("look")  # a warning is worth more than a near miss
    assert looked.count("\n") <= 15
    assert "is left out" in looked and "notes.md" in looked and "kept " in looked


@pytest.mark.slow
def test_look_names_a_stray_line_whatever_else_it_says(agent):
    agent.edit(0.9960, last_words=SLOW)
    assert agent.call("try", "--seconds", "0", "width: wider")[0] == "RUNNING"
    wait_for(agent.folder / "up")
    with (agent.folder / "results.tsv").open("a") as ledger:
        ledger.write(f"{agent.head()[:6]}0\t1.0\t44.0\tdiscard\t\n")  # a row without words
        ledger.write("a stray line\n")
    agent.edit(0.5)
    agent.write("go", "")
    wait_for(agent.runs(agent.head())[0] / "result.json")
    _, looked = agent.call("look")
    assert "is left out" in looked and "edited meanwhile" in looked


@pytest.mark.parametrize("words", ["x: y", "x: y, seed 43", "x: y, seed 42", "x: seed 43, seed 43"])
@pytest.mark.parametrize("seed", [42, 43])
def test_a_row_is_read_as_it_was_written(words, seed):
    row = ratchet.Row("abcdef1", 0.9, 44.0, "discard", words, seed)
    assert ratchet.parse_row(ratchet.format_row(row)) == row


def test_a_full_disk_does_not_lose_a_result_for_the_copy_of_its_log(tmp_path, monkeypatch, capsys):
    log = tmp_path / "runs" / "run.log"
    log.parent.mkdir()
    log.write_text("step 1")
    monkeypatch.setattr(ratchet, "ROOT", tmp_path)
    ratchet.show_log(log)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(shutil, "copyfile", raises(full))
    ratchet.keep_log(log)
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "run.log").read_text() == "step 1"


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.slow
def test_show(agent):
    agent.attempt("width: worse", 0.9990)
    commit = agent.rows()[-1][0]
    word, out = agent.call("show", commit, lines=60)
    assert word == "DISCARD"
    assert "width: worse" in out and "+VALUES" in out and "| depth:" in out
    agent.git("config", "color.ui", "always")
    assert agent.call("show", commit, lines=60)[1] == out
    assert agent.call("show", "--lines", "1", commit)[1].count("\n") == 1
    agent.attempt("width: typo", text="import oss\n")
    assert "No module named" in agent.call("show", "HEAD", lines=60)[1]
    assert one_line(agent.call("show", "1234567"), "REFUSED")
    word, out = agent.call("show", "base/autoresearch/nov21", lines=60)
    assert word == "NEXT" and "| depth:" in out
    assert "the base, val_bpb 0.997900 (mean of 3 runs)" in out
    assert "nothing" not in agent.call("show", agent.rows()[0][0], lines=60)[1]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [("--experiments", "2"), ("--patience", "2")])
def test_a_limit_ends_the_night(fresh, limit):
    assert fresh.call("start", "nov21", *limit)[0] == "NEXT"
    assert fresh.attempt("width: worse", 0.9990)[0] == "DISCARD"
    assert fresh.call("look")[0] == "NEXT"
    fresh.attempt("width: worse", 0.9991)
    assert fresh.call("look")[0] == "OVER"
    head = fresh.head()
    assert fresh.attempt("width: wider", 0.9960)[0] == "OVER"
    assert fresh.head() == head


@pytest.mark.slow
def test_patience_counts_from_the_last_keep(fresh):
    fresh.call("start", "nov21", "--patience", "2")
    fresh.attempt("width: worse", 0.9990)
    fresh.attempt("width: wider", 0.9960)
    fresh.attempt("width: worse", 0.9990)
    assert fresh.call("look")[0] == "NEXT"


@pytest.mark.slow
def test_an_idea_is_finished_past_the_end(agent):
    agent.edit(0.9975, 0.9970, last_words=f"if seed == 43:\n    {SLOW}".replace("\nw", "\n    w"))
    call = agent.start_process("try", "width: slow")
    wait_for(agent.folder / "up")
    facts = json.dumps({"experiments": None, "until": 1, "patience": None, "launch": ""})
    agent.git("tag", "-f", "-a", "-m", facts, "base/autoresearch/nov21", "HEAD~1")
    agent.write("go", "")
    assert call.communicate()[0].splitlines()[-1].startswith("KEEP")
    assert agent.call("look")[0] == "OVER"


@pytest.mark.slow
def test_a_long_night_costs_no_more_processes(agent, tmp_path):
    """A thousand rows and three hundred ideas: as many calls of git as at the beginning."""
    real = shutil.which("git")
    shim = tmp_path / "git"
    shim.write_text(f'#!/bin/sh\necho x >> "{tmp_path}/count"\nexec "{real}" "$@"\n')
    shim.chmod(0o755)
    agent.env["PATH"] = f"{tmp_path}{os.pathsep}{agent.env['PATH']}"

    def count():
        (tmp_path / "count").unlink(missing_ok=True)
        agent.call("look")
        return len((tmp_path / "count").read_text().splitlines())

    agent.call("start", "nov21", "--renew")  # without limits
    agent.attempt("width: kept", 0.9960)
    kept = agent.git("rev-parse", "HEAD")
    before = count()
    rows = [
        ratchet.Row(f"{i:07x}", 1.0, 1.0, "discard", f"axis {i % 20}: idea {i}", 42)
        for i in range(1, 1001)
    ]
    ratchet.append_rows(agent.folder / "results.tsv", rows)
    refs = "".join(f"create refs/autoresearch/nov21/{i:07x} {kept}\n" for i in range(1, 301))
    subprocess.run(["git", "update-ref", "--stdin"], cwd=agent.folder, input=refs, text=True)
    assert count() == before


# ------------------------------------------------------------------------------------------------
# For the person


def ideas_of(agent, *texts):
    """Commit ideas on HEAD by hand, each beside the other; return their hashes."""
    head = agent.git("rev-parse", "HEAD")
    found = []
    for number, text in enumerate(texts):
        agent.write("train.py", text)
        agent.git("commit", "-qam", f"wave: idea {number}")
        found.append(agent.head())
        agent.git("reset", "-q", "--hard", head)
    return found


MEETS = """(here / "runs/{me}").touch()
end = time.monotonic() + 100
while not (here / "runs/{other}").exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.02)
"""


@pytest.mark.slow
def test_a_wave(fresh):
    """Two of the ideas end only if they run at the same time."""
    assert fresh.call("start", "nov21", "--launch", "env")[0] == "NEXT"
    base = fresh.head()
    meet = [MEETS.format(me=f"m{me}", other=f"m{3 - me}") for me in (1, 2)]
    texts = [fresh.canvas((0.9960, 0.996), last_words=meet[0])]
    texts += [fresh.canvas((0.9950, 0.995), last_words=meet[1], mb=1024), "raise MemoryError\n"]
    worse, best, broken = ideas_of(fresh, *texts)
    assert fresh.call("wave", worse, best, broken)[0] == "KEEP"
    rows = fresh.rows()[3:]
    assert [(row[0], row[3]) for row in rows[:3]] == [
        (broken, "crash"),
        (worse, "discard"),
        (best, "keep"),
    ]
    assert best in rows[1][4]  # it beat its bar beside the best one
    assert fresh.git("log", "--format=%s", f"{base}..HEAD") == "wave: idea 1"
    assert fresh.git("status", "--porcelain") == ""
    assert fresh.call("look")[0] == "NEXT"


def knobs(agent, first=0, second=0, third=0):
    """Return a train.py with three knobs, apart from each other, that gain what they say."""
    text = agent.canvas()
    lines = [f"A = {first}", *["#"] * 5, f"B = {second}", *["#"] * 5, f"C = {third}", *["#"] * 5]
    text = "\n".join(lines) + "\n" + text
    return (
        text.replace("{last}", "")
        .replace("seed = int", "GAIN = A + B + C\nseed = int")
        .replace("here = Path", "VALUES = {k: v - GAIN for k, v in VALUES.items()}\nhere = Path")
    )


@pytest.mark.slow
@pytest.mark.parametrize("sub", ["", "recipes/gpt two"])
def test_the_keeps_of_a_wave_are_combined(tmp_path, sub):
    fresh = scratch(tmp_path, sub)
    for setting in ("diff.noprefix=true", "color.ui=always", "apply.whitespace=error-all"):
        fresh.git("config", *setting.split("="))
    fresh.write("train.py", knobs(fresh))
    fresh.git("commit", "-qam", "knobs")
    fresh.call("start", "nov21")
    texts = (knobs(fresh, 0.01), knobs(fresh, 0, 0.02), knobs(fresh, 0, 0, -0.03))
    word, _ = fresh.call("wave", *ideas_of(fresh, *texts))
    assert word == "KEEP"
    assert [row[3] for row in fresh.rows()[3:]] == ["discard", "discard", "keep", "keep"]
    assert float(fresh.rows()[-1][1]) == pytest.approx(0.9979 - 0.03)
    text = (fresh.folder / "train.py").read_text()
    assert "A = 0.01\n" in text and "B = 0.02\n" in text and "C = 0\n" in text
    # A discarded idea can be tried again on what was kept since
    again = fresh.rows()[3][0]
    assert fresh.call("wave", again)[0] == "DISCARD"
    assert [row[3:] for row in fresh.rows()[3:4]] == [row[3:] for row in fresh.rows()[7:]]


@pytest.mark.slow
def test_a_wave_through_a_busy_machine(fresh):
    fresh.call("start", "nov21", "--launch", "env")
    busy = "if not (here / 'quiet').exists(): print('machine busy: 38%')"
    texts = (fresh.canvas((0.9990,)), fresh.canvas((0.9960,), last_words=busy))
    ideas = ideas_of(fresh, *texts)
    assert fresh.call("wave", *ideas)[0] == "BUSY"
    assert fresh.attempt("width: not now", 0.5)[0] == "REFUSED"
    fresh.git("checkout", "-q", "train.py")
    fresh.write("quiet", "")
    assert fresh.call("wait")[0] == "KEEP"
    assert [row[0] for row in fresh.rows()[3:]] == ideas
    assert len(fresh.calls()) == 6


@pytest.mark.slow
def test_a_wave_that_a_person_ended_goes_on_when_the_night_is_renewed(fresh):
    assert fresh.call("start", "nov27")[0] == "NEXT"
    ideas = ideas_of(fresh, fresh.canvas((0.9960, 0.9960), last_words=SLOW))
    assert fresh.call("wave", "--seconds", "0", *ideas)[0] == "RUNNING"
    wait_for(fresh.folder / "up")
    fresh.call("stop", "--night")
    word, said = fresh.call("wait")
    assert word == "OVER" and "start nov27 --renew goes on" in said
    fresh.write("go", "")
    assert fresh.call("start", "nov27", "--renew")[0] in ("KEEP", "NEXT")
    assert fresh.told()[-1][0] == "keep"


def test_an_edit_during_a_wave_is_saved(agent):
    edits = "(here / 'train.py').write_text('mine')"
    (idea,) = ideas_of(agent, agent.canvas((0.9960,), last_words=edits))
    assert agent.call("wave", idea)[0] == "KEEP"
    assert agent.head() == idea
    assert agent.git("status", "--porcelain") == ""
    assert next((agent.folder / "runs").glob("edited-*.py")).read_text() == "mine"


@pytest.mark.parametrize("case", ["nothing", "another file", "conflict"])
def test_a_wave_of_what_is_no_idea(agent, case):
    head = agent.git("rev-parse", "HEAD")
    if case == "nothing":
        assert one_line(agent.call("wave", head), "REFUSED")
        return
    if case == "another file":
        agent.write("notes.md", "more")
        agent.git("commit", "-qam", "notes")
        commit = agent.head()
        agent.git("reset", "-q", "--hard", head)
        assert one_line(agent.call("wave", commit), "REFUSED")
        return
    (idea,) = ideas_of(agent, agent.canvas((0.9950,)))
    agent.attempt("width: kept", 0.9960)
    word, out = agent.call("wave", idea)
    assert word == "REFUSED" and "does not apply" in out
    assert len(agent.rows()) == 4


@pytest.mark.slow
def test_final(agent):
    on_test = "import builtins; P = print; print = lambda *a: P(*[str(x).replace('val_bpb', "
    on_test += "os.environ['AUTORESEARCH_SPLIT'] + '_bpb') for x in a])"
    on_test = f"if 'AUTORESEARCH_SPLIT' in os.environ:\n    {on_test}"
    agent.git("switch", "-q", "main")
    agent.edit(0.9979, 0.9975, 0.9983, last_words=on_test)
    agent.git("commit", "-qam", "knows the test shard")
    agent.write("results.tsv", "")
    agent.call("start", "nov22")
    agent.attempt("width: wider", 0.9960, 0.9950, 0.9970, last_words=on_test)
    before = agent.rows()
    assert agent.call("final")[0] == "REFUSED"  # no look at the test shard during the night
    agent.call("stop", "--night")
    calls = len(agent.calls())
    word, out = agent.call("final")
    assert word == "OVER"
    assert len(agent.calls()) == calls + 6
    gains = (0.9979 - 0.9960, 0.9975 - 0.9950, 0.9983 - 0.9970)
    assert f"gain {statistics.mean(gains):.6f}" in out
    assert agent.rows() == before
    agent.call("final")
    assert len(agent.calls()) == calls + 6


# What each line that an idea adds or takes out is worth on the test shard, seed 43 a little more
WORTH = """\
parts = Path("train.py").read_text().count
value = 3 - 0.5 * parts("\\nA = 1") - 0.2 * parts("\\nB = 1") + 0.1 * parts("\\nC = 1")
VALUES = dict.fromkeys((42, 43, 44), value + 0.01 * (seed == 43) * parts("\\nA = 1"))
if parts("\\nB = 1") and not parts("\\nA = 1"):
    sys.exit("B needs A")
"""

# Name the number as the real train.py does: test_bpb on the test shard
ON_TEST = (
    "print = lambda *a, P=print, **k: P(*[str(x).replace('val_bpb', "
    "os.environ.get('AUTORESEARCH_SPLIT', 'val') + '_bpb') for x in a], **k)"
)


def ablate(agent, *words):
    """Call tools/ablate.py of the clone; return its exit status, its table, and all it said."""
    command = [sys.executable, str(agent.folder / "tools/ablate.py"), *words]
    done = subprocess.run(
        command,
        cwd=agent.folder,
        env=agent.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    table = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return done.returncode, table, done.stdout


@pytest.mark.slow
def test_every_kept_change_is_taken_out_of_the_winner_alone(fresh):
    agent = fresh
    apart = "\n" + 8 * "# so that git sees no conflict\n"
    text = agent.canvas(last_words=f"{WORTH}\n{ON_TEST}\nA = 0{apart}B = 0{apart}C = 0{apart}")
    agent.edit(text=text)
    (agent.folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/ablate.py", agent.folder / "tools")
    agent.git("add", ".")
    agent.git("commit", "-qm", "knows what its lines are worth")
    assert agent.call("start", "nov27")[0] == "NEXT"
    kept = []
    for line in ("A", "B"):
        text = text.replace(f"\n{line} = 0", f"\n{line} = 1")
        assert agent.attempt(f"axis: {line}", text=text)[0] == "KEEP"
        kept.append(agent.head())
    ledger = agent.rows()
    assert ablate(agent)[0] == 1 and "the night goes on" in ablate(agent)[2]
    agent.call("stop", "--night")
    calls = len(agent.calls())
    status, table, out = ablate(agent)
    assert status == 0, out
    assert [row[1:] for row in table[1:]] == [
        ["2.300000", "2.310000", "", "", "the winner"],
        ["crash", "crash", "", "", f"without {kept[0]} axis: A"],
        ["2.500000", "2.510000", "0.200000", "0.200000", f"without {kept[1]} axis: B"],
    ]
    assert len(agent.calls()) == calls + 6
    seeds = [call.split()[0] for call in agent.calls()[calls:]]
    assert seeds == ["42"] * 3 + ["43"] * 3
    assert ablate(agent)[1] == table and len(agent.calls()) == calls + 6  # nothing runs again
    assert agent.rows() == ledger and agent.git("status", "--porcelain") == ""

    # A version that a person has made
    agent.edit(text=text.replace("\nC = 0", "\nC = 1"))
    agent.git("commit", "-qam", "C, by hand")
    by_hand = agent.head()
    agent.git("reset", "-q", "--hard", "HEAD~1")
    status, table, out = ablate(agent, by_hand)
    assert status == 0 and table[-1] == [
        by_hand,
        "2.400000",
        "2.410000",
        "0.100000",
        "0.100000",
        f"by hand: {by_hand} C, by hand",
    ]


@pytest.mark.slow
def test_a_change_that_cannot_be_taken_out_alone_is_named(agent):
    (agent.folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/ablate.py", agent.folder / "tools")
    kept = []
    for value in (0.9960, 0.9930):
        answer = agent.attempt(f"width: {value}", value, value, value, last_words=ON_TEST)
        assert answer[0] == "KEEP"
        kept.append(agent.head())
    agent.write("notes.md", "a note that is no idea\n")
    agent.git("commit", "-qam", "a note")
    agent.call("stop", "--night")
    status, table, out = ablate(agent)
    assert status == 0
    assert f"cannot be taken out alone: {kept[0]} width: 0.996" in out and "a note" not in out
    assert [row[1:] for row in table[1:]] == [
        ["0.993000", "0.993000", "", "", "the winner"],
        ["0.996000", "0.996000", "0.003000", "0.003000", f"without {kept[1]} width: 0.993"],
    ]


@pytest.mark.slow
def test_a_person_can_stop_what_scores_the_versions(tmp_path):
    slow = f"{ON_TEST}\nif 'AUTORESEARCH_SPLIT' in os.environ:\n    "
    slow += "\n    ".join(SLOW.splitlines())
    agent = scratch(tmp_path, last_words=slow)
    agent.call("start", "nov27")
    (agent.folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/ablate.py", agent.folder / "tools")
    assert agent.attempt("width: wider", 0.9960, 0.9960, 0.9960, last_words=slow)[0] == "KEEP"
    agent.call("stop", "--night")
    for command in (["ratchet.py", "final"], ["tools/ablate.py"]):
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=agent.folder,
            env=agent.env,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.STDOUT,
        )
        (agent.folder / "up").unlink(missing_ok=True)
        wait_for(agent.folder / "up")
        calls = len(agent.calls())
        assert agent.call("stop")[0] == "NEXT"
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert "it was stopped by a person" in out
        assert len(agent.calls()) == calls
    assert "left" in out and f"uv run {command[0]} runs it again" in out


# ------------------------------------------------------------------------------------------------
# The orders


def test_everything_that_the_orders_name_exists():
    text = (ROOT / "program.md").read_text()
    assert max(map(len, text.splitlines())) <= 100
    named = re.findall(r"`([^`]+)`", text)
    calls = [name.split() for name in named if name.startswith(ratchet.ME)]
    verbs = {words[3] for words in calls}
    assert verbs == {"start", "try", "wait", "drop", "look", "show"}
    for words in calls:
        ratchet.make_parser().parse_args(shlex.split(" ".join(words[3:])))
    answers = re.findall(r"^\| `([A-Z]+)` \|", text, re.M)
    assert sorted(answers) == sorted(ratchet.ANSWERS)
    files = {name for name in named if re.fullmatch(r"[\w.-]+\.\w+", name)}
    assert files == {"prepare.py", "train.py", "results.tsv", "run.log"}
    contract = (ROOT / "prepare.py").read_text()
    constants = {name for name in named if re.fullmatch("[A-Z_]+", name)} - set(answers)
    assert constants
    for name in constants:
        assert re.search(rf"^{name} = ", contract, re.M), name


# ------------------------------------------------------------------------------------------------
# The real train.py

SHRINK = {
    "prepare.py": (
        (r"^TIME_BUDGET = .*", "TIME_BUDGET = 2"),
        (r"^EVAL_TOKENS = .*", "EVAL_TOKENS = 2 * MAX_SEQ_LEN"),
        (r"^PROBE_ROWS = .*", "PROBE_ROWS = 2"),
        (r"^(MAX_SHARE_TAKEN = )0\.1", r"\g<1>1.1"),  # other tests run beside this one
    ),
    "train.py": (
        (r"^DEPTH = .*", "DEPTH = 1"),
        (r"^( +TOTAL_BATCH_SIZE) = .*", r"\g<1> = 2**11"),  # without CUDA: one row
        (r"^( +DEVICE_BATCH_SIZE) = .*", r"\g<1> = 1"),
    ),
}


@pytest.mark.slow
def test_real_train(prepared_cache, tmp_path):
    agent = scratch(tmp_path)
    for name in ("prepare.py", "train.py"):
        text = (ROOT / name).read_text()
        for pattern, new in SHRINK[name]:
            text = re.sub(pattern, new, text, flags=re.M)
        agent.write(name, text)
    agent.git("commit", "-qam", "the real ones, small")
    agent.env |= {
        "AUTORESEARCH_CACHE": str(prepared_cache),
        "AUTORESEARCH_CORPUS": "python",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # faster where other tests run beside this one
        "TORCH_COMPILE_DISABLE": "1",  # compiling takes longer than all the rest
    }
    assert agent.call("start", "nov21", "--seconds", "0")[0] == "RUNNING"
    while (said := agent.call("look"))[0] == "RUNNING":
        time.sleep(1)
    assert said[0] == "NEXT", said[1]
    (base,) = {row[0] for row in agent.rows()}
    result = json.loads((agent.runs(base)[0] / "result.json").read_text())
    assert agent.rows()[0][1] == f"{result['value']:.6f}"
    assert result["setting"]["attention"].startswith("attention: blocked")
    assert result["steps"] > 0 and result["memory_mb"] > 100 and result["losses"]
    assert result["total_seconds"] > 2


# ------------------------------------------------------------------------------------------------
# Cut after every step

CUT = """\
import json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {folder!r})
import ratchet

cuts = Path({cuts!r})

def state():
    head = ratchet.git_or_none("rev-parse", "HEAD")
    rows = ratchet.LEDGER.read_text().count("\\n") if ratchet.LEDGER.exists() else 0
    return head, rows, len(list(ratchet.RUNS.glob("*/result.json")))

def then_cut(name, function):
    def step(*args, **options):
        done = function(*args, **options)
        if name != "git" or args[0] in CHANGES:
            key = [name if name != "git" else args[0], sys.argv[1], *map(str, state())]
            seen = json.loads(cuts.read_text())
            if key not in seen:
                cuts.write_text(json.dumps([*seen, key]))
                os._exit(137)
        return done
    return step

CHANGES = ("commit", "update-ref", "reset", "merge", "tag", "switch", "checkout", "read-tree")
ratchet.git_bytes = then_cut("git", ratchet.git_bytes)
for name in ("append_rows", "replace_file", "make_snapshot", "start_run"):
    setattr(ratchet, name, then_cut(name, getattr(ratchet, name)))
ratchet.__file__ = {file!r}
sys.exit(ratchet.main())
"""


def cut_call(agent, script, *words):
    """Call the ratchet, which is cut after the first step it was not cut after before."""
    command = [sys.executable, str(script), *words]
    out = subprocess.run(
        command,
        cwd=agent.folder,
        env=agent.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert "Traceback" not in out.stderr, out.stderr
    return None if out.returncode == 137 else out.stdout.splitlines()[-1]


def play(agent, script, ideas):
    """Do what program.md says, as one who remembers nothing between two calls."""
    for _ in range(300):
        said = cut_call(agent, script, "look")
        if said is None:
            continue
        if said.startswith("NEXT no night"):
            cut_call(agent, script, "start", "nov21")
            continue
        tried = {row[4].split(";")[0].split(",")[0] for row in agent.rows()}
        idea = next((idea for idea in ideas if idea not in tried), None)
        if said.startswith("CRASH"):
            cut_call(agent, script, "drop", "no use")
        elif "ratchet.py wait" in said:
            cut_call(agent, script, "wait")
        elif said.startswith("NEXT"):
            if idea is None:
                return
            agent.write("train.py", ideas[idea])
            cut_call(agent, script, "try", idea)
        else:
            raise AssertionError(said)
    raise AssertionError("the night does not end")


def night_of(folder):
    agent = scratch(folder)
    ideas = {
        "width: better": agent.canvas((0.9960, 0.9961)),
        "loss: crash": "import oss\n",
        "width: worse": agent.canvas((0.9990, 0.9990)),
        "optimizer: between": agent.canvas((0.9958, 0.9951)),
    }
    return agent, ideas


@pytest.mark.slow
def test_a_prepared_edit_survives_a_cut_after_every_step_of_a_discard(agent, tmp_path):
    base = agent.head()
    begin = (agent.folder / "train.py").read_text()
    script = tmp_path / "cut.py"
    cuts = tmp_path / "cuts.json"
    cuts.write_text("[]")
    file = str(agent.folder / "ratchet.py")
    script.write_text(CUT.format(folder=str(agent.folder), cuts=str(cuts), file=file))
    running = agent.canvas((0.9990, 0.9990, 0.9990), last_words=f"width = 1\n{SLOW}\n")
    agent.write("train.py", running)
    assert agent.call("try", "--seconds", "0", "width: wider")[0] == "RUNNING"
    agent.write("train.py", f"depth = 2\n{running}")
    agent.write("go", "")
    wait_for(agent.runs(agent.head())[0] / "result.json")
    said = None
    while said is None:
        said = cut_call(agent, script, "wait")
    steps = [key[0] for key in json.loads(cuts.read_text())]
    assert steps.count("replace_file") == 1 and steps.count("reset") == 1
    assert agent.head() == base
    assert (agent.folder / "train.py").read_text() == f"depth = 2\n{begin}"
    assert agent.git("diff", "--cached", "--name-only") == ""


@pytest.mark.slow
def test_a_night_cut_after_every_step_goes_on(tmp_path):
    agent, ideas = night_of(tmp_path)
    script = tmp_path / "cut.py"
    cuts = tmp_path / "cuts.json"
    cuts.write_text("[]")
    file = str(agent.folder / "ratchet.py")
    script.write_text(CUT.format(folder=str(agent.folder), cuts=str(cuts), file=file))
    play(agent, script, ideas)
    assert len(json.loads(cuts.read_text())) > 40
    assert agent.told(0) == [
        ("keep", "baseline, seed 42"),
        ("keep", "baseline, seed 43"),
        ("keep", "baseline, seed 44"),
        ("keep", "width: better"),
        ("crash", "loss: crash; dropped: no use"),
        ("discard", "width: worse"),
        ("keep", "parent again, seed 43"),
        ("keep", "optimizer: between"),
        ("keep", "optimizer: between, seed 43"),
    ]
    subjects = agent.git("log", "--format=%s", "main..").splitlines()
    assert subjects == ["optimizer: between", "width: better"]
    assert agent.git("status", "--porcelain") == ""
