"""Offline scripts and what they share: files of posts, JSON-lines files, summaries."""
