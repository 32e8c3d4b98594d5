"""The page of commands: their ``--help``, taken from their parsers."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

from parsers import ROOT, insighttag, script_parser, subcommands
from tables import table

# The owner's scripts, in the order in which a user meets them.
SCRIPTS = (
    "online_process.py",
    "flask_server.py",
    "train_net.py",
    "infer_net.py",
    "scripts/data_scripts/pull_posts.py",
    "scripts/data_scripts/download_mp.py",
    "scripts/data_scripts/analyze_posts.py",
    "scripts/build_label_map.py",
    "scripts/extract_text_features.py",
    "scripts/extract_image_features.py",
    "scripts/extract_audio_features.py",
    "scripts/extract_video_features.py",
    "scripts/build_trainval_data.py",
    "scripts/out_of_fold_features.py",
    "scripts/mongo_supervisor/check.py",
    "scripts/data_scripts/make_demo_posts.py",
    "scripts/data_scripts/make_openclipart_posts.py",
)
# The first is `insighttag` itself, the others are for those who change the code.
_LEFT_OUT = frozenset({"cli.py", "write_schemas.py", "build_wheel.py"})
_TARGET = re.compile(r"^([a-z_-]+):.*?## (.+)$", re.MULTILINE)
_EXAMPLE = re.compile(r"^\s*(insighttag|python|make) \S")


def page() -> str:
    """Return the page in Markdown."""
    parts = [
        "# Commands",
        "Generated from the commands' `--help` when this site was built. Exit codes: "
        "0 done, 2 your input or configuration is wrong (one line names the key or file), 1 "
        "anything else.",
        "## make",
        table(("target", "meaning"), [(f"`make {name}`", text) for name, text in make_targets()]),
    ]
    for name, command in subcommands(insighttag()):
        parts += _command(f"insighttag {name}".strip(), command, "##" if " " not in name else "###")
    for script in SCRIPTS:
        parser, _ = script_parser(script)
        parts += _command(f"python {script}", parser, "##")
    return "\n\n".join(parts) + "\n"


def make_targets() -> list[tuple[str, str]]:
    """Return the targets that the Makefile has a line of help for."""
    return _TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8"))


def owner_scripts() -> set[str]:
    """Return the scripts that people start, by their paths in the repository."""
    folders = (
        ROOT,
        *(ROOT / "scripts" / each for each in ("", "data_scripts", "mongo_supervisor")),
    )
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8") and path.name not in _LEFT_OUT
    }


def _command(name: str, command: Any, heading: str) -> Iterator[str]:
    yield f"{heading} {name}"
    context = command.make_context(name, [], resilient_parsing=True)
    yield f"```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield from _paragraphs(command.help or "")
    if command.epilog:
        yield "```text\n" + "\n".join(map(str.strip, command.epilog.splitlines())) + "\n```"
    records = [each.get_help_record(context) for each in command.params]
    rows = [(f"`{_plain(record[0])}`", _text(_plain(record[1]))) for record in records if record]
    if rows:
        yield table(("option", "meaning"), rows)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text, command lines as code."""
    for block in re.split(r"\n\s*\n", text.replace("\b", "").strip()):
        if _EXAMPLE.match(block):
            lines = [line.strip() for line in block.strip().splitlines()]
            yield "```text\n" + "\n".join(lines) + "\n```"
        else:
            yield _text(" ".join(block.split()))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """Return words as Markdown that shows them as they are."""
    if "`" in text:
        return text
    shown = html.escape(text, quote=False)
    return re.sub(r"([\\*_\[\]#])", r"\\\1", shown)
