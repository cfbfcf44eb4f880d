"""The one exception that users are meant to read."""


def printable(text: str) -> str:
    """A text as one line: line breaks, control characters and bytes that are no UTF-8 are escaped.

    Args:
        text: A path, a name out of a file, or a message that holds some.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class QsdError(ValueError):
    """A wrong argument, file, layout, checkpoint or layer.

    The message is one clear line: what is wrong, which value it has, how to mend it. The command line prints it
    without a traceback and exits with code 2.
    """

    def __init__(self, *messages: object) -> None:
        super().__init__(*(printable(str(message)) for message in messages))
