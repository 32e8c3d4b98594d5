"""The feature cache: features that were extracted before, by content of the file and extractor."""
