"""Weights sharded over two processes (FSDP2): clipped, regularised and measured as the same weights on one."""

import socket

import pytest
import torch
from agents_for_tests import Net
from torch import distributed, multiprocessing, nn

from metta_fastagent import ops

RANKS = 2
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without distributed")


def make_net(**kwargs):
    """Two layers, the second one with an odd number of rows, so that the shards differ in size."""
    torch.manual_seed(0)
    return Net([nn.Linear(6, 8), nn.Linear(8, 7)], **kwargs)


def sharded(**kwargs):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = make_net(**kwargs)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    return net


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def refuse_partial_sums():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    partial = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (RANKS,)), [Partial()])
    with pytest.raises(
        ValueError, match=r"^tensors\[0\]: got a DTensor with placements .* expected Shard or Replicate"
    ):
        ops.clip_weights_([partial], [1.0])


def compare(rank, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        for mode in ("absolute", "init_scaled"):
            one, many = make_net(clip_range=0.2, clip_mode=mode), sharded(clip_range=0.2, clip_mode=mode)
            one.clip_weights()
            many.clip_weights()
            for expected, found in zip(one.parameters(), many.parameters(), strict=True):
                assert torch.equal(whole(found.detach()), expected.detach()), mode
        one, many = make_net(), sharded()
        many.update_l2_init_weight_copy()
        with torch.no_grad():
            for agent in (one, many):
                for param in agent.parameters():
                    param.mul_(1.5)
        losses = [agent.l2_init_loss() for agent in (one, many)]
        torch.testing.assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
        for expected, found in zip(one.parameters(), many.parameters(), strict=True):
            if expected.grad is not None:
                torch.testing.assert_close(whole(found.grad), expected.grad)
        assert many.layers[0].weight.grad is not None
        for expected, found in zip(one.compute_weight_metrics(), many.compute_weight_metrics(), strict=True):
            assert found.pop("name") == expected.pop("name")
            assert found == pytest.approx(expected, rel=1e-5)
        refuse_partial_sums()
    finally:
        distributed.destroy_process_group()


def test_two_ranks_compute_what_one_process_does():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(compare, args=(port,), nprocs=RANKS)
