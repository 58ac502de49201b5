"""Collectives that are right under autograd, and the placing of a model on its device.

All of them do the obvious thing without a process group, so losses can be called anywhere.
"""

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.running.errors import UserError
from common.running.progress import say


def world_size():
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def limit_waits(seconds):
    """From now on a rank that waits longer for the others ends with an error; all ranks call it."""
    if dist.is_initialized():
        older = dist.distributed_c10d._set_pg_timeout  # before torch 2.12
        getattr(dist, "set_timeout", older)(timedelta(seconds=seconds))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        # Every rank's loss depends on this rank's x: their gradients add up.
        grad = grad.clone(memory_format=torch.contiguous_format)  # not ours to change
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def all_gather_with_grad(x):
    """x: (B, ...) of one shape on all ranks -> (B * ranks, ...) and where this rank's rows start.

    The gradient of x is that of the sum of all ranks' losses; DistributedDataParallel then averages
    the parameters' gradients over ranks, so together they are those of the mean loss.
    """
    if world_size() == 1:
        return x, 0
    return _AllGather.apply(x), dist.get_rank() * len(x)


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def all_reduce_mean(x):
    """Mean of x over ranks, seen by autograd; the same on all ranks."""
    return x if world_size() == 1 else _AllReduceMean.apply(x)


def all_reduce_means(numbers):
    """{name: float or scalar tensor of this rank} -> {name: float}, the means over ranks."""
    return {k: float(all_reduce_mean(torch.as_tensor(v).double())) for k, v in numbers.items()}


def all_reduce_sum_(x):
    """Sum of x over ranks, in place, without autograd."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_unpadded(x):
    """x: (n, ...) CPU tensor, n may differ between ranks -> (sum of n, ...), in rank order."""
    if world_size() == 1:
        return x
    length = torch.tensor([len(x)])
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


def has_batchnorm(model):
    """Whether any of its layers is a BatchNorm."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def to_device(model, device, batch_size):
    """On CUDA: channels_last, and BatchNorm over all ranks (gloo on CPU has no such collective).

    batch_size: over all ranks. Raises UserError where it leaves a BatchNorm a single image.
    """
    images = batch_size if device.type == "cuda" else batch_size // world_size()
    if images < 2 and has_batchnorm(model):
        raise UserError(
            f"optimization.batch_size: {batch_size} over {world_size()} ranks leaves BatchNorm one "
            "image, and it needs two"
        )
    model = model.to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        if world_size() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def compiles(compile_model, device):
    """run.compile, True, False or "auto" (on CUDA) -> whether to compile."""
    return compile_model is True or (compile_model == "auto" and device.type == "cuda")


def wrap(model, device, compile_model, deterministic):
    """Compile in place, then DistributedDataParallel where there are several ranks.

    compile_model: True, False or "auto": on CUDA, unless a SyncBatchNorm, around which a graph
    breaks, would leave it in dozens of pieces. A model without anything to train stays bare.
    deterministic: on CUDA, keep the gradients' places fixed, at some cost in speed; on CPU always.
    """
    trains = any(p.requires_grad for p in model.parameters())
    syncs = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    if compile_model == "auto" and device.type == "cuda" and syncs:
        say("run.compile: auto leaves the model: the BatchNorm of several GPUs breaks its graph")
    elif compiles(compile_model, device):
        model.compile()
    if world_size() == 1 or not trains:
        return model
    # After its first step DistributedDataParallel moves the gradients to other places of its
    # buckets, and a sum over three or more ranks depends on the place: a resumed run, which has its
    # first step later, would differ. Looking for unused parameters keeps it from doing so.
    fixed = deterministic or device.type == "cpu"
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=fixed,
    )


def broadcast_buffers(model):
    """Rank 0's buffers to all ranks: without SyncBatchNorm their running statistics differ."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def mixed_precision(precision, device):
    """precision: fp16 | bf16 | fp32 -> (autocast context, gradient scaler).

    The scaler does something for fp16 on CUDA only. On CPU fp16 runs as fp32. On CUDA, convolutions
    in fp32 may use TF32, as torch does unless told otherwise; matrix products, so losses, do not.
    """
    half = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if device.type == "cpu" and precision == "fp16":
        half = torch.float32
    autocast = torch.autocast(device.type, dtype=half, enabled=half != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=half == torch.float16)
