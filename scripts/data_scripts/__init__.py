"""From the platform to a training set."""
