"""Take each kept change out of a night's winner, and score what is left on the test shard.

    uv run ratchet.py stop --night
    uv run tools/ablate.py
    uv run tools/ablate.py COMMIT...

For every kept commit this makes the winner without the change of that commit, as git would revert
it. It trains under two seeds, and so does the winner. The second seed takes the list backwards, so
that a machine that becomes slower or faster favours nobody. A change holds if the winner is better
with it under both seeds, and by more than one seed differs from the other by itself.

Where a later change edits the same lines, git cannot take a change out alone. The tool says so. You
can then commit the winner without it by hand, and name that commit on the command line.

The runs are the ratchet's own, in runs/, and in no ledger. If the tool is ended, call it again: it
goes on where it was. The night must be over, and its branch checked out.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ratchet
from ratchet import Answer, Need, Refused, figure

SEEDS = ratchet.SEEDS[:2]


def take_out(commit, winner):
    """Return a commit that is the winner without the change of a kept one, None on a conflict."""
    tree = ratchet.tree_with(winner, commit, f"{commit}^")
    if tree is None:
        return None
    # By the same author at the same time: the next call makes the same commit, and finds its runs
    env = dict(os.environ)
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_NAME": "ablate", f"GIT_{role}_EMAIL": "ablate@localhost"}
        env[f"GIT_{role}_DATE"] = "@0 +0000"
    words = f"without {ratchet.subject(commit)}"
    return ratchet.git("commit-tree", "--no-gpg-sign", "-p", winner, "-m", words, tree, env=env)


def versions_of(night, by_hand):
    """Return {commit: words} of all that is to be scored: the winner first, then without each."""
    versions = {night.kept: "the winner"}
    span = f"{night.base}..{night.kept}"  # with the notes that people have committed
    kept = ratchet.git("rev-list", "--reverse", span, "--", ratchet.CANVAS).split()
    for commit in kept:
        words = f"without {commit[:7]} {ratchet.subject(commit)}"
        version = take_out(commit, night.kept)
        if version is None:
            print(f"cannot be taken out alone: {commit[:7]} {ratchet.subject(commit)}")
        elif ratchet.git("diff", "--name-only", version, night.kept):
            versions[version] = words
        else:
            print(f"undone by a later change: {commit[:7]} {ratchet.subject(commit)}")
    for commit in by_hand:
        full = ratchet.full_commit(night.tag, commit)
        versions[full] = f"by hand: {full[:7]} {ratchet.subject(full)}"
    return versions


def crashed(night, need):
    """Tell whether a run failed in a way that it would fail again."""
    return any(training.word in ratchet.FAILED for training in night.attempts(*need))


def step(night, call, versions):
    """Start the next run; return an Answer when nothing is left, None while a run is awaited."""
    commits = list(versions)
    needs = [Need(commit, SEEDS[0], split="test") for commit in commits]
    needs += [Need(commit, SEEDS[1], split="test") for commit in reversed(commits)]
    left = [need for need in needs if not night.valid(*need)]
    left = [need for need in left if need.commit == night.kept or not crashed(night, need)]
    if left:
        failed = ratchet.start_runs(night, call, left)
        return ratchet.outcome(night, call, failed, f"{len(left)} runs")
    return Answer("OVER", f"{len(versions) - 1} versions of the winner were scored")


def score_of(night, commit, seed):
    """Return what a version scored under a seed, or None and a word for why there is no score."""
    last = next(reversed(night.attempts(commit, seed, 0.0, "test")), None)
    if last is None:
        return None, "left"
    if last.word != "valid":
        return None, last.word
    return last.value, figure(last.value)


def report(night, versions):
    """Print what every version scored under each seed, and what the winner gains over it."""
    of_winner = [score_of(night, night.kept, seed)[0] for seed in SEEDS]
    columns = [f"{name} {seed}" for name in ("seed", "gain") for seed in SEEDS]
    print("\t".join(["commit", *columns, "version"]))
    for commit, words in versions.items():
        found = [score_of(night, commit, seed) for seed in SEEDS]
        gains = [""] * len(SEEDS)
        for i, (score, _) in enumerate(found):
            if commit != night.kept and score is not None and of_winner[i] is not None:
                gains[i] = figure(ratchet.gain_of(score, of_winner[i]), 3)
        print("\t".join([commit[:7], *(word for _, word in found), *gains, words]))


def main():
    call = ratchet.Call("uv run tools/ablate.py", seconds=float("inf"))
    call.may_run = True
    try:
        night = ratchet.Night()
        if not night.over():
            raise Refused(f"the night goes on: end it first with {ratchet.ME} stop --night")
        versions = versions_of(night, sys.argv[1:])
        if len(versions) == 1:
            raise Refused("there is nothing to take out")
        print(f"{len(versions)} versions under {len(SEEDS)} seeds each", flush=True)
        answer = ratchet.advance(call, functools.partial(step, versions=versions))
    except Refused as error:
        sys.exit(f"ablate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"ablate.py: the run that was started goes on: {call.again}, or {ratchet.ME} stop")
    for line in call.lines:
        print(line)
    report(ratchet.Night(), versions)
    if answer.word != "OVER":
        sys.exit(f"ablate.py: {answer.word} {answer.text}")


if __name__ == "__main__":
    main()
