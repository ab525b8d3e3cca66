"""What goes wrong by the user's hand."""


class BadInput(Exception):
    """Something that was asked for can't be done. Its message is one line and says what to change."""


def one_line(error: BaseException) -> str:
    """An exception in one line: its first line, with its type where that tells something.

    >>> one_line(KeyError("betas"))
    "KeyError: 'betas'"
    >>> one_line(ValueError("lr=-1: must be >= 0"))
    'lr=-1: must be >= 0'
    """
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
