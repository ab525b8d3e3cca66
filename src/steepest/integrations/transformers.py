"""A callback for the Trainer of transformers, which has to be installed: `LogDiagnostics`."""

from __future__ import annotations

from typing import Any

from steepest.integrations.logged import checked, diagnosed

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("steepest.integrations.transformers needs transformers: pip install transformers") from error


class LogDiagnostics(TrainerCallback):
    """Logs the optimizer's `steepest.Optimizer.diagnostics` by the Trainer's own ``log``, wherever that reports to.

    On the first process only, after steps ``every``, ``2 every``, ...; nothing is computed in between. The first log
    has no directions of matrices, since steps keep them only once somebody has asked.

    Args:
        trainer: The Trainer, which is there before its callback is: ``trainer.add_callback(LogDiagnostics(trainer))``.
        every: The steps of the optimizer between two logs.

    Raises:
        ValueError: If ``every`` is no integer of at least 1.
        TypeError: When training begins, if the optimizer is none of this package.

    Example:
        >>> LogDiagnostics(None, every=0)
        Traceback (most recent call last):
        ValueError: every=0: must be a number of steps, an integer >= 1
    """

    def __init__(self, trainer: Any, every: int = 10) -> None:
        self.trainer = trainer
        self.every = checked(every)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse an optimizer that has no diagnostics."""
        diagnosed(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, if it is time."""
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            self.trainer.log(diagnosed(kwargs["optimizer"]).diagnostics())
