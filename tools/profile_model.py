"""Moved to ``qsd profile``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "profile", {"--image-size": "--img-size"})
