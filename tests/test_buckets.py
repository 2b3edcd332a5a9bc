"""Sizes merged as a hand would, and batches that miss no record."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from deeplab_jax.data import buckets


def same(size):
  return size


def random_sizes(count, seed=0):
  rng = np.random.default_rng(seed)
  return [tuple(rng.integers(20, 90, 2).tolist()) for _ in range(count)]


def padding(counts, sizes):
  """Pixels added where each image takes the cheapest size that holds it."""
  return sum(
    number * (min(h * w for h, w in sizes if h >= height and w >= width))
    - number * height * width
    for (height, width), number in counts.items()
  )


def test_the_pair_that_adds_the_least_padding_is_merged():
  counts = {(10, 10): 100, (10, 12): 1, (20, 20): 1}
  # (10, 12) into (20, 20) adds 280 pixels, (10, 10) into (10, 12) 2000.
  assert buckets.merge_sizes(counts, 2) == [(10, 10), (20, 20)]
  # With few of the small ones it is the other way round: 20 * 5 < 280.
  counts[10, 10] = 5
  assert buckets.merge_sizes(counts, 2) == [(10, 12), (20, 20)]


def test_merged_size_takes_the_larger_of_both_sides():
  assert buckets.merge_sizes({(10, 30): 1, (30, 10): 1}, 1) == [(30, 30)]


def test_merging_into_a_size_that_is_there_gives_one_size():
  counts = {(10, 30): 1, (30, 10): 1, (30, 30): 9, (90, 90): 9}
  assert buckets.merge_sizes(counts, 3) == [(10, 30), (30, 30), (90, 90)] or (
    buckets.merge_sizes(counts, 3) == [(30, 10), (30, 30), (90, 90)]
  )
  assert buckets.merge_sizes(counts, 2) == [(30, 30), (90, 90)]


@pytest.mark.parametrize('limit', [3, 4, 9])
def test_few_sizes_stay_as_they_are(limit):
  counts = {(5, 5): 3, (7, 2): 1, (2, 9): 4}
  assert buckets.merge_sizes(counts, limit) == [(7, 2), (2, 9), (5, 5)]


def test_more_sizes_cost_less_padding_and_hold_every_image():
  counts = Counter(random_sizes(300))
  costs = [padding(counts, buckets.merge_sizes(counts, n)) for n in range(1, 8)]
  assert costs == sorted(costs, reverse=True) and costs[3] < costs[0] / 2


def test_two_hundred_sizes_are_merged_at_once():
  counts = Counter(dict.fromkeys(random_sizes(400), 3))
  assert len(counts) > 200
  start = time.process_time()
  assert len(buckets.merge_sizes(counts, 4)) == 4
  assert time.process_time() - start < 5


@pytest.mark.parametrize('count', [1, 7, 40])
@pytest.mark.parametrize('batch_size', [1, 4, 6])
@pytest.mark.parametrize('limit', [1, 3, 50])
def test_every_record_is_in_one_batch_that_holds_it(count, batch_size, limit):
  sizes = random_sizes(count, seed=count)
  plan = buckets.plan_batches(
    sizes,
    padded=lambda size: (size[0] + 1, size[1] + 2),
    limit=limit,
    batch_size=batch_size,
  )
  seen = []
  for batch in plan:
    assert len(batch.indices) == batch_size
    assert any(index != buckets.FILLER for index in batch.indices)
    for index in batch.indices:
      if index != buckets.FILLER:
        height, width = sizes[index]
        assert height + 1 <= batch.size[0] and width + 2 <= batch.size[1]
        seen.append(index)
  assert sorted(seen) == list(range(count))
  assert len({batch.size for batch in plan}) <= limit
  for size, batches in itertools.groupby(plan, lambda batch: batch.size):
    assert sum(batch.size == size for batch in plan) == len(list(batches))


def test_only_the_last_batch_of_a_size_is_filled_up():
  sizes = [(9, 9), (5, 5), (9, 9), (9, 9), (5, 5)]
  plan = buckets.plan_batches(sizes, padded=same, limit=2, batch_size=2)
  fill = buckets.FILLER
  assert [(batch.size, batch.indices) for batch in plan] == [
    ((5, 5), (1, 4)),
    ((9, 9), (0, 2)),
    ((9, 9), (3, fill)),
  ]


def test_a_split_without_records_has_no_batches():
  assert buckets.plan_batches([], padded=same, limit=4, batch_size=2) == []
