"""Supervision and embedded services."""
