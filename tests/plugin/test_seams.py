"""How OpenOOD learns about postprocessors: at import, by hand, from other packages, or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from openood_sandi import startup
from tests.helpers import installation, tiny

pytestmark = pytest.mark.slow  # every test starts a Python with the installed wheel

BY_NAME = """
import warnings
warnings.simplefilter("always")
from openood.utils import Config
from openood.postprocessors import get_postprocessor
from openood.evaluation_api.evaluator import get_postprocessor as for_evaluator

def try_both(name):
    dataset = {"dataset": {"name": "cifar100"}}
    for build in (
        lambda: get_postprocessor(Config("configs/postprocessors/" + name + ".yml", dataset)),
        lambda: for_evaluator("configs", name, "cifar100"),
    ):
        try:
            print(name, type(build()).__name__)
        except Exception as error:
            print(name, type(error).__name__, error)
"""


def script(checkout: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in the checkout with the installed wheel."""
    return installation.run(installation.wheel_python(), "-c", code, cwd=checkout, **variables)


def test_names_and_files_are_known(bare_checkout: Path) -> None:
    result = script(bare_checkout, BY_NAME + "try_both('sandi'); try_both('gaia'); try_both('msp')")
    assert result.stdout.splitlines() == (
        ["sandi SandIPostprocessor"] * 2 + ["gaia GAIAPostprocessor"] * 2 + ["msp BasePostprocessor"] * 2
    )


def test_switched_off_nothing_is_changed(bare_checkout: Path) -> None:
    code = "import openood.utils.config as config; print(config.setup_config.__wrapped__)"
    assert "setup_config" in script(bare_checkout, code).stdout
    with pytest.raises(AssertionError, match="no attribute '__wrapped__'"):
        script(bare_checkout, code, **{startup.SWITCH: "1"})


def test_by_hand_after_import_and_twice(bare_checkout: Path) -> None:
    # OpenOOD is imported without the plugin, apart from the stand-ins that let it be imported at all
    code = (
        "import sys\n"
        "from openood_sandi import register\nfrom openood_sandi.plugin import seams as plugin\n"
        "seams = dict(plugin.SEAMS)\n"
        "plugin.SEAMS.clear()\n"
        "import openood.pipelines, openood.evaluation_api, openood.utils\n"
        "from openood.utils import setup_config\n"
        "stock = setup_config\n"
        "plugin.SEAMS.update(seams)\n"
        "register()\n"
        "print(setup_config.__wrapped__ is stock)\n"
        "register()\n"
        "print(setup_config.__wrapped__ is stock, openood.utils.setup_config is setup_config)\n"
        "import openood.pipelines.test_ood_pipeline as pipeline\n"
        "from openood.postprocessors.utils import get_postprocessor\n"
        "print(pipeline.get_postprocessor is get_postprocessor)\n"
    )
    result = script(bare_checkout, code + BY_NAME + "try_both('sandi')")
    assert result.stdout.splitlines() == ["True", "True True", "True"] + ["sandi SandIPostprocessor"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_gpu_only_openoods_own_calls_stay_on_the_cpu(checkout: Path) -> None:
    code = (
        "import openood.postprocessors, torch\n"
        "from openood.networks import get_network\n"
        "from openood.utils import Config\n"
        f"settings = dict(name='resnet18_32x32', num_classes=100, checkpoint={str(tiny.CHECKPOINT)!r})\n"
        "net = get_network(Config(**settings, pretrained=True, num_gpus=1))\n"
        "print({parameter.device.type for parameter in net.parameters()})\n"
        f"for call in (net.cuda, torch.zeros(1).cuda, lambda: torch.load({str(tiny.CHECKPOINT)!r})):\n"
        "    try: call()\n"
        "    except (AssertionError, RuntimeError): print('refused')\n"
    )
    lines = script(checkout, code).stdout.splitlines()
    assert lines[-4:] == ["{'cpu'}", "refused", "refused", "refused"]


def write_package(folder: Path, name: str, entries: str, **files: str) -> None:
    """A package with entry points, as an installer leaves it in site-packages."""
    for path, text in {
        f"{name}/__init__.py": "",
        f"{name}-1.dist-info/entry_points.txt": entries,
        **files,
    }.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (folder / f"{name}-1.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")


def test_other_packages_join_in_and_a_broken_one_is_left_out(bare_checkout: Path, tmp_path: Path) -> None:
    yml = "postprocessor:\n  name: {}\n  APS_mode: False\n"
    group = "[openood.postprocessors]\n"
    good = (
        "from openood.postprocessors import BasePostprocessor\n"
        "from openood_sandi import DetectorInfo\n"
        "class Good(BasePostprocessor): pass\n"
        "class Method:\n  def __init__(self, net, *, share=0.5): pass\n"
        "INFO = DetectorInfo('described', 'Described', 'good.methods:Method', '', '', '')\n"
    )
    write_package(
        tmp_path,
        "good",
        f"{group}inside = good.methods:Good\nbeside = good.methods:Good\ndescribed = good.methods:INFO\n",
        **{
            "good/methods.py": good,
            "good/configs/postprocessors/inside.yml": yml.format("inside"),
            "good/configs/postprocessors/described.yml": yml.format("described"),
            "configs/postprocessors/beside.yml": yml.format("beside"),
        },
    )
    write_package(
        tmp_path,
        "broken",
        f"{group}broken = broken.methods:Method\n",
        **{
            "broken/methods.py": "raise RuntimeError('no such luck')",
            "broken/configs/postprocessors/broken.yml": yml.format("broken"),
        },
    )
    names = "inside", "beside", "sandi", "described", "broken"
    code = BY_NAME + "; ".join(f"try_both({name!r})" for name in names)
    result = script(bare_checkout, code, PYTHONPATH=str(tmp_path))
    lines = result.stdout.splitlines()
    assert lines[:6] == ["inside Good"] * 2 + ["beside Good"] * 2 + ["sandi SandIPostprocessor"] * 2
    assert lines[6:8] == ["described MethodPostprocessor"] * 2
    refusal = "the postprocessor 'broken' (broken.methods:Method) does not load: RuntimeError: no such luck"
    assert lines[8:] == [f"broken ImportError {refusal}"] * 2
    warnings = [line for line in result.stderr.splitlines() if "Warning" in line and "broken" in line]
    assert len(warnings) == 1 and "no such luck" in warnings[0]
