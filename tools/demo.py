"""Moved to ``qsd demo digits``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "demo digits", {"--images": "--max-images"})
