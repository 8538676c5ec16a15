"""The detectors that are compared: other people's, run by their libraries' own code, and this package's.

``available(suite)`` gives them by name. A name means the same options wherever it runs; of two libraries that have the
method, OpenOOD goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..suite import Suite
from . import own, with_openood, with_pytorch_ood
from .baselines import BASELINES
from .method import Method, Scorer
from .network import NetworkParts

__all__ = ["DEFAULT", "Method", "Scorer", "available", "called"]

DEFAULT = (
    *("msp", "odin", "ebo", "mls", "gradnorm", "react", "rankfeat", "scale", "ash", "gen", "knn", "vim", "fdbd", "nci"),
    *("gsc", "prototype_fusion", "gaia-z", "gaia-a", "sandi-z", "sandi-a", "sandi-z-last-stage"),
)
"""What is compared unless other methods are named: one setting of each, none that takes tens of forward passes."""


def available(suite: Suite) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods that can score the suite, by name, and why the others cannot."""
    parts = NetworkParts(suite)
    found: dict[str, Method] = {}
    reasons: dict[str, list[str]] = {}
    for library in (with_openood, with_pytorch_ood, own):
        methods, absent = library.offer(suite, parts)
        for name, method in methods.items():
            found.setdefault(name, method)
        for name, reason in absent.items():
            reasons.setdefault(name, []).append(reason)
    absent = {name: "; ".join(dict.fromkeys(given)) for name, given in reasons.items() if name not in found}
    return {name: found[name] for name in (*DEFAULT, *sorted(found)) if name in found}, absent


def called(runnable: Mapping[str, Method], known: Iterable[str]) -> dict[str, str]:
    """What each name and printed title means, by the same in lower case: a method, "default" or "all"."""
    titles = {
        **{title: name for name, (title, _) in own.SETTINGS.items()},
        **{baseline.title: name for name, baseline in BASELINES.items()},
        **{method.title: name for name, method in runnable.items()},
    }
    known = ("default", "all", *known)
    return {
        **{title.casefold(): name for title, name in titles.items() if name in known},
        **{name.casefold(): name for name in known},
    }
