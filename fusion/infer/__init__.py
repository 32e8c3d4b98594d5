"""Inference over a data file."""
