"""A notebook on eigenbases around a spike, written for another library's SOAP, runs with its import line changed.

It builds the optimizer with the arguments of that library, reads ``Q_L`` and ``L`` from ``opt.state[param]`` after each
step, and prints two kinds of tables. This is its use of the interface, shortened; the steps are as many as it prints.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

NOTEBOOK = '''
from steepest.optimizers.soap import SOAP

device, dtype = torch.device("cpu"), torch.float32
SHAPE, SPIKE_AT, STEPS, TOP_K, OFFSETS = (128, 64), 50, 70, 8, [1, 2, 5, 10]


def make_soap_kl(param, fp32_matmul_prec="highest"):
    return SOAP(
        [param], lr=1.0, betas=(0.9, 0.95), shampoo_beta=0.95, weight_decay=0.0,
        use_kl_shampoo=True, use_eigh=False, fp32_matmul_prec=fp32_matmul_prec,
    )


def make_rekls(param, fp32_matmul_prec="highest"):
    return SOAP(
        [param], lr=1.0, betas=(0.9, 0.95), shampoo_beta=0.95, weight_decay=0.0,
        use_kl_shampoo=True, use_eigh=True, fp32_matmul_prec=fp32_matmul_prec,
    )


def drive(make_opt, fp32_matmul_prec):
    """The basis after each step, and L's eigenvalues, ascending."""
    g = torch.Generator(device=device).manual_seed(0)
    param = torch.zeros(SHAPE, device=device, dtype=dtype, requires_grad=True)
    opt = make_opt(param, fp32_matmul_prec)
    bases, eigenvalues = torch.empty(STEPS, SHAPE[0], SHAPE[0]), []
    for i in range(STEPS):
        scale = 1000.0 if i == SPIKE_AT else 1.0
        with torch.no_grad():
            grad = torch.randn(SHAPE, device=device, dtype=dtype, generator=g) * scale
        param.grad = grad
        opt.step()
        bases[i] = opt.state[param]["Q_L"].detach().cpu()
        eigenvalues.append(torch.linalg.eigvalsh(opt.state[param]["L"].detach()).cpu().numpy())
    return bases, eigenvalues


def top1(Q, ref):
    return (Q[:, 0] @ ref[:, 0]).abs().clamp(max=1.0).arccos().rad2deg().item()


def topk(Q, ref):
    sigmas = torch.linalg.svdvals(Q[:, :TOP_K].T @ ref[:, :TOP_K]).clamp(max=1.0)
    return sigmas.min().arccos().rad2deg().item()


for prec in ["high", "highest"]:
    for name, make in [("SOAP (KL)", make_soap_kl), ("REKLS", make_rekls)]:
        bases, eigenvalues = drive(make, prec)
        ref = bases[SPIKE_AT - 1]
        print(f"{name} at {prec}: principal angle to Q_L(step {SPIKE_AT}), degrees")
        for n in OFFSETS:
            around = bases[SPIKE_AT - 1 - n], bases[SPIKE_AT - 1 + n]
            cells = [angle(Q, ref) for Q in around for angle in (top1, topk)]
            print(f"{n:>3} |" + "".join(f" {x:>8.3f}°" for x in cells))

print(f"{'step':>5} {'eig[0] (top)':>14} {'eig[1]':>14} {'eig[4]':>14} {'eig[9]':>14} {'top/2nd':>9}")
for i in [SPIKE_AT - 5, SPIKE_AT - 1, SPIKE_AT, SPIKE_AT + 1, SPIKE_AT + 4, SPIKE_AT + 9, SPIKE_AT + 19]:
    ev = eigenvalues[i][::-1]
    marker = "  <-- spike" if i == SPIKE_AT else ""
    print(f"{i + 1:>5} {ev[0]:>14.4g} {ev[1]:>14.4g} {ev[4]:>14.4g} {ev[9]:>14.4g} {ev[0] / ev[1]:>9.4f}{marker}")
'''


@pytest.fixture(scope="module")
def printed() -> str:
    said: list[str] = []
    exec(compile(NOTEBOOK, "notebook", "exec"), {"torch": torch, "np": np, "print": said.append})
    return "\n".join(said)


def test_its_tables_of_angles_have_their_structure(printed):
    tables = re.split(r"^(.+): principal angle to Q_L\(step 50\), degrees$", printed, flags=re.MULTILINE)[1:]
    assert tables[::2] == ["SOAP (KL) at high", "REKLS at high", "SOAP (KL) at highest", "REKLS at highest"]
    read = [
        re.findall(r"^ +(\d+) \| +([\d.]+)° +([\d.]+)° +([\d.]+)° +([\d.]+)°$", t, re.MULTILINE) for t in tables[1::2]
    ]
    for rows in read:
        assert [int(n) for n, *_ in rows] == [1, 2, 5, 10]
        for n, *cells in rows:
            before, after = map(float, cells[:2]), map(float, cells[2:])
            assert max(before) < 30, f"{n} steps before the spike: drift"
            assert min(after) > 60, f"{n} steps after: with the default floor the spike itself turns the basis"
    assert read[:2] == read[2:], "without TF32 there is one precision"


def test_its_table_of_eigenvalues_has_its_structure(printed):
    rows = re.findall(r"^ +(\d+)((?: +[\d.e+-]+){5})(  <-- spike)?$", printed, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [46, 50, 51, 52, 55, 60, 70]
    assert [bool(marker) for *_, marker in rows] == [i == 2 for i in range(7)]
    for _, cells, _ in rows:
        top, second, fifth, tenth, ratio = map(float, cells.split())
        assert top >= second >= fifth >= tenth > 0
        assert ratio == pytest.approx(top / second, rel=2e-3)
