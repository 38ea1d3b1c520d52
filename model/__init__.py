"""Titans language models: mathematics on one device."""
