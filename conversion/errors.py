"""What the command line reports in one line instead of a traceback."""


class ConversionError(Exception):
    """The input, or the place for the output, is not what a conversion needs; the message says what and where."""
