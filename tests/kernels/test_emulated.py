"""Kernels with a fault put into their PTX: the emulator refuses them, or their results are wrong."""

import os
import re

import pytest
import torch
from references import CUM_MAX_PARAMS, check_categorical, check_lstm_layer, lstm_inputs, random_tokens

from metta_fastagent import ops, use_backend
from metta_fastagent.ops import conversion
from metta_fastagent.ops.categorical import kernels as categorical
from metta_fastagent.ops.lstm import kernels as lstm_kernels
from metta_fastagent.ops.tensor_lists import kernels as tensor_lists
from metta_fastagent.ops.tokens import kernels as tokens

if "EMULATE" in os.environ:
    import emulator

pytestmark = pytest.mark.skipif("EMULATE" not in os.environ, reason="needs EMULATE=sm_90 and a C++ compiler")


@pytest.fixture(autouse=True)
def no_report_is_left():
    """Drop what a kernel with a fault has reported, so that the next test does not see it."""
    yield
    while True:
        try:
            ops.raise_if_reported()
            return
        except ops.BadRowError:
            pass


def clip():
    tensors = [torch.randn(n) for n in (5000, 4096, 7)]
    ops.clip_weights_(tensors, [0.5, 0.25, 1.0])
    return tensors


def l2():
    params, initial = ([torch.randn(n).requires_grad_() for n in (5000, 4096, 7)] for _ in range(2))
    loss = ops.l2_init_loss(params, [each.detach() for each in initial])
    return [loss, *torch.autograd.grad(loss, params)]


def evaluate(actions):
    logits = torch.randn(150, actions).requires_grad_()
    outputs = ops.evaluate_actions(logits, torch.randint(actions, (150,)))
    return [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), logits)]


def convert():
    pairs = torch.tensor([[0, 1], [2, 2], [1, 0]]).repeat(70, 1)
    return [ops.action_to_logit_index(pairs, CUM_MAX_PARAMS)]


def grid():
    return [ops.tokens_to_grid(random_tokens(2, 100, 4, 11, 11), 4, 11, 11, torch.ones(4))]


def layer():
    inputs, resets = lstm_inputs(4, 20, 40, torch.float32, "some")
    inputs = [each.requires_grad_() for each in inputs]
    outputs = ops.lstm_layer(*inputs, resets)
    return [*outputs, *torch.autograd.grad(outputs[0].sum(), inputs)]


CALLS = {
    "clip": (clip, tensor_lists._clip_weights_kernel),
    "l2": (l2, tensor_lists._l2_init_loss_fwd_kernel),
    "l2 backward": (l2, tensor_lists._l2_init_loss_bwd_kernel),
    "evaluate": (lambda: evaluate(21), categorical._evaluate_actions_fwd_kernel),
    "evaluate a tile": (lambda: evaluate(600), categorical._evaluate_actions_fwd_kernel),
    "evaluate backward": (lambda: evaluate(21), categorical._evaluate_actions_bwd_kernel),
    "sample": (lambda: ops.sample_actions(torch.randn(150, 21)), categorical._sample_actions_kernel),
    "convert": (convert, conversion._action_to_logit_index_kernel),
    "tokens": (grid, tokens._tokens_to_grid_kernel),
    "lstm": (layer, lstm_kernels._lstm_layer_fwd_kernel),
    "lstm backward": (layer, lstm_kernels._lstm_layer_bwd_kernel),
}


@pytest.fixture(autouse=True)
def triton_backend():
    torch.manual_seed(0)
    with use_backend("triton"):
        yield


def changed(pattern, by, which):
    """An edit that replaces the first or the last match of the pattern, or all of them."""

    def edit(ptx):
        matches = list(re.finditer(pattern, ptx))
        chosen = {"first": matches[:1], "last": matches[-1:], "all": matches}[which]
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return edit


BARRIER, WAIT = (r"bar\.sync\s+0;", ""), (r"cp\.async\.wait_group\s+0;", "")
LATER_WAIT = (WAIT[0], "cp.async.wait_group 1;")
STORE_MASK, LOAD_MASK = (r"@%p\d+ (st\.global)", r"\1"), (r"@%p\d+ (ld\.global)", r"\1")
BOUND = (r"setp\.lt\.s(32|64)", r"setp.le.s\1")
ALIGNMENT = (r"(global\.v[24]\.b\d+ .*\]?.*) \+ 0 \]", r"\1 + 4 ]")
COUNTER = (
    r"atom\.global\.gpu\.acq_rel\.add\.u32 (%r\d+), \[ (%rd\d+) \+ 0 \], [^;]*;",
    r"ld.global.b32 \1, [ \2 + 0 ];",
)
OUTSIDE, RACE = "outside of the launch's tensors", "since the last barrier"
UNWRITTEN, MISALIGNED, ASYNCHRONOUS = "never written", "at the misaligned address", "not waited for"
WRONG = None  # No fault: results that are not those of the kernel.


# Not of the lists' masks: what lies behind a tensor, another one or none, depends on the heap.
@pytest.mark.parametrize(
    ("name", "mutation", "which", "expected"),
    [
        ("clip", BARRIER, "last", RACE),
        ("clip", BOUND, "all", WRONG),
        ("clip", ALIGNMENT, "first", MISALIGNED),
        ("l2", BARRIER, "first", UNWRITTEN),
        ("l2", BARRIER, "last", RACE),
        ("l2", COUNTER, "all", WRONG),
        ("l2 backward", STORE_MASK, "last", "another program"),
        ("l2 backward", ALIGNMENT, "last", MISALIGNED),
        ("evaluate", BARRIER, "all", UNWRITTEN),
        ("evaluate", BOUND, "first", OUTSIDE),
        ("evaluate a tile", BARRIER, "all", UNWRITTEN),
        ("evaluate a tile", LOAD_MASK, "all", OUTSIDE),
        ("evaluate backward", LOAD_MASK, "first", OUTSIDE),
        ("sample", STORE_MASK, "all", f"{OUTSIDE}|{RACE}"),
        ("convert", STORE_MASK, "last", OUTSIDE),
        ("convert", BOUND, "all", OUTSIDE),
        ("tokens", (r"min\.u32", "max.u32"), "all", "lanes store different values"),
        ("tokens", STORE_MASK, "last", OUTSIDE),
        ("tokens", LOAD_MASK, "last", OUTSIDE),
        ("lstm", BARRIER, "first", UNWRITTEN),
        ("lstm", BARRIER, "last", ASYNCHRONOUS),
        ("lstm", WAIT, "first", ASYNCHRONOUS),
        ("lstm", LATER_WAIT, "last", ASYNCHRONOUS),
        ("lstm", STORE_MASK, "all", OUTSIDE),
        ("lstm", ALIGNMENT, "last", MISALIGNED),
        ("lstm backward", BARRIER, "last", ASYNCHRONOUS),
        ("lstm backward", LATER_WAIT, "first", ASYNCHRONOUS),
        ("lstm backward", LOAD_MASK, "last", OUTSIDE),
    ],
)  # fmt: skip
def test_a_fault_is_seen(name, mutation, which, expected):
    call, kernel = CALLS[name]
    results = call()
    with emulator.mutated(kernel, changed(*mutation, which)):
        torch.manual_seed(0)
        if expected is not WRONG:
            with pytest.raises(RuntimeError, match=expected):
                call()
            return
        try:
            wrong = call()
        except RuntimeError:
            # What lies behind the tensor was no other one.
            return
    assert not all(torch.equal(a, b) for a, b in zip(wrong, results, strict=True))


@pytest.mark.parametrize("direction", [2, 3], ids=["upwards", "downwards"])
@pytest.mark.parametrize("actions", [9, 33])
def test_the_largest_errors_of_approximate_instructions(direction, actions):
    logits, index = 3 * torch.randn(60, actions), torch.randint(actions, (60,))
    with emulator.option(approximate=direction):
        check_categorical(lambda x: (index, *ops.evaluate_actions(x, index)), logits)
        inputs, resets = lstm_inputs(5, 3, 40, torch.float32, "some")
        check_lstm_layer(ops.lstm_layer, inputs, resets)


@pytest.mark.parametrize("name", CALLS)
def test_programs_may_run_in_any_order(name):
    call = CALLS[name][0]
    results = call()
    torch.manual_seed(0)
    with emulator.option(backwards=1):
        assert all(map(torch.equal, call(), results))
