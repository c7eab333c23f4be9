"""Canonical graphs as text."""
