"""Looking at posts before training on them: what is there, what repeats, what looks wrong."""
