"""HTTP: tag a post in one request, put posts on the queue, read their results, and a page."""
