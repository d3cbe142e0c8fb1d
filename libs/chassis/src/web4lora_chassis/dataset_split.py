"""Holds rows out of training that nothing trained on resembles.

Rows whose questions are near duplicates stay on one side. They are found by MinHash: a question is the set of
its runs of five characters, and the share of runs that two questions have in common is their resemblance
(Broder, "On the resemblance and containment of documents", 1997). Of one hash for each run, the smallest in
each of 64 bins is kept (one permutation hashing: Li, Owen, Zhang, 2012); questions that agree in four
neighbouring bins are compared in full.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from web4lora_chassis.dataset_row import Row
from web4lora_chassis.errors import InvalidInput

_RUN = 5
_BINS = 64
_BAND = 4
_ALIKE = 0.7
"""Questions with this share of their runs in common, or more, are near duplicates."""


def held_out_rows(rows: Sequence[Row], share: float) -> set[int]:
    """Return the rows to hold out of training, by their places in `rows`.

    Of each core about the same share is held out. The choice depends on the rows alone, not on their order.

    Args:
        rows: All rows.
        share: Of them to hold out, above 0 and below 1.

    Raises:
        InvalidInput: The rows are so alike that none can be held out, or none would be left.
    """
    by_core: dict[str, list[list[int]]] = defaultdict(list)
    groups = near_duplicates([row.question for row in rows])
    for group in groups:
        by_core[rows[group[0]].core].append(group)
    chosen: set[int] = set()
    for core_groups in by_core.values():
        room = round(share * sum(map(len, core_groups)))
        for group in sorted(core_groups, key=lambda group: _order(rows, group)):
            if len(group) <= room:
                chosen.update(group)
                room -= len(group)
    if not chosen or len(chosen) == len(rows):
        largest = max(map(len, groups), default=0)
        raise InvalidInput(
            f"dataset.eval_share: {share:g} of {len(rows)} rows can't be held out: near duplicates stay "
            f"together, and the largest group of them has {largest} rows.",
            fix="Raise it, give more rows of other kinds, or name eval_files.",
            metadata={"field": "dataset.eval_share"},
        )
    return chosen


def near_duplicates(texts: Sequence[str]) -> list[list[int]]:
    """Return groups of texts that are near duplicates of one another, each by its places, in order."""
    runs = [_runs(text) for text in texts]
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, own in enumerate(runs):
        for band in _bands(own):
            for other in alike[band]:
                if root(other) != root(place) and _resemblance(own, runs[other]) >= _ALIKE:
                    parent[root(place)] = root(other)
            alike[band].append(place)
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(texts)):
        groups[root(place)].append(place)
    return list(groups.values())


def _runs(text: str) -> frozenset[int]:
    """Return the hashes of a text's runs of characters, without regard to case and white space."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    count = max(1, len(plain) - _RUN + 1)
    return frozenset(zlib.crc32(plain[start : start + _RUN].encode()) for start in range(count))


def _bands(runs: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Yield the neighbouring bins' smallest hashes; an empty bin takes those of the next one that is not."""
    smallest: list[int | None] = [None] * _BINS
    for run in runs:
        kept = smallest[run % _BINS]
        smallest[run % _BINS] = run if kept is None else min(kept, run)
    filled = [place for place, value in enumerate(smallest) if value is not None]
    signature = []
    for place in range(_BINS):
        nearest = next((each for each in filled if each >= place), filled[0])
        signature.append(smallest[nearest] or 0)
    for start in range(0, _BINS, _BAND):
        yield (start, *signature[start : start + _BAND])


def _resemblance(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)


def _order(rows: Sequence[Row], group: Sequence[int]) -> str:
    """Return what groups are sorted by: as good as random, and the same wherever the rows stand."""
    return min(hashlib.sha256(rows[place].question.encode()).hexdigest() for place in group)
