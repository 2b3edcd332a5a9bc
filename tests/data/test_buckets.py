"""Sizes merged as a hand would, and batches that miss no record."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from deeplab_jax.data import buckets


def random_sizes(count, seed=0):
  rng = np.random.default_rng(seed)
  return [tuple(rng.integers(20, 90, 2).tolist()) for _ in range(count)]


def chosen_for(sizes, limit):
  """What each image is padded to where all sizes are known."""
  planned = buckets.Buckets(limit, sizes)
  return [planned.of(size) for size in sizes]


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


def merged_pair_by_pair(counts, limit):
  """What `merge_sizes` does, written with loops alone."""
  counts = dict(counts)
  while len(counts) > limit:
    costs = {}
    for one, other in itertools.combinations(counts, 2):
      height, width = map(max, zip(one, other, strict=True))
      costs[one, other] = sum(
        counts[size] * (height * width - size[0] * size[1])
        for size in (one, other)
      )
    pair = min(costs, key=costs.get)
    total = sum(counts.pop(size) for size in pair)
    size = tuple(map(max, zip(*pair, strict=True)))
    counts[size] = counts.get(size, 0) + total
  return sorted(counts, key=lambda size: size[0] * size[1])


@pytest.mark.parametrize('limit', [1, 2, 5, 9])
def test_few_sizes_are_merged_pair_by_pair(limit):
  for seed in range(25):
    rng = np.random.default_rng(seed)
    # Small numbers, so that costs are equal and merged sizes are there.
    sizes = rng.integers(1, rng.integers(3, 30), (24, 2)).tolist()
    counts = Counter(map(tuple, sizes))
    expected = merged_pair_by_pair(counts, limit)
    assert buckets.merge_sizes(counts, limit) == expected


@pytest.mark.parametrize('limit', [4, 16])
def test_many_sizes_cost_hardly_more_padding_than_pair_by_pair(
  monkeypatch, limit
):
  rng = np.random.default_rng(0)
  sizes = np.stack([rng.integers(300, 501, 600), rng.integers(480, 641, 600)])
  turned = rng.random(600) < 0.3  # portraits
  sizes = np.where(turned, sizes[::-1], sizes).T
  counts = Counter(map(tuple, sizes.tolist()))
  assert len(counts) > 2 * buckets._PAIRED_UP_TO
  ours = padding(counts, buckets.merge_sizes(counts, limit))
  monkeypatch.setattr(buckets, '_PAIRED_UP_TO', len(counts))
  theirs = padding(counts, buckets.merge_sizes(counts, limit))
  assert 0 < ours < 1.1 * theirs


@pytest.mark.parametrize('limit', [1, 8, 300, 2000, None])
def test_twenty_thousand_sizes_are_planned_at_once(limit):
  rng = np.random.default_rng(0)
  # All different: every height below 200 with every width below 100.
  sizes = [divmod(code, 100) for code in rng.permutation(20_000).tolist()]
  sizes = [(300 + 5 * height, 400 + 7 * width) for height, width in sizes]
  start = time.process_time()
  chosen = chosen_for(sizes, limit)
  assert time.process_time() - start < 1
  assert len(set(chosen)) <= (limit or len(sizes))
  assert np.all(np.array(chosen) >= sizes)
  if limit in (1, None):
    assert set(chosen) == ({(1295, 1093)} if limit else set(sizes))


def test_each_image_takes_the_smallest_size_that_holds_it():
  sizes = [(10, 10), (12, 9), (30, 30), (9, 10), (25, 31)]
  merged = buckets.merge_sizes(Counter(sizes), 2)
  assert merged == [(12, 10), (30, 31)]
  assert chosen_for(sizes, 2) == [merged[index] for index in (0, 0, 1, 0, 1)]
  assert chosen_for(sizes, None) == sizes
  assert chosen_for([], 2) == []


@pytest.mark.parametrize('count', [1, 7, 40])
@pytest.mark.parametrize('batch_size', [1, 4, 6])
@pytest.mark.parametrize('limit', [1, 3, 50, None])
def test_every_record_is_in_one_batch_that_holds_it(count, batch_size, limit):
  sizes = random_sizes(count, seed=count)
  plan = buckets.plan_batches(sizes, limit=limit, batch_size=batch_size)
  seen = []
  for batch in plan:
    assert len(batch.indices) == batch_size
    assert any(index != buckets.FILLER for index in batch.indices)
    for index in batch.indices:
      if index != buckets.FILLER:
        height, width = sizes[index]
        assert height <= batch.size[0] and width <= batch.size[1]
        assert limit is not None or batch.size == sizes[index]
        seen.append(index)
  assert sorted(seen) == list(range(count))
  assert len({batch.size for batch in plan}) <= (limit or count)
  for size, batches in itertools.groupby(plan, lambda batch: batch.size):
    assert sum(batch.size == size for batch in plan) == len(list(batches))


def test_only_the_last_batch_of_a_size_is_filled_up():
  sizes = [(9, 9), (5, 5), (9, 9), (9, 9), (5, 5)]
  plan = buckets.plan_batches(sizes, limit=2, batch_size=2)
  fill = buckets.FILLER
  assert [(batch.size, batch.indices) for batch in plan] == [
    ((5, 5), (1, 4)),
    ((9, 9), (0, 2)),
    ((9, 9), (3, fill)),
  ]


def test_a_split_without_records_has_no_batches():
  assert buckets.plan_batches([], limit=4, batch_size=2) == []
