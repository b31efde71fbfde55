"""Simulate program.md's rule of keeping; print the tables that the README quotes.

    uv run python tools/simulate_rule.py                   # by hand, about a minute
    uv run python tools/simulate_rule.py --nights 200 --set HIGH=2.5 STALE=inf
    uv run python tools/simulate_rule.py --nights 200 --wave 2 8 16  # K runs at once

The unit is the noise of one run. A night is RUNS runs. Of its ideas a share is good, and gains an
exponential amount; the rest loses one. All rules get the same ideas and the same luck.
Not modelled: crashes, ideas that build on each other, an agent that learns from the ledger.
"""

import argparse
import math
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HARD_LIMIT = int(re.search(r"^HARD_LIMIT = (\d+)", (ROOT / "prepare.py").read_text(), re.M)[1])

RUNS = 100  # a night's, baselines included
RUN_SECONDS = 375  # what a run takes, with compiling and evaluation
LOSS = 3.0  # mean loss of a bad idea
MIXES = ((0.2, 0.5), (0.2, 2.0), (0.1, 1.0))  # share of good ideas, their mean gain
# stationary standard deviation of the machine's drift, runs in which it forgets, share of the
# variance of one run that its seed fixes for all commits alike
MACHINES = {
    "steady": (0.0, 1, 0.0),
    "drifts slowly": (1.0, 30, 0.0),
    "drifts by one noise a run": (5.0, 50, 0.0),  # 5 * sqrt(2 / 50) = 1
    "steady, 40 % is the seed": (0.0, 1, 0.4),
}
ENOUGH = 200  # repeated ideas after which the noise in waves is known
SIMPLE = (0.3, 0.3)  # share of ideas that simplify, standard deviation of what they gain


@dataclass
class Night:
    """Hold one night's luck; a gain is positive, in the unit of val_bpb it is subtracted."""

    gains: list  # (RUNS,) true gain of each idea on its parent
    simpler: list  # (RUNS,) whether the idea takes out code
    luck: list  # (RUNS, 2) an idea's own runs
    parent_luck: list  # (RUNS,) by slot: whatever else runs then
    drift: list  # (RUNS,) by slot
    seeds: dict  # effect of a seed on all commits

    def again(self, gain, seed, slot):
        """Return val_bpb of a run of a commit that is `gain` better than the base."""
        return self.parent_luck[slot] + self.seeds[seed] + self.drift[slot] - gain

    def first(self, idea, gain, seed, slot):
        """Return val_bpb of the run of an idea with seed 42 or 43."""
        return self.luck[idea][seed - 42] + self.seeds[seed] + self.drift[slot] - gain


def make_nights(num_nights, mix, machine, share_simple=0.0, seed=1):
    """Return num_nights nights; the same seed gives the same ideas on every machine."""
    share, gain = mix
    spread, memory, seed_share = machine
    shape = (num_nights, RUNS)
    rng = np.random.default_rng(seed)
    good = rng.random(shape) < share
    gains = np.where(good, rng.exponential(gain, shape), -rng.exponential(LOSS, shape))
    simpler = rng.random(shape) < share_simple
    gains = np.where(simpler, rng.normal(0, SIMPLE[1], shape), gains)
    luck = rng.normal(0, (1 - seed_share) ** 0.5, (*shape, 2))
    parent_luck = rng.normal(0, (1 - seed_share) ** 0.5, shape)
    seeds = rng.normal(0, seed_share**0.5, (num_nights, 3))
    drift = rng.normal(0, spread, shape)
    keep = math.exp(-1 / memory)
    for slot in range(1, RUNS):
        drift[:, slot] = keep * drift[:, slot - 1] + (1 - keep**2) ** 0.5 * drift[:, slot]
    columns = (a.tolist() for a in (gains, simpler, luck, parent_luck, drift, seeds))
    return [
        Night(*rest, dict(zip((42, 43, 44), effects, strict=True)))
        for *rest, effects in zip(*columns, strict=True)
    ]


# A rule plays a night: it returns the true gain of the last kept commit on the base, and the keeps
# as (true gain on the parent, whether it simplifies).


def play_any_decrease(night):
    """Keep whatever runs below the best run so far: the original, with its one baseline."""
    true, keeps = 0.0, []
    best = night.again(0.0, 42, 0)
    for idea, slot in enumerate(range(1, RUNS)):
        value = night.first(idea, true + night.gains[idea], 42, slot)
        if value < best:
            best = value
            true += night.gains[idea]
            keeps.append((night.gains[idea], night.simpler[idea]))
    return true, keeps


def play_floor(night):
    """Keep above the range of three baselines, repeat above half of it: program.md before."""
    true, keeps = 0.0, []
    baselines = [night.again(0.0, seed, slot) for slot, seed in enumerate((42, 43, 44))]
    floor = max(baselines) - min(baselines)
    best = (baselines[0] + baselines[1]) / 2
    slot = 3
    for idea in range(RUNS):
        if slot == RUNS:
            break  # a night that ends within an idea leaves it without a verdict
        gain = true + night.gains[idea]
        value = night.first(idea, gain, 42, slot)
        slot += 1
        keep = best - value > floor * (-0.5 if night.simpler[idea] else 1)
        if not keep and best - value > floor / 2 and slot < RUNS:
            value = (value + night.first(idea, gain, 43, slot)) / 2
            slot += 1
            keep = best - value > 0.7 * floor
        if keep:
            best = min(best, value)
            true = gain
            keeps.append((night.gains[idea], night.simpler[idea]))
    return true, keeps


def play_rule(night, rule):
    """Judge by program.md's own functions; what is not clear is run once more, parent first.

    A parent that is not among the last STALE runs goes again before the next idea.
    """
    judge, pooled_noise, stale = rule["judge"], rule["pooled_noise"], rule["STALE"]
    true, keeps = 0.0, []
    parent = [(seed, night.again(0.0, seed, slot)) for slot, seed in enumerate((42, 43, 44))]
    settled = {}  # commits that have run twice or more; the others tell nothing of the noise
    slot, last = 3, 2

    def noise(*repeated):
        groups = {name: [bpb for _, bpb in runs] for name, runs in enumerate(repeated)}
        return pooled_noise({**settled, **groups})

    for idea in range(RUNS):
        if slot - last > stale and slot < RUNS:
            parent.append((42, night.again(true, 42, slot)))
            last = slot
            slot += 1
        if slot == RUNS:
            break
        gain, simpler = true + night.gains[idea], night.simpler[idea]
        runs = [(42, night.first(idea, gain, 42, slot))]
        slot += 1
        verdict, *_ = judge(runs, parent, noise(parent), simpler)
        if verdict == "repeat":
            if slot > RUNS - 2:
                break
            parent.append((43, night.again(true, 43, slot)))
            runs.append((43, night.first(idea, gain, 43, slot + 1)))
            last, slot = slot, slot + 2
            verdict, *_ = judge(runs, parent, noise(parent, runs), simpler)
        done = parent if verdict == "keep" else runs
        if len(done) > 1:
            settled[f"idea {idea}"] = [bpb for _, bpb in done]
        if verdict == "keep":
            parent, true, last = runs, gain, slot - 1
            keeps.append((night.gains[idea], simpler))
    return true, keeps


def play_waves(rng, lanes, num_slots, mix, machine, rule):
    """Return the true gain of a night of waves: `lanes` runs at once, num_slots times.

    All ideas of a wave are one step from the same parent, which goes again before them, in every
    lane, when it is stale. The best idea is judged; if it is kept, what else would have been kept
    is tried on top of it in the next wave. Every lane is a machine that drifts by itself.
    """
    judge, pooled_noise, stale = rule["judge"], rule["pooled_noise"], rule["STALE"]
    (share, mean_gain), (spread, memory, _) = mix, machine
    drift, keep, slots = rng.normal(0, spread, lanes), math.exp(-1 / memory), 0

    def run(seed, gains):
        """Return runs of these gains, as many at once as there are lanes."""
        nonlocal drift, slots
        done = []
        for i, gain in enumerate(gains):
            if i % lanes == 0:
                slots += 1
                drift = keep * drift + rng.normal(0, spread * (1 - keep**2) ** 0.5, lanes)
            done.append((seed, rng.normal() + drift[i % lanes] - gain))
        return done

    parent = [run(seed, [0.0])[0] for seed in (42, 43, 44)]
    true, settled, waiting, age = 0.0, [], [], 1  # age: rows since the parent's last one
    while slots < num_slots:
        if age > stale:
            parent += run(42, [true] * lanes)
            age = 1 - lanes
        ideas, waiting = waiting[:lanes], waiting[lanes:]
        while len(ideas) < lanes:
            good = rng.random() < share
            ideas.append(rng.exponential(mean_gain) if good else -rng.exponential(LOSS))
        results = [[first] for first in run(42, [true + gain for gain in ideas])]
        age += lanes
        noise = pooled_noise(dict(enumerate([*settled, [bpb for _, bpb in parent]])))
        verdicts = [judge(result, parent, noise) for result in results]
        best = max(range(lanes), key=lambda i: verdicts[i][1])
        if verdicts[best][0] == "repeat":
            parent += run(43, [true])
            results[best] += run(43, [true + ideas[best]])
            groups = [[bpb for _, bpb in runs] for runs in (parent, results[best])]
            verdicts[best] = judge(
                results[best], parent, pooled_noise(dict(enumerate(settled + groups)))
            )
            age = 1
        kept = verdicts[best][0] == "keep"
        done = parent if kept else results[best]
        if len(done) > 1 and len(settled) < ENOUGH:
            settled.append([bpb for _, bpb in done])
        if kept:
            waiting += [ideas[i] for i, v in enumerate(verdicts) if v[0] == "keep" and i != best]
            true, parent, age = true + ideas[best], results[best], 0
    return true


def wave_gains(lanes, num_slots, mix, machine, num_nights, constants):
    """Return the true gains of so many nights of waves, (num_nights,)."""
    rule = read_rule(constants)
    rngs = map(np.random.default_rng, np.random.SeedSequence(1).spawn(num_nights))
    return np.array([play_waves(rng, lanes, num_slots, mix, machine, rule) for rng in rngs])


def print_waves(pool, waves, num_nights, constants):
    """Print what a night of RUNS slots gains on K devices, and in as many runs one by one."""
    names = list(MACHINES)[:2]
    cells = {
        (shape, name, mix): pool.submit(
            wave_gains, *shape, mix, MACHINES[name], num_nights, constants
        )
        for shape in {(1, RUNS), *((k, RUNS) for k in waves), *((1, k * RUNS) for k in waves)}
        for name in names
        for mix in MIXES
    }
    print(f"True gain in {RUNS} runs' time; in brackets, of what as many runs one by one gain.\n")
    print(f"| devices | {' | '.join(names)} |\n| --- {'| --- ' * len(names)}|")
    for k in [1, *waves]:
        row = [str(k)]
        for name in names:
            means = [
                [cells[shape, name, mix].result().mean() for shape in ((k, RUNS), (1, k * RUNS))]
                for mix in MIXES
            ]
            row.append("; ".join(f"{gain:.1f} ({gain / alone:.0%})" for gain, alone in means))
        print(f"| {' | '.join(row)} |")


def read_rule(constants):
    """Return judge, pooled_noise and the constants of program.md's Log, some of them replaced."""
    text = (ROOT / "program.md").read_text(encoding="utf-8")
    functions = re.search(r"^# Log\n.*?<<'EOF'\n(.*?)^last, ", text, re.M | re.S)[1]
    minutes = HARD_LIMIT / int(re.search(r"HARD_LIMIT.* int\(\$3 / (\d+)\)", text)[1])
    rule = {"STALE": round(60 * minutes / RUN_SECONDS)}
    exec(functions, rule)
    if unknown := constants.keys() - rule.keys():
        raise SystemExit(f"program.md's rule has no {', '.join(sorted(unknown))}")
    rule.update(constants)  # the functions see them: this is where their globals live
    return rule


def play(rule_name, mix, machine, share_simple, num_nights, constants):
    """Return true gains (num_nights,), and the keeps of each night."""
    if rule_name == "any decrease":
        one_night = play_any_decrease
    elif rule_name == "floor of three baselines":
        one_night = play_floor
    else:
        one_night = partial(play_rule, rule=read_rule(constants))
    nights = make_nights(num_nights, mix, machine, share_simple)
    true, keeps = zip(*map(one_night, nights), strict=True)
    return np.array(true), keeps


def real_share(keeps):
    """Return the share of a group of nights' keeps, simplifications apart, that are gains."""
    gains = np.array([gain for night in keeps for gain, simpler in night if not simpler])
    return (gains > 0).mean()


def standard_error(true):
    """Return the standard error of the mean of the nights' gains."""
    return true.std(ddof=1) / len(true) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nights", type=int, default=1000, help="of every cell (default 1000)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the rule")
    parser.add_argument("--wave", nargs="+", type=int, metavar="K", help="runs at once, instead")
    args = parser.parse_args()
    constants = {name: float(value) for name, _, value in (s.partition("=") for s in args.set)}

    if args.wave:
        with ProcessPoolExecutor() as pool:
            return print_waves(pool, args.wave, args.nights, constants)
    rules = {
        "any decrease": {},
        "floor of three baselines": {},
        "program.md": constants,
        "program.md, no stale runs": constants | {"STALE": math.inf},
    }
    with ProcessPoolExecutor() as pool:
        cells = {
            (rule, machine, mix, share): pool.submit(
                play, rule, mix, MACHINES[machine], share, args.nights, rules[rule]
            )
            for rule in rules
            for machine in MACHINES
            for mix in MIXES
            for share in (0.0, SIMPLE[0])
            if not share or (mix == MIXES[-1] and machine == "steady")
        }
        cells = {key: future.result() for key, future in cells.items()}

    mixes = "; ".join(f"{share:.0%} of mean {gain:g}" for share, gain in MIXES)
    print(
        f"True gain of a night's {RUNS} runs and share of keeps that are real; good ideas: {mixes}."
    )
    print(f"\n| rule | {' | '.join(MACHINES)} |\n| --- {'| --- ' * len(MACHINES)}|")
    for rule in rules:
        row = [rule]
        for machine in MACHINES:
            results = [cells[rule, machine, mix, 0.0] for mix in MIXES]
            row.append("; ".join(f"{true.mean():.2f} ({real_share(k):.0%})" for true, k in results))
        print(f"| {' | '.join(row)} |")
    worst = [
        max(standard_error(cells[r, m, mix, 0.0][0]) for r in rules for m in MACHINES)
        for mix in MIXES
    ]
    print("\nStandard error of the gains, at most:", "; ".join(f"{error:.2f}" for error in worst))

    share, spread = SIMPLE
    print(f"\nSteady, {share:.0%} of the ideas simplify (gain 0 +- {spread:g}), rest as above.")
    print("\n| rule | true gain | simplifications kept a night | their mean gain |")
    print("| --- | --- | --- | --- |")
    for rule in rules:
        true, keeps = cells[rule, "steady", MIXES[-1], share]
        kept = np.array([gain for night in keeps for gain, simpler in night if simpler])
        print(
            f"| {rule} | {true.mean():.2f} ({real_share(keeps):.0%}) "
            f"| {len(kept) / len(true):.1f} | {kept.mean():+.2f} |"
        )


if __name__ == "__main__":
    main()
