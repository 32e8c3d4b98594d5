"""The command line: ``insighttag``, or ``python -m insighttag``."""

from scripts.cli import main

if __name__ == "__main__":
    main()
