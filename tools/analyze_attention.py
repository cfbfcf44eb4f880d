"""Moved to ``qsd analyze``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "analyze")
