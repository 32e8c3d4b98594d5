"""Hooks of mkdocs: pages generated from the code, and links to files outside docs/.

The pages of commands, settings and the HTTP interface are generated when the site is built, so
that they always match the code. README, CHANGELOG and others from the root become pages too, and
files that pages link to, such as the alert rules, are copied next to them.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import commands_page
import http_page
import python_page
import settings_page
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from tables import CODE

ROOT = Path(__file__).resolve().parents[2]
# Files of the root, and the pages that they become.
ROOT_PAGES = MappingProxyType(
    {
        "README.md": "index.md",
        "README.zh-CN.md": "index.zh-CN.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
        "SECURITY.md": "security-policy.md",
    }
)
GENERATED = MappingProxyType(
    {
        "commands.md": commands_page.page,
        "settings.md": settings_page.page,
        "training-settings.md": settings_page.training_page,
        "http-interface.md": http_page.page,
        "python-reference.md": python_page.page,
    }
)
# Of the repository, and not of the site: links to it become plain words.
LEFT_OUT = frozenset({"docs/plan.md", "LICENSE"})
DIAGRAMS = "assets/diagrams"
_CHINESE = ".zh-CN.md"
_LINK = re.compile(r"\[([^\]\n]*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files in docs/, and the files that pages link to."""
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, write in GENERATED.items():
        files.append(File.generated(config, page, content=write()))
    pages = [file for file in files.documentation_pages() if file.src_uri not in GENERATED]
    for target in sorted({target for page in pages for target in _linked_files(page)}):
        files.append(File.generated(config, f"files/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site, and diagrams into pictures."""
    here = page.file.src_uri
    if here in GENERATED:
        return markdown
    return MERMAID.sub(lambda match: _picture(match[1], here), _outside_code(markdown, here))


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """Set the language of a page, and the link to the same page in the other language."""
    name = page.file.src_uri
    chinese = name.endswith(_CHINESE)
    config.theme["language"] = "zh" if chinese else "en"
    other = name.replace(_CHINESE, ".md") if chinese else name.replace(".md", _CHINESE)
    pages = {each.file.src_uri for each in nav.pages}
    english, translated = (other, name) if chinese else (name, other)
    config.extra["alternate"] = [
        _language(english if english in pages else "index.md", "en", "English"),
        _language(translated if translated in pages else f"index{_CHINESE}", "zh-CN", "中文"),
    ]
    return context


def _language(page: str, code: str, name: str) -> dict[str, str]:
    return {"name": name, "lang": code, "link": page.removesuffix(".md") + ".html"}


def _resolved(page: str, link: str) -> str | None:
    """Return the path in the repository that a link leads to; None outside of it."""
    path = link.partition("#")[0]
    if not path or "://" in link or link.startswith(("mailto:", "/")):
        return None
    source = next((name for name, it in ROOT_PAGES.items() if it == page), f"docs/{page}")
    folder = posixpath.dirname(source)
    return posixpath.normpath(posixpath.join(folder, path))


def _linked_files(page: File) -> Iterator[str]:
    """Yield the files outside docs/ that a page links to."""
    for _, link in _LINK.findall(_FENCE.sub("", page.content_string)):
        target = _resolved(page.src_uri, link)
        if target is None or target in ROOT_PAGES or target in LEFT_OUT:
            continue
        if not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def _outside_code(markdown: str, page: str) -> str:
    """Replace the links of a page, but not those in its blocks of code."""
    parts, end = [], 0
    for block in _FENCE.finditer(markdown):
        parts += [_with_site_links(markdown[end : block.start()], page), block[0]]
        end = block.end()
    return "".join([*parts, _with_site_links(markdown[end:], page)])


def _with_site_links(text: str, page: str) -> str:
    folder = posixpath.dirname(page)

    def link(match: re.Match[str]) -> str:
        target = _resolved(page, match[2])
        if target is None:
            return match[0]
        if target in LEFT_OUT:
            return match[1]
        of_site = ROOT_PAGES.get(target) or (
            target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"
        )
        anchor = match[2].partition("#")[1:]
        return f"[{match[1]}]({posixpath.relpath(of_site, folder or '.')}{''.join(anchor)})"

    # GitHub wants bars in the code of tables escaped; here the backslash would be shown.
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), _LINK.sub(link, text))


def diagram_name(source: str) -> str:
    """Return the file of a diagram's picture, which tells from which source it was drawn."""
    return f"{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def _picture(source: str, page: str) -> str:
    path = f"{DIAGRAMS}/{diagram_name(source)}"
    if not (ROOT / "docs" / path).is_file():
        raise PluginError(f"{page}: no picture of a diagram: python docs/generate/diagrams.py")
    return f'<div class="diagram" tabindex="0"><img src="{path}" alt="Diagram"></div>\n'
