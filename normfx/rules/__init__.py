"""RULES: the ordered table of rewrite rules. Adding a rule is one file and one line here."""

from typing import Any

from normfx.rules import (
    bake_weights,
    crms_norm,
    fold_affine,
    fold_batch_norm,
    fold_scale,
    fuse_residual_norm,
    linear_norm,
    pre_rms_norm,
)
from normfx.rules.rule import Rule

RULES: tuple[Rule[Any], ...] = (  # each rule has its own kind of site
    pre_rms_norm.RULE,
    linear_norm.RULE,
    fold_scale.RULE,
    fold_affine.RULE,
    fuse_residual_norm.RULE,
    bake_weights.RULE,
    crms_norm.RULE,
    fold_batch_norm.RULE,
)

RMS_NORM_RULES = frozenset(rule.name for rule in RULES if rule.makes_rms_norms)
"""Rules that make RMSNorms of LayerNorms."""
