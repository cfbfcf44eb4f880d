"""The subcommand ``qsd demo``: trainings on handwritten digits that scikit-learn ships, from data to report."""

from qsd.commands.demo.command import main

__all__ = ["main"]
