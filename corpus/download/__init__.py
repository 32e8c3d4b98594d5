"""Downloading the media of many posts: hosts in turn, many processes, content-addressed files."""
