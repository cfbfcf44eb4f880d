"""The subcommand ``qsd benchmark``: speed and memory beside the float twin, as ratios of one run."""

from qsd.commands.benchmark.command import main

__all__ = ["main"]
