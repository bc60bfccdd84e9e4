"""What ``test_distributed`` runs in two processes: functions named check_..., each run by both.

``python3 two_processes.py RANK FOLDER DEVICE`` is one of them.  It writes what failed to FOLDER.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.utils import distributed

WORLD = 2
IGNORED = -100


def of_all(rank: int, *shape: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """This process's random fp64 tensor, which wants a gradient, and those of all processes."""
    gen = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(WORLD)]
    tensors = [x.to(device).requires_grad_() for x in tensors]
    return tensors[rank].detach().clone().requires_grad_(), tensors


def check_all_gather(rank: int, device: str) -> None:
    mine, tensors = of_all(rank, 3, 4, device=device)
    weight = torch.arange(1.0, 25.0, device=device).view(6, 4) * (rank + 1)
    out = distributed.all_gather(mine, dist.group.WORLD)
    assert torch.equal(out, torch.cat(tensors))
    out.backward(weight.double())
    total = torch.arange(1.0, 25.0, device=device).view(6, 4) * 3
    assert torch.equal(mine.grad, total.double()[3 * rank : 3 * rank + 3])
    integers, handle = distributed.all_gather_raw(torch.full((2,), rank, device=device), None)
    assert integers.tolist() == [0, 0, 1, 1] and handle is None


def check_reduce_scatter(rank: int, device: str) -> None:
    mine, tensors = of_all(rank, 4, 3, device=device)
    out = distributed.reduce_scatter(mine, None)
    torch.testing.assert_close(out, sum(tensors)[2 * rank : 2 * rank + 2].detach())
    out.backward(torch.full((2, 3), rank + 1.0, device=device).double())
    assert mine.grad[:, 0].tolist() == [1, 1, 2, 2]
    try:
        distributed.reduce_scatter(mine[:3], None)
    except RuntimeError as error:
        assert "multiple of the group's size; got (3, 3) in a group of 2" in str(error)
    else:
        raise AssertionError("three rows cannot be divided by two")


def check_all_reduce(rank: int, device: str) -> None:
    mine, tensors = of_all(rank, 4, 3, device=device)
    out = distributed.all_reduce(mine, None)
    torch.testing.assert_close(out, sum(tensors).detach())
    assert torch.equal(mine, tensors[rank])
    out.backward(torch.full_like(out, 3.0))
    assert (mine.grad == 3).all()
    summed, _ = distributed.all_reduce_raw(mine.detach(), None)
    assert summed.data_ptr() == mine.data_ptr() and torch.equal(summed, out)


def check_async(rank: int, device: str) -> None:
    mine, tensors = of_all(rank, 4, 3, device=device)
    results = []
    for function in ("all_gather_raw", "reduce_scatter_raw", "all_reduce_raw"):
        # Not contiguous: the copy that is sent must live until it is.
        x = mine.detach().t().contiguous().t()
        out, handle = getattr(distributed, function)(x, None, async_op=True)
        handle.wait()
        results.append(out)
    total = sum(tensors).detach()
    assert torch.equal(results[0], torch.cat(tensors))
    torch.testing.assert_close(results[1], total[2 * rank : 2 * rank + 2])
    torch.testing.assert_close(results[2], total)


def check_second_derivative(rank: int, device: str) -> None:
    """Of sum(gather(x)^3) over both processes: 6 x, times the two that sum it."""
    mine, _ = of_all(rank, 2, 2, device=device)
    loss = distributed.all_gather(mine, None).pow(3).sum()
    (grad,) = torch.autograd.grad(loss, mine, create_graph=True)
    torch.testing.assert_close(grad, 2 * 3 * mine.square())
    (second,) = torch.autograd.grad(grad.sum(), mine)
    torch.testing.assert_close(second, 2 * 2 * 6 * mine / 2)


def check_compiled(rank: int, device: str) -> None:
    mine, tensors = of_all(rank, 3, 4, device=device)

    def step(x: Tensor) -> Tensor:
        return (distributed.all_gather(2 * x, dist.group.WORLD) * 3).sum()

    loss = torch.compile(step, backend="aot_eager")(mine)
    torch.testing.assert_close(loss, 6 * sum(x.sum() for x in tensors).detach())
    loss.backward()
    assert (mine.grad == 12).all()


def check_shared_parameters(rank: int, device: str) -> None:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).to(device)
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
        parameter._shared_params = True
    if rank == 1:
        model.append(nn.Linear(3, 2).to(device))  # what only one has is not shared
    before = [p.detach().clone() for p in model.parameters()]
    distributed.sync_shared_params(model, dist.group.WORLD)
    after = list(model.parameters())
    assert torch.equal(after[0], before[0])
    for old, new in zip(before[2:4], after[2:4]):
        first = distributed.all_gather(old, None)[:3]
        assert torch.equal(new, first) and torch.equal(old, first) == (rank == 0)


def check_gradients_of_a_divided_sequence(rank: int, device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3).double()).to(device)
    for parameter in (*model[1].parameters(), model[2].weight, model[0].bias):
        parameter._sequence_parallel = True
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, rank + 1.0)
    model[0].bias.grad = None
    distributed.allreduce_sequence_parallel_grad(model, dist.group.WORLD)
    assert (model[1].weight.grad == 3).all() and (model[2].weight.grad == 3).all()
    assert (model[0].weight.grad == rank + 1).all() and model[0].bias.grad is None


def check_cross_entropy_of_a_divided_vocabulary(rank: int, device: str) -> None:
    gen = torch.Generator().manual_seed(3)
    everything = 4 * torch.randn(12, 2 * 501, generator=gen)
    labels = torch.randint(2 * 501, (12,), generator=gen).to(device)
    labels[::4] = IGNORED
    dlosses = torch.randn(12, generator=gen).to(device)
    part = slice(501 * rank, 501 * rank + 501)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rounded = everything.to(dtype).to(device)
        exact = rounded.double().clone().requires_grad_()
        for smoothing, scale, z, inplace in ((0, 1, 0, True), (0.1, 0.7, 0.01, False)):
            scaled = scale * exact
            want = F.cross_entropy(scaled, labels, reduction="none", label_smoothing=smoothing)
            want_z = z * scaled.logsumexp(1).square() * (labels != IGNORED)
            (grad,) = torch.autograd.grad(want + want_z, exact, dlosses.double())
            mine = rounded[:, part].clone().requires_grad_()
            losses, z_losses = cross_entropy_loss(
                *(mine, labels, None, smoothing, scale, z, IGNORED, inplace, dist.group.WORLD)
            )
            eps = torch.finfo(dtype).eps
            wide = losses.dtype
            torch.testing.assert_close(losses.double(), want + want_z, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(z_losses.double(), want_z, rtol=1e-5, atol=1e-5)
            losses.backward(dlosses.to(wide))
            torch.testing.assert_close(mine.grad.double(), grad[:, part], rtol=eps, atol=1e-5)


def check_lse_of_a_divided_vocabulary(rank: int, device: str) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(device)
    mine = logits[:, 4 * rank : 4 * rank + 4]
    labels = torch.tensor([0, 7, 3, 4, IGNORED], device=device)
    module = CrossEntropyLoss(process_group=dist.group.WORLD)
    torch.testing.assert_close(module(mine, labels), F.cross_entropy(logits, labels))
    with_lse = module(mine, labels, precomputed_lse=mine.logsumexp(1))
    torch.testing.assert_close(with_lse, F.cross_entropy(logits, labels))


def check_errors_of_a_divided_vocabulary(rank: int, device: str) -> None:
    mine = torch.randn(2, 4, device=device, requires_grad=True)
    options = dict(process_group=dist.group.WORLD)
    losses, _ = cross_entropy_loss(mine, torch.tensor([0, 7], device=device), **options)
    try:
        torch.autograd.grad(losses.sum(), mine, create_graph=True)
    except RuntimeError as error:
        assert "process_group" in str(error) and "create_graph" in str(error)
    else:
        raise AssertionError("there is no second derivative")
    if device == "cpu":
        try:
            cross_entropy_loss(mine, torch.tensor([0, 8]), **options)
        except RuntimeError as error:
            assert "labels must be in [0, 8)" in str(error)
        else:
            raise AssertionError("8 is no class")


def check_compiled_cross_entropy_of_a_divided_vocabulary(rank: int, device: str) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(device)
    mine = logits[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
    labels = torch.tensor([0, 7, 3, 4, IGNORED], device=device)
    module = CrossEntropyLoss(process_group=dist.group.WORLD)
    loss = torch.compile(lambda x: module(2 * x, labels), backend="aot_eager")(mine)
    torch.testing.assert_close(loss, F.cross_entropy(2 * logits, labels))
    loss.backward()
    exact = logits.clone().requires_grad_()
    F.cross_entropy(2 * exact, labels).backward()
    torch.testing.assert_close(mine.grad, exact.grad[:, 4 * rank : 4 * rank + 4])


CHECKS = [name for name in dir() if name.startswith("check_")]


def main(rank: int, folder: Path, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    torch.set_num_threads(1)
    backend = "gloo" if device == "cpu" else "nccl"
    store = dist.FileStore(str(folder / "store"), WORLD)
    patience = timedelta(seconds=60)
    dist.init_process_group(backend, store=store, rank=rank, world_size=WORLD, timeout=patience)
    failures = {}
    for name in CHECKS:
        try:
            globals()[name](rank, device)
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
