"""Preference data: rows, tokens on disk, packs."""
