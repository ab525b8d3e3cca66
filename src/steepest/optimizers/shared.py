"""What the optimizers' constructors share: types of parameters and options, and a decorator that passes these on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypedDict, TypeVar, cast

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.tables import warn_of_tables
from steepest.rule.words import Nonfinite
from steepest.rules.aliases import ALIASES, TARGETS

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""The parameters of an optimizer: tensors, dicts that define parameter groups, or ``(name, tensor)`` pairs."""

Init = TypeVar("Init", bound=Callable[..., None])

ABSENT = {*ALIASES, *(target for targets in TARGETS.values() for target in targets)}
"""Arguments that stay out of the options where a caller leaves them out."""


def sets_options(rule: str, **fixed: Any) -> Callable[[Init], Init]:
    """Return a decorator that makes ``__init__`` pass its arguments on to `Optimizer`, as options of a rule.

    The ``fixed`` options join the arguments. The body of the decorated ``__init__`` runs first, and may refuse them.
    """

    def construct(self: Optimizer, params: Any, options: dict[str, Any]) -> None:
        Optimizer.__init__(self, params, rule, **fixed, **options)
        given_groups = params if isinstance(params, list | tuple) else ()
        meant = [isinstance(group, dict) and "rule" in group for group in given_groups]
        warn_of_tables(self.param_groups, meant, stacklevel=3)

    decorator: Callable[[Init], Init] = passes_on("params", ABSENT, construct)
    return decorator


def passes_on(first: str, absent: Collection[str], receive: Callable[[Any, Any, dict[str, Any]], None]) -> Any:
    """Return a decorator that makes ``__init__`` pass its arguments on, once its own body has run.

    Args:
        first: the name of the argument after ``self``.
        absent: arguments that are passed on only if a caller gives them: the rule has their defaults, which an alias
            that is given may contradict.
        receive: takes ``self``, the first argument, and all others with the further ``options``.
    """

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def construct(*args: Any, **kwargs: Any) -> None:
            init(*args, **kwargs)  # for missing arguments, this raises Python's own TypeError, which names the class
            bound = signature.bind(*args, **kwargs)
            given = set(bound.arguments)
            bound.apply_defaults()
            arguments = bound.arguments
            self, taken, options = (arguments.pop(name) for name in ("self", first, "options"))
            for name in set(absent) - given:
                arguments.pop(name, None)
            receive(self, taken, arguments | options)

        return cast(Init, construct)

    return decorate


class GroupOptions(TypedDict, total=False):
    """Options that every optimizer takes, elementwise ones too; `SharedOptions` documents them."""

    nonfinite: Nonfinite
    stochastic_rounding: bool
    rounding_seed: int


class SharedOptions(GroupOptions, total=False):
    """Options that all optimizers of matrices take, as keyword arguments or as entries of a parameter group.

    Args:
        nonfinite: What happens when a gradient holds NaN, infinities, or numbers too large to square. "skip" (default)
            leaves the matrix out of the step: its weights, state and clock stay as they are, and ``optimizer.skipped``
            counts it. "raise" raises FloatingPointError before anything has changed.
        stochastic_rounding: Whether bfloat16 weights are rounded up or down at random, so that small updates count on
            average. By default (False) they are rounded to nearest, and updates below 1/512 of a weight are lost. Other
            dtypes are not affected. The random numbers are a hash of the parameter's name and step and of
            ``rounding_seed``, so a resumed run repeats them.
        rounding_seed: The seed of ``stochastic_rounding``, an integer; 0 by default.
        compile: Whether updates without a refresh run as graphs of torch.compile. Compiling takes seconds for each
            shape of matrices, and again when an option changes; it saves kernel launches (docs/kernels.md). False by
            default.
        cuda_graph: Whether updates without a refresh are recorded as CUDA graphs and replayed with one launch each
            (docs/kernels.md). It changes nothing on other devices. False by default.
        stagger: Whether the refreshes of a group's matrices are spread over the steps of a period, balanced by cost, so
            that all steps take about the same time. By default (False) all matrices refresh in the same step. A single
            matrix refreshes as if unstaggered.
        block_size: The largest number of rows and columns of a block. Larger matrices are cut into blocks of nearly
            equal size, and each block is optimized as a matrix of its own: with less memory, cheaper refreshes and less
            information. 0 (default) cuts nothing. Distributed Shampoo uses the same name.
        split: The row counts of blocks that are matrices of their own, as in a fused query-key-value projection. ()
            (default) takes a weight as one matrix.
        heads: The number of matrices that the rows of a weight, or of each block of ``split``, form. A tuple has
            a number for each block: (8, 2, 2) with 8 heads of queries and 2 of keys and values. 1 by default.
        transpose: Whether the weight is stored as ``[inputs, outputs]``. False by default: rows are outputs.

    Example:
        >>> import torch
        >>> from steepest import Muon
        >>> qkv = torch.nn.Parameter(torch.zeros(96, 32))
        >>> opt = Muon([qkv], lr=1e-3, split=(32, 32, 32), nonfinite="raise")
        >>> sorted(name for name in opt.state[qkv] if name.startswith("momentum"))
        ['momentum_buffer.0', 'momentum_buffer.1', 'momentum_buffer.2']
    """

    compile: bool
    cuda_graph: bool
    stagger: bool
    block_size: int
    split: tuple[int, ...]
    heads: int | tuple[int, ...]
    transpose: bool
