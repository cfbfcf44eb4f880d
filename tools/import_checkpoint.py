"""Moved to ``qsd import-checkpoint``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "import-checkpoint")
