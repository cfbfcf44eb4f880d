"""The subcommands of ``qsd`` beside those of Lightning, one module or package for each; see ``qsd_launcher``."""
