"""Which lines of two texts are the same: texts of thousands of lines, most of which occur once in each.

Lines that occur once in either text are matched first, as far as they stand in the same order (Bram Cohen's patience
diff); between two such lines `difflib` compares what is left.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import pairwise

Run = tuple[str, int, int, int, int]

LARGE = 400
"""Lines of a stretch from which it is not compared line by line: that takes quadratic time."""


def differences(before: Sequence[str], after: Sequence[str]) -> Iterator[Run]:
    """Runs (kind, begin and end in `before`, begin and end in `after`), in order.

    kind: "=" the same, "-" only before, "+" only after, "~" both, and different

    >>> list(differences(["a", "b", "c"], ["a", "x", "c", "d"]))
    [('=', 0, 1, 0, 1), ('~', 1, 2, 1, 2), ('=', 2, 3, 2, 3), ('+', 3, 3, 3, 4)]
    """
    held: Run | None = None
    for run in _runs(before, after):
        if held and held[0] == run[0] and run[0] == "=":
            held = "=", held[1], run[2], held[3], run[4]
            continue
        if held:
            yield held
        held = run
    if held:
        yield held


def _runs(before: Sequence[str], after: Sequence[str]) -> Iterator[Run]:
    ends = (-1, -1), (len(before), len(after))
    anchors = [ends[0], *_anchors(before, after), ends[1]]
    for (i, j), (k, m) in pairwise(anchors):
        yield from _between(before, after, i + 1, k, j + 1, m)
        if k < len(before):
            yield "=", k, k + 1, m, m + 1


def _between(before: Sequence[str], after: Sequence[str], i: int, k: int, j: int, m: int) -> Iterator[Run]:
    if max(k - i, m - j) > LARGE:
        yield "~", i, k, j, m
        return
    kinds = {"equal": "=", "delete": "-", "insert": "+", "replace": "~"}
    for tag, a, b, c, d in SequenceMatcher(None, before[i:k], after[j:m], autojunk=False).get_opcodes():
        yield kinds[tag], i + a, i + b, j + c, j + d


def _anchors(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of lines that occur once in either text: the longest sequence of them that is in order in both."""
    once, others = ({line for line, n in Counter(text).items() if n == 1} for text in (before, after))
    there = {line: j for j, line in enumerate(after) if line in others}
    pairs = [(i, there[line]) for i, line in enumerate(before) if line in once and line in there]
    tails: list[int] = []
    last: list[int] = []
    previous: list[int] = []
    for n, (_, j) in enumerate(pairs):
        at = bisect_left(tails, j)
        previous.append(last[at - 1] if at else -1)
        tails[at : at + 1], last[at : at + 1] = [j], [n]
    found, n = [], last[-1] if last else -1
    while n >= 0:
        found.append(pairs[n])
        n = previous[n]
    return found[::-1]
