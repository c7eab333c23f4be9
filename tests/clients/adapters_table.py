"""Writes the table of adapters in docs/clients.md, each one in a process of its own.

python tests/clients/adapters_table.py [names of the adapters to try]
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path.insert(0, str(SUPPORT))

from adapters import ADAPTERS, row  # noqa: E402 - where the helpers are is known only now

PAGE = SUPPORT.parents[1] / "docs" / "clients.md"
HEAD = (
    "| adapter | graphs | LayerNorms | became RMSNorms | γ and β folded | merged | training | difference | what stays |"
)


def main(names: list[str]) -> int:
    if names[:1] == ["--row"]:
        warnings.simplefilter("ignore")
        print("row " + row(ADAPTERS[int(names[1])]))
        return 0
    page = PAGE.read_text().splitlines()
    first = page.index(HEAD) + 2
    last = next((i for i in range(first, len(page)) if not page[i].startswith("|")), len(page))
    old = {line.split(" | ")[0].strip("| "): line for line in page[first:last]}
    failed, lines = 0, []
    for number, adapter in enumerate(ADAPTERS):
        line = old.get(adapter.name)
        if not names or adapter.name in names:
            done = subprocess.run(
                [sys.executable, __file__, "--row", str(number)], capture_output=True, text=True, check=False
            )
            found = [each.removeprefix("row ") for each in done.stdout.splitlines() if each.startswith("row ")]
            line = found[0] if found else line
            failed += not found
            print(line if found else f"{adapter.name}:\n{done.stderr[-1500:]}", flush=True)
        lines += [line] if line else []
    PAGE.write_text("\n".join([*page[:first], *lines, *page[last:]]) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
