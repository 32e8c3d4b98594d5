"""Shell commands out of Markdown: those of fenced blocks whole, those inside a sentence by name."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [
        *(path for path in (ROOT / "docs").glob("*.md") if path.name != "plan.md"),
        *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
    ]
)
PROGRAMS = ("insighttag", "python", "make")
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^ *```", re.M | re.S)
GIVEN = re.compile(r'^```python title="([\w.]+)"', re.M)
_INLINE = re.compile(r"(?<!`)`((?:insighttag|python|make) [^`\n]+)`(?!`)")
_VARIABLE = re.compile(r"[A-Z_]+=")
# What tells a synopsis from a command that can be typed: options in brackets, alternatives.
_SYNOPSIS = re.compile(r"\[|…|\S\|\S| \| -")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        words: As a shell would split it; in a synopsis without brackets.
        synopsis: It names options and alternatives, and cannot be typed as it is.
    """

    where: str
    words: tuple[str, ...]
    synopsis: bool = False


def blocks(page: Path, *kinds: str) -> Iterator[tuple[int, str]]:
    """Yield the fenced blocks of some kinds, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        if block["kind"] in kinds:
            yield text.count("\n", 0, block.start()) + 2, block["text"]


def commands(page: Path) -> Iterator[Command]:
    """Yield every command of our programs on a page; not of scripts that the page itself gives."""
    scripts = set(GIVEN.findall(page.read_text(encoding="utf-8")))
    for each in _all_commands(page):
        if not scripts & set(each.words):
            yield each


def _all_commands(page: Path) -> Iterator[Command]:
    for first, text in [*blocks(page, "", "bash", "sh"), *blocks(page, "console")]:
        for number, line in _lines(text, console=(first, text) in set(blocks(page, "console"))):
            yield from _parsed(line, f"{page.name}:{first + number}")
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for line in _INLINE.findall(prose):
        for each in _parsed(line.replace("\\|", "|"), page.name):
            yield Command(each.where, each.words, synopsis=True)


def _lines(text: str, *, console: bool) -> Iterator[tuple[int, str]]:
    """Yield the commands of a block with continuation lines joined; of a console, what is typed."""
    typed, start = "", 0
    for number, line in enumerate(text.splitlines()):
        if not typed and console and not line.startswith("$ "):
            continue
        start = start if typed else number
        typed += line.removeprefix("$ ")
        if typed.endswith("\\"):
            typed = typed[:-1]
            continue
        yield start, typed
        typed = ""


def _parsed(line: str, where: str) -> Iterator[Command]:
    synopsis = _SYNOPSIS.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", line)) is not None
    for each in _alternatives(line) if synopsis else [line]:
        for split in _split(each):
            words = list(dropwhile(_VARIABLE.match, split))
            if words and words[0] in PROGRAMS:
                yield Command(where, tuple(words), synopsis)


def _alternatives(line: str) -> Iterator[str]:
    """Yield the lines that a synopsis stands for: of ``a|b`` both, brackets and ellipses gone."""
    line = line.partition(" #")[0]
    whole = re.split(r" \| (?=-)", re.sub(r"[\[\]…]", " ", line))
    base = " ".join(whole[0].split()[:2])
    for each in [whole[0], *(f"{base} {more}" for more in whole[1:])]:
        options = next((word for word in each.split() if "|" in word), None)
        for one in options.split("|") if options else [""]:
            yield each.replace(options, one) if options else each


def _split(line: str) -> list[list[str]]:
    """Return the words of each command of a line: behind pipes, ``&&`` and so on a new one."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word in ("|", "||", "&&", "&", ";"):
            parts.append([])
        elif word in (">", ">>", "2>", "<"):
            parts.append(["(file)"])
        else:
            parts[-1].append(word)
    return parts
