"""The pool of worker processes: scheduling, pipes, shared memory."""
