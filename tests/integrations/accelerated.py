"""Functions that ranks run under Accelerate itself; tests/distributed/hosted.py does the same by hand."""

from __future__ import annotations

import os

import accelerate
import hosted
from models import toy

FSDP2 = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "no_wrap"}


def prepared(layout, rule, changed=0.0):
    """Return an accelerator, a model, and its optimizer, which was made first."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", LOCAL_RANK=os.environ["RANK"])
    plugin = accelerate.FullyShardedDataParallelPlugin(**FSDP2) if layout == "fsdp" else None
    if plugin:  # Accelerate shards on accelerators alone, so it is told that these processes have some
        accelerate.PartialState(cpu=True).distributed_type = accelerate.DistributedType.MULTI_GPU
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    model = toy()
    for p in model.parameters():
        p.data.add_(changed)
    return accelerator, *accelerator.prepare(model, hosted._optimizer(model, rule))


def compared(layout, rule, folder):
    """Return what differs in any bit from a plain script after six steps: unbroken, and saved and resumed at half."""
    plain = hosted.plainly(layout, rule)
    hosted.train(*plain, 0, hosted.STEPS)
    accelerator, *whole = prepared(layout, rule)
    hosted.train(*whole, 0, hosted.HALF, accelerator.backward)
    accelerator.save_state(folder)
    hosted.train(*whole, hosted.HALF, hosted.STEPS, accelerator.backward)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator, *resumed = prepared(layout, rule, changed=1.0)
    accelerator.load_state(folder)
    hosted.train(*resumed, hosted.HALF, hosted.STEPS, accelerator.backward)
    kinds = {type(p).__name__ for p in whole[0].parameters()}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return {
        "kinds": kinds,
        "whole": hosted.unlike((whole[0], whole[1].optimizer), plain),
        "resumed": hosted.unlike((resumed[0], resumed[1].optimizer), plain),
    }
