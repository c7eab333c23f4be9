"""A report as text: a summary in sentences, then norms in groups, graph breaks, and graphs. Pure.

Lines are at most WIDTH columns wide where words allow it; a list of names is never broken. Each line is a sequence of
pieces of text with a style of `rich`; without the styles they are the plain text.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from normfx.records import GraphBreak, GraphReport, RefusalReport, SiteReport
from normfx.rules import RULES

WIDTH = 80

Piece = tuple[str, str]
Line = tuple[Piece, ...]


def lines(graphs: Sequence[GraphReport], breaks: Sequence[GraphBreak], note: str = "") -> list[Line]:
    """The lines of a report. note: why it is empty, or what else there is to know."""
    found = [*summary(graphs, breaks, note)]
    for part in (_norms(graphs), _weights(graphs), _savings(graphs), _breaks(breaks), _graphs(graphs)):
        section = list(part)
        if section:
            found += [(), *section]
    return found


# ---------------------------------------------------------------- the summary


def summary(graphs: Sequence[GraphReport], breaks: Sequence[GraphBreak], note: str) -> Iterator[Line]:
    """What became of the norms, in sentences, and the two most frequent reasons why not more."""
    for text, style in sentences(graphs, breaks, note):
        yield from _wrapped(text, style=style)
    found = reasons(graphs)
    if found:
        yield (("Most frequent reasons why not more:", ""),)
    for text, hint in found:
        yield from _wrapped(text, "- ", "  ")
        yield from _wrapped(f"hint: {hint}", "  ", "    ", "green")
    refusals = (r for graph in graphs for site in graph.sites for r in site.refusals)
    if any(graph.gradients for graph in graphs) and any(r.code == "live_weights" for r in refusals):
        yield from _wrapped(
            "Gradients are recorded here, as in training. For inference, call the model under torch.no_grad().",
            style="yellow",
        )


def sentences(graphs: Sequence[GraphReport], breaks: Sequence[GraphBreak], note: str) -> Iterator[tuple[str, str]]:
    """What became of the norms, each sentence with its style."""
    sites = [site for graph in graphs for site in graph.sites]
    if sites:
        yield f"{_became(sites)}{_traffic(graphs)}.", "bold"
    elif graphs:
        yield f"No norm was found in {_counted(len(graphs), 'graph')}.", "bold"
    else:
        yield "No norm was found, for no graph was captured.", "bold"
    failed = [graph.failure for graph in graphs if graph.failure]
    if failed:
        what = "1 graph" if len(failed) == 1 else f"{len(failed)} graphs"
        yield (
            f"normfx failed on {what}, at stage '{failed[0].stage}' ({failed[0].error}): compiled unchanged.",
            "red",
        )
    if note:
        yield note, ""
    if breaks and sites:
        yield (
            f"{_counted(len(breaks), 'graph break')}: streams that cross one are not followed. Compile the whole model "
            "without them for more.",
            "",
        )


def _became(sites: Sequence[SiteReport]) -> str:
    """What became of them; of BatchNorms, and of what is no norm, by themselves, which other rules are for."""
    alone = ("BatchNorm", "Affine")
    apart = [[s for s in sites if s.kind not in alone], *([s for s in sites if s.kind == kind] for kind in alone)]
    return "; ".join(_became_of(group) for group in apart if group)


def _became_of(sites: Sequence[SiteReport]) -> str:
    kinds = Counter(site.kind for site in sites)
    converted = sum(site.to_rms_norm for site in sites)
    said = []
    if kinds["LayerNorm"]:
        whose = _share(converted, kinds["LayerNorm"])
        said.append(f"{whose} became {'an RMSNorm' if converted < 2 else 'RMSNorms'}")
    for sentence in dict.fromkeys(rule.summary for rule in RULES if rule.summary):
        rules = {rule.name for rule in RULES if rule.summary == sentence}
        applied = sum(not rules.isdisjoint(site.rules) for site in sites)
        if applied:
            said.append(sentence.format(norms=_share(applied, len(sites)), are="are" if applied > 1 else "is"))
    listed = _joined([_counted(n, kind) for kind, n in kinds.items()])
    return f"{listed}: {_joined(said) if said else 'none was changed'}"


def _traffic(graphs: Sequence[GraphReport]) -> str:
    saved = sum(n for graph in graphs for n in graph.saved.values() if n > 0)
    return f"; predicted to save {_bytes(saved)} of memory traffic per call" if saved else ""


def reasons(graphs: Sequence[GraphReport]) -> list[tuple[str, str]]:
    """The two most frequent refusals, each with its hint; what few rows in training refuse goes first. What an exported
    program has no use for is no reason."""
    sites = [[r for r in site.refusals if r.code != "not_exported"] for graph in graphs for site in graph.sites]
    count = Counter(reason for refusals in sites for reason in {_reason(r): None for r in refusals})
    rules: dict[tuple[str, str, str], dict[str, None]] = {}
    for refusal in (r for refusals in sites for r in refusals):
        rules.setdefault(_reason(refusal), {})[refusal.rule] = None
    ranked = sorted(rules, key=lambda reason: (reason[0] != "live_weights", -count[reason]))
    return [
        (f"{_joined(list(rules[reason]))}, {_counted(count[reason], 'norm')}: {reason[1]}", reason[2])
        for reason in ranked[:2]
    ]


def _reason(refusal: RefusalReport) -> tuple[str, str, str]:
    return refusal.code, refusal.meaning or refusal.detail, refusal.hint


# ---------------------------------------------------------------- norms


def _norms(graphs: Sequence[GraphReport]) -> Iterator[Line]:
    """Norms with the same rules and refusals and the same place in a block are one entry."""
    said: dict[tuple[str, str, str], str] = {}
    groups: dict[object, list[SiteReport]] = {}
    for graph in graphs:
        for site in graph.sites:
            groups.setdefault(_outcome(site), []).append(site)
    for group in groups.values():
        yield from _group(group, said)


def _outcome(site: SiteReport) -> object:
    refusals = tuple((r.rule, r.code, r.hint) for r in site.refusals)
    return pattern(site.name), site.kind, site.rules, refusals, bool(site.shares)


def _group(group: Sequence[SiteReport], said: dict[tuple[str, str, str], str]) -> Iterator[Line]:
    site = group[0]
    name = names([each.name for each in group])
    times = f" ×{len(group)}" if len(group) > 1 else ""
    rules = ", ".join(site.rules) or "-"
    shares = f" (computed by {site.shares})" if site.shares else ""
    head: Line = ((name, "bold cyan"), (times, ""), (f"  {site.kind}", ""))
    if _length(head) + 2 + len(rules) + len(shares) <= WIDTH:
        yield (*head, (f"  {rules}", "green"), (shares, ""))
    else:
        yield head
        yield ((f"  {rules}", "green"), (shares, ""))
    for refusal in site.refusals:
        yield from _refusal(refusal, site, len(group), said)


def _refusal(
    refusal: RefusalReport, site: SiteReport, times: int, said: dict[tuple[str, str, str], str]
) -> Iterator[Line]:
    key = refusal.rule, refusal.code, refusal.detail
    head = f"{refusal.rule} refused ({refusal.code}):"
    if key in said:
        yield from _wrapped(f"{head} as for {said[key]}", "  ", "    ")
        return
    said[key] = site.name
    meaning = refusal.meaning or refusal.detail
    yield from _wrapped(f"{head} {meaning}", "  ", "    ", "yellow")
    values = refusal.detail.removeprefix(meaning).removeprefix(": ")
    if values:
        yield ((f"    found{' in the first' if times > 1 else ''}: {_shortened(values, times > 1)}", ""),)
    yield from _wrapped(f"hint: {refusal.hint}", "    ", "      ", "green")
    source = refusal.source or site.source
    if source:
        yield ((_clipped(f"    at {source}"), "dim"),)


def _weights(graphs: Sequence[GraphReport]) -> Iterator[Line]:
    for graph in graphs:
        for weight in graph.composed:
            if weight.rules:
                yield ((weight.name, "bold cyan"), (f"  {weight.kind}  ", ""), (", ".join(weight.rules), "green"))


# ---------------------------------------------------------------- savings, breaks, graphs


def _savings(graphs: Sequence[GraphReport]) -> Iterator[Line]:
    saving = [(i, rule) for i, graph in enumerate(graphs) for rule in graph.bytes if graph.saved.get(rule, 0) > 0]
    if saving:
        yield (("Bytes per call that pass over activations and live weights, predicted:", ""),)
    width = max((len(rule) for _, rule in saving), default=0)
    for i, rule in saving:
        before, after = graphs[i].bytes[rule]
        where = f"graph {i}: " if len(graphs) > 1 else ""
        yield ((f"  {where}{rule:{width}}  {before} to {after}", ""),)
    stored = sum(graph.stored_sums for graph in graphs)
    if stored:
        yield ((f"{_counted(stored, 'sum')} of residual streams stored once, not added up again.", ""),)
    centrings = sum(graph.centrings for graph in graphs)
    if centrings:
        yield ((f"{_counted(centrings, 'value')} centred while the model runs, in each call.", ""),)


def _breaks(breaks: Sequence[GraphBreak]) -> Iterator[Line]:
    if breaks:
        yield ((f"{_counted(len(breaks), 'graph break')}:", ""),)
    for each in breaks:
        yield ((_clipped(f"  {each.place or 'at an unknown place'}"), "dim"),)
        yield from _wrapped(each.cause, "    ", "    ", "yellow")
        if each.hint:
            yield from _wrapped(f"hint: {each.hint}", "    ", "      ", "green")


def _graphs(graphs: Sequence[GraphReport]) -> Iterator[Line]:
    """Graphs by compile id, where there are several or something is to be said of one."""
    for i, graph in enumerate(graphs):
        if len(graphs) == 1 and not graph.weights and not graph.failure:
            return
        name = f" [{graph.compile_id}]" if graph.compile_id else ""
        function = f" {graph.function}" if graph.function else ""
        yield ((f"graph {i}{name}{function}: {_counted(len(graph.sites), 'norm')}", "bold"),)
        if graph.failure:
            text = f"stage '{graph.failure.stage}' failed ({graph.failure.error}); compiled unchanged by Inductor"
            yield from _wrapped(text, "  ", "    ", "red")
        elif graph.weights:
            yield from _wrapped(str(graph.weights), "  ", "    ")


# ---------------------------------------------------------------- words


def pattern(name: str) -> str:
    """A norm's name without what numbers it: equal for the same norm of equal blocks.

    >>> pattern("h.11.ln_1"), pattern("layer_norm_3")
    ('h.#.ln_1', 'layer_norm#')
    """
    plain = re.fullmatch(r"([a-z]+_norm)(_\d+)?", name)
    return f"{plain[1]}#" if plain else re.sub(r"(?<![^.])\d+(?![^.#])", "#", name)


def names(given: Sequence[str]) -> str:
    """Names of one pattern as one: 'h.{0…11}.ln_1'; the first and the last where more than one number differs.

    >>> names(["h.0.ln", "h.1.ln", "h.2.ln"])
    'h.{0…2}.ln'
    >>> names(["a.0.1", "a.2.0"])
    'a.0.1 … a.2.0'
    """
    unique = list(dict.fromkeys(given))
    if len(unique) == 1:
        return unique[0]
    parts = [name.split(".") for name in unique]
    places = [i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len({len(p) for p in parts}) == 1 and len(places) == 1 and all(p[places[0]].isdecimal() for p in parts):
        numbers = sorted({int(p[places[0]]) for p in parts})
        runs = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
        between = f"{numbers[0]}…{numbers[-1]}" if runs or len(numbers) > 8 else ",".join(map(str, numbers))
        inside = list(parts[0])
        inside[places[0]] = f"{{{between}}}"
        return ".".join(inside)
    return f"{unique[0]} … {unique[-1]}"


def _shortened(values: str, first: bool) -> str:
    """A list of values that fits into its line: what does not is counted."""
    items = re.split(r", (?![^(]*\))", values)
    room = WIDTH - len("    found: ") - (len(" in the first") if first else 0)
    for kept in range(len(items), 0, -1):
        rest = f" and {len(items) - kept} more" if kept < len(items) else ""
        text = ", ".join(items[:kept]) + rest
        if len(text) <= room:
            return text
    return text


def _share(some: int, of: int) -> str:
    return "all" if some == of > 1 else "none" if not some else "it" if some == of else str(some)


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _joined(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + "".join(parts[-1:])


def _bytes(n: int) -> str:
    size, units = float(n), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{n:,} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _wrapped(text: str, first: str = "", later: str | None = None, style: str = "") -> Iterator[Line]:
    later = first if later is None else later
    wrapped: Iterable[str] = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    for line in wrapped:
        yield ((line, style),)


def _clipped(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1].rstrip() + "…"


def _length(line: Line) -> int:
    return sum(len(text) for text, _ in line)
