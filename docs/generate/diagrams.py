"""Draw the diagrams of the pages, which mermaid would otherwise draw in each reader's browser.

    npm pack mermaid && tar xzf mermaid-*.tgz
    python docs/generate/diagrams.py package/dist/mermaid.min.js

The library has 3.5 MB and the site loads nothing from elsewhere, so the pictures are kept in
docs/assets/diagrams. Their names hold a digest of the source: a build fails where one has changed.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from docs_site import DIAGRAMS, MERMAID, ROOT, diagram_name

_PAGE = """<!doctype html>
<meta charset="utf-8">
<pre id="d">{source}</pre>
<script src="{library}"></script>
<script>
mermaid.initialize({{startOnLoad: false, theme: "neutral", deterministicIds: true,
  htmlLabels: false, flowchart: {{htmlLabels: false}}, fontFamily: "system-ui, sans-serif"}});
mermaid.run({{querySelector: "#d"}})
</script>"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("library", type=Path, help="mermaid.min.js")
    library = parser.parse_args().library.resolve()
    folder = ROOT / "docs" / DIAGRAMS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for page in sorted((ROOT / "docs").glob("*.md")):
        for source in MERMAID.findall(page.read_text(encoding="utf-8")):
            (folder / diagram_name(source)).write_text(_draw(source, library), encoding="utf-8")
            print(f"{page.name}: {folder / diagram_name(source)}")


def _draw(source: str, library: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        text = _PAGE.format(source=html.escape(source), library=library.as_uri())
        page.write_text(text, encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--virtual-time-budget=20000"]
        command += ["--dump-dom", page.as_uri()]
        dom = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120
        ).stdout
    drawn = re.search(r"<svg.*</svg>", dom, re.DOTALL)
    if drawn is None:
        raise SystemExit(f"mermaid draws nothing of: {source[:80]}")
    return f"{drawn[0].replace('<br>', '<br/>')}\n"


if __name__ == "__main__":
    main()
