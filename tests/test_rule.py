"""The rule of keeping: gain, noise and verdict, against values worked out by hand."""

import math
import random
import statistics

import numpy as np
import pytest

import ratchet
from ratchet import Run, gain_of, judge, noise_of
from tools import simulate_rule


def runs_of(commit, *values, first_seed=42):
    """Return runs of a commit with these values, under seeds that count up."""
    return [Run(commit, seed, value) for seed, value in enumerate(values, first_seed)]


@pytest.fixture
def plain_bars(monkeypatch):
    """Give the rule bars that are easy to reckon with; parents and ideas here have sqrt(2)."""
    monkeypatch.setattr(ratchet, "LOW", 0.25)
    monkeypatch.setattr(ratchet, "HIGH", 1.5)
    monkeypatch.setattr(ratchet, "BAR", 0.5)
    monkeypatch.setattr(ratchet, "SIMPLER", -0.5)
    monkeypatch.setattr(ratchet, "LAST_RUNS", 3)


# --- Gain -----------------------------------------------------------------------------------------


def test_a_gain_is_positive_where_the_number_got_better(monkeypatch):
    assert gain_of(1.5, 1.25) == 0.25
    assert gain_of(-2.0, -3.0) == 1.0
    monkeypatch.setattr(ratchet, "LOWER_IS_BETTER", False)
    assert gain_of(1.5, 1.25) == -0.25
    assert gain_of(-3.0, -2.0) == 1.0


# --- Noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [[], runs_of("a", 1.0), runs_of("a", 1.0) + runs_of("b", 2.0)])
def test_without_repeats_the_noise_is_unknown(runs):
    assert math.isnan(noise_of(runs))


def test_noise_of_one_commit_is_near_its_standard_deviation(monkeypatch):
    # The repeats 3 and 5 give the squares (3 - 1)^2 / 2 = 2 and (5 - 2)^2 * 2/3 = 6.
    runs = runs_of("a", 1.0, 3.0, 5.0)
    monkeypatch.setattr(ratchet, "HALF_LIFE", math.inf)
    assert noise_of(runs) == pytest.approx(2.0)  # (2 + 6) / 2 = 4 = 2^2
    monkeypatch.setattr(ratchet, "HALF_LIFE", 1)
    assert noise_of(runs) == pytest.approx(math.sqrt((2 / 2 + 6) / (1 / 2 + 1)))


def test_the_latest_repeats_count_most(monkeypatch):
    monkeypatch.setattr(ratchet, "HALF_LIFE", 1)
    # Squares 8, 2 and 0.5, whatever ran once between them; weights 1/4, 1/2 and 1
    runs = [*runs_of("a", 0.0, 4.0), *runs_of("b", 9.0), *runs_of("c", 5.0, 7.0)]
    runs += [*runs_of("d", 3.0, 4.0), *runs_of("e", 8.0)]
    assert noise_of(runs) == pytest.approx(math.sqrt((8 / 4 + 2 / 2 + 0.5) / 1.75))


def test_the_noise_follows_a_model_that_calms_down():
    """After ten repeats at a third of the noise the estimate is near the new noise."""
    rng = random.Random(1)
    estimates = []
    for _ in range(300):
        loud = [run for n in range(10) for run in runs_of(f"l{n}", *rng.choices([-3, 3], k=2))]
        calm = [run for n in range(10) for run in runs_of(f"c{n}", *rng.choices([-1, 1], k=2))]
        estimates.append(noise_of(loud + calm) ** 2)
    # Two draws of +-s have a variance of s^2; all repeats alike would give (9 + 1) / 2 = 5.
    assert 1 < statistics.fmean(estimates) < 2.5


def test_without_weights_it_is_the_pooled_deviation(monkeypatch):
    monkeypatch.setattr(ratchet, "HALF_LIFE", math.inf)
    rng = random.Random(2)
    sizes = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 7}
    groups = {name: [rng.gauss(5, 2) for _ in range(size)] for name, size in sizes.items()}
    runs = [run for name, values in groups.items() for run in runs_of(name, *values)]
    rng.shuffle(runs)
    squares = sum((len(v) - 1) * statistics.variance(v) for v in groups.values() if len(v) > 1)
    freedom = sum(len(v) - 1 for v in groups.values())
    assert noise_of(runs) == pytest.approx(math.sqrt(squares / freedom))


def test_a_row_that_stands_twice_is_one_run():
    runs = runs_of("a", 1.0, 1.5)
    assert noise_of([runs[0], runs[0], runs[1], runs[1]]) == noise_of(runs)
    assert math.isnan(noise_of([runs[0], runs[0]]))
    # The same seed again with another value is a repeat, and so is the same value of another seed.
    assert noise_of([Run("a", 42, 1.0), Run("a", 42, 3.0)]) == pytest.approx(math.sqrt(2))
    assert noise_of(runs_of("a", 1.0, 1.0)) == 0.0


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e6])
@pytest.mark.parametrize("offset", [0.0, -1.0, 3.0])
def test_noise_has_the_unit_of_the_number(scale, offset):
    base = [*runs_of("a", 1.0, 1.25, 0.75), *runs_of("b", 0.5, 0.25)]
    other = [run._replace(value=(run.value + offset) * scale) for run in base]
    assert noise_of(other) == pytest.approx(scale * noise_of(base))


# --- Verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "word"),
    # The error of the difference is 0.1 * sqrt(2) = 0.1414: discard to 0.0354, keep above 0.2121.
    [
        (1.2, "discard"),
        (1.0, "discard"),
        (0.965, "discard"),
        (0.964, "repeat"),
        (0.788, "repeat"),
        (0.787, "keep"),
        (0.2, "keep"),
    ],
)
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_verdict_after_one_run(plain_bars, monkeypatch, value, word, lower_is_better):
    monkeypatch.setattr(ratchet, "LOWER_IS_BETTER", lower_is_better)
    sign = 1 if lower_is_better else -1
    verdict = judge(runs_of("i", sign * value), runs_of("p", sign * 1.0), 0.1)
    assert verdict.word == word
    assert verdict.gain == pytest.approx(1.0 - value)
    assert verdict.bar == pytest.approx(1.5 * 0.1 * math.sqrt(2))


@pytest.mark.parametrize(
    ("second", "word"),
    # Means of 0.9 and the second; the error is 0.1 * sqrt(1/2 + 1/2), the bar 0.05.
    [(1.1, "discard"), (1.001, "discard"), (0.999, "keep"), (0.8, "keep")],
)
def test_verdict_after_two_runs(plain_bars, second, word):
    verdict = judge(runs_of("i", 0.9, second), runs_of("p", 1.0, 1.0), 0.1)
    assert verdict.word == word
    assert verdict.bar == pytest.approx(0.05)


def test_only_the_parents_runs_under_the_same_seeds_count(plain_bars):
    parent = [Run("p", 42, 1.0), Run("p", 43, 5.0), Run("p", 44, 9.0)]
    assert judge(runs_of("i", 0.5), parent, 0.1).gain == 0.5
    assert judge(runs_of("i", 0.5, 1.5), parent, 0.1).gain == 2.0
    assert judge(runs_of("i", 0.5, first_seed=7), parent, 0.1).gain == 4.5  # there are none


def test_only_the_parents_last_runs_count(plain_bars):
    parent = [Run("p", 42, value) for value in (90.0, 1.0, 2.0, 3.0)]
    verdict = judge(runs_of("i", 1.5), parent, 0.1)
    assert verdict.gain == 0.5
    assert verdict.bar == pytest.approx(1.5 * 0.1 * math.sqrt(1 + 1 / 3))


def test_a_row_that_stands_twice_weighs_once_in_a_verdict(plain_bars):
    idea = runs_of("i", 0.9)
    parent = runs_of("p", 1.0)
    assert judge(idea * 2, parent * 3, 0.1) == judge(idea, parent, 0.1)
    assert judge(idea * 2, parent, 0.1).word == "repeat"  # it is no second run


def test_what_takes_out_code_may_lose_a_little(plain_bars):
    parent = runs_of("p", 1.0)
    assert judge(runs_of("i", 1.07), parent, 0.1, simpler=True).word == "keep"
    assert judge(runs_of("i", 1.07), parent, 0.1).word == "discard"
    assert judge(runs_of("i", 1.08), parent, 0.1, simpler=True).word == "discard"


def test_without_a_known_noise_an_idea_runs_again(plain_bars):
    assert judge(runs_of("i", 0.2), runs_of("p", 1.0), math.nan).word == "repeat"


def test_a_number_without_noise_needs_no_bar(plain_bars):
    parent = runs_of("p", 1.0)
    assert judge(runs_of("i", 1.0 - 1e-12), parent, 0.0).word == "keep"
    assert judge(runs_of("i", 1.0), parent, 0.0).word == "discard"
    assert judge(runs_of("i", 1.0), parent, 0.0, simpler=True).word == "keep"
    assert judge(runs_of("i", 1.0 + 1e-12), parent, 0.0, simpler=True).word == "discard"


def test_tiny_numbers_are_judged_like_any_other(plain_bars):
    parent = runs_of("p", 2e-7)
    assert judge(runs_of("i", 1.7e-7), parent, 1e-8).word == "keep"
    assert judge(runs_of("i", 1.9e-7), parent, 1e-8).word == "repeat"
    assert judge(runs_of("i", 2e-7), parent, 1e-8).word == "discard"


@pytest.mark.parametrize("noise", [math.nan, 0.1])
def test_any_decrease_is_a_persons_wish(plain_bars, monkeypatch, noise):
    monkeypatch.setattr(ratchet, "ANY_DECREASE", True)
    parent = runs_of("p", 1.0)
    verdict = judge(runs_of("i", 0.999999), parent, noise)
    assert (verdict.word, verdict.bar) == ("keep", 0.0)
    assert judge(runs_of("i", 1.0), parent, noise).word == "discard"
    assert judge(runs_of("i", 1.000001), parent, noise, simpler=True).word == "discard"


def test_the_shipped_bars_leave_something_to_repeat():
    assert ratchet.SIMPLER < 0 <= ratchet.LOW < ratchet.HIGH
    assert ratchet.LOW < ratchet.BAR < ratchet.HIGH


# --- Simulation -----------------------------------------------------------------------------------


def no_noise(rng, num_nights):
    return np.zeros((num_nights, simulate_rule.RUNS))


def test_a_simulated_night_without_noise_keeps_the_good_ideas_and_no_other():
    machine = simulate_rule.Machine(noise=no_noise)
    for night in simulate_rule.make_nights(5, (0.3, 1.0), machine):
        true_gain, keeps = simulate_rule.play_rule(night)
        good = [gain for gain in night.gains if gain > 0]
        assert len(keeps) >= 10
        assert [gain for gain, _ in keeps] == good[: len(keeps)]
        assert true_gain == pytest.approx(sum(good[: len(keeps)]))


def test_simulated_rules_get_the_same_nights_and_the_constants_come_back():
    arguments = ((0.2, 0.5), "steady", 0.0, 3, {})
    before = vars(ratchet).copy()
    first, _ = simulate_rule.play("this rule", *arguments)
    again, _ = simulate_rule.play("this rule", *arguments)
    strict, keeps = simulate_rule.play("this rule", *arguments[:-1], {"HIGH": 1e9, "BAR": 1e9})
    assert first.tolist() == again.tolist()
    assert strict.tolist() == [0.0] * 3
    assert keeps == ([], [], [])
    assert vars(ratchet) == before


def test_the_noise_of_a_simulated_machine_is_what_its_name_says():
    rng = np.random.default_rng(0)
    falling = simulate_rule.falling_noise(rng, 2)
    assert falling[:, [0, -1]] == pytest.approx(np.array([[1, 1 / 3]] * 2))
    rising = simulate_rule.rising_noise(rng, 2)
    assert rising[:, [0, -1]] == pytest.approx(np.array([[1, 4]] * 2))
    for noise in (simulate_rule.noisy_hour(rng, 50), simulate_rule.noisy_first_hour(rng, 50)):
        assert ((noise == 3).sum(axis=1) == simulate_rule.HOUR).all()
        assert ((noise == 1) | (noise == 3)).all()
