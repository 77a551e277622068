"""What an unknown key may have been meant for: a key of another framework, or one that is spelt alike. No
torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from launch.cli.synonyms import SYNONYMS, explain

ALIKE = 0.6
"""similarity, as difflib measures it, from which a whole key is suggested"""
ALIKE_LAST = 0.75
"""the same for the last part of a key, and for a key of another framework"""


def suggest(name: str, value: str, known: Collection[str]) -> str:
    """What to give instead of the unknown key `name`; "" if nothing is like it."""
    if group := [key for key in known if key.startswith(f"{name}.")]:
        return f"it is a group: {', '.join(group)}"
    near = nearest(name, known)
    theirs = nearest_synonym(name, value, known)
    if theirs and similarity(name, [theirs]) > similarity(name, near):
        return f"did you mean {theirs}? {explain(theirs, value, known)}"
    if last_part(name) in SYNONYMS:  # what is spelt alike would be something else
        return "nothing here is like it; `--help` lists the keys"
    return f"did you mean {' or '.join(near)}?" if near else ""


def nearest(name: str, known: Collection[str]) -> list[str]:
    """The keys spelt like `name`, as a whole or in their last part (`lr` for optim.lr); at most three."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=ALIKE)
    parts = {last_part(key) for key in known}
    for part in difflib.get_close_matches(last_part(name), parts, n=3, cutoff=ALIKE_LAST):
        near += [key for key in known if last_part(key) == part and key not in near]
    return near[:3]


def nearest_synonym(name: str, value: str, known: Collection[str]) -> str:
    """The key of another framework that is spelt like `name` and has an answer here; "" if there is none."""
    near = difflib.get_close_matches(last_part(name), SYNONYMS, n=3, cutoff=ALIKE_LAST)
    return next((theirs for theirs in near if explain(theirs, value, known)), "")


def similarity(name: str, keys: Iterable[str]) -> float:
    """How much the most similar of `keys` is like `name`, in whole or in its last part; from 0 to 1."""
    pairs = [(name, key) for key in keys] + [(last_part(name), last_part(key)) for key in keys]
    return max((difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs), default=0.0)


def last_part(name: str) -> str:
    """`lr` of `optim.lr`."""
    return name.rpartition(".")[2]
