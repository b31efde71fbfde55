"""Simulate the rule of ratchet.py on nights of made-up ideas; print the tables of docs/rule.md.

    uv run python tools/simulate_rule.py                     # by hand, about ten minutes
    uv run python tools/simulate_rule.py --nights 100 --set HIGH=2.5 PARENT_AGE_MINUTES=inf
    uv run python tools/simulate_rule.py --nights 200 --wave 2 8 16  # so many runs at once

The unit is the noise of one run on a steady machine. A night is RUNS runs. Of its ideas a share is
good and gains an exponential amount; the rest loses one. All rules get the same ideas and the same
luck, so that their difference is known better than either. What is not modelled: crashes, ideas
that build on each other, an agent that learns from the ledger.
"""

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ratchet
from ratchet import Run, judge, noise_of

RUNS = 100  # of a night, baselines included
RUN_SECONDS = 375  # what a run takes, with compiling and evaluation
HOUR = 10  # runs in an hour
SEEDS = ratchet.SEEDS
LOSS = 3.0  # mean loss of a bad idea
MIXES = ((0.2, 0.5), (0.2, 2.0), (0.1, 1.0))  # share of good ideas, their mean gain
POOR_MIXES = ((0.05, 1.0), (0.1, 0.3))  # the same, of a night whose easy ideas are gone
RICH_MIX = (0.35, 10.0)  # about as in the night of 27 November 2026, in noises of its first half
SIMPLE = (0.3, 0.3)  # share of ideas that simplify, standard deviation of what they gain
ENOUGH = 200  # runs, the latest ones, that the noise in waves is reckoned from


class Rule(NamedTuple):
    """A rule to compare: ratchet.py's own but for some constants."""

    constants: dict
    noise_is_known: bool = False  # judges by the true noise of the slot, which no estimate can know


OLD_BARS = {"LOW": 0.2, "HIGH": 1.25, "BAR": 0.7, "SIMPLER": -0.5}
ALIKE = {"HALF_LIFE": math.inf}  # the pooled noise of all repeats
ORIGINAL = "any decrease"  # keep whatever is below the best run so far
BEFORE = "old bars, all repeats alike"  # the rule before: docs/rule.md says why it changed
RULES = {
    ORIGINAL: None,
    BEFORE: Rule(OLD_BARS | ALIKE),
    "old bars": Rule(OLD_BARS),
    "old bars, true noise known": Rule(OLD_BARS, noise_is_known=True),
    "this rule": Rule({}),
    "this rule, all repeats alike": Rule(ALIKE),
    "this rule, true noise known": Rule({}, noise_is_known=True),
    "this rule, parent never again": Rule({"PARENT_AGE_MINUTES": math.inf}),
}
POOR_RULES = (ORIGINAL, BEFORE, "old bars", "this rule")  # that are tried on POOR_MIXES
STRICTER_RULES = {  # that might keep less of what is not real
    "this rule, BAR 0.7": Rule({"BAR": 0.7}),
    "this rule, BAR 0.85": Rule({"BAR": 0.85}),
    "this rule, HIGH 2": Rule({"HIGH": 2.0}),
    "this rule, all keeps run twice": Rule({"HIGH": math.inf}),
}
CONSTANTS = [
    "LOW",
    "HIGH",
    "BAR",
    "SIMPLER",
    "LAST_RUNS",
    "HALF_LIFE",
    "PARENT_AGE_MINUTES",
    "ANY_DECREASE",
]


# --- Nights ---------------------------------------------------------------------------------------


def steady_noise(rng, num_nights):
    """Return the standard deviation of each run's luck, (num_nights, RUNS): always one."""
    return np.ones((num_nights, RUNS))


def falling_noise(rng, num_nights):
    """Return a noise that falls evenly, in logarithm, from one to a third."""
    return np.tile(np.geomspace(1, 1 / 3, RUNS), (num_nights, 1))


def high_falling_noise(rng, num_nights):
    """Return a noise that falls evenly, in logarithm, from three to one."""
    return 3 * falling_noise(rng, num_nights)


def rising_noise(rng, num_nights):
    """Return a noise that rises evenly, in logarithm, from one to four."""
    return np.tile(np.geomspace(1, 4, RUNS), (num_nights, 1))


def noisy_hour(rng, num_nights):
    """Return a noise of one but for an hour of three, which begins anywhere in the night."""
    begin = rng.integers(RUNS - HOUR, size=(num_nights, 1))
    slot = np.arange(RUNS)
    return np.where((begin <= slot) & (slot < begin + HOUR), 3.0, 1.0)


def noisy_first_hour(rng, num_nights):
    """Return a noise of three for the first hour, then one."""
    return np.tile(np.where(np.arange(RUNS) < HOUR, 3.0, 1.0), (num_nights, 1))


class Machine(NamedTuple):
    """How the number of one commit varies from run to run."""

    drift: float = 0.0  # stationary standard deviation of the machine's drift
    memory: int = 1  # runs in which the machine forgets where it was
    seed_share: float = 0.0  # of the variance of one run: what its seed does to all commits alike
    noise: Callable = steady_noise  # (rng, num_nights) to (num_nights, RUNS) deviations


STEADY = "steady"
OLD_MACHINES = {
    STEADY: Machine(),
    "drifts slowly": Machine(drift=1.0, memory=30),
    "drifts by one noise a run": Machine(drift=5.0, memory=50),  # 5 * sqrt(2 / 50) = 1
    "steady, 40 % is the seed": Machine(seed_share=0.4),
}
NEW_MACHINES = {
    "noise falls from 1 to 1/3": Machine(noise=falling_noise),
    "noise falls from 3 to 1": Machine(noise=high_falling_noise),
    "an hour of noise 3": Machine(noise=noisy_hour),
    "first hour of noise 3": Machine(noise=noisy_first_hour),
}
RISING = "noise rises from 1 to 4"  # as in the night of 27 November 2026
RISING_MACHINES = {STEADY: OLD_MACHINES[STEADY], RISING: Machine(noise=rising_noise)}
MACHINES = OLD_MACHINES | NEW_MACHINES | RISING_MACHINES


class Night(NamedTuple):
    """One night's ideas and luck; a gain is positive, and is subtracted from the number."""

    gains: list  # (RUNS,) true gain of each idea on its parent
    simpler: list  # (RUNS,) whether the idea takes out code
    luck: list  # (RUNS, 2) of an idea's own two runs, before the noise of their slots
    parent_luck: list  # (RUNS,) by slot, of whatever else runs then
    noise: list  # (RUNS,) by slot
    drift: list  # (RUNS,) by slot
    seeds: list  # (3,) what a seed does to all commits, in noises

    def run_of_idea(self, idea, gain, seed, slot):
        """Return the run of an idea that is `gain` better than the base."""
        luck = self.luck[idea][SEEDS.index(seed)]
        return Run(f"idea {idea}", seed, self._value(gain, seed, slot, luck))

    def run_of_parent(self, commit, gain, seed, slot):
        """Return a run of a commit that is `gain` better than the base, as baseline or again."""
        return Run(commit, seed, self._value(gain, seed, slot, self.parent_luck[slot]))

    def _value(self, gain, seed, slot, luck):
        variation = luck + self.seeds[SEEDS.index(seed)]
        return self.noise[slot] * variation + self.drift[slot] - gain


def make_nights(num_nights, mix, machine, share_simple=0.0, seed=1):
    """Return num_nights nights; the same seed gives the same ideas on every machine."""
    share_good, mean_gain = mix
    shape = (num_nights, RUNS)
    rng = np.random.default_rng(seed)
    good = rng.random(shape) < share_good
    gains = np.where(good, rng.exponential(mean_gain, shape), -rng.exponential(LOSS, shape))
    simpler = rng.random(shape) < share_simple
    gains = np.where(simpler, rng.normal(0, SIMPLE[1], shape), gains)
    own_share = (1 - machine.seed_share) ** 0.5
    luck = rng.normal(0, own_share, (*shape, 2))
    parent_luck = rng.normal(0, own_share, shape)
    seeds = rng.normal(0, machine.seed_share**0.5, (num_nights, len(SEEDS)))
    drift = rng.normal(0, machine.drift, shape)
    keep = math.exp(-1 / machine.memory)
    for slot in range(1, RUNS):
        drift[:, slot] = keep * drift[:, slot - 1] + (1 - keep**2) ** 0.5 * drift[:, slot]
    noise = machine.noise(rng, num_nights)
    columns = (gains, simpler, luck, parent_luck, noise, drift, seeds)
    return [Night(*night) for night in zip(*(c.tolist() for c in columns), strict=True)]


# --- Rules ----------------------------------------------------------------------------------------
# A rule plays a night: it returns the true gain of the last kept commit on the base, and the keeps
# as (true gain on the parent, whether it simplifies).


def play_any_decrease(night):
    """Keep whatever runs below the best run so far: the original, with its one baseline."""
    true_gain = 0.0
    keeps = []
    best = night.run_of_parent("base", 0.0, 42, 0).value
    for idea, slot in enumerate(range(1, RUNS)):
        value = night.run_of_idea(idea, true_gain + night.gains[idea], 42, slot).value
        if value < best:
            best = value
            true_gain += night.gains[idea]
            keeps.append((night.gains[idea], night.simpler[idea]))
    return true_gain, keeps


def play_rule(night, noise_is_known=False):
    """Keep by ratchet.py's rule; what is not clear is run once more, parent first.

    A parent that ran too long ago goes again before the next idea.
    """
    max_age = ratchet.PARENT_AGE_MINUTES * 60 / RUN_SECONDS  # in runs
    commit = "base"
    true_gain = 0.0
    keeps = []
    parent = [night.run_of_parent(commit, 0.0, seed, slot) for slot, seed in enumerate(SEEDS)]
    history = list(parent)  # in order of time, without what ran once and was put back
    estimate = noise_of(history)
    slot = len(parent)
    parent_slot = slot - 1  # the last one in which the parent ran

    def noise():
        return night.noise[slot - 1] if noise_is_known else estimate

    for idea in range(RUNS):
        if slot - parent_slot > max_age and slot < RUNS:
            parent.append(night.run_of_parent(commit, true_gain, 42, slot))
            history.append(parent[-1])
            estimate = noise_of(history)
            parent_slot = slot
            slot += 1
        if slot == RUNS:
            break
        gain = true_gain + night.gains[idea]
        simpler = night.simpler[idea]
        runs = [night.run_of_idea(idea, gain, 42, slot)]
        idea_slot = slot
        slot += 1
        verdict = judge(runs, parent, noise(), simpler)
        if verdict.word == "repeat":
            if slot > RUNS - 2:
                break  # a night that ends within an idea leaves it without a verdict
            parent.append(night.run_of_parent(commit, true_gain, 43, slot))
            runs.append(night.run_of_idea(idea, gain, 43, slot + 1))
            history += [runs[0], parent[-1], runs[1]]
            estimate = noise_of(history)
            parent_slot = slot
            idea_slot = slot + 1
            slot += 2
            verdict = judge(runs, parent, noise(), simpler)
        elif verdict.word == "keep":
            history.append(runs[0])
        if verdict.word == "keep":
            commit = runs[0].commit
            true_gain = gain
            parent = runs
            parent_slot = idea_slot
            keeps.append((night.gains[idea], simpler))
    return true_gain, keeps


def play(rule_name, mix, machine_name, share_simple, num_nights, constants):
    """Return true gains (num_nights,), and the keeps of each night."""
    nights = make_nights(num_nights, mix, MACHINES[machine_name], share_simple)
    if rule_name == ORIGINAL:
        results = [play_any_decrease(night) for night in nights]
    else:
        rule = (RULES | STRICTER_RULES)[rule_name]
        with patch.dict(vars(ratchet), constants | rule.constants):
            results = [play_rule(night, rule.noise_is_known) for night in nights]
    true_gains, keeps = zip(*results, strict=True)
    return np.array(true_gains), keeps


# --- Waves ----------------------------------------------------------------------------------------


def play_waves(rng, lanes, num_slots, mix, machine):
    """Return the true gain of a night of waves: `lanes` runs at once, num_slots times.

    All ideas of a wave are one step from the same parent, which goes again before them, in every
    lane, when its last run is too old. The best idea is judged; if it is kept, what else would have
    been kept is tried on top of it in the next wave. Every lane is a machine that drifts by itself.
    """
    share_good, mean_gain = mix
    max_age = ratchet.PARENT_AGE_MINUTES * 60 / RUN_SECONDS  # in rows of the ledger
    keep = math.exp(-1 / machine.memory)
    drift = rng.normal(0, machine.drift, lanes)
    slots = 0
    num_commits = 0

    def new_commits(gains):
        """Return (name, gain) of new commits that are so much better than the base."""
        nonlocal num_commits
        num_commits += len(gains)
        return [(num_commits - i, gain) for i, gain in enumerate(gains)]

    def run(seed, commits):
        """Return a run of each commit, as many at once as there are lanes."""
        nonlocal drift, slots
        done = []
        for i, (name, gain) in enumerate(commits):
            lane = i % lanes
            if lane == 0:
                slots += 1
                drift = keep * drift + rng.normal(0, machine.drift * (1 - keep**2) ** 0.5, lanes)
            done.append(Run(name, seed, rng.normal() + drift[lane] - gain))
        return done

    def remember(*runs):
        """Add runs to the history, which has only commits that ran twice or are kept."""
        nonlocal history, noise
        history = [*history, *runs][-ENOUGH:]
        noise = noise_of(history)

    (base,) = new_commits([0.0])
    parent_commit = base
    parent = [run(seed, [base])[0] for seed in SEEDS]
    history = []  # in order of time
    noise = math.nan
    remember(*parent)
    waiting = []  # gains of ideas that would have been kept, too
    age = 1  # rows since the parent's last one
    while slots < num_slots:
        if age > max_age:
            again = run(42, [parent_commit] * lanes)
            parent += again
            remember(*again)
            age = 1 - lanes
        steps = waiting[:lanes]
        waiting = waiting[lanes:]
        while len(steps) < lanes:
            good = rng.random() < share_good
            steps.append(rng.exponential(mean_gain) if good else -rng.exponential(LOSS))
        ideas = new_commits([parent_commit[1] + step for step in steps])
        results = [[first] for first in run(42, ideas)]
        age += lanes
        verdicts = [judge(result, parent, noise) for result in results]
        best = max(range(lanes), key=lambda i: verdicts[i].gain)
        if verdicts[best].word == "repeat":
            parent += run(43, [parent_commit])
            results[best] += run(43, [ideas[best]])
            remember(results[best][0], parent[-1], results[best][1])
            verdicts[best] = judge(results[best], parent, noise)
            age = 1
        elif verdicts[best].word == "keep":
            remember(*results[best])
        if verdicts[best].word == "keep":
            waiting += [steps[i] for i, v in enumerate(verdicts) if v.word == "keep" and i != best]
            parent_commit = ideas[best]
            parent = results[best]
            age = 0
    return parent_commit[1]


def mean_of_waves(lanes, num_slots, mix, machine_name, num_nights, constants):
    """Return the mean true gain of so many nights of waves."""
    seeds = np.random.SeedSequence(1).spawn(num_nights)
    with patch.dict(vars(ratchet), constants):
        gains = [
            play_waves(np.random.default_rng(seed), lanes, num_slots, mix, MACHINES[machine_name])
            for seed in seeds
        ]
    return sum(gains) / num_nights


def print_waves(pool, waves, num_nights, constants):
    """Print what a night of RUNS slots gains on K devices, and in as many runs one by one."""
    names = list(OLD_MACHINES)[:2]
    shapes = {(1, RUNS)}
    for k in waves:
        shapes |= {(k, RUNS), (1, k * RUNS)}
    cells = {
        (shape, name, mix): pool.submit(mean_of_waves, *shape, mix, name, num_nights, constants)
        for shape in shapes
        for name in names
        for mix in MIXES
    }
    print(f"True gain in {RUNS} runs' time; in brackets, of what as many runs one by one gain.\n")
    print_row("devices", names)
    print_row("---", ["---"] * len(names))
    for k in [1, *waves]:
        row = []
        for name in names:
            texts = []
            for mix in MIXES:
                gain = cells[(k, RUNS), name, mix].result()
                alone = cells[(1, k * RUNS), name, mix].result()
                texts.append(f"{gain:.1f} ({gain / alone:.0%})")
            row.append("; ".join(texts))
        print_row(k, row)


# --- Tables ---------------------------------------------------------------------------------------


def print_row(first, rest):
    print(f"| {' | '.join([str(first), *rest])} |")


def real_share(keeps):
    """Return the share of a group of nights' keeps, simplifications apart, that are gains."""
    gains = np.array([gain for night in keeps for gain, simpler in night if not simpler])
    return (gains > 0).mean()


def standard_error(values):
    """Return the standard error of the mean of values (num_nights,)."""
    return values.std(ddof=1) / len(values) ** 0.5


def print_gains(cells, rules, machines, mixes):
    """Print each rule's true gain and share of real keeps, in each cell mix by mix."""
    words = "; ".join(f"{share:.0%} of mean {gain:g}" for share, gain in mixes)
    print(f"\nTrue gain and share of real keeps. Good ideas: {words}.\n")
    print_row("rule", machines)
    print_row("---", ["---"] * len(machines))
    for rule in rules:
        row = []
        for machine in machines:
            results = [cells[rule, machine, mix, 0.0] for mix in mixes]
            texts = [f"{gains.mean():.2f} ({real_share(keeps):.0%})" for gains, keeps in results]
            row.append("; ".join(texts))
        print_row(rule, row)


def print_differences(cells, rules, machines, mixes, percent=True):
    """Print what each rule gains more than the rule before, +- the standard error of that."""
    unit = "per cent of that" if percent else "noises"
    print(f"\nGain over that of {BEFORE!r}, in {unit}, +- the difference's standard error.\n")
    print_row("rule", machines)
    print_row("---", ["---"] * len(machines))
    for rule in rules:
        if rule == BEFORE:
            continue
        row = []
        for machine in machines:
            texts = []
            for mix in mixes:
                before, _ = cells[BEFORE, machine, mix, 0.0]
                gains, _ = cells[rule, machine, mix, 0.0]
                more = gains - before
                mean = more.mean()
                error = standard_error(more)
                if percent:
                    per_cent = 100 / abs(before.mean())
                    texts.append(f"{mean * per_cent:+.1f} +- {error * per_cent:.1f}")
                else:
                    texts.append(f"{mean:+.2f} +- {error:.2f}")
            row.append("; ".join(texts))
        print_row(rule, row)


def print_simplifications(cells):
    """Print what becomes of ideas that take out code, on a steady machine."""
    share, spread = SIMPLE
    print(f"\nSteady, {share:.0%} of the ideas simplify (gain 0 +- {spread:g}), rest as above.\n")
    print_row("rule", ["true gain", "simplifications kept a night", "their mean gain"])
    print_row("---", ["---"] * 3)
    for rule in RULES:
        gains, keeps = cells[rule, STEADY, MIXES[-1], share]
        kept = np.array([gain for night in keeps for gain, simpler in night if simpler])
        mean = f"{gains.mean():.2f} ({real_share(keeps):.0%})"
        print_row(rule, [mean, f"{len(kept) / len(gains):.1f}", f"{kept.mean():+.2f}"])


def read_constant(text):
    """Return (name, value) of NAME=VALUE; raises ArgumentTypeError."""
    name, _, number = text.partition("=")
    if name not in CONSTANTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CONSTANTS)}")
    try:
        value = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {name}=NUMBER") from None
    if value.is_integer():
        value = int(value)  # LAST_RUNS counts runs
    return name, value


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nights", type=int, default=1000, help="of every cell (default 1000)")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        type=read_constant,
        metavar="NAME=VALUE",
        help="constants of ratchet.py's rule to change",
    )
    parser.add_argument("--wave", nargs="+", type=int, metavar="K", help="runs at once, instead")
    args = parser.parse_args()
    constants = dict(args.set)

    with ProcessPoolExecutor() as pool:
        if args.wave:
            print_waves(pool, args.wave, args.nights, constants)
            return
        keys = [
            (rule, machine, mix, 0.0)
            for rule in RULES
            for machine in OLD_MACHINES | NEW_MACHINES
            for mix in MIXES
        ]
        keys += [
            (rule, machine, mix, 0.0)
            for rule in POOR_RULES
            for machine in OLD_MACHINES
            for mix in POOR_MIXES
        ]
        rising_rules = [ORIGINAL, "this rule", "this rule, true noise known", *STRICTER_RULES]
        rising_mixes = [*MIXES, RICH_MIX]
        keys += [
            (rule, machine, mix, 0.0)
            for rule in rising_rules
            for machine in RISING_MACHINES
            for mix in rising_mixes
        ]
        keys += [(rule, STEADY, MIXES[-1], SIMPLE[0]) for rule in RULES]
        futures = {}
        for key in dict.fromkeys(keys):  # some cells are in two tables
            rule, machine, mix, share_simple = key
            futures[key] = pool.submit(
                play, rule, mix, machine, share_simple, args.nights, constants
            )
        cells = {key: future.result() for key, future in futures.items()}

    print(f"Nights of {RUNS} runs, {args.nights} in each cell.")
    for machines in (OLD_MACHINES, NEW_MACHINES):
        print_gains(cells, RULES, machines, MIXES)
        print_differences(cells, RULES, machines, MIXES)
    print_gains(cells, POOR_RULES, OLD_MACHINES, POOR_MIXES)
    print_differences(cells, POOR_RULES, OLD_MACHINES, POOR_MIXES, percent=False)
    print_gains(cells, rising_rules, RISING_MACHINES, rising_mixes)
    print_simplifications(cells)


if __name__ == "__main__":
    main()
