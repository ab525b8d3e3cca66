"""Names with options in brackets, as on the command line: ``soap(lr=1e-2)`` or ``stdlib(width=128)``."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options, whose values are Python literals.

    Raises:
        ValueError: if the brackets hold anything else.

    >>> parse_call("kl-soap(lr=1e-2, betas=(.9, .95))")
    ('kl-soap', {'lr': 0.01, 'betas': (0.9, 0.95)})
    >>> parse_call("muon"), parse_call("muon()")
    (('muon', {}), ('muon', {}))
    """
    name, bracket, _ = text.partition("(")
    if not bracket:
        return name.strip(), {}
    try:
        call = ast.parse("options" + text[len(name) :].rstrip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        return name.strip(), {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except (ValueError, SyntaxError):
        raise ValueError(f"{text!r}: options are names and plain values") from None


def spell_call(name: str, options: Mapping[str, Any]) -> str:
    """Return the one spelling of a name with options.

    >>> spell_call("soap", {"lr": 1e-2, "betas": (0.9, 0.95)}), spell_call("soap", {})
    ('soap(lr=0.01, betas=(0.9, 0.95))', 'soap')
    """
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name
