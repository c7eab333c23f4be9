"""Writes the table of docs/peers.md from the results of tests/peers/run.py.

    python tests/peers/table.py peers.json > table.md

explained.json, next to this file, gives the reason of each difference that is known; a test it does not name is new.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EXPLAINED = Path(__file__).with_name("explained.json")
NEW = "not explained"


def table(found: Mapping[str, Any], explained: Mapping[str, str]) -> str:
    """Markdown: a row for each file, compiler and mode, and below it each test that differs, with the reason."""
    return "\n".join(_lines(found, explained))


def _lines(found: Mapping[str, Any], explained: Mapping[str, str]) -> Iterator[str]:
    results: Sequence[Mapping[str, Any]] = sorted(found["results"], key=lambda r: (r["file"], r["compiler"], r["mode"]))
    yield f"torch {found['torch']}\n"
    yield "| tests | compiler | mode | pass in both | of these compile a graph | pass only without normfx | explained |"
    yield "|---|---|---|---|---|---|---|"
    for r in results:
        known = sum(name in explained for name in r["differ"])
        passed = f"{r['passed']} | {r['compiled']} | {len(r['differ'])}"
        yield f"| {r['file']} | {r['compiler']} | {r['mode']} | {passed} | {known} |"
    differing = {name: result for r in results for name, result in r["differ"].items()}
    if differing:
        yield "\n| test | what fails | why |"
        yield "|---|---|---|"
    for name, result in sorted(differing.items()):
        parts = [result.get("stage", ""), result.get("kind", ""), result.get("text", "")]
        what = " ".join(filter(None, parts)).replace("|", "\\|").replace("\n", " ")
        yield f"| {name.split('/')[-1]} | {what[:160]} | {explained.get(name, NEW)} |"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text()), json.loads(EXPLAINED.read_text())))
