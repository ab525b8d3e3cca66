"""Optimizers that hold the model, because their rules are fed by what is captured in its layers.

    forward, backward ──taps──▶ steepest.curvature.Curvature ──step──▶ buckets ──▶ Step.statistics ──▶ rule

Statistics are due when the count of steps, the entry ``statistics_step`` of a parameter group, says so. In between,
taps are not even made.
"""

from __future__ import annotations

import weakref
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from steepest.curvature import Curvature, Layer, layers, unsupported
from steepest.engine.optimizer import Optimizer
from steepest.exchange import samples
from steepest.exchange.bucket import Tensors
from steepest.rule import Rule, Statistics
from steepest.rules import RULES
from steepest.stack.stack import Segment
from steepest.view import View

COUNT = "statistics_step"
"""The entry of a parameter group that counts steps, and that statistics go by."""
DRAWS = 2**20
"""More draws of targets than a step makes: draws are numbered by the step, so that a resumed run repeats them."""


class CapturingOptimizer(Optimizer, ABC):
    """An optimizer that captures statistics in the layers of a model.

    Args:
        model: the module whose layers' weights and biases are in groups under a rule that captures.
        groups: parameter groups.
        rule: the rule of groups that name none.
        capture: the arguments of `steepest.curvature.Curvature`.
        options: as for `Optimizer`.
    """

    _captures: ClassVar[bool] = True
    _curvature: Curvature | None = None
    _detached = False
    _checked = False
    """Whether the ranks that share the model were looked for again at the first statistics."""
    _segments: Sequence[Segment] = ()
    """The segments under rules that capture, whichever rank steps them."""
    _places: Mapping[Tensor, int] = {}
    """The numbers of their weights."""

    def __init__(
        self, model: nn.Module, groups: Iterable[Any], rule: str, capture: Mapping[str, Any], **options: Any
    ) -> None:
        self._model, self._capture = model, dict(capture)
        super().__init__(groups, rule, **options)

    # For training loops.

    @property
    def fisher(self) -> str:
        """Whose gradients the statistics are of: "empirical", those of the loss, or "sampled", of drawn targets."""
        return str(self._capture.get("fisher", "empirical"))

    @property
    def wants_statistics(self) -> bool:
        """Whether the next forward and backward passes are captured."""
        return self._curvature is not None and bool(self._curvature.listening)

    def sample(self, outputs: Tensor, likelihood: str) -> None:
        """Draw targets from the model, and capture the gradients for them. Call it between forward and backward pass.

        It does nothing unless statistics are due and ``fisher="sampled"``, and leaves ``.grad`` as it is.

        Args:
            outputs: of the model, ``[..., C]``, in their graph.
            likelihood: "categorical" for logits of classes (the last dimension), "normal" for means of variance 1,
                "bernoulli" for logits of yes and no.

        Raises:
            ValueError: for another likelihood.
        """
        if self._curvature is not None:
            self._curvature.sample(outputs, likelihood)

    def detach(self) -> None:
        """Remove all hooks from the model. Steps go on with the statistics that there are."""
        if self._curvature is not None:
            self._curvature.detach()
            self._curvature.listening = False
        self._detached = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, as in torch, and forget the statistics that were captured along with them.

        Those of drawn targets stay: `sample` may come before it.
        """
        super().zero_grad(set_to_none)
        if self._curvature is not None and self._curvature.fisher == "empirical":
            self._curvature.discard()

    # A step.

    def _step(self) -> None:
        super()._step()
        roster = self._roster
        numbers = [n for n, rule in enumerate(roster.rules) if isinstance(rule, Rule) and rule.captures]
        for number in numbers:
            self.param_groups[number][COUNT] += 1
        self._seen.note(self.param_groups, numbers)
        self._listen()

    def _participants(self) -> list[Tensor | None]:
        """As ever; what thaws is captured from the next step on."""
        frozen = set(self._roster.frozen)
        grads = super()._participants()
        self._thawed = frozen - self._roster.frozen
        self._fresh |= self._thawed
        return grads

    def _marks(self) -> Sequence[set[int]]:
        """Of which layers something was captured, and which never had an update; one rank knows, and all need to."""
        roster, curvature, places = self._roster, self._curvature, self._places
        self._heard = set() if curvature is None else {places[w] for w in curvature.pending if w in places}
        self._fresh = {
            segment.index
            for stack in roster.stacks
            if self._captures_group(stack.groups[0][0]) and not bool(stack.clock.all())
            for segment in stack.segments
            if not bool(stack.clock[segment.slots].any())
        }
        return self._heard, self._fresh

    def _captured(self, grads: list[Tensor | None]) -> Mapping[int, Statistics | None]:
        """Return what was captured since the last step, by the number of the weight.

        A layer that never had statistics waits for the next step that has some. The group of one that thaws settles
        anew.

        Raises:
            RuntimeError: if statistics were due, and a layer that has a gradient got none and never had any.
        """
        roster, curvature = self._roster, self._curvature
        found, places = {} if curvature is None else curvature.collect(), self._places
        if found and not self._checked:
            samples.refuse_unshared({p: roster.names[index] for p, index in places.items()}, roster.peers)
            self._checked = True
        statistics: dict[int, Statistics | None] = dict.fromkeys(self._heard)
        statistics |= {places[w]: Statistics(x.A, x.B, x.S) for w, x in found.items() if w in places}
        fresh = [s for s in self._segments if s.index not in statistics and s.index in self._fresh]
        new = [segment for segment in fresh if _takes_part(segment, grads)]
        missing = [segment for segment in new if self._detached or segment.index not in self._thawed]
        if missing and (self.wants_statistics or self._detached):
            raise RuntimeError(self._nothing_captured([roster.names[s.index] for s in missing]))
        for segment in new:
            grads[segment.index] = None
            if segment.bias is not None:
                grads[segment.bias] = None
            self.param_groups[segment.group][COUNT] = -1  # the next step is as the first one
        return statistics

    def _captures_group(self, number: int) -> bool:
        way = self._roster.ways[number]
        return way is not None and way.rule.captures

    def _nothing_captured(self, names: list[str]) -> str:
        shown = ", ".join(dict.fromkeys(names))
        if self._detached:
            return f"{shown}: no statistics were captured before detach(): build a new optimizer"
        if (
            self._capture["fisher"] == "sampled"
            and self._curvature is not None
            and not self._curvature.samplings % DRAWS
        ):
            return (
                f"{shown}: nothing was captured, since no targets were drawn: with fisher='sampled', call "
                'optimizer.sample(outputs, "categorical") between the forward and the backward pass'
            )
        return (
            f"{shown}: a gradient, but no statistics. The module was not called (fused attention and torch.func pass "
            "by it), was called in evaluation mode, or was compiled before the optimizer was built. Build the "
            f"optimizer first, or send the parameter to another rule: overrides={{{names[0]!r}: 'soap'}}"
        )

    # What is captured.

    def _biases(self) -> Mapping[Tensor, Tensor]:
        return _biases(self._layers())

    def _layers(self) -> dict[Tensor, Layer]:
        return {layer.weight: layer for layer in layers(self._model).values()}

    def _enter(self, numbers: Sequence[int]) -> None:
        """As ever, unless ranks share the model in a way that leaves statistics incomplete."""
        groups = [self.param_groups[number] for number in numbers]
        for rule in dict.fromkeys(group["rule"] for group in groups):
            kind = RULES[rule]
            if issubclass(kind, Rule) and kind.captures:
                places = self._layers()
                params = [p for group in groups if group["rule"] == rule for p in group["params"]]
                found = [places[p] for p in params if p in places]
                samples.refuse_parallel(found, self._model, rule, self._capture.get("fisher", "empirical"))
        super()._enter(numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `Optimizer.add_param_group` does. Under a rule that captures they must be the model's."""
        self._found = self._layers()  # for all of its parameters
        self._of_layers = set(_biases(self._found).values())
        super().add_param_group(param_group)

    def _admit(self, name: str, p: Tensor, group: Mapping[str, Any]) -> None:
        """Raise unless a parameter under a rule that captures is what can be captured."""
        kind = RULES[group["rule"]]
        if not (issubclass(kind, Rule) and kind.captures):
            return
        layer = self._found.get(p)
        if layer is None:
            if p not in self._of_layers:
                reasons = "; ".join(f"{module}: {why}" for module, why in unsupported(self._model).items())
                raise ValueError(
                    f"{name} under rule={group['rule']!r}: it is in no layer that can be captured. {reasons}"
                )
            return
        view = View.of(p, group)
        if view.bias and layer.module._parameters["bias"] is None:
            raise ValueError(f"{name} in a group with bias=True: its layer has no bias")
        if view.transpose != layer.transposed or (p.dim() > 2 and not view.merge_dims):
            raise ValueError(
                f"{name}: transpose={view.transpose!r}, merge_dims={view.merge_dims!r}: K-FAC's matrix is [m, n]"
            )
        if layer.groups > 1 and (view.heads != layer.groups or len(view.pieces) > 1):
            raise ValueError(f"{name}: heads={view.heads!r}: must be {layer.groups}, the groups of the convolution")
        if kind.name == "ekfac" and (len(view.pieces) > 1 or view.heads != layer.groups):
            raise ValueError(f"{name}: EKFAC takes a layer as one matrix: split and block_size are for K-FAC")

    def _show(self) -> None:
        """As ever, and have what the groups hold captured."""
        for group in self.param_groups:
            kind = RULES[group["rule"]]
            if issubclass(kind, Rule) and kind.captures:
                group.setdefault(COUNT, 0)
        super()._show()
        roster, curvature = self._roster, self._curvature
        self._segments = [s for bucket in roster.buckets for s in bucket.segments if self._captures_group(s.group)]
        self._places = {roster.params[segment.index]: segment.index for segment in self._segments}
        joins = {roster.params[s.index]: None if s.bias is None else roster.params[s.bias] for s in self._segments}
        known = {} if curvature is None else {layer.weight: layer.bias for layer in curvature.layers}
        same = joins.keys() == known.keys() and all(joins[w] is known[w] for w in joins)
        if not self._detached and (curvature is None or not same):
            if curvature is not None:
                curvature.detach()
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            self._curvature = Curvature(self._model, only=joins, rank=rank, **self._capture)
            if any(rule.name == "ekfac" for rule in roster.rules):
                this = weakref.ref(self)
                self._curvature.bases = lambda weight: None if (here := this()) is None else here._bases(weight)
        self._listen()

    def _listen(self) -> None:
        """Have statistics captured until the next step, if they are due."""
        curvature = self._curvature
        if curvature is None or self._detached:
            return
        due = False
        for group, rule in zip(self.param_groups, self._roster.rules, strict=True):
            if isinstance(rule, Rule) and rule.captures:
                count, every, settle = group[COUNT], group["statistics_frequency"], group["settle"]
                due = due or count < settle or count % every == 0
                curvature.samplings = DRAWS * count
        curvature.listening = due

    def _bases(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return a weight's bases ``Q_A [G, n, n]``, ``Q_B [G, m, m]``, if it is under EKFAC and has both."""
        state = self.state.get(weight, {})
        if not {"Q_A", "Q_B"} <= state.keys() or not bool(state["clock"].all()):
            return None
        return tuple(Q.view(-1, *Q.shape[-2:]) for Q in (state["Q_A"], state["Q_B"]))

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        here = {"_model": self._model, "_capture": self._capture, "_detached": self._detached}
        return super().__getstate__() | here


def _biases(found: Mapping[Tensor, Layer]) -> dict[Tensor, Tensor]:
    biases = ((weight, layer.module._parameters["bias"]) for weight, layer in found.items())
    return {weight: bias for weight, bias in biases if bias is not None}


def _takes_part(segment: Segment, grads: Tensors) -> bool:
    return grads[segment.index] is not None or (segment.bias is not None and grads[segment.bias] is not None)
