"""The parts of `bench/chaos.py` and `bench/soak.py`: a whole installation that can be hurt."""
