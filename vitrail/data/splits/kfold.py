"""Assign images to the folds of a cross-validation: groups are kept whole, classes are spread evenly."""

from __future__ import annotations

import numpy as np

from vitrail.data.problems import Problem


def fold_numbers(pool: np.ndarray, targets: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of every image of `pool` [len(pool)]; -1 where it is evaluated in no fold and always trained on.

    Groups of several images are assigned first, the largest before the others, each to the fold that has the least of
    its classes; single images then level the classes. Without such groups, folds differ by at most one image, in all
    and in each class. A group that holds all of a class is evaluated in no fold, since that fold could not learn it.
    """
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, 1]))
    order = random.permutation(len(pool))
    classes, members, starts = targets[pool], *ordered_by_group(order, groups[pool])
    sizes = np.bincount(classes)
    filled = np.zeros((folds, len(sizes)), dtype=np.int64)
    numbers = np.full(len(pool), -1, dtype=np.int64)
    lengths = np.diff(starts)
    large = np.flatnonzero(lengths > 1)
    for group in large[np.argsort(-lengths[large], kind="stable")]:
        own = members[starts[group] : starts[group + 1]]
        labels, counts = np.unique(classes[own], return_counts=True)
        if (counts == sizes[labels]).any():
            continue
        # The growth of the sum over folds of each class's squared share.
        cost = (counts * (2 * filled[:, labels] + counts) / sizes[labels] ** 2).sum(axis=1)
        fold = np.lexsort((filled.sum(axis=1), cost))[0]
        filled[fold, labels] += counts
        numbers[own] = fold
    singles = members[starts[:-1][lengths == 1]]
    singles = singles[np.argsort(classes[singles], kind="stable")]
    for label, count in enumerate(np.bincount(classes[singles], minlength=len(sizes))):
        own, singles = singles[:count], singles[count:]
        if count and sizes[label] > 1:
            more = levelled(filled, label, int(count))
            numbers[own] = np.repeat(np.arange(folds), more)
            filled[:, label] += more
    # Groups of several classes may have put all of a small class into one fold.
    for label in np.flatnonzero((sizes > 1) & ((filled > 0).sum(axis=0) == 1)):
        fold = int(filled[:, label].argmax())
        if filled[fold, label] == sizes[label]:  # an earlier pass of this loop may have taken some of it out
            chosen = groups[pool[(classes == label) & (numbers == fold)]][0]
            removed = groups[pool] == chosen
            filled[fold] -= np.bincount(classes[removed], minlength=len(sizes))
            numbers[removed] = -1
    return numbers


def levelled(filled: np.ndarray, label: int, count: int) -> np.ndarray:
    """Return how many of `count` single images of a class each fold gets, to make the folds equal or nearly so."""
    levels = filled[:, label, None] + np.arange(count)  # the count that each further image would bring a fold to
    fold, _ = np.indices(levels.shape)
    totals = np.broadcast_to(filled.sum(axis=1)[:, None], levels.shape)
    lowest = np.lexsort((fold.ravel(), totals.ravel(), levels.ravel()))[:count]
    return np.bincount(fold.ravel()[lowest], minlength=len(filled))


def ordered_by_group(order: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of `order` group after group, in order of first occurrence, and the start of each group and the end.

    Args:
        groups: the group of every image that `order` may name.
    """
    _, first, number = np.unique(groups[order], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    members = order[np.argsort(rank[number], kind="stable")]
    return members, np.concatenate([[0], np.cumsum(np.bincount(rank[number], minlength=len(first)))])


def fold_problems(labels: tuple[str, ...], targets: np.ndarray, numbers: np.ndarray, folds: int) -> list[Problem]:
    """Return the problems of classes that not every fold can evaluate.

    Args:
        targets: [P] the class of every image that is assigned to a fold.
        numbers: [P] its fold.
    """
    sizes = np.bincount(targets, minlength=len(labels))
    few = tuple(labels[label] for label in np.flatnonzero((sizes > 0) & (sizes < folds)))
    problems = []
    if few:
        text = (
            f"{len(few)} classes have fewer images than there are folds ({folds}), so that some folds evaluate none of them: "
            f"{', '.join(few[:10])}"
        )
        problems.append(Problem("warning", "small-class", few, text))
    alone = tuple(labels[label] for label in np.unique(targets[numbers < 0]))
    if alone:
        text = (
            f"{int((numbers < 0).sum())} images are evaluated in no fold, since they are all or nearly all of a class, in one "
            f"group: of {', '.join(alone[:10])}"
        )
        problems.append(Problem("warning", "small-class", alone, text))
    return problems
