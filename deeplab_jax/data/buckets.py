"""A few common sizes for many images, and batches of one size each."""

import bisect
import collections
import math
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Size = tuple[int, int]  # height, width
FILLER = -1
_NEVER = np.iinfo(np.int64).max
# The time of merging by pairs grows with the cube of the number of sizes.
_PAIRED_UP_TO = 256
_STEP = 64  # pixels by which a bucket of a stream grows


class PlannedBatch(NamedTuple):
  """One batch of all hosts together."""

  size: Size  # to which its images are padded
  indices: tuple[int, ...]  # of its records; `FILLER` where a row has none


def merge_sizes(counts: Mapping[Size, int], limit: int | None) -> list[Size]:
  """Merges sizes, of so many images each, until at most `limit` are left.

  Each time, those two are merged, to the larger height and the larger width,
  that add the smallest area of padding over all images. Of more than a few
  hundred sizes, those that lie close together are merged first. None merges
  none. Returns the sizes left, by area.
  """
  limit = limit or len(counts)
  sizes = np.array(list(counts), np.int64)
  images = np.array(list(counts.values()), np.int64)
  most = max(limit, _PAIRED_UP_TO)
  if len(sizes) > most:
    sizes, images = _merge_neighbors(sizes, images, most)
  while len(sizes) > limit:
    (heights, widths), area = sizes.T, sizes.prod(-1) * images
    merged = np.maximum.outer(heights, heights)
    merged *= np.maximum.outer(widths, widths)
    added = merged * np.add.outer(images, images) - np.add.outer(area, area)
    np.fill_diagonal(added, _NEVER)
    pair = list(np.unravel_index(added.argmin(), added.shape))
    size, total = sizes[pair].max(0), images[pair].sum()
    sizes, images = np.delete(sizes, pair, 0), np.delete(images, pair)
    same = (sizes == size).all(-1)
    if same.any():
      images[same] += total
    else:
      sizes, images = np.vstack([sizes, size]), np.append(images, total)
  return sorted(map(tuple, sizes.tolist()), key=math.prod)


def _merge_neighbors(
  sizes: Array, images: Array, limit: int
) -> tuple[Array, Array]:
  """Merges the sizes [N, 2] of `images` [N] that lie in one cell of a grid.

  It is the finest with few enough cells. The largest height and width are kept.
  """
  cells, grid = sizes, 1
  while len(cells) > limit:
    grid += 1 + grid // 8
    rows, columns = -(-sizes.T // grid)
    cells, of_each = np.unique(rows << 32 | columns, return_inverse=True)
  largest = np.zeros((len(cells), 2), np.int64)
  np.maximum.at(largest, of_each, sizes)
  return largest, np.bincount(of_each, images).astype(np.int64)


def plan_batches(
  sizes: Sequence[Size], *, limit: int | None, batch_size: int
) -> list[PlannedBatch]:
  """Deals records of these sizes to batches, each padded to one size.

  There are at most `limit` sizes; None pads no image. Sizes ascend by area, and
  records within each size. The last batch of a size is filled up.
  """
  rows = collections.defaultdict[Size, list[int]](list)
  buckets = Buckets(limit, sizes)
  for index, (height, width) in enumerate(sizes):
    rows[buckets.of((height, width))].append(index)
  batches = []
  for size in sorted(rows, key=math.prod):
    indices = rows[size]
    indices += [FILLER] * (-len(indices) % batch_size)
    batches += [
      PlannedBatch(size, tuple(indices[start : start + batch_size]))
      for start in range(0, len(indices), batch_size)
    ]
  return batches


class Buckets:
  """The sizes to pad a stream of images to, at most `limit`; None for any.

  Several threads may use one. A size that is `planned` from the start serves
  all images that it holds. None grows above `area` pixels.
  """

  def __init__(
    self,
    limit: int | None,
    planned: Sequence[Size] = (),
    area: float = math.inf,
  ) -> None:
    """Starts with the sizes that `merge_sizes` makes of the planned ones."""
    self._limit, self._area, self._lock = limit, area, threading.Lock()
    counts = collections.Counter((height, width) for height, width in planned)
    self._sizes = merge_sizes(counts, limit)
    self._planned = bool(planned)

  def of(self, size: Size) -> Size:
    """Returns the size to which an image is padded, by (height, width)."""
    if self._limit is None:
      return size
    with self._lock:
      # By area: none before its own holds it, and the first that does is best.
      start = bisect.bisect_left(self._sizes, math.prod(size), key=math.prod)
      larger = self._sizes[start:]
      holding = (b for b in larger if size[0] <= b[0] and size[1] <= b[1])
      best = next(holding, None)
      room = len(self._sizes) < self._limit and not self._planned
      # Where there is room, a size of its own saves padding above a fifth.
      if best and not (room and math.prod(best) > 1.2 * math.prod(size)):
        return best
      if not room:  # the one that has to grow least grows, in a few large steps
        merged = [-(-np.maximum(size, b) // _STEP) * _STEP for b in self._sizes]
        areas = np.array([m.prod() for m in merged])
        growth = areas - [math.prod(b) for b in self._sizes]
        place = int(np.where(areas > self._area, _NEVER, growth).argmin())
        if areas[place] > self._area:
          return size  # an image of a shape of its own
        del self._sizes[place]
        height, width = map(int, merged[place])
        size = height, width
      bisect.insort(self._sizes, size, key=math.prod)
      return size
