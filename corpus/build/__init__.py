"""From labelled posts and their features to training, validation and test files."""
