"""From posts in files at hand to a bundle, without a database: ``insighttag train`` and ``tag``."""
