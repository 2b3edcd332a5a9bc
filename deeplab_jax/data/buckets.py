"""A few common sizes for images of many, and batches of one size each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Size = tuple[int, int]  # height, width
FILLER = -1


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
  """One batch of all hosts together.

  Attributes:
    size: (height, width) to which its images are padded.
    indices: of its records; `FILLER` where the row is none.
  """

  size: Size
  indices: tuple[int, ...]


def merge_sizes(counts: Mapping[Size, int], limit: int) -> list[Size]:
  """Merges sizes until at most `limit` are left.

  Each time the two are merged, to the larger height and the larger width, that
  add the smallest area of padding over all images.

  Args:
    counts: number of images by (height, width).
    limit: at least 1.

  Returns:
    The sizes left, by area; every image fits one of them.
  """
  counts = dict(counts)
  while len(counts) > limit:
    sizes = np.array(list(counts), np.int64)
    images = np.array(list(counts.values()), np.int64)
    merged = np.maximum(sizes[:, None], sizes[None])
    padded = sizes.prod(-1) * images
    added = merged.prod(-1) * (images[:, None] + images[None])
    added -= padded[:, None] + padded[None]
    np.fill_diagonal(added, np.iinfo(np.int64).max)
    pair = np.unravel_index(added.argmin(), added.shape)
    total = sum(counts.pop(tuple(sizes[i].tolist())) for i in pair)
    size = tuple(merged[pair].tolist())
    counts[size] = counts.get(size, 0) + total
  return sorted(counts, key=_area)


def plan_batches(
  sizes: Sequence[Size],
  *,
  padded: Callable[[Size], Size],
  limit: int,
  batch_size: int,
) -> list[PlannedBatch]:
  """Deals records to batches whose images are all padded to one size.

  Args:
    sizes: (height, width) of each record.
    padded: the smallest size that an image of a given size may be padded to.
    limit: of the number of sizes.
    batch_size: of all hosts together.

  Returns:
    Batches that hold every record once, in ascending order within each size;
    the last batch of a size is filled up.
  """
  counts: dict[Size, int] = {}
  for size in sizes:
    size = padded(size)
    counts[size] = counts.get(size, 0) + 1
  rows: dict[Size, list[int]] = {
    size: [] for size in merge_sizes(counts, limit)
  }
  for index, size in enumerate(sizes):
    height, width = padded(size)
    # By area: the first that fits is the cheapest.
    fitting = next(b for b in rows if height <= b[0] and width <= b[1])
    rows[fitting].append(index)
  batches = []
  for size, indices in rows.items():
    indices += [FILLER] * (-len(indices) % batch_size)
    batches += [
      PlannedBatch(size, tuple(indices[start : start + batch_size]))
      for start in range(0, len(indices), batch_size)
    ]
  return batches


def _area(size: Size) -> int:
  return size[0] * size[1]
