"""``python -m refiner`` is the command ``refiner``."""

import sys

from refiner.cli import main

if __name__ == "__main__":
    sys.exit(main())
