"""Integrations: optimizers of this package in the trainers of others, given as a class and settings.

None of these trainers is imported unless its module here is. A host that takes an optimizer object needs none of this:
it gets ``steepest.for_model(model, ...)``. See docs/hosts.md.

  TrainerFactory      for ``optimizer_cls_and_kwargs`` of transformers' Trainer
  ByShape             for hosts that name a class and pass parameters
  timm                registers names in timm, when it is imported
  transformers        a callback that logs diagnostics
  lightning           likewise
  megatron            registers names for Megatron-LM, when it is imported
  llamafactory        registers names in LLaMA-Factory, when it is imported
  axolotl             a plugin for Axolotl
  torchtitan          a container of optimizers for torchtitan
"""

from steepest.integrations.by_shape import ByShape
from steepest.integrations.trainer import TrainerFactory

__all__ = ["ByShape", "TrainerFactory"]
