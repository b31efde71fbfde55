"""The referee of autoresearch: decides whether an idea is kept. Nobody edits it in a night."""

import math
import statistics
from typing import NamedTuple

# --- The rule -------------------------------------------------------------------------------------
# docs/rule.md explains it; tools/simulate_rule.py chose the numbers.

METRIC = "val_bpb"  # the number that train.py's summary prints and that decides
LOWER_IS_BETTER = True  # False for a metric that should rise
ANY_DECREASE = False  # True keeps whatever is better at all, however little, after one run

# The bars, in standard errors of the difference between an idea and its parent
LOW = 0.0  # after one run each: not above this is a discard
HIGH = 1.25  # after one run each: above this is a keep; between the two, both run once more
BAR = 0.4  # after two runs each: above this is a keep
SIMPLER = -0.5  # an idea that takes out code is kept above this

LAST_RUNS = 3  # runs of the parent that count, the latest ones
HALF_LIFE = 2  # repeats after which a repeat weighs half in the noise; math.inf: all weigh the same
PARENT_AGE_MINUTES = 75  # a parent that last ran longer ago runs again: machines drift


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
    if LOWER_IS_BETTER:
        return before - after
    return after - before


def distinct(runs):
    """Return the runs without those that stand there again: one row twice is one run."""
    return list(dict.fromkeys(runs))


def noise_of(runs):
    """Return the standard deviation of one run now, from all runs so far, in order of time.

    It is in the unit of METRIC, and nan where no commit ran twice.
    """
    squares = []  # of each repeat, in order; each estimates the variance by itself
    values = {}  # of each commit, so far
    for run in distinct(runs):
        earlier = values.setdefault(run.commit, [])
        if earlier:
            # The deviation of a value from the mean of n others has (n + 1) / n times its variance.
            # Without weights the mean of these squares is the pooled variance (Welford 1962).
            n = len(earlier)
            squares.append((run.value - statistics.fmean(earlier)) ** 2 * n / (n + 1))
        earlier.append(run.value)
    if not squares:
        return math.nan
    # As the model changes, so does its noise: a repeat weighs less, the more came after it.
    weights = [0.5 ** (age / HALF_LIFE) for age in reversed(range(len(squares)))]
    return math.sqrt(statistics.fmean(squares, weights))


def judge(idea, parent, noise, simpler=False):
    """Return the Verdict on an idea from its runs and its parent's, each in order of time.

    Only runs of the parent under the idea's seeds count, where there are any.
    """
    idea = distinct(idea)
    parent = distinct(parent)
    seeds = {run.seed for run in idea}
    same_seeds = [run for run in parent if run.seed in seeds]
    against = (same_seeds or parent)[-LAST_RUNS:]
    before = statistics.fmean(run.value for run in against)
    after = statistics.fmean(run.value for run in idea)
    gain = gain_of(before, after)

    error = noise * math.sqrt(1 / len(idea) + 1 / len(against))
    if ANY_DECREASE:
        error = 0.0
    settled = len(idea) > 1  # there is no third run
    low = error * (BAR if settled else LOW)
    bar = error * (BAR if settled else HIGH)
    if simpler:
        bar = error * SIMPLER
    # What takes out code is kept at equal results, too, where the metric knows no noise.
    if gain > bar or (simpler and gain == bar):
        return Verdict("keep", gain, bar)
    if gain <= low:
        return Verdict("discard", gain, bar)
    return Verdict("repeat", gain, bar)
