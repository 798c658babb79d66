"""A layer with its own memory in a loop of one's own, over several processes: DistributedDataParallel and FSDP2 learn
what one process learns from all the rows."""

import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from warm_start import WarmStart

from dsmr import DSMRAttention

CHILD = """
import sys, torch, torch.distributed as dist
from test_several_ranks import Stack, rows, trained

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world, how = dist.get_rank(), dist.get_world_size(), sys.argv[1]
model = Stack()
if how == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    wrapped = model
else:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
trained(wrapped, rows().chunk(world)[rank])
found = {name: p.full_tensor() if how == "fsdp" else p for name, p in model.state_dict().items()}
if rank == 0:
    torch.save(found, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


class Stack(nn.Module):
    """Two layers, whose memories the loop carries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = ({"horizon": 12, "n_kv_heads": 1}, {"horizon": 4, "qk_norm": True, "bias": True})
        self.layers = nn.ModuleList(DSMRAttention(16, 2, segment_length=8, **kind) for kind in kinds).double()

    def forward(self, x, memories):
        kept = []
        for layer, memory in zip(self.layers, memories, strict=True):
            y, memory = layer(x, memory)
            x = x + y
            kept.append(memory)
        return x, kept


def rows() -> torch.Tensor:
    """(4, 24, 16): three segments of four streams."""
    return torch.randn(4, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: torch.Tensor) -> None:
    """Two passes over the segments, a step each segment, the memories carried."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        memories = [None, None]
        for segment in x.split(8, 1):
            y, memories = model(segment, memories)
            loss = (y - segment.roll(1, -1)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_learn_what_one_process_learns_from_all_rows(how: str, tmp_path: Path, warm_start: WarmStart) -> None:
    """Slow: two processes that meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    code = f"import sys\nsys.path[:0] = {[str(path) for path in Path(__file__).parents[:2]]}\n{CHILD}"
    processes = [
        warm_start.start(
            [how, str(tmp_path / "found.pt")],
            code=code,
            environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    ended = [process.wait() for process in processes]
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    alone, start = Stack(), Stack()
    trained(alone, rows())
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)
    assert (alone.layers[0].qkv.weight - start.layers[0].qkv.weight).abs().max() > 1e-3
