"""Features of a corpus: what ``scripts/extract_{text,audio,image,video}_features.py`` do.

A posts file becomes `Work`, one post at a time (`work`); an engine, of local processes or of
actors of Ray, turns it into `Result`; features go into one file a post, merged under a lock
(`store`); failures and counts go into files of their own (`failures`, `tally`).
"""
