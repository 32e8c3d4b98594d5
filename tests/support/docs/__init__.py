"""Readers of the documents: commands, keys of settings, endpoints."""
