"""Conversions that measure little and draw nothing."""

from qsd.report import ConversionOptions


def undraw(patch):
    """Leave the pictures of reports empty: drawing takes most of the time of a page."""
    patch.setattr("qsd.report.rendering.data_uri", lambda figure: "data:,")


def shorten_conversions(patch, **values):
    """Let conversions measure on two images, and nothing beside the accuracy unless ``stages`` are given."""
    undraw(patch)
    check = ConversionOptions.__post_init__

    def shorten(options):
        for name, value in {"stages": (), "max_images": 2, "step_images": 1, **values}.items():
            object.__setattr__(options, name, value)
        check(options)

    patch.setattr(ConversionOptions, "__post_init__", shorten)
