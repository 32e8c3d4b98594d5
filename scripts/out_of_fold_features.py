"""Extract each post's features by a backbone that was not trained on it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from corpus.extract.out_of_fold import main

if __name__ == "__main__":
    sys.exit(main())
