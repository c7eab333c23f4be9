"""RULES: the ordered table of rewrite rules. A rule is one file and one line here, or an entry point elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from normfx.errors import NormfxWarning
from normfx.rules import (
    bake_weights,
    crms_norm,
    defer_norm,
    fold_affine,
    fold_batch_norm,
    fold_scale,
    fuse_residual_norm,
    linear_norm,
    merge_branches,
    merge_linears,
    pre_rms_norm,
)
from normfx.rules.rule import Rule

GROUP = "normfx.rules"
"""Entry points of installed packages that name a rule: `name = "package.module:RULE"`."""

_OWN: tuple[Rule[Any], ...] = (  # each rule has its own kind of site
    pre_rms_norm.RULE,
    linear_norm.RULE,
    fold_scale.RULE,
    fold_affine.RULE,
    crms_norm.RULE,
    defer_norm.RULE,
    fuse_residual_norm.RULE,
    bake_weights.RULE,
    fold_batch_norm.RULE,
    merge_linears.RULE,
    merge_branches.RULE,
)


def plugged(points: Iterable[EntryPoint], known: Iterable[str]) -> Iterator[Rule[Any]]:
    """The rules of other packages, in the order of their names. What cannot be loaded, is no rule or has a name that
    is taken is left out with a warning: models still compile."""
    names = set(known)
    for point in sorted(points, key=lambda p: p.name):
        try:
            rule = point.load()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        else:
            why = "" if isinstance(rule, Rule) else f"it is a {type(rule).__name__}, not a normfx.rules.rule.Rule"
            if not why and rule.name in names:
                why = f"there is a rule named {rule.name!r} already"
        if why:
            said = f"normfx: the rule {point.name!r} ({point.value}) is left out: {why}"
            warnings.warn(said, NormfxWarning, stacklevel=2)
            continue
        names.add(rule.name)
        yield rule


RULES: tuple[Rule[Any], ...] = (*_OWN, *plugged(entry_points(group=GROUP), (rule.name for rule in _OWN)))

RMS_NORM_RULES = frozenset(rule.name for rule in RULES if rule.makes_rms_norms)
"""Rules that make RMSNorms of LayerNorms."""
