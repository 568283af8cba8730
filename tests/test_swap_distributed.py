"""fastdl.accelerate with torch.distributed: wrapping by FSDP and DDP after the swap and before it, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing, nn

import fastdl
from fastdl import swap

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch was built without gloo"
)
STEPS = 10


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))
    return x, x.roll(1, dims=-1)


def shard(model: nn.Module) -> nn.Module:
    """FSDP as its documentation has it: every block, then the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_norms(model: nn.Module) -> nn.Module:
    """A norm as an FSDP unit of its own, which changes the class of the swapped layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.layers[0].norm1, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    return shard(model)


WRAPS = {"fully_shard": shard, "fully_shard of a norm": shard_norms, "ddp": nn.parallel.DistributedDataParallel}


def losses(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def worker(rank: int, world: int, store: str, folder: str) -> None:
    """Trains every wrapped model on this rank's part of the batch; rank 0 saves the mean losses."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        x, target = (tensor.chunk(world)[rank] for tensor in data())
        found = {}
        for name, wrap in WRAPS.items():
            model = encoder()
            fastdl.accelerate(model)
            own = torch.tensor(losses(wrap(model), x, target))
            distributed.all_reduce(own)
            found[name] = own / world
        if rank == 0:
            torch.save(found, f"{folder}/losses.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_train_as_one(native, tmp_path):
    """Two ranks with half of the batch each: the losses of the unswapped model on all of it."""
    store = tmp_path / "store"
    multiprocessing.spawn(worker, args=(2, str(store), str(tmp_path)), nprocs=2)
    plain = torch.tensor(losses(encoder(), *data()))
    assert plain[-1] < 0.8 * plain[0]
    for name, found in torch.load(tmp_path / "losses.pt").items():
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["swap", "wrap"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_swap_and_wrap(native, alone, wrap, first):
    """In both orders: the layers are called, evaluation too; restore gives the layers back and leaves the wrapping."""
    model, (x, target) = encoder(), data()
    if first == "swap":
        report = fastdl.accelerate(model)
        wrapped = WRAPS[wrap](model)
    else:
        wrapped = WRAPS[wrap](model)
        report = fastdl.accelerate(wrapped)
    # fully_shard gives what it wraps a class of its own, which is then not known; what is inside is swapped.
    left = {layer.reason.split(" that")[0] for layer in report.left}
    expected = set()
    if first == "wrap" and wrap.startswith("fully_shard"):
        expected.add("FSDPTransformerEncoderLayer is a subclass")
    if first == "wrap" and wrap == "fully_shard of a norm":
        expected.add("FSDPLayerNorm is a subclass")
    assert left == expected and len(report.swapped) == 9 - len(report.left)
    torch.testing.assert_close(losses(wrapped, x, target), losses(encoder(), x, target), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = wrapped.eval()(x)
    fastdl.restore(wrapped)
    assert not [
        module for module in model.modules() if isinstance(module, fastdl.nn.LayerNorm) or swap._MARK in vars(module)
    ]
    assert all(isinstance(layer.norm1, nn.LayerNorm) for layer in model.layers)
    if wrap.startswith("fully_shard"):
        assert type(model.layers[0]).__name__ == "FSDPTransformerEncoderLayer"
    if wrap == "fully_shard of a norm":
        assert type(model.layers[0].norm1).__name__ == "FSDPLayerNorm"
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)
