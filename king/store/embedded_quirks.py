"""Work-arounds for nx-27017, the embedded server that speaks MongoDB's protocol on SQLite.

Everything that is written or asked in a certain way only for its sake is here; each form is correct
for MongoDB too. Known faults of version 0.8.1, and what the code does about them:

    ``$or`` next to other keys of an update's filter changes other documents -> `all_of`
    a projection drops paths through lists, and names parts with dots       -> `whole_fields`
    ``$set`` of a date at the top level of a document stores text           -> jobs keep their times
        as numbers of seconds, which both servers compare and sort alike
    ``_id`` is sorted as text, and ``$type: objectId`` finds nothing        -> `is_embedded`
    ``find_one_and_update``, ``$not``, update pipelines and ``$nor`` on
        absent fields are wrong                                             -> not used
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pymongo import MongoClient


def all_of(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a filter that holds where every condition holds, one of them perhaps an ``$or``."""
    return {"$and": [dict(condition) for condition in conditions]}


def whole_fields(paths: Iterable[str]) -> dict[str, int]:
    """Return a projection of the top-level fields that dotted paths lead into.

    MongoDB, too, refuses a projection that names both a path and a part of it.
    """
    return {path.split(".")[0]: 1 for path in paths}


def is_embedded(client: MongoClient[dict[str, Any]]) -> bool:
    """Return True for nx-27017: MongoDB states its version in parts as well."""
    return "versionArray" not in client.admin.command("buildInfo")
