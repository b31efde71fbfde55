"""Every state of a night, played by the ratchet's own command line in a scratch repository.

train.py is a stand-in that prints what a run prints, in milliseconds; prepare.py and pyproject.toml
are stubs. Every call is a process of its own, as the agent's are.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import ratchet

ROOT = Path(__file__).resolve().parent.parent
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
STATUS = {"KEEP": 0, "NEXT": 0, "REFUSED": 2, "DISCARD": 3, "CRASH": 4}
STATUS |= {"BUSY": 5, "RUNNING": 6, "OVER": 7}

CANVAS = """\
import os, sys, time
from pathlib import Path
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
    print(f"step {{step:5d}} (  9.9%) | loss {{VALUES[seed] * 5 / step:.4f}} | val_bpb: 0.1", flush=True)
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
        out, _ = process.communicate(given, timeout=60)
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
        defaults |= {"attention": "flex", "here": str(self.folder)}
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

    def copy(self, folder):
        shutil.copytree(self.folder, folder, symlinks=True)
        train = folder / "train.py"
        twin = Agent(folder, self.env | {"TMPDIR": str(folder.parent)})
        if "calls.log" in train.read_text():
            old = str(self.folder)
            exclude = folder / ".git/info/exclude"
            exclude.write_text("calls.log\nquiet\nup\ngo\n")
            assert old in train.read_text()
        return twin


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


def test_baseline(at_baseline):
    word, out = at_baseline.said
    assert word == "NEXT"
    base = at_baseline.git("rev-parse", "base/autoresearch/nov21^0")[:7]
    assert at_baseline.rows() == [
        (base, "0.997900", "44.0", "keep", "baseline, seed 42"),
        (base, "0.997500", "44.0", "keep", "baseline, seed 43"),
        (base, "0.998300", "44.0", "keep", "baseline, seed 44"),
    ]


def test_keep(agent):
    base = agent.git("rev-parse", "HEAD")
    word, out = agent.attempt("width: wider", 0.9960, mb=51200)
    assert word == "KEEP"
    assert agent.rows()[3:] == [(agent.head(), "0.996000", "50.0", "keep", "width: wider")]
    assert len(agent.calls()) == 4  # one run was enough
    assert agent.git("rev-parse", "HEAD~1") == base
    assert agent.git("diff", "--name-only", base, "HEAD") == "train.py"
    assert agent.git("status", "--porcelain") == ""


def test_discard(agent):
    base, before = agent.head(), (agent.folder / "train.py").read_text()
    word, out = agent.attempt("width: wider", 0.9990)
    assert word == "DISCARD"
    assert agent.head() == base
    assert (agent.folder / "train.py").read_text() == before
    assert [row[1:] for row in agent.rows()[3:]] == [
        ("0.999000", "44.0", "discard", "width: wider")
    ]
    assert agent.git("status", "--porcelain") == ""
