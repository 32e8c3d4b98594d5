"""The commands and the offline scripts, thin over the packages."""
