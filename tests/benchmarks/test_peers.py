"""The README's first table: its rows can be measured, and both sides of the masked head give the same gradient."""

import pytest
import torch

pytest.importorskip("gymnasium", reason="gymnasium is an extra")

from benchmarks import peers


def test_one_round_of_each_row_gives_both_figures(monkeypatch):
    monkeypatch.setattr(peers, "ROWS", 32)
    monkeypatch.setattr(peers, "STEPS", 4)
    gradients = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: gradients.append(grad(*arguments)))
    for figures in (peers.masked_heads(rounds=1), peers.lstms(rounds=1)):
        assert set(figures) == {"ops", "plain"} and min(figures.values()) > 0
    # rounds and sides in turns, masked head first
    for ours, theirs in zip(gradients[::2], gradients[1::2], strict=True):
        for mine, plain in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def test_a_loop_that_is_not_installed_is_left_out(monkeypatch, capsys):
    def missing():
        raise ImportError("not here")

    monkeypatch.setattr(peers, "sb3_contrib", missing)
    monkeypatch.setattr(peers, "pufferlib", missing)
    assert set(peers.loops(rounds=1)) == {"metta_fastagent.ops", "CleanRL's style"}
    assert "not here" in capsys.readouterr().out
