"""``python -m refiner`` is the command ``refiner``."""

from refiner.cli import main

if __name__ == "__main__":
    main()
