"""Errors that the user of a command can correct."""


class BadInput(Exception):
    """A request that can't be carried out. Its message is one line and says what to change."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with the exception's type unless it is a ValueError.

    >>> one_line(KeyError("betas"))
    "KeyError: 'betas'"
    >>> one_line(ValueError("lr=-1: must be >= 0"))
    'lr=-1: must be >= 0'
    """
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
