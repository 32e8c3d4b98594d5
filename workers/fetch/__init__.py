"""Downloads: HTTP client, address guard and spool."""
