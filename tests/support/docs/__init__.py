"""What the documents say: commands, keys of settings, endpoints."""
