"""Make a label map from the labels of posts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from corpus.build.label_map import main

if __name__ == "__main__":
    sys.exit(main())
