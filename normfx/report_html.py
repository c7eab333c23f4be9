"""A report as one HTML page that needs nothing outside of itself: the files of normfx/page, filled by jinja2.

The page holds the data of `Report.to_json()`, and draws the streams, the details of a norm and the graphs from it when
they are looked at. Its policy allows its own script and styles, and no connection. What users named is always text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from normfx.printing.line_diff import differences
from normfx.records import GraphBreak, GraphReport
from normfx.report_text import reasons, sentences

FILES = Path(__file__).parent / "page"
_NUMBER = re.compile(r"%\d+")


def page(
    graphs: Sequence[GraphReport],
    breaks: Sequence[GraphBreak],
    note: str,
    environment: Mapping[str, str],
    data: Mapping[str, Any],
) -> str:
    """The page. data: what `Report.to_json()` says."""
    script = (FILES / "page.js").read_text(encoding="utf-8")
    held = {**data, "differences": [_differences(graph) for graph in graphs]}
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return found.get_template("page.html").render(
        style=Markup((FILES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=htmlsafe_json_dumps(held, separators=(",", ":")),
        sentences=[text for text, _ in sentences(graphs, breaks, note)],
        reasons=reasons(graphs),
        graphs=graphs,
        breaks=breaks,
        environment=environment,
        sites=[site for graph in graphs for site in graph.sites],
        coloured=_coloured,
    )


def _differences(graph: GraphReport) -> list[tuple[str, int, int, int, int]]:
    """Runs of lines of both texts that are equal, or not; the numbers of values do not count."""
    before, after = ([_NUMBER.sub("%", line) for line in text.splitlines()] for text in (graph.before, graph.after))
    return list(differences(before, after))


def _coloured(source: str) -> Markup:
    """A kernel's source with its tokens marked; pygments escapes it."""
    from pygments import highlight  # where a model is compiled, none of it is needed
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return Markup(highlight(source, PythonLexer(), HtmlFormatter(nowrap=True)))
