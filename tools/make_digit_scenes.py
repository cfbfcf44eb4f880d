"""Moved to ``qsd demo scenes``; this script goes with the next release."""

from moved import moved

main = moved(__name__, "demo scenes")
