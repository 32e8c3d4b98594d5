"""Health of the database and of the backlog."""
