"""Features of a corpus: ``scripts/extract_{text,audio,image,video}_features.py``.

A posts file becomes `Work`, one post at a time (`work`); an engine, of local processes (`local`) or
of actors of Ray (`on_ray`), turns it into `Result` and writes one feature file a post, merged under
a lock; `run` counts and reports.
"""
