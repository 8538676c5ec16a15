"""Packaging: metadata, extras, entry points, and the two files that a plain pyproject.toml cannot place.

- ``configs/postprocessors/*.yml`` lies at the root, as in OpenOOD; a wheel carries it inside the package.
- The start-up file goes to the root of site-packages, from a wheel and from an editable install alike.
"""

import ast
import re
import shutil
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"', (ROOT / "openood_sandi/__init__.py").read_text(), re.M)[0]
CONFIGS = sorted((ROOT / "configs/postprocessors").glob("*.yml"))

# Python runs these at every start: the .pth up to 3.14, the .start from 3.15 on (PEP 829). Their names sort
# after "__editable__...", which makes the package importable. Not even a half-removed package may break a
# start.
STARTUP = {
    "openood_sandi.pth": (
        'import sys; exec("try:\\n from openood_sandi import startup\\n startup.activate()\\nexcept Exception: pass")\n'
    ),
    "openood_sandi.start": "openood_sandi.startup:activate\n",
}


class BuildWithStartup(build_py):
    """``build_py`` that also places the configurations and the start-up files."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            # the folder that becomes the editable wheel; the configurations are read from the checkout
            site_packages = Path(self.get_finalized_command("install").install_lib)
        else:
            site_packages = Path(self.build_lib)
            folder = site_packages / "openood_sandi/configs/postprocessors"
            folder.mkdir(parents=True, exist_ok=True)
            for config in CONFIGS:
                shutil.copy(config, folder)
        for name, text in STARTUP.items():
            (site_packages / name).write_text(text)


def literal(module: str, name: str) -> Any:
    """The literal assigned to ``name`` in a module of this package, which is not imported: torch is not there yet.

    The arguments of a call, as a dictionary, where it is one: ``INFO = DetectorInfo(...)``.
    """
    path = ROOT / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            if isinstance(node.value, ast.Call):
                return {argument.arg: ast.literal_eval(argument.value) for argument in node.value.keywords}
            return ast.literal_eval(node.value)
    raise LookupError(f"{module} has no literal {name}")


DETECTORS = literal("openood_sandi.plugin.registry", "DETECTORS")
LABELS = [literal(module, "INFO")["label"] for module, _ in DETECTORS.values()]

OPENOOD = [  # what OpenOOD needs to be imported on a current Python; openood_sandi.plugin.standins covers the rest
    "faiss-cpu",
    "pandas",
    "pyyaml>=5.4.1",
    "scikit-learn",
    "scipy",
    "torchvision",
    "tqdm",
]

TESTING = ["build", "hypothesis", "pytest", "pytest-xdist", "pyyaml>=5.4.1", "safetensors", "setuptools>=77"]
BENCH = ["adjusttext", "jinja2", "matplotlib", "pandas", "plotly", "pytorch-ood", "scikit-learn", "timm", "torchvision"]
BENCH += ["tqdm"]

setup(
    name="openood-sandi",
    version=VERSION,
    description=f"Out-of-distribution detection for OpenOOD: {', '.join(LABELS[:-1])} and {LABELS[-1]}",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["openood_sandi", "openood_sandi.*"]),
    package_data={"openood_sandi": ["py.typed"]},
    install_requires=["numpy", "safetensors", "torch>=2.6"],
    extras_require={
        "openood": OPENOOD,
        "bench": BENCH,
        "test": [*BENCH, *TESTING],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "dev": ["mypy", "pre-commit", "ruff"],
    },
    entry_points={
        "console_scripts": ["openood-sandi = openood_sandi.command:main"],
        "openood.postprocessors": [
            f"{name} = openood_sandi.postprocessor:{postprocessor}" for name, (_, postprocessor) in DETECTORS.items()
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    cmdclass={"build_py": BuildWithStartup},
)
