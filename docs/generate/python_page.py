"""The page of the Python interface: what `insighttag` exports, by its docstrings."""

from __future__ import annotations

import insighttag

# What people call comes first, then what they get, then what is raised.
CALLED = ("Tagger", "extract", "train")


def page() -> str:
    """Return the page in Markdown, with a directive of mkdocstrings for each name."""
    errors = [name for name in insighttag.__all__ if _is_error(name)]
    others = [name for name in insighttag.__all__ if name not in {*errors, *CALLED}]
    parts = [
        "# Python interface",
        "Generated from the docstrings of `insighttag` when this site was built. "
        "[python.md](python.md) shows how to use it.",
        *(f"::: insighttag.{name}" for name in (*CALLED, *others)),
        "## Errors",
        *(f"::: insighttag.{name}\n    options: {{heading_level: 3}}" for name in errors),
    ]
    return "\n\n".join(parts) + "\n"


def _is_error(name: str) -> bool:
    value = getattr(insighttag, name)
    return isinstance(value, type) and issubclass(value, Exception)
