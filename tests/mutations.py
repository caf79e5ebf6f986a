"""Damaged and foreign versions of a good input, drawn from a `random.Random`."""

import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, -1, 1, 2, 255, 65536, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"))
STRINGS = ("", "x", "../secret", "/etc/passwd", "<script>", "\0", "\ud800", "a\nb", "é", "x" * 5000)
ODD = (None, True, [], {}, [None], {"": None}, [[]], *NUMBERS, *STRINGS)


def bend_bytes(data: bytes, rng: random.Random, tokens: Sequence[bytes] = ()) -> bytes:
    """`data` with one to four changes: bits flipped, bytes replaced, spans removed, repeated,
    zeroed or moved, one of `tokens` inserted, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(changed)
        # headers are where it hurts, so every other change is near the beginning
        place = rng.randrange(min(size, 256) if rng.random() < 0.5 else size) if size else 0
        span = min(rng.choice((1, 2, 4, 16, 64, 512)), size - place)
        kind = rng.randrange(9)
        if kind == 0 and size:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            changed[place] = rng.randrange(256)
        elif kind == 2:
            changed[place : place + span] = rng.randbytes(span)
        elif kind == 3:
            del changed[place : place + span]
        elif kind == 4:
            changed[place:place] = changed[place : place + span] * rng.choice((1, 2, 50))
        elif kind == 5:
            changed[place : place + span] = bytes(span)
        elif kind == 6:
            moved = changed[place : place + span]
            del changed[place : place + span]
            place = rng.randrange(len(changed) + 1)
            changed[place:place] = moved
        elif kind == 7 and tokens:
            changed[place:place] = rng.choice(tokens)
        else:
            del changed[rng.randrange(size + 1) :]
    return bytes(changed)


def bend_value(value: Any, rng: random.Random) -> Any:
    """A nested value in which one place is another: replaced, removed, or with something added."""
    if isinstance(value, dict | list | tuple) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        changed = dict(value) if isinstance(value, dict) else list(value)
        key, kind = rng.choice(keys), rng.random()
        if kind < 0.15:
            del changed[key]
        elif kind < 0.2 and isinstance(changed, dict):
            changed[rng.choice(STRINGS)] = rng.choice(ODD)
        elif kind < 0.2:
            changed.insert(key, rng.choice(ODD))
        else:
            changed[key] = bend_value(changed[key], rng)
        return changed
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(NUMBERS)
    return rng.choice(ODD)


def bend_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with one value that is another, or, of three times one, damaged bytes."""
    if rng.random() < 1 / 3:
        return bend_bytes(data, rng, (b"{", b"]", b"null", b"NaN", b"1e999", b"\xff", b"[" * 3000))
    return json.dumps(bend_value(json.loads(data), rng)).encode()


def bend_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON lines in which one line is bent, missing, there twice or cut off."""
    lines = data.splitlines()
    place, kind = rng.randrange(len(lines)), rng.random()
    if kind < 0.7:
        lines[place] = bend_json(lines[place], rng)
    elif kind < 0.8:
        del lines[place]
    elif kind < 0.9:
        lines.insert(place, rng.choice(lines))
    else:
        return bend_bytes(data, rng)
    return b"\n".join(lines) + b"\n"


def bend_words(words: Sequence[str], rng: random.Random) -> list[str]:
    """A command line with words replaced, removed, repeated, exchanged or added."""
    changed = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, kind = rng.randrange(len(changed) + 1), rng.randrange(5)
        new = str(rng.choice((*NUMBERS, *STRINGS[:-1], "--", "-", "nan", "inf", "--out", "-1e-3")))
        if kind == 0:
            changed.insert(place, new)
        elif kind == 1:
            changed[place : place + 1] = [new]
        elif kind == 2:
            del changed[place : place + 1]
        elif kind == 3:
            changed[place:place] = changed[place - 1 : place]
        elif place < len(changed) and changed[place]:
            changed[place] = bend_bytes(changed[place].encode("utf-8", "replace"), rng).decode(
                "utf-8", "surrogateescape"
            )
    return changed
