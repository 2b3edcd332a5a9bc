"""A few common sizes for images of many, and batches of one size each."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Size = tuple[int, int]  # height, width
FILLER = -1
_NEVER = np.iinfo(np.int64).max
# The time of merging by pairs grows with the cube of the number of sizes.
_PAIRED_UP_TO = 256


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
  """One batch of all hosts together.

  Attributes:
    size: (height, width) to which its images are padded.
    indices: of its records; `FILLER` where the row is none.
  """

  size: Size
  indices: tuple[int, ...]


def merge_sizes(counts: Mapping[Size, int], limit: int | None) -> list[Size]:
  """Merges sizes until at most `limit` are left.

  Each time the two are merged, to the larger height and the larger width, that
  add the smallest area of padding over all images. Of more than a few hundred
  sizes, those that lie close together are merged first.

  Args:
    counts: number of images by (height, width).
    limit: at least 1; None to merge none.

  Returns:
    The sizes left, by area; every image fits one of them.
  """
  counts = dict(counts)
  if limit is not None and len(counts) > limit:
    counts = _merge_neighbors(counts, max(limit, _PAIRED_UP_TO))
    counts = _merge_pairs(counts, limit)
  return sorted(counts, key=_area)


def _merge_neighbors(counts: dict[Size, int], limit: int) -> dict[Size, int]:
  """Merges what lies in one cell of a grid, the finest with few enough cells.

  A cell gets the largest height and width that are in it.
  """
  if len(counts) <= limit:
    return counts
  sizes, grid = np.array(list(counts), np.int64), 1
  cells = np.arange(len(sizes))
  while len(cells) > limit:
    grid += 1 + grid // 8
    rows, columns = -(-sizes.T // grid)
    cells, of_each = np.unique(rows << 32 | columns, return_inverse=True)
  largest = np.zeros((len(cells), 2), np.int64)
  np.maximum.at(largest, of_each, sizes)
  images = np.zeros(len(cells), np.int64)
  np.add.at(images, of_each, list(counts.values()))
  merged = map(tuple, largest.tolist())
  return dict(zip(merged, images.tolist(), strict=True))


def _merge_pairs(counts: dict[Size, int], limit: int) -> list[Size]:
  """Merges the pair that adds the least padding until `limit` are left."""
  if len(counts) <= limit:
    return list(counts)
  sizes = np.array(list(counts), np.int64)
  images = np.array(list(counts.values()), np.int64)
  added = _added(sizes[:, None], images[:, None], sizes, images)
  np.fill_diagonal(added, _NEVER)
  while len(sizes) > limit:
    pair = list(np.unravel_index(added.argmin(), added.shape))
    size, total = sizes[pair].max(0), images[pair].sum()
    kept = np.ones(len(sizes), bool)
    kept[pair] = False
    sizes, images, added = sizes[kept], images[kept], added[kept][:, kept]
    if not (sizes == size).all(-1).any():
      sizes, images = np.vstack([sizes, size]), np.append(images, 0)
      added = np.pad(added, (0, 1))
    place = (sizes == size).all(-1).argmax()
    images[place] += total
    row = _added(size, images[place], sizes, images)
    added[place], added[:, place], added[place, place] = row, row, _NEVER
  return [(height, width) for height, width in sizes.tolist()]


def _added(
  sizes: np.ndarray, images: np.ndarray, others: np.ndarray, more: np.ndarray
) -> np.ndarray:
  """Area of padding that merging sizes of so many images adds."""
  merged = np.maximum(sizes, others).prod(-1) * (images + more)
  return merged - sizes.prod(-1) * images - others.prod(-1) * more


def bucket_of_each(sizes: Sequence[Size], limit: int | None) -> list[Size]:
  """The size that each image is padded to, of `limit` different ones at most.

  Args:
    sizes: (height, width) of each image.
    limit: at least 1; None for as many as there are sizes.

  Returns:
    The smallest of `merge_sizes` that holds it, for each image.
  """
  counts = collections.Counter(map(tuple, sizes))
  buckets = merge_sizes(counts, limit)
  if len(buckets) == len(counts):  # none was merged
    return list(sizes)
  heights, widths = np.array(buckets, np.int64).T
  chosen = {}
  for height, width in counts:
    # By area: the first that fits is the cheapest.
    first = np.argmax((height <= heights) & (width <= widths))
    chosen[height, width] = buckets[first]
  return [chosen[tuple(size)] for size in sizes]


def plan_batches(
  sizes: Sequence[Size], *, limit: int | None, batch_size: int
) -> list[PlannedBatch]:
  """Deals records to batches whose images are all padded to one size.

  Args:
    sizes: (height, width) of each record.
    limit: of the number of sizes; None to pad no image.
    batch_size: of all hosts together.

  Returns:
    Batches that hold every record once, in ascending order within each size;
    the last batch of a size is filled up. Sizes ascend by area.
  """
  rows: dict[Size, list[int]] = {}
  for index, size in enumerate(bucket_of_each(sizes, limit)):
    rows.setdefault(size, []).append(index)
  batches = []
  for size in sorted(rows, key=_area):
    indices = rows[size]
    indices += [FILLER] * (-len(indices) % batch_size)
    batches += [
      PlannedBatch(size, tuple(indices[start : start + batch_size]))
      for start in range(0, len(indices), batch_size)
    ]
  return batches


def _area(size: Size) -> int:
  return size[0] * size[1]
