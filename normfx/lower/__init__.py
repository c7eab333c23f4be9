"""Rewritten graph → callable."""
