"""docs/agents: the loop that starts an agent again, with a dummy agent; the settings parse.

What the real clients make of the settings is tried by hand: tools/drive.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import PATIENCE_SECONDS, ROOT

AGENTS = ROOT / "docs/agents"
UV = f"""#!/bin/sh
shift
exec {sys.executable} "$@"
"""
SLEEP = """#!/bin/sh
echo $1 >> "$RECIPE/slept"
"""
AGENT = """#!/usr/bin/env bash
trap 'exit 0' INT
echo x >> "$RECIPE/starts"
printf '%s\\n' "$@" > "$RECIPE/words"
read -r line && echo "$line" > "$RECIPE/stdin"
next=$(head -n 1 "$RECIPE/script")
sed -i.old 1d "$RECIPE/script"
[ "$next" != book ] || echo row >> "$RECIPE/results.tsv"
[ "$next" != over ] || touch "$RECIPE/over"
[ "$next" != interrupt ] || kill -INT 0
"""
RATCHET = """import pathlib
print("a line")
print("OVER the limit" if pathlib.Path("over").exists() else "NEXT edit train.py")
"""


@pytest.fixture
def night(tmp_path):
    """Return a function that runs night.sh with a dummy agent that takes these steps."""
    recipe = tmp_path / "a recipe"
    (recipe / "docs/agents").mkdir(parents=True)
    shutil.copy(AGENTS / "night.sh", recipe / "docs/agents")
    (recipe / "ratchet.py").write_text(RATCHET)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("uv", UV), ("sleep", SLEEP), ("agent", AGENT)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "RECIPE": str(recipe)}
    somebody = {"GIT_COMMITTER_NAME": "nobody", "GIT_COMMITTER_EMAIL": "nobody@localhost"}

    def run(*steps, command=("agent", "-p", "two words"), identity=somebody):
        (recipe / "script").write_text("".join(f"{step}\n" for step in steps))
        line = ["bash", str(recipe / "docs/agents/night.sh"), *command]
        ended = subprocess.run(
            line,
            cwd=tmp_path,
            env=env | identity,
            input="not for the agent\n",
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            start_new_session=True,
        )
        return ended

    run.recipe = recipe
    return run


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_agent_starts_again_until_the_night_is_over(night):
    ended = night("book", "book", "over")
    assert ended.returncode == 0
    assert "OVER the limit" in ended.stdout
    assert len(lines(night.recipe / "starts")) == 3
    assert lines(night.recipe / "words") == ["-p", "two words"]
    assert not (night.recipe / "stdin").exists()


def test_five_idle_starts_end_the_loop_with_growing_waits(night):
    ended = night()
    assert ended.returncode == 1
    assert len(lines(night.recipe / "starts")) == 5
    waits = [int(wait) for wait in lines(night.recipe / "slept")]
    assert waits == [60, 240, 960, 3840]
    assert len(ended.stderr.splitlines()) == 1


def test_a_booked_row_forgets_the_idle_starts(night):
    ended = night("idle", "idle", "book", "idle", "over")
    assert ended.returncode == 0
    waits = [int(wait) for wait in lines(night.recipe / "slept")]
    assert waits == [60, 240, 10, 60]


def test_no_such_agent_is_one_line_and_no_wait(night):
    for command in (["no-such-agent", "-p", "x"], []):
        ended = night(command=command)
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1
        assert not (night.recipe / "slept").exists()


def test_git_that_knows_no_name_is_said_before_the_night(night):
    ended = night(identity={"GIT_COMMITTER_NAME": "", "GIT_COMMITTER_EMAIL": ""})
    assert ended.returncode == 2
    assert "git config user.name" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (night.recipe / "starts").exists()


def test_interrupt_ends_the_loop(night):
    ended = night("interrupt")
    assert ended.returncode == 130
    assert len(lines(night.recipe / "starts")) == 1


def test_settings_parse_and_name_files_that_exist():
    rules = json.loads((AGENTS / "claude.json").read_text())["permissions"]
    named = [rule[5:-1] for rule in rules["allow"] + rules["deny"] if rule.startswith("Edit(")]
    profile = tomllib.loads((AGENTS / "codex.toml").read_text())
    permission = profile["permissions"][profile["default_permissions"]]
    writable = permission["filesystem"][":workspace_roots"]
    assert {name.partition("/")[0] for name in writable} == {"train.py"}
    written = {"results.tsv"}  # by the ratchet, during a night
    for name in {*named, "train.py"} - written:
        assert list(ROOT.glob(name)), name
