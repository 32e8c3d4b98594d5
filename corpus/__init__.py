"""What the offline scripts share: files of posts, JSON-lines files, summaries."""
