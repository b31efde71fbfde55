"""The referee of autoresearch: decides whether an idea is kept. Nobody edits it in a night."""

import math
import statistics
from typing import NamedTuple

# --- The rule -------------------------------------------------------------------------------------

METRIC = "val_bpb"  # the number that train.py's summary prints and that decides
LOWER_IS_BETTER = True  # False for a metric that should rise

# In standard errors of the difference between an idea and its parent; by tools/simulate_rule.py
LOW = 0.2  # after one run each: not above this is a discard
HIGH = 1.25  # after one run each: above this is a keep; between the two, both run once more
BAR = 0.7  # after two runs each: above this is a keep
SIMPLER = -0.5  # an idea that takes out code is kept above this
LAST_RUNS = 3  # runs of the parent that count, the latest ones


class Run(NamedTuple):
    """One finished run of a commit."""

    commit: str
    seed: int
    value: float  # of METRIC


class Verdict(NamedTuple):
    """What the rule says of an idea: "keep", "discard" or "repeat", its gain and what it needed."""

    word: str
    gain: float
    bar: float


def gain_of(before, after):
    """Return by how much `after` is better than `before`; positive is better."""
    return before - after if LOWER_IS_BETTER else after - before


def noise_of(runs):
    """Return the standard deviation of a run about the mean of its commit; nan without repeats."""
    by_commit = {}
    for run in runs:
        by_commit.setdefault(run.commit, []).append(run.value)
    squares = 0.0
    freedom = 0  # degrees of freedom: every commit's mean costs one
    for values in by_commit.values():
        mean = statistics.fmean(values)
        squares += sum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def judge(idea, parent, noise, simpler=False):
    """Return the Verdict on an idea from its runs and its parent's, each in order of time.

    Only runs of the parent under the idea's seeds count, where there are any.
    """
    seeds = {run.seed for run in idea}
    shared = [run.value for run in parent if run.seed in seeds] or [run.value for run in parent]
    shared = shared[-LAST_RUNS:]
    gain = gain_of(statistics.fmean(shared), statistics.fmean(run.value for run in idea))
    error = noise * math.sqrt(1 / len(idea) + 1 / len(shared))
    low, high = (LOW, HIGH) if len(idea) == 1 else (BAR, BAR)
    bar = error * (SIMPLER if simpler else high)
    if gain > bar:
        return Verdict("keep", gain, bar)
    if gain <= error * low:
        return Verdict("discard", gain, bar)
    return Verdict("repeat", gain, bar)
