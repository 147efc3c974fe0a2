"""The order of training images: a function of the step's number, so that resuming needs no state."""

from __future__ import annotations

import numpy as np

# The purpose of a stream of random numbers, beside (seed, epoch): `TrainLoader` has 1 for patch sizes, natural order 0.
_CLASSES, _SHUFFLED = 2, 3


class Sampler:
    """The samples of every step: the index of each in the training split, and the number of its visit.

    A visit is one of the times that an image is sampled; with seed and index it decides the augmentation. Step s takes
    entries s·B/R … (s+1)·B/R - 1 of an endless row of epochs, each R times (`repeats`), so every batch of B is full.

    Args:
        targets: [n] class of every image of the split.
        batch_size: B, over all processes.
        sampling: natural: each epoch is a permutation of the split, and its number is that of the visit. balanced,
            sqrt: each epoch has as many samples, of which every class has a fixed share, the same or in proportion to
            the square root of its size (Mahajan et al. 2018, section 2.2); a class's images come in an endless row of
            permutations of their own, and the number of the permutation is that of the visit.
        repeats: R, repeated augmentation (Hoffer et al. 2020): each image of a step is R times in its batch, B/R
            samples apart, and each time is a visit of its own.
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
        """Return (visit, index in the split) of every sample of one process in step `step` (from 0).

        An index in the split, unlike one in the dataset, stays when files are added to the folder.
        """
        share, distinct = self.batch_size // ranks, self.batch_size // self.repeats
        repeat, entry = np.divmod(np.arange(rank * share, (rank + 1) * share), distinct)
        epochs, entries = np.divmod(step * distinct + entry, self.count)
        visits, indices = np.empty_like(entries), np.empty_like(entries)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            epoch_visits, epoch_indices = self.epoch(int(epoch))
            visits[in_epoch] = epoch_visits[entries[in_epoch]]
            indices[in_epoch] = epoch_indices[entries[in_epoch]]
        return visits * self.repeats + repeat, indices

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (visit, index in the split) of every entry of one epoch."""
        samples = self._epochs.get(number)
        if samples is None:
            samples = self.natural(number) if not self.members else self.by_class(number)
            # One assignment: the diagnosis of a step may ask from another thread.
            recent = {epoch: stored for epoch, stored in self._epochs.items() if epoch >= number - 1}
            self._epochs = recent | {number: samples}
        return samples

    def natural(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch with every index once."""
        return np.full(self.count, epoch), self.random(epoch).permutation(self.count)

    def by_class(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch with the share of every class, shuffled."""
        visits, indices = [], []
        for label, (members, share) in enumerate(zip(self.members, self.shares, strict=True)):
            rounds, entries = np.divmod(epoch * share + np.arange(share), len(members))
            first = int(rounds[0])
            rows = [self.random(row, label, _CLASSES).permutation(members) for row in range(first, rounds[-1] + 1)]
            visits.append(rounds)
            indices.append(np.stack(rows)[rounds - first, entries])
        shuffled = self.random(epoch, 0, _SHUFFLED).permutation(self.count)
        return np.concatenate(visits)[shuffled], np.concatenate(indices)[shuffled]

    def random(self, number: int, label: int = 0, purpose: int = 0) -> np.random.Generator:
        """Return the generator of one epoch or of one permutation of a class."""
        return np.random.Generator(np.random.Philox(key=[self.seed, number], counter=[0, 0, label, purpose]))


def largest_remainder(total: int, proportions: np.ndarray) -> np.ndarray:
    """Return whole numbers that sum to `total`, nearest to the proportions: the largest remainders round up."""
    exact = total * proportions / proportions.sum()
    whole = np.floor(exact).astype(np.int64)
    left = total - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:left]] += 1
    return whole
