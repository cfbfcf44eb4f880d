"""Moved to ``qsd export``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "export", {"--images": "--max-images"})
