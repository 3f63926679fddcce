"""The error that the command line shows without a traceback."""


class MoeqError(ValueError):
    """Bad input; the message names the file, tensor or parameter and says what to do.

    Parameters stand in backticks, as ```group_size```: keywords of the Python API, which the
    command line shows as its options, as ``--group-size``.
    """
