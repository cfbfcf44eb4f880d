"""``python -m qsd`` is the console script ``qsd``."""

from qsd.cli import run

if __name__ == "__main__":
    run()
