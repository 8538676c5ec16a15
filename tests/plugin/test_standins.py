"""Stand-ins for packages that OpenOOD imports and that are missing; mostly with a made-up OpenOOD."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import installation
from tests.plugin.test_seams import BY_NAME, script

ON = "import openood_sandi; openood_sandi.register()\n"


def run(folder: Path, code: str, **modules: str) -> subprocess.CompletedProcess[str]:
    """Run code beside packages made of ``modules`` ({dotted name: text}), without third-party libraries."""
    for name, text in modules.items():
        file = folder / (name.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    path = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(installation.source())!r}]\n"
    return installation.run(sys.executable, "-S", "-c", path + code, cwd=folder)


def test_a_missing_package_can_be_imported_and_says_so_when_used(tmp_path: Path) -> None:
    method = (
        "import cv2, timm\nimport imgaug.augmenters as iaa\n"
        "from statsmodels.distributions.empirical_distribution import ECDF\n"
        "FLAG = cv2.IMREAD_COLOR\n"
        "def use(): ECDF([1.0])\n"
        "def read(): cv2.imread('x')\n"
        "def nested(): iaa.pillike.Autocontrast()\n"
    )
    code = ON + (
        "from openood import method\n"
        "for use in (method.use, method.read, method.nested):\n"
        "    try: use()\n"
        "    except ImportError as error: print(error.name, error)\n"
        "packages = {'cv2', 'timm', 'imgaug', 'statsmodels'}\n"
        "print([name for name in sys.modules if name.partition('.')[0] in packages])\n"
        "import timm\n"
    )
    with pytest.raises(AssertionError, match="No module named 'timm'"):  # to code that is not OpenOOD's
        run(tmp_path, code, **{"openood.__init__": "", "openood.method": method})
    code = code.removesuffix("import timm\n")
    lines = run(tmp_path, code, **{"openood.__init__": "", "openood.method": method}).stdout.splitlines()
    needs = "this part of OpenOOD needs"
    assert lines[0] == (
        f"statsmodels {needs} statsmodels (statsmodels.distributions.empirical_distribution.ECDF), "
        "which is not installed: pip install statsmodels"
    )
    assert lines[1].startswith(f"cv2 {needs} cv2 (cv2.imread), which is not installed: pip install opencv")
    assert lines[2].startswith(f"imgaug {needs} imgaug (imgaug.augmenters.pillike.Autocontrast)")
    assert lines[3] == "[]"


def test_a_package_that_dies_on_import_is_stood_in_for(tmp_path: Path) -> None:
    code = ON + (
        "from openood import method\n"
        "try: method.iaa.Affine()\n"
        "except ImportError as error: print(error)\n"
        "print('imgaug' in sys.modules, 'imgaug.part' in sys.modules)\n"
    )
    modules = {
        "imgaug.__init__": "from imgaug import part\nimport math\nmath.sctypes",
        "imgaug.part": "",
        "openood.__init__": "",
        "openood.method": "import imgaug.augmenters as iaa",
    }
    error, left = run(tmp_path, code, **modules).stdout.splitlines()
    assert "does not import (AttributeError: module 'math' has no attribute 'sctypes'" in error
    assert left == "False False"


def test_a_real_package_stays_real_with_all_its_submodules(tmp_path: Path) -> None:
    method = (
        "import timm, timm.models\n"
        "try: import timm.extras\n"
        "except ModuleNotFoundError as error: print('as always:', error)\n"
        "print(timm.value, timm.models.value)"
    )
    modules = {
        "timm.__init__": "value = 1",
        "timm.models": "value = 2",
        "openood.__init__": "",
        "openood.method": method,
    }
    lines = run(tmp_path, ON + "from openood import method; import timm; print(timm.value)", **modules).stdout
    assert lines.splitlines() == ["as always: No module named 'timm.extras'", "1 2", "1"]


def test_other_libraries_and_other_names_are_none_of_its_business(tmp_path: Path) -> None:
    library = "try: import cv2\nexcept ImportError: print('no cv2')"
    modules = {
        "library": library,
        "openood.__init__": "",
        "openood.method": "import cv2, library\nimport unknown",
    }
    with pytest.raises(AssertionError, match="No module named 'unknown'") as caught:
        run(tmp_path, ON + "from openood import method", **modules)
    assert "no cv2" in str(caught.value)


@pytest.mark.slow
def test_choosing_a_method_that_needs_a_missing_package_names_it(bare_checkout: Path) -> None:
    # adascale and openmax import statsmodels and libmr; these dies-on-import twins win over installed ones
    twins = installation.workspace() / "twins"
    for name in ("statsmodels", "libmr"):
        (twins / name).mkdir(parents=True, exist_ok=True)
        (twins / name / "__init__.py").write_text("raise AttributeError('a twin')")
    code = BY_NAME + "try_both('openmax'); print(type(for_evaluator('configs', 'msp', 'cifar10')).__name__)\n"
    code += "try: for_evaluator('configs', 'adascale_a', 'cifar10')\nexcept ImportError as error: print(error)"
    lines = script(bare_checkout, code, PYTHONPATH=str(twins)).stdout.splitlines()
    assert [line.startswith("openmax ImportError the postprocessor OpenMax") for line in lines[:2]] == [
        True,
        True,
    ]
    assert all("needs libmr, which does not import" in line for line in lines[:2])
    assert lines[2] == "BasePostprocessor"
    assert lines[3].startswith("the postprocessor AdaScalePostprocessor") and "pip install statsmodels" in lines[3]
