"""Demo posts with real media: what tags there are, how a post is planned, drawn and encoded."""
