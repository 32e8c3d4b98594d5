"""What `bench/walk.py` is made of: a platform to pull from, the commands of the docs, the judge."""
