"""The error that every reader of the format raises."""


class FormatError(ValueError):
    """A plan, checkpoint or file does not follow the moeq format; the message names the part."""
