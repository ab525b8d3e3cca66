"""Accelerate, installed, against plain loops."""

import pytest
import torch
from plain import assert_same, assert_same_state, batches, examples, falling, host, model, optimizer_of, train

accelerate = host("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def anew():
    """Forget the settings of the accelerators before, which are shared."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(net, **settings):
    accelerator = accelerate.Accelerator(cpu=True, step_scheduler_with_optimizer=False, **settings)
    optimizer = optimizer_of(net)
    return accelerator, *accelerator.prepare(net, optimizer, falling(optimizer))


def run(accelerator, net, optimizer, scheduler, data, clip=None):
    for batch in data:
        with accelerator.accumulate(net):
            accelerator.backward(net(**batch)["loss"])
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("settings", "plainly", "clip"),
    [
        ({}, {}, None),
        ({"gradient_accumulation_steps": 2}, {"accumulation": 2, "clip": 0.1}, 0.1),
        ({"mixed_precision": "bf16"}, {"dtype": torch.bfloat16}, None),
    ],
)
def test_it_trains_as_a_plain_loop(settings, plainly, clip):
    net = model()
    data = batches(examples())[: 6 * plainly.get("accumulation", 1)]
    run(*prepared(net, **settings), data, clip)
    other = model()
    optimizer = optimizer_of(other)
    assert_same(net, train(other, optimizer, falling(optimizer), **plainly))


def test_resumed_training_goes_on_bit_for_bit(tmp_path):
    data = batches(examples())[:6]
    net = model()
    whole = prepared(net)
    run(*whole, data[:3])
    whole[0].save_state(tmp_path)
    run(*whole, data[3:])
    other = model(seed=5)
    resumed = prepared(other)
    resumed[0].load_state(tmp_path)
    run(*resumed, data[3:])
    assert_same(net, other)
    assert_same_state(whole[2], resumed[2])
