"""The error that the command line shows without a traceback."""


class MoeqError(ValueError):
    """Bad input; the message names the file, tensor or option and says what to do."""
