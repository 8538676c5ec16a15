"""What ranks do in the tests, as processes forked from the tests or started by ``torchrun``:
``python -m torch.distributed.run --standalone --nproc_per_node N tests/helpers/rank_cases.py OUT MODE``.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from openood_sandi import SandI
from openood_sandi.runs import ranks
from tests.helpers import loaders as runs
from tests.helpers.loaders import Linear, run


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(runs.images())


def shuffled() -> DataLoader[Any]:
    """In an order that follows from the global generator, as of a script that has set its seed."""
    torch.manual_seed(3 + ranks.rank())  # only rank 0's counts
    return runs.loader(shuffle=True)


def dictionaries() -> list[dict[str, Tensor]]:
    return [{"data": images, "label": label} for images, label in runs.loader()]


LOADERS: dict[str, Callable[[], Any]] = {
    "uneven": runs.loader,
    "workers": lambda: runs.loader(num_workers=1),
    "one batch": lambda: runs.loader(batch_size=64),
    "two batches": lambda: runs.loader(batch_size=20),
    "one image": lambda: runs.loader(runs.images(1)),
    "shuffled": shuffled,
    "listed": lambda: DataLoader(runs.images(), batch_sampler=[[5, 1], [0], [2, 4, 3, 9], [8]]),
    "stream": lambda: DataLoader(Stream(), batch_size=runs.BATCH),
    "dictionaries": dictionaries,
}


def results() -> dict[str, Any]:
    """{case: (pred, score, label)} of S&I."""
    return {name: run(SandI(runs.network()), data=loader()) for name, loader in LOADERS.items()}


def share(out: Path) -> None:
    """All results, of every rank."""
    ranks.join()
    try:
        run(Linear(), data=runs.loader(sampler=DistributedSampler(runs.images())))
    except ValueError as error:
        assert "give all ranks the loader that one process would have" in str(error)
    else:
        raise AssertionError("a DistributedSampler was not refused")
    for differing, options in (
        ("weights", {"key": {"weights": ranks.rank()}}),
        ("order", {"data": runs.loader(batch_size=5 + ranks.rank())}),
        ("number of batches", {"data": dictionaries()[ranks.rank() :]}),
    ):
        try:
            run(Linear(), **options)
        except RuntimeError as error:
            assert f"share one task, but differ in {differing}; give" in str(error), error
        else:
            raise AssertionError(f"ranks that differ in {differing} were not refused")
    score = Linear()
    run(score)
    mine = list(range(10))[ranks.rank() :: ranks.world_size()]
    assert score.batches() == ([] if mine[0] == 0 else [0]) + mine
    flat = {f"{name}/{column}": array for name, found in results().items() for column, array in enumerate(found)}
    np.savez(out / f"{ranks.rank()}.npz", **flat)


def resume(out: Path) -> None:
    """With a cache; tells which batches were scored."""
    score = Linear()
    found = run(score, out / "cache")
    np.savez(out / f"{ranks.rank()}.npz", *found, batches=score.batches())


def fail(out: Path) -> None:
    """With a cache; rank 1 raises at its third batch."""
    score = Linear()

    def failing(x: Tensor) -> tuple[Tensor, Tensor]:
        if ranks.rank() == 1 and len(score.seen) == 3:
            raise ArithmeticError("this image cannot be scored")
        return score(x)

    run(failing, out / "cache")


def go_on(out: Path) -> None:
    """Rank 0 takes an error of its own for nothing and goes on to the next set."""

    def failing(x: Tensor) -> tuple[Tensor, Tensor]:
        if ranks.rank() == 0:
            raise ArithmeticError
        return Linear()(x)

    with contextlib.suppress(ArithmeticError):
        run(failing)
    run(Linear())


def die(out: Path) -> None:
    """Rank 1 is killed while rank 0 waits for it."""

    def deadly(x: Tensor) -> tuple[Tensor, Tensor]:
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Linear()(x)

    run(deadly)


def hang(out: Path) -> None:
    """Rank 1 never comes."""
    ranks.PATIENCE = timedelta(seconds=2)
    ranks.join()
    if ranks.rank() == 1:
        time.sleep(6)
    run(Linear())


def exchange(out: Path) -> None:
    """Tells how often Python has met a new thread while ranks exchanged values: their own main threads do that."""
    ranks.join()
    before = met()
    for number in range(20):
        ranks.gather("number", number)
    (out / f"{ranks.rank()}.txt").write_text(str(met() - before - 1))


def met() -> int:
    """How many threads Python has met so far, with one more for this question."""
    api, number = ctypes.pythonapi, []
    api.PyThreadState_Get.restype, api.PyThreadState_GetID.restype = ctypes.c_void_p, ctypes.c_uint64
    api.PyThreadState_GetID.argtypes = [ctypes.c_void_p]
    thread = threading.Thread(target=lambda: number.append(api.PyThreadState_GetID(api.PyThreadState_Get())))
    thread.start()
    thread.join()
    return int(number[0])


def forked(ranks: int, case: Callable[[Path], None], out: Path) -> list[tuple[int | None, str]]:
    """Run a case on so many ranks, without ``torchrun``, which takes seconds: exit code and error of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            case(out)
        except BaseException:
            (out / f"{rank}.log").write_text(traceback.format_exc())
            raise

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():  # a hang: no exit code
            process.kill()
    logs = [out / f"{rank}.log" for rank in range(ranks)]
    return [
        (process.exitcode, log.read_text() if log.exists() else "")
        for process, log in zip(processes, logs, strict=True)
    ]


if __name__ == "__main__":
    {"share": share, "fail": fail}[sys.argv[2]](Path(sys.argv[1]))
