"""A callback for Lightning, which has to be installed: `LogDiagnostics`."""

from __future__ import annotations

from typing import Any

from steepest.integrations.logged import checked, diagnosed

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError("steepest.integrations.lightning needs lightning: pip install lightning") from error


class LogDiagnostics(Callback):  # type: ignore[misc]  # it is Any where Lightning isn't installed
    """Gives the `steepest.Optimizer.diagnostics` of a Trainer's optimizers to its loggers: ``callbacks=[...]``.

    On the first process only, after steps ``every``, ``2 every``, ...; nothing is computed in between. The first log
    has no directions of matrices, since steps keep them only once somebody has asked. With several optimizers, keys
    begin with the optimizer's number: ``1/soap/update_rms``.

    Args:
        every: The steps of optimizers between two logs, as Lightning's ``global_step`` counts them.

    Raises:
        ValueError: If ``every`` is no integer of at least 1.
        TypeError: When training begins, if an optimizer is none of this package.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = checked(every)
        self.latest = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse an optimizer that has no diagnostics."""
        for optimizer in trainer.optimizers:
            diagnosed(optimizer)
        self.latest = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Log, if it is time; batches whose gradients only accumulate are no steps."""
        before, self.latest = self.latest, trainer.global_step
        if before // self.every == self.latest // self.every or not trainer.is_global_zero:
            return
        several = len(trainer.optimizers) > 1
        found = {
            f"{number}/{name}" if several else name: x
            for number, optimizer in enumerate(trainer.optimizers)
            for name, x in diagnosed(optimizer).diagnostics().items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
