"""Exchange between processes: unequal slices, gradients through the gather, means weighted by their share."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from ssl_kit.methods import simclr
from ssl_kit.training import joining
from ssl_kit.training.distributed import (
    Word,
    all_gather,
    counts,
    exchange,
    leave,
    others,
    rank,
    settle,
    share_weight,
    world_size,
)

COUNTS = (5, 2, 4, 1)  # rows of the ranks


def rows():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(COUNTS), 3, generator=generator, dtype=torch.float64)
    return images, torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()


def between_rows(z):
    """A loss that is no mean over rows: every pair counts."""
    return (z @ z.T).square().sum() / len(z) ** 2


def one_rank(number, world, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=world)
    images, weight = rows()
    slices = images.split([*COUNTS[: world - 1], sum(COUNTS[world - 1 :])])
    own = slices[number]
    assert (rank(), world_size()) == (number, world) and counts(len(own)) == [len(part) for part in slices]
    assert torch.equal(all_gather(own), images)
    assert torch.equal(others(own), torch.cat([*slices[:number], *slices[number + 1 :]]))
    results = []
    for loss in (
        lambda: (own @ weight).tanh().square().mean() * share_weight(len(own)),  # a mean over images: MAE, VAE
        lambda: between_rows(all_gather(own @ weight)),  # every process computes the loss of the joined batch
        *(lambda whole=whole: contrasted(own @ weight, own, whole) * share_weight(len(own)) for whole in (False, True)),
    ):
        weight.grad = None
        value = loss()
        value.backward()
        value = value.detach()
        torch.distributed.all_reduce(weight.grad)
        torch.distributed.all_reduce(value)
        results.append((value.item() / world, (weight.grad / world).numpy()))
    told = exchange(Word(signal=number, due=number == 0, seconds=0.5 * number))
    assert told == [(i, i == 0, 0.5 * i) for i in range(world)]
    settle(counts(len(own)))
    gather, torch.distributed.all_gather = torch.distributed.all_gather, None  # nothing more is exchanged
    assert counts(2 * len(own), per_image=2) == [2 * len(part) for part in slices]
    assert share_weight(len(own)) == len(own) * world / len(images)
    torch.distributed.all_gather = gather
    if number == 0:
        queue.put(results)
    torch.distributed.barrier()
    leave()


def contrasted(z, images, whole):
    """NT-Xent of two views, with groups: by the whole matrix, or in blocks of it."""
    simclr._fits = lambda *_: whole
    group = (images[:, 0] > 0).long() - (images[:, 1] > 0).long()  # -1, 0 or 1
    return simclr.nt_xent(torch.cat([z, z.flip(1)]), 0.5, group=group)


@pytest.mark.parametrize("world", [2, 3])
def test_unequal_slices_equal_one_process(world, free_port, monkeypatch):
    monkeypatch.setattr(simclr, "_fits", simclr._fits)
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(one_rank, args=(world, free_port, queue), nprocs=world)
    found = queue.get()
    images, weight = rows()
    losses = (lambda z: z.tanh().square().mean(), between_rows, *[lambda z: contrasted(z, images, False)] * 2)
    for (value, gradient), loss in zip(found, losses, strict=True):
        weight.grad = None
        wanted = loss(images @ weight)
        wanted.backward()
        assert value == pytest.approx(wanted.item(), rel=1e-12)
        assert (torch.from_numpy(gradient) - weight.grad).abs().max() <= 1e-12 * weight.grad.abs().max()


def test_each_try_meets_in_a_room_of_its_own():
    store = torch.distributed.HashStore()  # torchrun's outlives the tries
    rooms = []
    for present in (4, 2, 4):  # the second try lacks two of its processes, as when a machine dies while all begin
        former = store.get("token/1") if rooms else b""
        with ThreadPoolExecutor(4) as pool:
            entered = [pool.submit(joining._room, store, number, 4) for number in range(1, present)]
            if present == 4:
                rooms.append(joining._room(store, 0, 4))
                assert {one.result(60) for one in entered} == {rooms[-1]}
            else:  # lets the one that waits go, by its own token: answered by the former try's it waits for 30 minutes
                while (token := store.get("token/1")) == former:
                    time.sleep(0.01)
                store.set(token.decode(), "nowhere")
    assert len(set(rooms)) == 2


def test_one_process_needs_no_group():
    images, _ = rows()
    assert all_gather(images) is images and others(images).shape == (0, 3)
    assert (rank(), world_size(), share_weight(7), counts(7)) == (0, 1, 1.0, [7])


def test_gradients_of_the_methods_equal_those_of_one_process(tmp_path):
    """The quick benchmark: DDP over 1 to 4 processes, equal and unequal parts, gradient caching, accumulation."""
    program = Path(__file__).parents[2] / "benchmarks" / "faults" / "distributed.py"
    options = ["--quick", "--only", "D1,D2,D7", "--json", str(tmp_path / "rows.json")]
    subprocess.run([sys.executable, str(program), *options], check=True, timeout=300)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["id"] for row in rows] == ["D1", "D2", "D7"]
    assert all(row["survived"] == row["tried"] >= 2 for row in rows), rows
