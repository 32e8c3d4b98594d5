"""`infer_net.py`: feature files or raw media in; JSON lines, CSV or a MongoDB collection out."""
