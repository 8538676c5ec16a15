"""Hook of MkDocs: the table of detectors is made from the registry, with those of other installed packages.

The same table is committed between its two comments, for readers of the repository; `tests/test_documents.py` holds
that it is current, and `python docs/hooks/detector_table.py` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openood_sandi import DetectorInfo

PLACE = re.compile(r"(<!-- detectors: .*? -->\n).*?(<!-- end -->)", re.S)
HEAD = "| name | detector | published | needs, beside the network |\n|---|---|---|---|\n"


def table(infos: Iterable[DetectorInfo]) -> str:
    """A Markdown table with a row for each detector."""
    return HEAD + "".join(map(_row, infos))


def _row(info: DetectorInfo) -> str:
    published = f"[{info.title}]({info.url}), {info.venue} {info.year or ''}".strip()
    return f"| `{info.name}` | {info.label} | {published} | {info.needs} |\n"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The page with its table of detectors, if it has one, made anew."""
    return PLACE.sub(lambda place: place[1] + _registered() + place[2], markdown)


def _registered() -> str:
    from openood_sandi.plugin import registry

    return table(registry.infos().values())


if __name__ == "__main__":
    print(_registered())
