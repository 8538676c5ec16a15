"""What SECURITY.md promises of the code: nothing is unpickled, evaluated or fetched."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.places import ROOT

FILES = sorted([*ROOT.glob("openood_sandi/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
CALLS = [(file, call) for file in FILES for call in ast.walk(ast.parse(file.read_text())) if isinstance(call, ast.Call)]

#: Modules that open connections, or run what a file says.
REFUSED_MODULES = {"urllib", "requests", "http", "socket", "ftplib", "shelve", "marshal", "dill", "joblib", "gdown"}
REFUSED_CALLS = {"eval", "exec", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "os.system"}
#: What a loader must be told to be safe.
SAFE_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
SAFE_WITH["numpy.load"] = SAFE_WITH["np.load"]


def found(names: set[str]) -> Iterator[str]:
    """Places that call one of ``names``."""
    for file, call in CALLS:
        if ast.unparse(call.func) in names:
            yield f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"


def test_files_are_found() -> None:
    assert len(FILES) > 30 and any("load" in ast.unparse(call.func) for _, call in CALLS)


def test_nothing_is_evaluated_or_unpickled() -> None:
    assert list(found(REFUSED_CALLS)) == []


def test_loaders_are_told_not_to_unpickle() -> None:
    for file, call in CALLS:
        argument = SAFE_WITH.get(ast.unparse(call.func))
        if argument is not None:
            given = {
                keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == argument[0]
            }
            assert given == dict([argument]), f"{file}:{call.lineno}"
    loads = [ast.unparse(call.func) for _, call in CALLS]
    assert "torch.load" in loads and "np.load" in loads, "the test looks for names that nobody uses"


def test_yml_is_loaded_safely() -> None:
    for file, call in CALLS:
        name = ast.unparse(call.func)
        assert not (name.startswith("yaml.") and "load" in name and name != "yaml.safe_load"), f"{file}:{call.lineno}"


def test_nothing_opens_connections() -> None:
    for file in FILES:
        imported: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
        assert not imported & REFUSED_MODULES, file
