"""Writes the table of docs/clients.md: each client that is installed is tried, in a process of its own.

python tests/clients/table.py [words of the clients to try]
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path.insert(0, str(SUPPORT))

from clients import CLIENTS, Client  # noqa: E402 - where the helpers are is known only now

PAGE = SUPPORT.parents[1] / "docs" / "clients.md"
HEAD = "| library | use | compiled by | LayerNorms | became RMSNorms | graphs | difference |"


def row(client: Client) -> str:
    """What came of a client, as a line of the table."""
    warnings.simplefilter("ignore")
    outcome = client.run()
    counts, version = outcome.report.counts, importlib.metadata.version(client.distribution)
    cells = [
        f"{client.distribution} {version}",
        client.what,
        f"`{client.compiled}`",
        *(str(counts[name]) for name in ("layer_norm", "to_rms_norm", "graphs")),
        f"{outcome.difference:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(words: list[str]) -> int:
    if words[:1] == ["--row"]:
        print("row " + row(CLIENTS[int(words[1])]))
        return 0
    page = PAGE.read_text().splitlines()
    first = page.index(HEAD) + 2
    last = next((i for i in range(first, len(page)) if not page[i].startswith("|")), len(page))
    old = {tuple(line.split(" | ")[1:3]): line for line in page[first:last]}
    failed, lines = 0, []
    for number, client in enumerate(CLIENTS):
        line = old.get((client.what, f"`{client.compiled}`"))
        if not words or any(word in f"{client.distribution} {client.what}" for word in words):
            done = subprocess.run(
                [sys.executable, __file__, "--row", str(number)], capture_output=True, text=True, check=False
            )
            found = [each.removeprefix("row ") for each in done.stdout.splitlines() if each.startswith("row ")]
            line = found[0] if found else line
            failed += not found
            print(line if found else f"{client.distribution}, {client.what}:\n{done.stderr[-1500:]}", flush=True)
        lines += [line] if line else []
    PAGE.write_text("\n".join([*page[:first], *lines, *page[last:]]) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
