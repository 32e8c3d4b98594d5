"""The fusion models, chosen by name."""
