"""Intervals and paired tests, against brute force and known distributions."""

import itertools
import math

import numpy as np
import pytest

from deeplab_jax.evaluation import metrics, resampling


def counts_of(right, wrong):
  """Counts [N, 3, 1] of one class, from pixels that are right and missed."""
  right, wrong = np.asarray(right), np.asarray(wrong)
  return np.stack([right, np.zeros_like(right), wrong], -1)[..., None]


def random_counts(n, classes, seed=0):
  return np.random.default_rng(seed).integers(0, 50, (n, 2, 3, classes))


def test_interval_of_a_mean_is_the_normal_one():
  # Images of one size: pixel accuracy is a mean over images.
  right = np.random.default_rng(1).binomial(1000, 0.7, 400)
  found = resampling.intervals(counts_of(right, 1000 - right))
  shares = right / 1000
  half = 1.96 * shares.std() / math.sqrt(400)
  expected = shares.mean() - half, shares.mean() + half
  np.testing.assert_allclose(
    found['pixel_accuracy'], expected, atol=half * 0.1, rtol=0
  )


def test_the_interval_holds_the_truth_in_95_of_100_sets():
  # A class is a set of its own: 400 sets of 100 images, truth 0.6.
  rng = np.random.default_rng(2)
  right = rng.binomial(20, rng.beta(3, 2, (100, 400)))
  counts = np.stack([right, 0 * right, 20 - right], 1)
  sums = resampling._drawn(counts)
  low, high = resampling._ends(metrics.rates(sums)['per_class_accuracy'])
  assert 0.91 <= ((low <= 0.6) & (high >= 0.6)).mean() <= 0.98


def test_draws_take_as_many_images_as_there_are_all_as_likely():
  drawn = resampling._drawn(np.eye(30, dtype=int)[:, None])[:, 0]
  assert drawn.shape == (2000, 30) and set(drawn.sum(1)) == {30}
  np.testing.assert_allclose(drawn.mean(0), 1, atol=0.1)
  np.testing.assert_allclose(drawn.var(0), 29 / 30, atol=0.15)


@pytest.mark.parametrize(
  'counts, keys',
  [
    (np.zeros((5, 3, 4), int), set()),  # all void
    (counts_of([7], [3]), set()),  # one image
    (
      counts_of([7, 0], [3, 0]),  # one of two is void
      {
        *('miou', 'pixel_accuracy', 'frequency_weighted_iou', 'mean_accuracy'),
        *('mean_precision', 'mean_f1'),
      },
    ),
  ],
)
def test_there_is_no_interval_without_a_value(counts, keys):
  found = resampling.intervals(counts)
  assert set(found) == keys
  assert all(low <= high for low, high in found.values())


def miou(counts):
  """Of one run, by loops."""
  ious = []
  for hits, wrong, missed in counts.T:
    either = hits + wrong + missed
    ious += [hits / either] if either else []
  return sum(ious) / len(ious)


def test_p_of_few_images_is_about_that_of_all_swaps():
  counts = random_counts(6, 3)
  real = abs(miou(counts[:, 1].sum(0)) - miou(counts[:, 0].sum(0)))
  as_large = 0
  for order in itertools.product((0, 1), repeat=6):
    a = sum(counts[i, swap] for i, swap in enumerate(order))
    b = sum(counts[i, 1 - swap] for i, swap in enumerate(order))
    as_large += abs(miou(b) - miou(a)) >= real - 1e-12
  found = resampling.paired(counts)['miou']
  assert found['p'] == pytest.approx(as_large / 64, abs=0.015)
  assert found['difference'] == pytest.approx(
    miou(counts[:, 1].sum(0)) - miou(counts[:, 0].sum(0)), abs=1e-12
  )


def test_paired_result_of_a_case_made_by_hand():
  # B has 10 of 100 pixels more in each of three images: all 8 ways to swap
  # differ by 30, 10, 10, 10 and the same below 0, so two are as large.
  a, b = counts_of([50] * 3, [50] * 3), counts_of([60] * 3, [40] * 3)
  for found in resampling.paired(np.stack([a, b], 1)).values():
    (p,) = np.ravel(found['p'])
    assert p == 1 or abs(p - 0.25) < 0.015  # of precision, 1 for both
  found = resampling.paired(np.stack([a, b], 1))['pixel_accuracy']
  assert (found['a'], found['b']) == (0.5, 0.6)
  assert found['difference'] == pytest.approx(0.1)
  np.testing.assert_allclose(found['interval_95'], [0.1, 0.1])


def test_equal_runs_differ_by_0_with_p_1():
  counts = random_counts(40, 3)
  counts[:, 1] = counts[:, 0]
  for found in resampling.paired(counts).values():
    assert not found['difference'].any() and not found['interval_95'].any()
    assert np.all(found['p'] == 1)


def test_random_swaps_give_the_p_of_the_normal_approximation():
  # 200 images: the sum of signed differences is nearly normal.
  rng = np.random.default_rng(3)
  a = rng.integers(400, 600, 200)
  b = a + rng.normal(0.5, 15, 200).round().astype(int)
  of = np.stack([counts_of(a, 1000 - a), counts_of(b, 1000 - b)], 1)
  found = resampling.paired(of)['pixel_accuracy']
  z = (b - a).sum() / math.sqrt(((b - a) ** 2).sum())
  assert 0.01 < found['p'] < 0.2
  assert found['p'] == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)


def test_p_below_5_percent_is_as_rare_as_that_where_nothing_differs():
  # One class is one pair of runs: 300 pairs of 12 images.
  right = np.random.default_rng(4).binomial(1000, 0.5, (12, 2, 300))
  counts = np.stack([right, 0 * right, 1000 - right], 2)
  p = resampling.paired(counts)['per_class_accuracy']['p']
  assert 0.02 < (p < 0.05).mean() < 0.08


def test_a_class_that_one_run_lacks_has_no_p():
  counts = random_counts(5, 2)
  counts[:, 0, :, 1] = 0  # neither in the label nor predicted
  found = resampling.paired(counts)['per_class_iou']
  assert np.isnan(found['p']).tolist() == [False, True]
