"""The parts of `bench/fuzz.py`: hostile files, hostile messages, the place they are sent to."""
