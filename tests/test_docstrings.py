"""`help()` of a public name: its docstring has an example, and the example runs as printed."""

import doctest
import importlib
import inspect

import numpy as np
import pytest
import torch
from torch import nn

MODULES = ("metta_fastagent", "metta_fastagent.ops", "metta_fastagent.testing", "metta_fastagent.train")
PUBLIC = [
    pytest.param(getattr(importlib.import_module(module), name), id=f"{module}.{name}")
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if not name.startswith("__")
]
# Errors of an assertion, whose message is the documentation; and the mixin, of which VectorAgent is the example.
WITHOUT_EXAMPLE = ("AgentCheckError", "AgentsDifferError", "PyTorchAgentMixin")


@pytest.mark.parametrize("public", PUBLIC)
def test_the_docstring_has_an_example_that_runs(public):
    text = inspect.getdoc(public) or ""
    assert "Example:" in text or public.__name__ in WITHOUT_EXAMPLE
    names = {"torch": torch, "nn": nn, "np": np, **vars(inspect.getmodule(public))}
    (test,) = doctest.DocTestFinder(recurse=False).find(public, public.__name__, globs=names)
    with torch.random.fork_rng():
        failed, tried = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert failed == 0
    assert tried or ">>>" not in text


@pytest.mark.parametrize("public", [each for each in PUBLIC if inspect.isfunction(each.values[0])])
def test_the_docstring_of_a_function_names_its_arguments(public):
    text = inspect.getdoc(public) or ""
    for name in inspect.signature(public).parameters:
        assert name in text, f"{public.__name__}: the docstring does not mention {name}"
