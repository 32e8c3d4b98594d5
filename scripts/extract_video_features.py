"""Extract the features of posts' videos into feature files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from corpus.extract.run import main

if __name__ == "__main__":
    sys.exit(main("video"))
