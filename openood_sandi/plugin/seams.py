"""OpenOOD's seams: where names of postprocessors, yml files and the command line reach the entry points.

OpenOOD has no plugin loader. Six of its modules are changed in memory as soon as they are executed, before
any other module can import their functions by name; OpenOOD's files stay as they are:

- ``openood.postprocessors.utils``: ``get_postprocessor`` of ``main.py`` knows the entry points;
- ``openood.evaluation_api.postprocessor``: ``get_postprocessor`` of the ``Evaluator`` knows them too;
- ``openood.evaluation_api.evaluator``: ``--postprocessor.KEY VALUE`` of scripts; under ``torchrun`` ranks share the
  ``Evaluator``'s work;
- ``openood.evaluators.utils``: ``ood.csv`` holds each set once;
- ``openood.networks.utils``: checkpoints that do not fit are told;
- ``openood.utils.config``: yml files that packages ship; ``--postprocessor NAME``; no value is evaluated.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from openood_sandi import startup
from openood_sandi.plugin import arguments, command_line, ood_csv, registry, scripts, settings, standins, without_gpu
from openood_sandi.plugin.warning import warn

if TYPE_CHECKING:
    from openood_sandi.detectors.info import DetectorInfo


def register(info: DetectorInfo | None = None) -> None:
    """Make OpenOOD know the installed postprocessors, as the start-up file does; also after OpenOOD's import.

    Needed only where Python does not read start-up files (``PYTHONPATH``, ``pip install --target``, ``python
    -S``), where ``OPENOOD_SANDI_DISABLE`` keeps them from acting, or for a detector that no installed package offers
    by an entry point. Calling it again changes nothing, but for modules of OpenOOD that have been reloaded since, whose
    seams it opens again.

    Args:
        info: a detector to offer, in this process, beside the installed ones. Its yml file is
            ``configs/postprocessors/<name>.yml`` in its package, or beside its package or module.

    Raises:
        ValueError: another detector is offered under the name of ``info``.
    """
    if info is not None:
        registry.add(info)
    startup.install()
    for name in SEAMS:
        if name in sys.modules:
            open_seam(sys.modules[name])


def find_openood(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The spec that the other finders give for ``fullname``, with its loader opening the module's seam."""
    standins.install()
    spec = _find_elsewhere(fullname, path, target)
    if spec is None or not hasattr(spec.loader, "exec_module"):
        return spec
    execute = spec.loader.exec_module  # type: ignore[union-attr]

    def execute_and_open(module: ModuleType) -> None:
        try:
            with standins.extra_named():
                execute(module)
        finally:
            standins.withdraw()
        open_seam(module)

    spec.loader.exec_module = execute_and_open  # type: ignore[union-attr, method-assign]
    return spec


def _find_elsewhere(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is not startup.OpenOODFinder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


def open_seam(module: ModuleType) -> None:
    """Change ``module`` if it is one of :data:`SEAMS` and not changed yet; a failure is a warning, never an error.

    A module that was reloaded has its own functions again, while its namespace still has our mark: the mark is one of
    the functions that we have put there.
    """
    seam = SEAMS.get(module.__name__)
    if seam is None or _is_open(module):
        return
    before = dict(vars(module))
    try:
        seam(module)
    except Exception as error:  # another version of OpenOOD must keep working by itself
        warn(
            f"openood-sandi does not fit this OpenOOD: {module.__name__} at {module.__file__} "
            f"({type(error).__name__}: {error}); set {startup.SWITCH}=1 to keep it out",
            stacklevel=2,
        )
    changed = [(name, value) for name, value in vars(module).items() if before.get(name) is not value]
    module.__openood_sandi__ = changed  # type: ignore[attr-defined]


def _is_open(module: ModuleType) -> bool:
    marked = getattr(module, "__openood_sandi__", None)
    return marked is not None and all(getattr(module, name, None) is value for name, value in marked)


def _main_registry(module: ModuleType) -> None:
    own: Callable[[Any], Any] = module.get_postprocessor

    @functools.wraps(own)
    def get_postprocessor(config: Any) -> Any:
        name = config.postprocessor.name
        settings.require_sound(config.postprocessor)
        build = registry.postprocessor_class(name) or own
        try:
            return standins.require_real(build(config))
        except KeyError as error:
            if build is not own or error.args != (name,):
                raise
            known = command_line.postprocessors(Path(module.__file__ or "").resolve().parents[2])
            raise _no_such_postprocessor(name, known) from None

    _replace(own, get_postprocessor)
    without_gpu.stay_on_cpu_without_gpu()
    if _under_torchrun():
        from openood_sandi.plugin import torchrun
        from openood_sandi.runs import ranks

        ranks.take_own_gpu()
        torchrun.share_inference(module.BasePostprocessor)


def _evaluator_registry(module: ModuleType) -> None:
    own: Callable[..., Any] = module.get_postprocessor

    @functools.wraps(own)
    def get_postprocessor(config_root: str, postprocessor_name: str, id_data_name: str) -> Any:
        offered = registry.postprocessor_class(postprocessor_name)
        build = offered or module.postprocessors.get(postprocessor_name)
        if build is None:
            known = sorted({*module.postprocessors, *registry.entry_points()})
            raise _no_such_postprocessor(postprocessor_name, known)
        file = f"{config_root}/postprocessors/{postprocessor_name}.yml"
        if not offered and not Path(file).exists():
            own(config_root, postprocessor_name, id_data_name)  # downloads it
        # Config itself turns to the package's file where config_root has none
        config = module.merge_configs(module.Config(file), module.Config(dataset={"name": id_data_name}))
        scripts.apply_options(config)
        settings.require_sound(config.postprocessor)
        postprocessor = build(config)
        postprocessor.APS_mode = config.postprocessor.APS_mode
        postprocessor.hyperparam_search_done = False
        return standins.require_real(postprocessor)

    _replace(own, get_postprocessor)


def _no_such_postprocessor(name: object, known: list[str]) -> ValueError:
    return ValueError(f"there is no postprocessor {name!r}. {arguments.did_you_mean(str(name), known)}")


def _networks(module: ModuleType) -> None:
    from openood_sandi.plugin import checkpoints

    _replace(module.get_network, checkpoints.watched(module.get_network))


def _evaluator(module: ModuleType) -> None:
    scripts.take_options(sys.modules["__main__"])
    if _under_torchrun():
        from openood_sandi.plugin import torchrun

        torchrun.share_evaluation(module)


def _evaluators(module: ModuleType) -> None:
    for evaluator in (module.OODEvaluator, module.MOSEvaluator):
        ood_csv.hold_each_set_once(evaluator)


def _config(module: ModuleType) -> None:
    own_init: Callable[..., None] = module.Config.__init__
    own_setup: Callable[..., Any] = module.setup_config

    @functools.wraps(own_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *map(registry.resolve_config, args), **kwargs)

    @functools.wraps(own_setup)
    def setup_config(*args: Any, **kwargs: Any) -> Any:
        config = command_line.setup_config(functools.partial(own_setup, *args, **kwargs))
        if _under_torchrun():
            from openood_sandi.plugin import torchrun

            torchrun.run_main(config)
        return config

    @functools.wraps(module.Config.parse_args)
    def parse_args(self: Any, cmd_args: Sequence[str] | None = None, strict: bool = True) -> list[str]:
        return arguments.parse_args(self, cmd_args, strict)

    module.Config.__init__ = __init__
    module.Config.parse_args = parse_args
    _replace(own_setup, setup_config)


def _under_torchrun() -> bool:
    from openood_sandi.runs import ranks

    return ranks.launched()


def _replace(own: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Put ``ours`` wherever OpenOOD, or a script, has already bound ``own`` under its name."""
    for name, module in list(sys.modules.items()):
        if name == "__main__" or name.partition(".")[0] == "openood":
            if getattr(module, "__dict__", {}).get(own.__name__) is own:
                setattr(module, own.__name__, ours)


SEAMS: dict[str, Callable[[ModuleType], None]] = {
    "openood.networks.utils": _networks,
    "openood.postprocessors.utils": _main_registry,
    "openood.evaluation_api.postprocessor": _evaluator_registry,
    "openood.evaluation_api.evaluator": _evaluator,
    "openood.evaluators.utils": _evaluators,
    "openood.utils.config": _config,
}
