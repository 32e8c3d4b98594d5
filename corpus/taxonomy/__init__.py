"""Changes of the taxonomy: label maps and data files that go from one version to the next."""
