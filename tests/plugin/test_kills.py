"""main.py, killed again and again: its table is, byte for byte, that of a run left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import installation
from tests.plugin.test_main import results

KILLS = int(os.environ.get("OPENOOD_SANDI_KILLS", "50"))
METHODS = ("gsc", "sandi")  # the quickest of this package's, and one that studies the first images that it sees
A_ROUND = 5  # kills, after which a run is left to end
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the quicker way on a machine that does other things as well

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are killed here as POSIX does it")


def arguments(method: str, mark: str, cache: Path) -> list[str]:
    kept = ["--postprocessor.postprocessor_args.cache_dir", str(cache)]
    return ["main.py", "--postprocessor", method, *kept, "--mark", mark]


def killed(command: list[str], checkout: Path, seconds: float) -> bool:
    """Whether main.py was killed after so long; else it had ended by itself."""
    none, variables = subprocess.DEVNULL, {**installation.variables_of(), **ONE_THREAD}
    process = subprocess.Popen(
        command, cwd=checkout, env=variables, stdin=none, stdout=none, stderr=none, start_new_session=True
    )
    try:
        assert process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and the processes that load images
        process.wait()
        return True
    return False


def kill_again_and_again(checkout: Path, folder: Path, method: str, kills: int) -> None:
    python, rng = installation.wheel_python(), random.Random(0)
    started = time.monotonic()
    installation.run(python, *arguments(method, "alone", folder / "cache"), cwd=checkout, **ONE_THREAD)
    whole = time.monotonic() - started
    expected = (results(checkout, method, mark="alone") / "ood.csv").read_bytes()
    for number in range(0, kills, A_ROUND):
        mark, cache, count = f"kills{number}", folder / f"cache{number}", 0
        while count < min(A_ROUND, kills - number):
            moment = rng.uniform(0.3, 1.0) * whole  # before, it imports
            if killed([python, *arguments(method, mark, cache)], checkout, moment):
                count += 1
            else:
                whole = max(0.9 * moment, 1.0)
        installation.run(python, *arguments(method, mark, cache), cwd=checkout, **ONE_THREAD)
        assert (results(checkout, method, mark=mark) / "ood.csv").read_bytes() == expected, (
            f"after {number + count} kills"
        )


@pytest.mark.slow
def test_a_few_kills(checkout: Path, tmp_path: Path) -> None:
    kill_again_and_again(checkout, tmp_path, METHODS[0], 2)


@pytest.mark.long
@pytest.mark.parametrize(("method", "kills"), [(METHODS[0], KILLS), (METHODS[1], KILLS // 5)], ids=METHODS)
def test_many_kills(method: str, kills: int, checkout: Path, tmp_path: Path) -> None:
    kill_again_and_again(checkout, tmp_path, method, kills)
