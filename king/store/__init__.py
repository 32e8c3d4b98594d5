"""MongoDB: posts, jobs and results."""
