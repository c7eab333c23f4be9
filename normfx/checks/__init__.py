"""Invariants of canonical graphs, checked in production and between stages."""
