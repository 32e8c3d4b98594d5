"""Features -> tags: models, losses, metrics, trainer, inferer, bundle."""
