"""Any yml value for any option, read as OpenOOD reads it: taken, or refused in the words that Python hears too."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from openood_sandi import SandI

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text("aZ0.,*e-x ", max_size=5),
    st.sampled_from(["auto", "Z", "A", "all", "count", "1e-3", ".inf", "inf", "nan", "True", "0x10", "1_000"]),
    st.lists(st.one_of(st.text("aZ.*", max_size=3), st.integers()), max_size=2),
    st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers(), max_size=1),
)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_value(checkout: Path, tmp_path: Path, data: st.DataObject) -> None:
    from openood.utils.config import Config

    from openood_sandi.detectors.options import options_of
    from openood_sandi.postprocessor import SandIPostprocessor

    name = data.draw(st.sampled_from(list(options_of(SandI))))
    value = data.draw(values)
    file = tmp_path / "sandi.yml"
    arguments = {name: value}
    described = {"name": "sandi", "APS_mode": False, "postprocessor_args": arguments, "postprocessor_sweep": {}}
    file.write_text(yaml.safe_dump({"postprocessor": described}))
    read = yaml.safe_load(file.read_text())["postprocessor"]["postprocessor_args"][name]
    try:
        taken = SandIPostprocessor(Config(str(file))).options[name]
    except ValueError as error:
        refused = str(error)
    else:
        number = isinstance(options_of(SandI)[name], float)
        assert taken == (float(read) if number else read)  # PyYAML reads 1e-3 as a string
        SandI(nn.Identity(), **{name: taken})
        return
    assert refused.startswith(f"sandi: {name}=") and "expected" in refused
    try:
        SandI(nn.Identity(), **{name: read})
    except (ValueError, TypeError) as error:
        python = str(error)
    else:
        raise AssertionError(f"{name}={read!r}: Python takes it, the yml does not: {refused}")
    if not isinstance(read, dict):  # which OpenOOD has made something else of
        assert "expected" in python and python.partition(":")[0] == f"{name}={read!r}"
