"""``python -m qsd`` is the console script ``qsd``."""

from qsd_launcher import run

if __name__ == "__main__":
    run()
