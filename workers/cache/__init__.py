"""The feature cache: what was extracted before, by content of the file and extractor.

entry.py     one entry as bytes, checked when it is read
keys.py      everything that determines an entry, in its key
store.py     where entries lie: a folder, Redis, or any fsspec file system
guarded.py   a cache that is away, slow or broken is a miss, never an error
features.py  what is looked up and written for a post
process.py   the worker that looks up; extract workers write by `writer.py`
"""
