"""Which name of a model is which name in a file of weights, whatever wrapped the model that was saved.

Several matchings are tried: the names as they are; without what wrappers (DDP, torch.compile, ...) put into
them; without a prefix on one of the two sides. The best is the one with the most tensors of equal shape.
Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""what DDP, DataParallel, torch.compile, FSDP, activation checkpointing and Lightning put into names"""
MAX_PREFIXES = 4
"""prefixes that are tried: those without which most names agree"""

Shape = tuple[int, ...]


class Matching(NamedTuple):
    """Which tensor of the file belongs to which of the model."""

    pairs: dict[str, str]
    """name in the model -> name in the file"""
    prefix: str = ""
    """which prefix was removed where, for messages; empty if none was"""


def match_names(sources: Mapping[str, Shape], targets: Mapping[str, Shape]) -> tuple[Matching, str]:
    """The best matching of the names of a file (`sources`) with those of a model (`targets`).

    Returned with it: the prefix of a second matching that is just as good, empty if there is none.
    """

    def score(matching: Matching) -> tuple[int, int]:
        same_shape = sum(sources[source] == targets[target] for target, source in matching.pairs.items())
        return same_shape, len(matching.pairs)

    matchings = list(candidate_matchings(sources, targets))
    best = max(matchings, key=score)  # the first of equals
    if not best.prefix:
        return best, ""
    for other in matchings:
        if other.prefix != best.prefix and other.pairs != best.pairs and score(other) == score(best):
            return best, other.prefix
    return best, ""


def candidate_matchings(sources: Iterable[str], targets: Iterable[str]) -> Iterator[Matching]:
    """The matchings that are tried, the simplest first."""
    for clean in (unchanged, without_wrappers):
        yield Matching(pair_by_key(index_by_key(sources, clean), index_by_key(targets, clean)))
    for clean in (unchanged, without_wrappers):
        by_source, by_target = index_by_key(sources, clean), index_by_key(targets, clean)
        for prefix in likely_prefixes(by_source, by_target):
            shorter = index_by_key(sources, clean, prefix)
            yield Matching(pair_by_key(shorter, by_target), f"its names without {prefix!r}")
        for prefix in likely_prefixes(by_target, by_source):
            shorter = index_by_key(targets, clean, prefix)
            yield Matching(pair_by_key(by_source, shorter), f"its names put under {prefix!r}")


def unchanged(name: str) -> str:
    """The name as it is."""
    return name


def without_wrappers(name: str) -> str:
    """A name without what wrappers put into it."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS) or name


def index_by_key(names: Iterable[str], clean: Callable[[str], str], prefix: str = "") -> dict[str, str]:
    """Names by their key: what is left of them after `clean` and without `prefix`.

    Where a name with the prefix and one without have the same key, the former counts. A key that two names
    share otherwise is ambiguous, and left out.
    """
    with_prefix: dict[str, list[str]] = {}
    without_prefix: dict[str, list[str]] = {}
    for name in names:
        cleaned = clean(name)
        group = with_prefix if cleaned.startswith(prefix) else without_prefix
        group.setdefault(cleaned.removeprefix(prefix), []).append(name)
    by_key = without_prefix | with_prefix
    return {key: same_key[0] for key, same_key in by_key.items() if len(same_key) == 1}


def pair_by_key(sources: Mapping[str, str], targets: Mapping[str, str]) -> dict[str, str]:
    """The pairs (target name -> source name) of two indices that have the same key."""
    return {name: sources[key] for key, name in targets.items() if key in sources}


def likely_prefixes(longer: Iterable[str], shorter: Mapping[str, str]) -> list[str]:
    """The beginnings (`model.`, `net.body.`) without which most of the longer names are shorter ones."""
    votes = Counter(
        name[: dot.end()]
        for name in longer
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in shorter
    )
    return [prefix for prefix, _ in votes.most_common(MAX_PREFIXES)]
