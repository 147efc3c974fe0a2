"""Which image of the training split comes when: a function of the step's number, so that resuming needs no state."""

from __future__ import annotations

import numpy as np

# Beside (seed, epoch), what a row of random numbers is for; the patch sizes of `TrainLoader` have 1, natural order 0.
_CLASSES, _MIXED = 2, 3


class Sampler:
    """The samples of every step: the place of each in the training split, and its occasion.

    An occasion tells apart the times that one image comes; with seed and place it decides the augmentation. Step s takes
    turns s·B/R … (s+1)·B/R - 1 of an endless row of epochs, each R times (`repeats`), so every batch of B is full.

    Args:
        targets: [n] class index of every place of the part.
        batch_size: B, over all processes.
        sampling: natural: each epoch is a permutation of the part, and its number is the occasion. balanced, sqrt: each
            epoch has as many samples, of which every class has a fixed share, the same or in proportion to the square root
            of its size (Mahajan et al. 2018, section 2.2); a class's images take their turns in an endless row of
            permutations of their own, and the number of the permutation is the occasion.
        repeats: R, repeated augmentation (Hoffer et al. 2020): each image of a step comes so often in its batch, B/R
            samples apart, each time on an occasion of its own.
    """

    def __init__(
        self, targets: np.ndarray, *, batch_size: int, seed: int, sampling: str = "natural", repeats: int = 1
    ) -> None:
        assert batch_size % repeats == 0
        self.count, self.batch_size, self.seed, self.repeats = len(targets), batch_size, seed, repeats
        self.members: list[np.ndarray] = []
        if sampling != "natural":
            self.members = [np.flatnonzero(targets == label) for label in np.unique(targets)]
            sizes = np.asarray([len(each) for each in self.members])
            self.shares = largest_remainder(
                self.count, np.ones(len(sizes)) if sampling == "balanced" else np.sqrt(sizes)
            )
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def samples(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return (occasion, place in the part) of every sample of one process in step `step` (from 0).

        A place, unlike an image's number in the listing, stays when files are added to the folder.
        """
        share, distinct = self.batch_size // ranks, self.batch_size // self.repeats
        repeat, turn = np.divmod(np.arange(rank * share, (rank + 1) * share), distinct)
        epochs, turns = np.divmod(step * distinct + turn, self.count)
        occasions, places = np.empty_like(turns), np.empty_like(turns)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            own_occasions, own_places = self.epoch(int(epoch))
            occasions[here], places[here] = own_occasions[turns[here]], own_places[turns[here]]
        return occasions * self.repeats + repeat, places

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (occasion, place in the part) of every turn of one epoch."""
        made = self._epochs.get(number)
        if made is None:
            made = self.natural(number) if not self.members else self.by_class(number)
            # One assignment: the diagnosis of a step may ask from another thread.
            self._epochs = {epoch: each for epoch, each in self._epochs.items() if epoch >= number - 1} | {number: made}
        return made

    def natural(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Every place once."""
        return np.full(self.count, epoch), self.random(epoch).permutation(self.count)

    def by_class(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The share of every class, mixed."""
        occasions, places = [], []
        for label, (members, share) in enumerate(zip(self.members, self.shares, strict=True)):
            rounds, turns = np.divmod(epoch * share + np.arange(share), len(members))
            first = int(rounds[0])
            rows = [self.random(each, label, _CLASSES).permutation(members) for each in range(first, rounds[-1] + 1)]
            occasions.append(rounds)
            places.append(np.stack(rows)[rounds - first, turns])
        mixed = self.random(epoch, 0, _MIXED).permutation(self.count)
        return np.concatenate(occasions)[mixed], np.concatenate(places)[mixed]

    def random(self, number: int, label: int = 0, purpose: int = 0) -> np.random.Generator:
        """Return the generator of one epoch or of one permutation of a class."""
        return np.random.Generator(np.random.Philox(key=[self.seed, number], counter=[0, 0, label, purpose]))


def largest_remainder(total: int, proportions: np.ndarray) -> np.ndarray:
    """Divide `total` in whole numbers as near to the proportions as they can be: by the largest remainders."""
    exact = total * proportions / proportions.sum()
    whole = np.floor(exact).astype(np.int64)
    left = total - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:left]] += 1
    return whole
