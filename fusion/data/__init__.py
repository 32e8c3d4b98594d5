"""Data files, feature files and batches."""
