"""What `bench/fuzz.py` is made of: hostile files, hostile messages, the place they are sent to."""
