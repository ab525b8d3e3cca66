"""The part of an optimizer that tells how it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from steepest.engine.diagnostics.factors import note_factors
from steepest.engine.diagnostics.readings import Readings
from steepest.engine.diagnostics.tallies import Tallies
from steepest.engine.diagnostics.updates import UPDATES, note_updates
from steepest.engine.diagnostics.watch import Watch
from steepest.engine.roster import Roster
from steepest.exchange.peers import Peers
from steepest.linalg.surroundings import undisturbed
from steepest.stack.stack import Stack


class Diagnosed(torch.optim.Optimizer, ABC):
    """The part of an optimizer that tells how it is."""

    _roster: Roster
    _elsewhere: dict[Peers, int]
    _skipped: Tensor | int = 0
    _failures = 0
    _watch: Watch | None = None

    @property
    def _stacks(self) -> list[Stack]:
        return self._roster.stacks

    @property
    def skipped(self) -> int:
        """Return the number of updates of single matrices that were skipped because a gradient was not finite.

        Asking waits for the device. The matrices of other ranks count too, as of the beginning of the latest step.
        """
        self._roster.settle()
        return int(self._skipped) + self._roster.skipped() + sum(self._elsewhere.values())

    @property
    def failed_decompositions(self) -> int:
        """Return how many times every solver failed on a matrix, in float64 too; asking waits for the device.

        The matrix then keeps its old basis or inverse root, at first the identity, and steps all the same. With a polar
        factor or a basis that is computed anew in every step, it stays where it is, except for weight decay. Only the
        matrices that this rank steps are counted.
        """
        return self._failures + sum(int(stack.failures.sum()) for stack in self._stacks)

    @undisturbed
    @torch.no_grad()
    def diagnostics(self, per_parameter: bool = False, *, times: bool = False) -> dict[str, float]:
        """Return how the latest step went, and how factors and bases are: plain numbers, for a log.

        Keys are ``rule/quantity``, and ``rule/parameter/quantity`` with ``per_parameter``. Of several matrices there is
        the largest number, of ``effective_rank`` the mean:

        ==========================  ====================================================================================
        ``update_rms``              root mean square of the latest direction, before the learning rate
        ``update_to_weight``        ``lr · ‖D‖ / ‖W‖``, by the norms of all matrices together
        ``condition_number``        of the Kronecker factors, at most 1/eps; of those with inverses (K-FAC), damped
        ``basis_drift``             ``‖offdiag(Qᵀ K Q)‖ / ‖K‖``: 0 for eigenvectors; below 1e-3 it is rounding
        ``effective_rank``          ``(tr K)² / ‖K‖²`` as a share of the side, in (0, 1]
        ``refresh_age``             the steps since the last refresh of a basis or root was due
        ``failed_decompositions``   as the property counts them
        ==========================  ====================================================================================

        Beside them stand ``optimizer/skipped``, ``optimizer/failed_decompositions``, and with ``times`` the
        milliseconds of each phase of the latest step (``time/refresh``). What isn't known is left out: directions of
        matrices, and phases, at the first call that asks for them, because steps keep them only from then on.
        Directions take as much memory as the weights.

        Between two calls steps only copy directions. A call waits once for each device. Between ranks nothing is sent:
        directions and weights are this rank's shards, factors are those of the matrices that this rank steps.

        Args:
            per_parameter: whether each parameter is shown, too.
            times: whether the phases of steps are timed from now on.

        Example:
            >>> from steepest import SOAP
            >>> W = torch.nn.Parameter(torch.eye(3))
            >>> opt, log = SOAP([("w", W)], lr=0.1, weight_decay=0.0), {}
            >>> for _ in range(2):
            ...     W.square().sum().backward()
            ...     opt.step()
            ...     log = opt.diagnostics(per_parameter=True)
            >>> log["soap/refresh_age"], round(log["soap/w/effective_rank"], 3)
            (1.0, 1.0)
        """
        self._roster.settle()
        watch = self._watch = self._watch or Watch()
        watch.timed = watch.timed or times
        readings, tallies = Readings(), Tallies(self._roster, per_parameter)
        note_updates(readings, watch, self._roster, self.param_groups)
        for stack in self._stacks:
            note_factors(readings, stack, self._roster)
        readings.note(("skipped",), torch.as_tensor(self._skipped))
        for (what, *where), numbers in readings.read():
            if what == "skipped":
                total = numbers[0] + self._roster.skipped() + sum(self._elsewhere.values())
            elif what in UPDATES:
                tallies.add_update(where[0], what, numbers[0])
            else:
                tallies.add_factors(where[0], what, numbers)
        for stack in self._stacks:
            tallies.add_ages(stack, self._roster.refresh_offsets(stack, self.param_groups))
        found = tallies.shown()
        failed = sum(x for name, x in found.items() if name.endswith("/failed_decompositions") and name.count("/") == 1)
        found |= {"optimizer/skipped": total, "optimizer/failed_decompositions": float(self._failures + failed)}
        return found | watch.times()

    @abstractmethod
    def _step(self) -> None: ...

    def _watched(self, watch: Watch) -> None:
        """Take one step, and keep what diagnostics need of it."""
        with watch.watching(self._roster.buckets):
            self._step()
        watch.roster, watch.rates = self._roster, [group["lr"] for group in self.param_groups]
