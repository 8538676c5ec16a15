"""Any value for any option: refused by name, or a detector that works; and nothing is left changed either way."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.cases import prepared
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import Block

OPTIONS = [name for name, option in inspect.signature(SandI).parameters.items() if option.kind is option.KEYWORD_ONLY]
WORDS = (
    *("auto", "all", "last_stage", "Z", "A", "z", "count", "union", "intersection", "max_logit", "cross_entropy"),
    *(
        "channels",
        "labels",
        "norm0",
        "norm1",
        "norm*",
        "norm1#2",
        "feature",
        "stem, conv1",
        "[",
        "*",
        "?",
        ",",
        "",
        "#",
    ),
)
numbers = st.one_of(st.integers(-4, 4), st.floats(), st.booleans(), st.just(10**400), st.just(-(10**400)))
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
anything = st.one_of(
    st.none(), numbers, words, st.binary(max_size=3), st.lists(st.one_of(words, numbers), max_size=3), st.sets(words)
)


@functools.cache
def network() -> tuple[nn.Module, Tensor]:
    net, x = prepared(Block, 12)
    return net, x[:2]


def refusal(options: dict[str, Any]) -> str | None:
    """Why the options are refused, at once or on the first batch; None if they work."""
    assume(not isinstance(options.get("steps"), int) or options["steps"] <= 4)  # more would work, one day
    net, x = network()
    before = surroundings(net, x)
    try:
        detector = SandI(net, **options)
        pred, tau = detector(x)
        assert pred.shape == tau.shape == (2,) and not tau.isinf().any()
        assert set(detector.densities(x)) == set(detector.split_names) and set(detector.explain(x))
    except (ValueError, TypeError) as error:
        return str(error)
    finally:
        assert surroundings(net, x) == before
    return None


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(OPTIONS), value=anything, variant=st.sampled_from("ZA"))
@example(name="step_size", value=1e38, variant="A")
@example(name="splits", value=["*"], variant="A")
def test_one_option(name: str, value: Any, variant: str) -> None:
    text = refusal({"variant": variant, name: value})
    if text is not None:
        # Names of modules are looked up on the first batch, and found wanting one by one.
        given_names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        about_a_name = any(
            repr(item.strip()) in text for given in given_names for item in (str(given), *str(given).split(","))
        )
        assert name in text.partition(" ")[0] or about_a_name or (name == "splits" and "split point" in text), text
        assert any(
            word in text
            for word in (
                "expected",
                "did you mean",
                "give ",
                "name ",
                "for instance",
                "is called",
                "never calls",
                "lies behind",
                "lies beside",
            )
        ), text


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(OPTIONS), anything, max_size=5))
def test_several_options(options: dict[str, Any]) -> None:
    refusal(options)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.lists(st.integers(0, 9), max_size=5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool, torch.bfloat16]),
)
def test_any_tensor(shape: list[int], dtype: torch.dtype) -> None:
    """Images that the network takes are scored; all else is a ValueError that tells the shape and the dtype."""
    net, good = network()
    x = torch.zeros(shape, dtype=dtype)
    before = surroundings(net, good)
    fits = len(shape) == 4 and shape[1] == 3 and min(shape) > 0 and dtype == torch.float64
    try:
        assert SandI(net)(x)[1].shape == (shape[0],)
        assert fits
    except ValueError as error:
        assert not fits
        assert str(tuple(shape)) in str(error)
        assert str(dtype).removeprefix("torch.") in str(error) or "empty" in str(error)
    assert surroundings(net, good) == before
