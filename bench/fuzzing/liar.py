"""A worker that was taken over: once in its life it answers with what is no answer.

The fuzzed daemon's interpreters call `lie_once` at their start (`fuzzing.site`). The King must kill
such a worker and start another; a task that it had in hand costs an attempt.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import sys

from tests.support.workers.malformed import MALFORMED
from workers.pool import channel
from workers.protocol import ArrayRef, Command, Decoded, Done, Extracted, Fetched, Part, Reply

VARIABLE = "FUZZ_LIE_AFTER"
"""Answers before the lie. Workers that load torch give eight times as many before theirs."""

_WRONG = (
    Fetched("/etc/passwd", 1),
    Fetched("", 1),
    Extracted(text="x"),
    Decoded((Part("image", ArrayRef(2**40, 0, (1, 2, 2, 3), "uint8")),)),
)
_ODD_REFS = (
    {"offset": 2**40},
    {"dtype": "no dtype"},
    {"shape": (2**40, 2**40)},
    {"shape": ()},
    {"shape": (1,)},
)
"""Of arrays in the task's own slot, where only their reader can tell."""


def _frame(body: bytes) -> bytearray:
    return bytearray(struct.pack("!Q", len(body)) + body)


def _lies(done: Done) -> list[bytearray]:
    """Return frames that are no answer to a task."""
    lies = [_frame(body) for body, _ in MALFORMED]
    lies += [bytearray(struct.pack("!Q", 2**60)), channel.encode(Done(2**40, done.result))]
    wrong = [result for result in _WRONG if type(result) is not type(done.result)]
    results = [*wrong, Fetched("/etc/passwd", 1)]
    if isinstance(done.result, Decoded) and done.result.parts:
        for odd in _ODD_REFS:
            part = done.result.parts[0]
            fields = {name: getattr(part.ref, name) for name in part.ref.__struct_fields__}
            results.append(Decoded((Part(part.kind, ArrayRef(**{**fields, **odd})),)))
    return lies + [channel.encode(Done(done.task_id, result)) for result in results]


def lie_once() -> None:
    """Replace one answer of this process by a lie, if it is a worker's."""
    if sys.orig_argv[1:3] != ["-m", "workers"]:
        return
    rng = random.Random()
    encode, answers = channel.encode, itertools.count(1)
    turn = int(os.environ[VARIABLE])

    def encode_or_lie(message: Command | Reply) -> bytearray:
        quick = "torch" not in sys.modules
        if isinstance(message, Done) and next(answers) == (turn if quick else 8 * turn):
            return rng.choice(_lies(message))
        return encode(message)

    channel.encode = encode_or_lie
