"""Canonical graph: ops, records, invariants and text."""
