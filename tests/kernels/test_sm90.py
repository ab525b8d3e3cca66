"""Every kernel compiles for an H200 (sm_90), with the tiles that it is launched with: nothing spills, and it fits."""

import re
import subprocess
from pathlib import Path

import pytest

from steepest import kernels

triton = pytest.importorskip("triton", reason="Triton isn't installed: it comes with the dev extra on Linux")
if kernels.INTERPRETED:
    pytest.skip("Triton interprets here", allow_module_level=True)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY, REGISTERS = 227 * 1024, 65536  # of one multiprocessor
ELEMENT = {"bfloat16": "*bf16", "float16": "*fp16", "tf32": "*fp32", "float32": "*fp32"}
NUMBERS = ("alpha", "beta", "beta1", "beta2", "rest1", "rest2", "log_beta1", "log_beta2", "eps", "weight", "tiny")
COUNTS = ("count", "parts", "blocks")  # need not be multiples of 16; sizes and strides are taken to be


def built(kernel, types, constants, ones, tmp_path, warps, stages=3):
    """PTX, bytes of shared memory, and registers, stack and local memory per thread."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names = kernel.arg_names
    fixed = dict(constants) | dict.fromkeys(ones, 1)
    types = {
        name: "constexpr" if name in fixed else types.get(name, "fp32" if name in NUMBERS else "i32") for name in names
    }
    aligned = [name for name in names if types[name] not in ("constexpr", "fp32") and name not in COUNTS]
    try:
        source = compiler.ASTSource(
            fn=kernel,
            signature=types,
            constexprs={(names.index(name),): value for name, value in fixed.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
    except TypeError:
        pytest.skip(f"Triton {triton.__version__} describes sources in another way")
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    used = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", used)[1]) for word in ("REG", "STACK", "LOCAL"))
    print(f"{kernel.__name__}: {binary.metadata.shared} B shared, {registers} registers, {stack} B stack")
    return binary.asm["ptx"], binary.metadata.shared, registers, stack + local


@pytest.mark.parametrize(
    ("precision", "d", "by_columns"),
    [
        ("bfloat16", 2048, False),
        ("bfloat16", 2048, True),
        ("tf32", 2048, False),
        pytest.param("float16", 2048, False, marks=pytest.mark.slow),
        pytest.param("tf32", 512, False, marks=pytest.mark.slow),
        ("float32", 2048, False),
    ],
)
def test_symmetric_products(precision, d, by_columns, tmp_path, monkeypatch):
    from steepest.kernels import symmetric

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = symmetric.tiles(d, "bfloat16" if precision == "float16" else precision)
    constants = {
        "HAS_OLD": True,
        "PER_MATRIX": False,
        "PRECISION": "ieee" if precision == "float32" else "tf32",
        "UPCAST": False,
        "BLOCK": tiles.block,
        "BLOCK_K": tiles.block_k,
        "SLICES": d // tiles.block_k,
    }
    types = dict.fromkeys(("out", "old", "x", "y"), ELEMENT[precision])
    ones = ("out_col", "old_col", *(("x_row", "y_row") if by_columns else ("x_col", "y_col")))
    ptx, shared, registers, spilled = built(
        symmetric._symmetric_kernel, types, constants, ones, tmp_path, tiles.warps, tiles.stages
    )
    assert not spilled
    assert shared <= SHARED_MEMORY
    assert registers * tiles.warps * 32 <= REGISTERS
    assert "cp.async" in ptx, "loads overlap with products"
    assert ("wgmma" in ptx) == (precision != "float32"), "tensor cores, unless the precision forbids it"
    if precision == "float32":
        assert "fma.rn.f32" in ptx


@pytest.mark.parametrize("noise", [False, True])
def test_adam(noise, tmp_path, monkeypatch):
    from steepest.kernels import adam

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("g_at", "exp_avg", "exp_avg_sq", "direction", "sums", "t_at"), "*fp32")
    switches = {"CORRECT": True, "NESTEROV": True, "MOMENTUM_FLOOR": True, "BLOCK": adam.BLOCK}
    kernels = [(adam._moments_kernel, {"NOISE": noise, "BLOCKS_PER_PROGRAM": 2})]
    if noise:
        kernels.append((adam._direction_kernel, {"PARTS": adam.PARTS}))
    for kernel, constants in kernels:
        ptx, _, registers, spilled = built(kernel, types, switches | constants, (), tmp_path, adam.WARPS)
        assert not spilled
        assert registers * adam.WARPS * 32 <= REGISTERS // 4, "four programs a multiprocessor keep the memory busy"
        assert "ld.global.v4" in ptx, "16 bytes a load"
        assert "div.rn" in ptx
        assert "atom" not in ptx, "sums have one order"
        assert "max.NaN.f32" in ptx, "NaN is no less than anything; the interpreter doesn't tell"
    assert "sqrt.rn" in ptx, "the kernel that writes the direction rounds as torch does"


def test_keeping(tmp_path, monkeypatch):
    from steepest.kernels import keeping

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"source": "*fp32", "target": "*fp32", "finite": "*u8"}
    constants = {"BLOCK": keeping.BLOCK}
    ptx, _, registers, spilled = built(keeping._put_back_kernel, types, constants, (), tmp_path, keeping.WARPS)
    assert not spilled
    assert registers * keeping.WARPS * 32 <= REGISTERS // 4
    assert "ld.global.v4" in ptx, "16 bytes a load"
    mask, state = ptx.index("ld.global.b8"), ptx.index("ld.global.v4")
    assert "bra" in ptx[mask:state], "state is read only once the mask has been looked at"
