import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import nn

from common.distributed import (
    all_gather_with_grad,
    all_reduce_mean,
    broadcast_buffers,
    gather_unpadded,
    mixed_precision,
    to_device,
    wrap,
)
from common.running.errors import UserError

CPU = torch.device("cpu")


def collectives():
    rank = dist.get_rank()
    x = (torch.arange(6.0).view(3, 2) + 10 * rank).requires_grad_()
    everything, first = all_gather_with_grad(x)
    weight = torch.arange(12.0).view(6, 2) * (rank + 1)  # each rank's loss weighs differently
    (everything * weight).sum().backward()
    y = torch.tensor([1.0 + rank], requires_grad=True)
    mean = all_reduce_mean(y)
    (mean * (rank + 1)).sum().backward()
    uneven = gather_unpadded(torch.full((rank * 2 + 1, 2), rank))
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(rank)
    broadcast_buffers(layer)
    found = [everything, x.grad, mean, y.grad, uneven, layer.running_mean]
    return [first, *(t.detach() for t in found)]


def test_collectives_and_their_gradients(tmp_path):
    for rank, found in enumerate(on_ranks(2, tmp_path / "r", collectives)):
        first, everything, x_grad, mean, y_grad, uneven, running_mean = found
        assert first == 3 * rank
        assert torch.equal(
            everything, torch.cat([torch.arange(6.0), torch.arange(6.0) + 10]).view(6, 2)
        )
        # d/dx of the sum of both ranks' losses: weights 1 + 2 = 3 times the position
        assert torch.equal(x_grad, 3 * torch.arange(12.0).view(6, 2)[first : first + 3])
        assert mean.item() == 1.5 and y_grad.item() == (1 + 2) / 2
        assert uneven.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert running_mean.tolist() == [0, 0]


def test_without_a_process_group_they_do_the_obvious():
    x = torch.ones(3, 2, requires_grad=True)
    everything, first = all_gather_with_grad(x)
    assert everything is x and first == 0 and all_reduce_mean(x) is x and gather_unpadded(x) is x


def test_on_cpu_fp16_is_fp32_and_bf16_is_bf16():
    for precision, kind in (
        ("fp16", torch.float32),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        autocast, scaler = mixed_precision(precision, CPU)
        for _ in range(2):  # the same context serves every step
            with autocast:
                assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == kind
        assert not scaler.is_enabled()


def test_a_model_on_one_cpu_stays_bare():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert to_device(model, CPU, 8) is model and wrap(model, CPU, "auto", False) is model
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def test_on_cuda_batchnorm_is_over_all_ranks_and_memory_is_channels_last(monkeypatch):
    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    monkeypatch.setattr(nn.Module, "to", _to_memory_format_only)
    placed = to_device(model, torch.device("cuda", 0), 2)
    assert isinstance(placed[1], nn.SyncBatchNorm)
    assert placed[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_auto_compiles_on_cuda_unless_a_syncbatchnorm_breaks_the_graph(capsys):
    cuda = torch.device("cuda", 0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def compiled(model, how):
        model._compiled_call_impl = None
        return wrap(model, cuda, how, False)._compiled_call_impl is not None

    assert compiled(plain, "auto") and compiled(plain, True) and not compiled(plain, False)
    assert not capsys.readouterr().err
    of_all_ranks = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert not compiled(of_all_ranks, "auto")
    assert capsys.readouterr().err.count("run.compile: auto") == 1
    assert compiled(of_all_ranks, True)


def test_a_batchnorm_needs_two_images(monkeypatch):
    """A rank's own on CPU, all ranks' on CUDA."""
    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    monkeypatch.setattr(nn.Module, "to", _to_memory_format_only)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for device, too_few in ((CPU, 2), (torch.device("cuda", 0), 1)):
        with pytest.raises(UserError, match=f"optimization.batch_size: {too_few} over 2 ranks"):
            to_device(model, device, too_few)
    to_device(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4)), CPU, 2)


def _to_memory_format_only(self, device=None, memory_format=None, _to=nn.Module.to):
    return self if memory_format is None else _to(self, memory_format=memory_format)
