"""The one exception that users are meant to read."""


class QsdError(ValueError):
    """A wrong argument, file, layout, checkpoint or layer.

    The message is one clear line: what is wrong, which value it has, how to mend it. The command line prints it
    without a traceback and exits with code 2.
    """
