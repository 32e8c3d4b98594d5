"""The programs that worker processes run."""
