"""What `bench/chaos.py` and `bench/soak.py` are made of: a whole installation that can be hurt."""
