"""Which images a step sees, and which stand in for those that cannot be decoded: pure functions of (seed, step)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.core.options import dashed
from ssl_kit.core.random import permutation, uniform_array
from ssl_kit.data.sources import Blocks

_BLOCKS = 198  # stream of the shuffle of blocks
_PARTNER = 199  # stream of the second view, which its own draws do not reach; see ssl_kit/core/random.py


class Planned(NamedTuple):
    """A batch before it is made.

    `rows`: (B,) positions in the source. `spare`: of a place in the batch, the positions that stand in for its image,
    one after the other while it cannot be decoded; without it, and after the last one, the row is dropped.
    """

    epoch: int
    rows: np.ndarray
    spare: Callable[[int], Iterator[int]] | None = None

    def substitutes(self, place: int) -> Iterator[int]:
        """For the image at `place`."""
        return self.spare(place) if self.spare else iter(())

    def part(self, rows: np.ndarray, first: int) -> Planned:
        """The part of the batch that begins at place `first`."""
        return Planned(self.epoch, rows, lambda place: self.substitutes(first + place))


class TrainingPlan:
    """Which images each step sees: a pure function of (seed, step), so that resuming needs the step alone.

    An epoch shows every image once, shuffled anew, in steps of nearly equal size (they differ by at most one image, so
    that no image is left out and no step is tiny; steps of one image are for those who ask for them). Each process
    takes a contiguous part of every step; their sizes differ by at most one image too. What a step sees does not depend
    on the number of processes, nor do the images that stand in for those that cannot be decoded.

    Args:
        count: images of the source.
        batch_size: images per process and step, at most.
        seed: of the run.
        rank: this process's number.
        world_size: number of processes.
        option: that the batch size came from, for messages.
        together: images of a step over all processes, at most, if not `batch_size` for each.
        blocks: of the source: an epoch shuffles them, then the images within windows of as many as are held; None
            shuffles all images among each other.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        option: Literal["batch_size", "contrastive_batch"] = "batch_size",
        together: int | None = None,
        blocks: Blocks | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"{dashed(option)} {batch_size}: wanted at least 1")
        together = together or batch_size * world_size
        if count < together:
            raise UserError(
                f"{count} images are fewer than one step of {together} ({option} {batch_size} x {world_size} "
                f"processes); lower {dashed(option)} to at most {count // world_size}, or add images"
            )
        self.count, self.seed, self.rank, self.world_size = count, seed, rank, world_size
        self.blocks = blocks
        steps = -(-count // together)
        self.steps_per_epoch = min(steps, count // min(2, together))  # an odd count by twos ends in a step of three
        if count // self.steps_per_epoch < world_size:  # the smallest step
            raise UserError(
                f"{count} images in {self.steps_per_epoch} steps leave some of {world_size} processes without any; "
                f"raise {dashed(option)} from {batch_size} to 2"
            )

        self._bounds = np.linspace(0, count, self.steps_per_epoch + 1).round().astype(np.int64)  # of an epoch's steps

    def images_of_each(self, step: int) -> list[int]:
        """Of step number `step`, of every process, in rank order."""
        step %= self.steps_per_epoch
        share, more = divmod(int(self._bounds[step + 1] - self._bounds[step]), self.world_size)
        return [share + (number < more) for number in range(self.world_size)]  # as np.array_split does

    @cached_property
    def sizes(self) -> set[int]:
        """How many images the steps of this process have: n, or n and n + 1."""
        return {self.images_of_each(step)[self.rank] for step in range(self.steps_per_epoch)}

    def batches(self, start: int = 0) -> Iterator[Planned]:
        """All steps from number `start` on, without end."""
        for epoch in itertools.count(start // self.steps_per_epoch):
            order = self._order(epoch)
            for step in range(start - epoch * self.steps_per_epoch, self.steps_per_epoch):
                begin, end = self._bounds[step : step + 2]
                whole = Planned(epoch, order[begin:end], _others(order, begin, end))
                parts = np.array_split(whole.rows, self.world_size)
                yield whole.part(parts[self.rank], sum(map(len, parts[: self.rank])))
            start = (epoch + 1) * self.steps_per_epoch

    def _order(self, epoch: int) -> np.ndarray:
        """(N,) every image once; a single window is the shuffle of all."""
        order = permutation(self.seed, epoch, self.count)
        if self.blocks is None:
            return order
        numbers, of = np.unique(self.blocks.of, return_inverse=True)
        window = np.argsort(permutation(self.seed, epoch, len(numbers), _BLOCKS)) // self.blocks.held
        return order[np.argsort(window[of[order]], kind="stable")]


def _others(order: np.ndarray, begin: int, end: int) -> Callable[[int], Iterator[int]]:
    """The images of an epoch's other steps, from the next one on, dealt out to the places of `order[begin:end]`."""
    size = end - begin
    return lambda place: (int(order[(end + number) % len(order)]) for number in range(place, len(order) - size, size))


def following(plan: Sequence[np.ndarray], number: int) -> Callable[[int], Iterator[int]]:
    """The images of the batches after batch `number`, dealt out to its places."""
    count = len(plan[number])
    return lambda place: itertools.islice(itertools.chain(*plan[number + 1 :]), place, None, count)


class Partners:
    """Another image of each image's group, a pure function of (seed, epoch, position); itself where it is alone.

    Args:
        groups: (N,) int64 of a source, -1 alone.
    """

    def __init__(self, groups: np.ndarray):
        self.groups = groups
        self._order = np.argsort(groups, kind="stable")  # members lie together
        self._place = np.argsort(self._order)  # of each image among them
        _, first, of, count = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
        self._first = self._place[first][of]  # (N,) where the group of each begins
        self._others = np.where(groups >= 0, count[of] - 1, 0)  # (N,) members beside it

    def draw(self, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
        """(R,) positions of the partners of `rows`, every other member of a group equally often."""
        drawn = uniform_array(seed, epoch, rows, _PARTNER, 1)[:, 0].astype(np.float64)
        others, own = self._others[rows], self._place[rows] - self._first[rows]
        chosen = np.floor(drawn * others).astype(np.int64)
        chosen += chosen >= own  # itself is left out
        return np.where(others > 0, self._order[self._first[rows] + np.minimum(chosen, others)], rows)
