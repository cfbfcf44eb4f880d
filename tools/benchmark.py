"""Moved to ``qsd benchmark``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "benchmark", {"--output": "--out"})
