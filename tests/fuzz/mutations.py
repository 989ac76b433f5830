"""Changes of a file: of bytes, and of JSON values with the checksums made right again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.fuzz.victim import TRAP

# what a value may become
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 29, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30),
    *(0.5, -1.5, 1e308, 1e-320, "", "x", "T", "B", "S", "\ud800", "a" * 5000, "../../etc/passwd"),
    *("/etc/passwd", "/dev/zero", TRAP, "tint.eval", "builtins.eval", [], {}, [[]], {"node": "x"}),
    *({"repr": TRAP}, {"node": None}, [1] * 1000, "softmax", "exact", "int", "bool", "float"),
)
Place = tuple[Any, Any]  # a dict or list, and a key or an index of it


def flip(file: Path, numbers: random.Random) -> None:
    """One bit of up to three bytes."""
    data = bytearray(file.read_bytes())
    for _ in range(numbers.randint(1, 3)):
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    file.write_bytes(data)


def mutate(file: Path, numbers: random.Random) -> None:
    """One to three changes of the structure of a JSON file."""
    value = json.loads(file.read_text(encoding="utf-8"))
    for _ in range(numbers.randint(1, 3)):
        places = list(_places(value))
        if places:
            _change(*numbers.choice(places), places, numbers)
    text = json.dumps(value)
    if numbers.random() < 0.02:  # deeper than any reader that recurses
        text = text.replace("[]", "[" * 50_000 + "]" * 50_000, 1)
    file.write_text(text, encoding="utf-8")


def _places(value: Any) -> list[Place]:
    found: list[Place] = []
    stack = [value]
    while stack:
        inner = stack.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        found += [(inner, key) for key in keys]
        stack += [inner[key] for key in keys if isinstance(inner[key], (dict, list))]
    return found


def _change(inner: Any, key: Any, places: list[Place], numbers: random.Random) -> None:
    if (isinstance(inner, list) and key >= len(inner)) or (
        isinstance(inner, dict) and key not in inner
    ):
        return  # an earlier change took it
    how = numbers.randrange(6)
    if how == 0:
        inner[key] = numbers.choice(HOSTILE)
    elif how == 1:
        del inner[key]
    elif how == 2:  # a value of the same type from elsewhere, which gets far
        alike = [
            other[k]
            for other, k in places
            if _there(other, k) and type(other[k]) is type(inner[key])
        ]
        inner[key] = json.loads(json.dumps(numbers.choice(alike)))
    elif how == 3 and type(inner[key]) is int:
        inner[key] += numbers.choice((-1, 1, 2, -inner[key], inner[key]))
    elif how == 4 and isinstance(inner, list):
        inner.insert(numbers.randint(0, len(inner)), json.loads(json.dumps(inner[key])))
    elif how == 5 and isinstance(inner, dict):
        inner[numbers.choice(("x", "", TRAP, "0", "node", "__class__"))] = inner.pop(key)
    else:
        inner[key] = [inner[key]]


def _there(inner: Any, key: Any) -> bool:
    return key < len(inner) if isinstance(inner, list) else key in inner
