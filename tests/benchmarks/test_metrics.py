"""Metrics and their bootstrap: against worked examples, scikit-learn and OpenOOD."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for module in ("pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


from comparison import metrics
from comparison.metrics import detection


def test_metrics_of_a_hand_worked_example() -> None:
    # Of 20 ID images two score above every OOD image; of 20 OOD images one scores below every ID image.
    id_scores = np.array([1.0] * 18 + [20.0] * 2)
    ood_scores = np.array([10.0] * 19 + [0.5])
    result = detection(id_scores, ood_scores)
    # Catching 19 OOD images (score >= 10) loses the two ID images at 20.
    assert result.fpr95_id_lost == pytest.approx(2 / 20)
    # Keeping 19 ID images means keeping those at 20 too, and with them every OOD image.
    assert result.fpr95_ood_let_in == pytest.approx(20 / 20)
    # 19 x 18 of the 20 x 20 pairs are in order.
    assert result.auroc == pytest.approx(19 * 18 / 400)
    # Trapezoids between (recall, precision): (1, 20/40), (19/20, 19/39), (19/20, 19/21), (0, 0).
    assert result.aupr_out == pytest.approx(0.05 * (20 / 40 + 19 / 39) / 2 + 0.95 * (19 / 21) / 2)
    # (1, 20/40), (18/20, 18/38), (18/20, 18/19), (0, 0).
    assert result.aupr_in == pytest.approx(0.1 * (20 / 40 + 18 / 38) / 2 + 0.9 * (18 / 19) / 2)


def test_metrics_of_perfect_and_of_useless_scores() -> None:
    perfect = detection(np.arange(5.0), np.arange(5.0) + 5)
    assert (perfect.auroc, perfect.fpr95_id_lost, perfect.fpr95_ood_let_in) == (1, 0, 0)
    useless = detection(np.zeros(5), np.zeros(5))
    assert (useless.auroc, useless.fpr95_id_lost, useless.fpr95_ood_let_in) == (0.5, 1, 1)


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


@unhurried
@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=60, unique=True).flatmap(
        lambda scores: st.tuples(st.just(scores), st.integers(1, len(scores) - 1))
    )
)
def test_fpr95_is_what_its_names_say(case: tuple[list[int], int]) -> None:
    scores, split = case
    id_scores, ood_scores = np.array(scores[:split], float), np.array(scores[split:], float)
    result = detection(id_scores, ood_scores)
    caught = next(t for t in np.sort(ood_scores)[::-1] if np.mean(ood_scores >= t) >= 0.95)
    assert result.fpr95_id_lost == pytest.approx(np.mean(id_scores >= caught))
    kept = next(t for t in np.sort(id_scores) if np.mean(id_scores <= t) >= 0.95)
    assert result.fpr95_ood_let_in == pytest.approx(np.mean(ood_scores <= kept))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 2 OOD scores are NaN or infinite"):
        detection(np.zeros(2), np.array([0.0, bad]))


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ID scores have shape \(0,\)"):
        detection(np.zeros(0), np.zeros(2))


@pytest.fixture(scope="module")
def compute_all_metrics() -> Callable[..., list[float]]:
    """OpenOOD's own function, read from its file, as importing its package needs far more than that."""
    spec = importlib.util.find_spec("openood")
    roots = [Path(p).parent for p in (spec.submodule_search_locations or [])] if spec else []
    roots += [Path(os.environ["OPENOOD_HOME"])] if os.environ.get("OPENOOD_HOME") else []
    files = [f for root in roots if (f := root / "openood/evaluators/metrics.py").is_file()]
    if not files:
        pytest.skip(
            "OpenOOD is missing; supply it by git clone https://github.com/Jingkang50/OpenOOD DIR and OPENOOD_HOME=DIR"
        )
    module_spec = importlib.util.spec_from_file_location("openood_metrics", files[0])
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.compute_all_metrics  # type: ignore[no-any-return]


@pytest.mark.parametrize("decimals", [1, 2, 15], ids=["many ties", "some ties", "no ties"])
def test_metrics_equal_openoods(compute_all_metrics: Callable[..., list[float]], decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    id_scores = rng.normal(0, 1, 300).round(decimals)
    ood_scores = rng.normal(1, 2, 211).round(decimals)
    ours = detection(id_scores, ood_scores)
    label = np.concatenate([rng.integers(0, 10, 300), np.full(211, -1)])
    with np.printoptions():  # OpenOOD's function changes them
        theirs = compute_all_metrics(-np.concatenate([id_scores, ood_scores]), label, label)
    expected = (ours.fpr95_id_lost, ours.auroc, ours.aupr_in, ours.aupr_out)
    assert theirs[:4] == pytest.approx(expected, rel=1e-12)
    assert ours.fpr95_ood_let_in != pytest.approx(ours.fpr95_id_lost)


# ---------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
def test_resampled_metrics_are_those_of_the_resampled_scores(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    id_scores, ood_scores = rng.normal(0, 1, 150).round(decimals), rng.normal(1, 2, 97).round(decimals)
    id_draws, ood_draws = metrics.draws(150, 25, 0, 0), metrics.draws(97, 25, 0, 1)
    found = metrics.resampled(id_scores, ood_scores, id_draws, ood_draws)
    expected = [
        astuple(detection(id_scores[known], ood_scores[unknown]))
        for known, unknown in zip(id_draws, ood_draws, strict=True)
    ]
    assert np.ptp(found, axis=0).min() > 0.01  # the resamples differ
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_draws_are_reproducible_with_replacement_and_of_their_stratum() -> None:
    drawn = metrics.draws(50, 400, seed=1, stratum=2)
    assert drawn.shape == (400, 50) and drawn.min() == 0 and drawn.max() == 49
    assert np.array_equal(drawn, metrics.draws(50, 400, seed=1, stratum=2))
    assert not np.array_equal(drawn, metrics.draws(50, 400, seed=1, stratum=3))
    # A resample of n has n (1 - (1 - 1/n)^n) different images on average: 31.8 of 50.
    assert np.mean([len(set(row)) for row in drawn.tolist()]) == pytest.approx(50 * (1 - 0.98**50), abs=0.5)


def test_the_interval_holds_the_true_auroc_about_as_often_as_it_says() -> None:
    truth = 0.5 * math.erfc(-1 / math.sqrt(2))  # N(0, 1) against N(sqrt 2, 1): P(N(sqrt 2, 2) > 0) = Phi(1)
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        known, unknown = rng.normal(0, 1, 80), rng.normal(math.sqrt(2), 1, 80)
        found = metrics.resampled(known, unknown, metrics.draws(80, 200, seed, 0), metrics.draws(80, 200, seed, 1))
        low, high = np.percentile(found[:, 0], [2.5, 97.5])
        held += bool(low <= truth <= high)
    assert 88 <= held <= 99
