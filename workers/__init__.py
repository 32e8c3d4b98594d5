"""Processes: fetch, decode, extract, fuse; pinning, batching, deadlines."""
