"""Pulling posts out of the database into a posts file, page by page."""
