"""Media on disk -> features; no network, no database."""
