"""The parts of `bench/walk.py`: a platform to pull from, the commands of the docs, the judge."""
