"""A module for one host says which package it needs, where that isn't installed."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("host", ["transformers", "lightning"])
def test_the_package_is_named(host, monkeypatch):
    monkeypatch.delitem(sys.modules, f"steepest.integrations.{host}", raising=False)
    for name in (host, "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it isn't installed
    with pytest.raises(ImportError, match=f"needs {host}: pip install {host}"):
        importlib.import_module(f"steepest.integrations.{host}")
