"""Runs with a cache in fresh processes, and the world that they score: modules, weights, images and settings on disk.

As a script it has imported torch, and forks a process for every line of JSON that it is sent (:class:`Server`), so that
each imports the package, and the network's modules, for the first time, without torch's second and a half.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGES, BYTES = 24, 12

MODULES = {
    "world_net": """
import torch
from torch import nn
import world_helper
from world_helper import clip

SCALE = 2.0
NAMES = {"alpha", "beta", "gamma", "delta"}

class Base(nn.Module):
    power = 2

    def raised(self, x, offset=0.25):
        return x.abs() ** self.power + offset

class Net(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(12)
        self.act = lambda x: x.relu()

    def forward(self, x):
        if "alpha" in {"alpha", "omega", "psi"} and NAMES:
            x = x * SCALE
        return self.head(self.act(self.norm(self.raised(clip(x.flatten(1))))))
""",
    "world_helper": "from world_deeper import limit\nLIMIT = 3.0\ndef clip(x):\n    return x.clamp(-LIMIT, limit())\n",
    "world_deeper": "import functools\n@functools.lru_cache\ndef limit(most=3.0):\n    return most + 0.5\n",
    "world_data": """
from pathlib import Path
import torch

class Images(torch.utils.data.Dataset):
    offset = -1.0

    def __init__(self, folder):
        self.files = sorted(str(path) for path in Path(folder).iterdir())

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        import world_late
        pixels = torch.tensor(list(Path(self.files[index]).read_bytes()), dtype=torch.float32)
        return world_late.shift(pixels / 128 + self.offset), index

def collate(items):
    return torch.stack([item[0] for item in items]) * 1.0, torch.tensor([item[1] for item in items])
""",
    "world_late": "def shift(image):\n    return image + 0.125\n",
}
SETTINGS = {"temperature": 1.0, "batch size": 5, "mkldnn": True, "precision": "highest", "autocast": None, "hook": 1.0}


def write(folder: Path, modules: Mapping[str, str], weights: Mapping[str, Any], images: Mapping[str, bytes]) -> None:
    """The world at ``folder``; what is there already stays untouched where it is the same."""
    import torch

    for name, text in modules.items():
        _put(folder / "modules" / f"{name}.py", text.encode())
    for name, pixels in images.items():
        _put(folder / "images" / name, pixels)
    torch.save(dict(weights), folder / "weights.pt")


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


class Server:
    """A process that has imported torch, and forks one for each run."""

    def __init__(self, seed: str = "0") -> None:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(self, folder: Path, cache: Path, settings: Mapping[str, Any] = SETTINGS, **how: Any) -> dict[str, Any]:
        """What a fresh process finds.

        Args:
            folder: the world.
            cache: of scores.
            settings: of the run, as :data:`SETTINGS`.
            how: ``package``, the folder that this package is imported from, by default this checkout; ``first``,
                modules imported ahead of all others; ``typed``, whether the network's module is typed in
                ``__main__``, as in a notebook; ``kill``, after how many batches the process is killed.

        Returns:
            ``scores`` with the cache, in hexadecimal; ``plain``, those of a loop of its own without any; ``scored``,
            how many batches were scored. Nothing of a process that was killed.
        """
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(folder), str(cache), dict(settings), how]) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in found, found["error"]
        return found

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        read, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                found = _run(*json.loads(line))
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            os.write(write_end, json.dumps(found).encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read, "rb") as pipe:
            found = pipe.read() or b"{}"  # killed
        os.waitpid(child, 0)
        print(found.decode(), flush=True)


def _run(folder: str, cache: str, settings: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """In the forked process."""
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "openood_sandi"]:
        del sys.modules[name]  # an installed one's start-up file has imported it
    sys.path[:0] = [f"{folder}/modules", how.get("package", str(ROOT))]
    for name in how.get("first", ()):
        importlib.import_module(name)
    net, data, collate = _made(folder, how.get("typed", False))
    _set(settings)

    from torch.utils.data import DataLoader

    from openood_sandi.runs import keys
    from openood_sandi.runs.cache import ScoreCache
    from openood_sandi.runs.score import score_dataset

    scored = 0

    @torch.no_grad()
    def score(x: Any) -> Any:
        nonlocal scored
        logits = net(x)
        scored += 1
        if scored == how.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return logits.argmax(1), (-torch.logsumexp(logits.float() / settings["temperature"], 1))

    loader = DataLoader(data, settings["batch size"], collate_fn=collate)
    key = keys.score_key("fuzz", {"temperature": settings["temperature"]}, net, data)
    with torch.autocast("cpu", getattr(torch, settings["autocast"] or "bfloat16"), settings["autocast"] is not None):
        kept = ScoreCache(cache, seconds=0.0)
        # without the canary, which would hide that a key is too short
        scores = score_dataset(score, loader, "cpu", key=key, cache=kept, canary=False, progress=False)[1]
        count = scored
        plain = torch.cat([score(images)[1] for images, _ in loader])
    return {"scores": scores.tobytes().hex(), "plain": plain.numpy().tobytes().hex(), "scored": count}


def _made(folder: str, typed: bool) -> tuple[Any, Any, Any]:
    """The network, the images and how they are joined."""
    import torch

    net_module: Any
    if typed:
        net_module = types.ModuleType("__main__")
        sys.modules["__main__"] = net_module
        text = Path(folder, "modules/world_net.py").read_text()
        exec(compile(text, f"<cell {os.getpid()}>", "exec"), vars(net_module))
    else:
        net_module = importlib.import_module("world_net")
    data = importlib.import_module("world_data")
    net = net_module.Net().eval()
    net.load_state_dict(torch.load(Path(folder, "weights.pt"), weights_only=True))
    return net, data.Images(f"{folder}/images"), data.collate


def _set(settings: dict[str, Any]) -> None:
    import torch

    torch.backends.mkldnn.enabled = settings["mkldnn"]
    torch.set_float32_matmul_precision(settings["precision"])
    if settings["hook"] != 1.0:
        factor = settings["hook"]
        torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: output * factor if isinstance(module, torch.nn.Linear) else output
        )


if __name__ == "__main__":
    _serve()
