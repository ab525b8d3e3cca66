"""All private names of torch that the library uses are listed here, and the torch that is installed has them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch._subclasses
import torch.distributed.tensor
from torch.distributed.device_mesh import DeviceMesh

import steepest
from steepest.exchange import dtensor
from steepest.linalg import untraced

OWNERS: dict[str, Any] = {
    # What has no public name, or only one that costs more: `steepest.linalg.untraced`.
    "_compile": torch,
    "_disable_dynamo": torch._compile,
    # A backend of torch.compile that calls Inductor, as torch's page on custom backends shows.
    "_inductor": torch,
    # Modes that see every operation, as torch's notes on extending it show.
    "_python_dispatch": torch.utils,
    # Which part of a DTensor other ranks hold, one that a single rank holds, and a mesh that is made without talking.
    "_dtensor_spec": torch.distributed.tensor,
    "_utils": torch.distributed.tensor,
    "_compute_local_shape_and_global_offset": torch.distributed.tensor._utils,
    "_init_backend": SimpleNamespace(**inspect.signature(DeviceMesh).parameters),
    # Hooks of load_state_dict, which the optimizer calls itself, as it loads states itself.
    "_optimizer_load_state_dict_pre_hooks": torch.optim.SGD([torch.zeros(1)]),
    "_optimizer_load_state_dict_post_hooks": torch.optim.SGD([torch.zeros(1)]),
    # A module's own parameters, with those that are None or stand in it twice.
    "_parameters": torch.nn.Module(),
    # A module's hooks, of which a copy's without effect are removed, as `torch.utils.hooks.RemovableHandle` does it.
    "_forward_hooks": torch.nn.Module(),
    "_forward_hooks_with_kwargs": torch.nn.Module(),
    # Whether a transform of torch.func is going on, and which backward pass.
    "_C": torch,
    "_functorch": torch._C,
    "_current_graph_task_id": torch._C,
    # Whether a tensor is a view, and a tensor with its memory that is none.
    "_is_view": torch.Tensor,
    "_unsafe_view": torch.ops.aten,
    # Operations whose public forms are other operations by the time that FLOPs are counted.
    "_linalg_eigh": torch.ops.aten,
    "_linalg_svd": torch.ops.aten,
    # Tensors without values that say they are on a GPU, what tells their memories apart, and a copy past autograd,
    # which would look for the GPU: with them `steepest bench --count` counts what a step does to one.
    "_subclasses": torch,
    "_pytree": torch.utils,
    "_cdata": torch.zeros(1).untyped_storage(),
    "_local_scalar_dense": torch.ops.aten,
    "_AutoDispatchBelowAutograd": torch._C,
}
"""Where torch has each name. Operations on lists (``torch._foreach_add_``) are documented, and are not listed."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Names in a file that are imported from elsewhere, or that no file of the library defines."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith(("steepest", "timm")):
                yield from (*module.split("."), *(alias.name for alias in names))
            case ast.Import(names=names):
                yield from (part for alias in names for part in alias.name.split("."))
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                yield name
            case ast.Attribute(value=ast.Name(id="os"), attr="_exit"):  # public in spite of its name
                pass
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) if name not in own:
                yield name


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                yield name


def private_names(sources: list[str]) -> set[str]:
    trees = [ast.parse(source) for source in sources]
    own = {name for tree in trees for name in defined(tree)}
    return {name for tree in trees for name in foreign(tree, own) if is_private(name)}


def test_all_private_names_are_listed() -> None:
    used = private_names([path.read_text() for path in Path(steepest.__file__).parent.rglob("*.py")])
    assert {name for name in used if not name.startswith("_foreach_")} == set(OWNERS)
    assert {name for name in used if name.startswith("_foreach_") and not hasattr(torch, name)} == set()


def test_the_torch_that_is_installed_has_them() -> None:
    assert {name for name, owner in OWNERS.items() if not hasattr(owner, name)} == set()


def imported_anew(module: ModuleType) -> ModuleType:
    """Return a second copy of a module, so that the first stays as it is."""
    spec = spec_from_file_location(module.__name__, module.__file__)
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_functions_stay_untraced_by_the_public_decorator_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch._compile, "_disable_dynamo")
    assert imported_anew(untraced).untraced is torch.compiler.disable


def test_a_torch_that_does_not_tell_the_layout_of_dtensors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.tensor._utils, "_compute_local_shape_and_global_offset")
    with pytest.raises(ImportError, match=r"DTensors in torch \d.*_compute_local_shape_and_global_offset"):
        imported_anew(dtensor)


def test_private_names_are_found_however_they_are_used() -> None:
    source = """
        from torch._a import b
        import torch._c
        torch.d._e(_f=1)
        getattr(x, "_g", None)
        class A:
            def _own(self): return self._own(self._mine)
            _mine = "_text"
    """
    assert private_names([inspect.cleandoc(source)]) == {"_a", "_c", "_e", "_f", "_g"}
