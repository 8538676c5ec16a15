"""Extension of Griffe: what docstrings write as Sphinx reads it, becomes Markdown and links of the API reference.

``:class:`~a.b.C``` links to C where the reference has it and is plain code where it has not (private names, other
packages). That every one names something that exists is the business of ``tests/test_documents.py``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: :class:`name` and its kin
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?(\.?[\w.]+)`")
#: `text <address>`_
LINK = re.compile(r"`([^`<]+) <(https?://[^>]+)>`_")
#: The two colons before an indented block of code.
LITERAL = re.compile("::$", re.M)


class DocstringRoles(griffe.Extension):
    """Rewrites every docstring of a package, once Griffe has read all of it."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring:
        text = LINK.sub(r"[\1](\2)", obj.docstring.value)
        text = LITERAL.sub(":", text)
        obj.docstring.value = ROLE.sub(lambda role: _link(role[1], obj), text)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):  # and no alias, which another object stands behind
            _rewrite(member)


def _link(name: str, obj: griffe.Object) -> str:
    module = obj if obj.is_module else obj.module
    if name.startswith("."):
        target = module.path.rpartition(".")[0] + name
    else:
        scopes = [scope for scope in (obj, obj.parent, module) if scope is not None and name in scope.members]
        target = f"{scopes[0].path}.{name}" if scopes else name
    return f'<autoref optional identifier="{target}"><code>{name.lstrip(".")}</code></autoref>'
