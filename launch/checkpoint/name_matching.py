"""Which name of a model is which name in a file of weights, whatever wrapped the model that was saved.
Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""what DDP, DataParallel, torch.compile, FSDP, activation checkpointing and Lightning put into names"""
PREFIXES = 4
"""prefixes that are tried: those with which most names would agree"""

Shape = tuple[int, ...]


class Matching(NamedTuple):
    """Which name of the run is which name of the file."""

    pairs: dict[str, str]
    prefix: str = ""
    """what was removed, in words"""


def match_names(there: Mapping[str, Shape], here: Mapping[str, Shape]) -> tuple[Matching, str]:
    """The matching of names with the most tensors of equal shape, and the prefix of another that is as good,
    if there is.

    Tried are the names as they are, then without wrappers, then both with one prefix less on either side.
    """

    def worth(match: Matching) -> tuple[int, int]:
        return sum(there[source] == here[name] for name, source in match.pairs.items()), len(match.pairs)

    tried = list(matchings(there, here))
    best = max(tried, key=worth)  # the first of equals
    rivals = (
        m.prefix
        for m in tried
        if m.prefix != best.prefix and m.pairs != best.pairs and worth(m) == worth(best)
    )
    return best, next(rivals, "") if best.prefix else ""


def matchings(there: Iterable[str], here: Iterable[str]) -> Iterator[Matching]:
    """Ways to match the names `there` with those `here`. No two names of one side meet the same name of the
    other.
    """
    for clean in (str, unwrapped):
        yield Matching(pairs(keyed(there, clean), keyed(here, clean)))
    for clean in (str, unwrapped):
        for prefix in prefixes(keyed(there, clean), keyed(here, clean)):
            yield Matching(
                pairs(keyed(there, clean, prefix), keyed(here, clean)), f"its names without {prefix!r}"
            )
        for prefix in prefixes(keyed(here, clean), keyed(there, clean)):
            yield Matching(
                pairs(keyed(there, clean), keyed(here, clean, prefix)), f"its names put under {prefix!r}"
            )


def unwrapped(name: str) -> str:
    """A name without what wrappers put into it."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS) or name


def keyed(names: Iterable[str], clean: Callable[[str], str], prefix: str = "") -> dict[str, str]:
    """Names by what is left of them; those that had the prefix go before those that had not. What is left of
    two is not in it.
    """
    found: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for name in names:
        key = clean(name)
        found[key.startswith(prefix)].setdefault(key.removeprefix(prefix), []).append(name)
    return {key: same[0] for key, same in {**found[False], **found[True]}.items() if len(same) == 1}


def pairs(there: Mapping[str, str], here: Mapping[str, str]) -> dict[str, str]:
    """The names `here` that have a partner `there`, and which."""
    return {name: there[key] for key, name in here.items() if key in there}


def prefixes(longer: Iterable[str], shorter: Mapping[str, str]) -> list[str]:
    """First segments without which most of the longer names are shorter ones."""
    votes = Counter(
        name[: dot.end()]
        for name in longer
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in shorter
    )
    return [prefix for prefix, _ in votes.most_common(PREFIXES)]
