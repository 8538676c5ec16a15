"""A page in headless Chromium, for what only a browser can say of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "Chromium is missing; a system's package supplies it, chromium in Debian"


def visit(page: Path, script: str, folder: Path, *options: str) -> tuple[Any, list[str]]:
    """What ``script``, the body of a function run once the page is there, returns, and the lines of the console.

    The page is read from a copy, in ``folder``, that ends with the script.
    """
    assert CHROMIUM, MISSING
    report = "document.body.append(Object.assign(document.createElement('pre'), {id: 'told', textContent: told}));"
    tail = f"<script>{{const told = JSON.stringify((() => {{{script}}})()); {report}}}</script>"
    copy = folder / "visited.html"
    copy.write_text(page.read_text(encoding="utf-8") + tail, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    # no name resolves: a page that wants the network has an error on its console
    command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, *options, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    return json.loads(html.unescape(told[1])) if told else None, console
