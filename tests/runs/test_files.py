"""A file is replaced in whole or not at all, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from openood_sandi.runs import files


def test_bytes_texts_and_functions(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/x.json"
    for content, expected in ((b"\xff", b"\xff"), ("µ", "µ".encode()), (lambda aside: aside.write_text("a"), b"a")):
        files.replace(path, content)
        assert path.read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("earlier")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        assert path.read_text() == "earlier" and aside.parent == tmp_path
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, fail)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda number: done.append("on disk"))
    own = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: done.append("named") or own(self, target))
    files.replace(tmp_path / "x", "text")
    assert done == ["on disk", "named"]
