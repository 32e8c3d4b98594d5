"""Options of the commands become settings; a mistake in them is one line."""

from __future__ import annotations
