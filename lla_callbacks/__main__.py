"""``python -m lla_callbacks``: measurements of a checkpoint, and the page of a run."""

import sys

from lla_callbacks.command.main import main

if __name__ == "__main__":
    sys.exit(main())
