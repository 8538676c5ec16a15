"""Where the checkout lies, and the data that only some machines have."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), BENCHMARKS / "README.md"])

#: Real images in OpenOOD's layout, with ``checkpoints``, ``parity`` and ``cases`` beside the folder.
DATA = Path(os.environ.get("OPENOOD_SANDI_DATA", ROOT.parent / "shared/data"))
CHECKPOINTS = DATA.parent / "checkpoints"
PARITY = DATA.parent / "parity"
