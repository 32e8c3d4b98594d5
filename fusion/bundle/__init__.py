"""Bundles: the deployed form of a model, and its exports."""
