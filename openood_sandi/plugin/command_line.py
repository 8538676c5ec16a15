"""``python main.py --postprocessor NAME``: what OpenOOD's command line gains.

With ``--config`` the named postprocessor's yml takes the place of any under ``postprocessors/`` in that list.
Without it, the command runs OpenOOD's CIFAR-100 protocol (:mod:`openood_sandi.plugin.cifar100`). NAME is one that a
package offers or one of OpenOOD's own; every other ``--key value`` keeps its meaning. What is wrong is said before
anything is computed, and a rerun without a terminal adds to the earlier run's folder instead of asking.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openood_sandi.plugin import arguments, cifar100, data_sets, registry

#: Last parts of the configuration keys whose values are paths.
_PATH_KEYS = ("cache_dir", "checkpoint", "data_dir", "imglist_pth", "output_dir")


def setup_config(own: Callable[[], Any]) -> Any:
    """OpenOOD's ``setup_config``, here ``own``, with ``--postprocessor NAME`` put into its terms.

    Raises:
        SystemExit: no postprocessor or setting has that name, a value is wrong, or files are missing; the message
            says which.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+")
    parser.add_argument("--postprocessor")
    options, overrides = parser.parse_known_args()
    try:
        config = _configured(own, options, overrides)
    except arguments.WrongArgument as error:
        raise SystemExit(str(error)) from None
    if config.merge_option == "default" and not _can_be_asked():
        config.merge_option = "merge"
    if config.pipeline and config.pipeline.name == "test_ood":
        protocol = options.postprocessor and not options.config
        run = "without --config this command runs OpenOOD's CIFAR-100 protocol, which" if protocol else "this run"
        data_sets.require_files(config, Path.cwd(), run)
    return config


def _configured(own: Callable[[], Any], options: argparse.Namespace, overrides: list[str]) -> Any:
    if options.postprocessor is None:
        return own()
    checkout = _checkout()
    postprocessor = _postprocessor_file(options.postprocessor, checkout)
    if options.config:
        files = [file for file in options.config if Path(file).parent.name != "postprocessors"]
        return _with_arguments(["--config", *files, postprocessor, *overrides], own)

    files = [str(checkout / "configs" / file) for file in cifar100.CONFIGS]
    overrides = [*cifar100.overrides(), *_from_here(overrides, checkout)]
    os.chdir(checkout)  # the protocol's data/ and results/ are the checkout's, wherever the command was typed
    return _with_arguments(["--config", *files, postprocessor, *overrides], own)


def _can_be_asked() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _with_arguments(arguments: list[str], call: Callable[[], Any]) -> Any:
    """``call()`` with ``arguments`` as the command line."""
    given = sys.argv
    sys.argv = [given[0], *arguments]
    try:
        return call()
    finally:
        sys.argv = given


def _checkout() -> Path:
    """The OpenOOD checkout that is running: the folder of ``main.py``, ``configs/`` and the package."""
    package = sys.modules["openood"].__file__
    roots = [Path(file).resolve().parent for file in (sys.argv[0], os.path.dirname(package or "")) if file]
    for root in roots:
        if (root / "configs" / "postprocessors").is_dir():
            return root
    raise SystemExit(
        f"--postprocessor needs OpenOOD's configs/, which is not in {' nor in '.join(map(str, roots))}: "
        "run main.py of a checkout (git clone https://github.com/Jingkang50/OpenOOD)"
    )


def _postprocessor_file(name: str, checkout: Path) -> str:
    """The yml of postprocessor ``name``: the checkout's, else the one its package ships."""
    folder = checkout / "configs" / "postprocessors"
    own = folder / f"{name}.yml"
    file = own if own.is_file() else registry.config_file(name)
    if file is not None:
        return str(file)
    names = postprocessors(checkout)
    if name in names:
        raise SystemExit(
            f"--postprocessor {name}: {registry.entry_points()[name].value} ships no "
            f"configs/postprocessors/{name}.yml, in its package or beside it"
        )
    raise SystemExit(f"--postprocessor {name}: there is no such postprocessor. {arguments.did_you_mean(name, names)}")


def postprocessors(checkout: Path) -> list[str]:
    """The names on offer: of packages, and of the yml files of a checkout."""
    return sorted({path.stem for path in checkout.glob("configs/postprocessors/*.yml")} | set(registry.entry_points()))


def _from_here(overrides: list[str], checkout: Path) -> list[str]:
    """``--key value`` overrides, whose relative paths become absolute from the current folder.

    A path that exists in the checkout only stays as it is, to be read from there.
    """
    resolved: list[str] = []
    key = ""
    for argument in overrides:
        prefix, value = "", argument
        if argument.startswith("--"):
            key, equals, value = argument.partition("=")
            prefix = key + equals
        if value and key.rpartition(".")[2].lstrip("-") in _PATH_KEYS:
            if os.path.exists(value) or not (checkout / value).exists():
                value = os.path.abspath(value)
        resolved.append(prefix + value)
    return resolved
