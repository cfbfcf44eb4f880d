"""The version, in a module of its own so that the build needs no torch to read it."""

__version__ = "0.2.0.dev0"
