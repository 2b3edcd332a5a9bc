"""How sure a score is: images drawn again, and two runs swapped on images.

Counts are `metrics.COUNTS` of single images. Sums of them are scored as those
of a real set are, exactly.
"""

import warnings
from collections.abc import Callable

import numpy as np

from deeplab_jax.evaluation.metrics import rates

_DRAWS, _SWAPS = 2000, 10_000
_AT_ONCE = 200  # of these


def intervals(counts: np.ndarray) -> dict[str, list[float]]:
  """Returns the 95 % percentile interval of each measure over a whole set.

  Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13:
  2,000 times (seed 0) N of the N images are drawn with replacement, and scored;
  2.5 % of these values lie below the interval, and 2.5 % above. It shows what
  other images of the same kind would change, not what another training would.
  Takes counts int [N, K, C]. Without a value, or for one image, none is there.
  """
  found = rates(_drawn(counts))
  ends = {k: _ends(v).tolist() for k, v in found.items() if v.ndim == 1}
  several = len(counts) > 1
  return {k: v for k, v in ends.items() if several and not np.isnan(v[0])}


def paired(counts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
  """Compares two runs by each of `rates`; takes counts int [N, 2, K, C].

  Returns the values `a` and `b`, `difference` (b - a), its `interval_95`
  [2, ...] as in `intervals`, with the same images drawn for both, and `p`, NaN
  where a run has no value.

  p is that of a sign-flip permutation test (Fisher, "Design of Experiments",
  1935; Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989): if
  the runs were equally good, the two results of any image could be swapped. p
  is the share of 10,000 random ways to swap (seed 0), and the real one, whose
  difference is as large as the real one, in either direction (Phipson and
  Smyth, "Permutation P-values Should Never Be Zero", 2010).
  """
  rng, (a, b), n = np.random.default_rng(0), counts.sum(0), len(counts)
  moved = _sums(
    lambda r: rng.integers(2, size=(r, n)), _SWAPS, counts[:, 1] - counts[:, 0]
  )
  swapped = _changes(np.stack([a + moved, b - moved], 1))
  drawn, found = _changes(_drawn(counts)), {}
  for key, (first, second) in rates(np.stack([a, b])).items():
    change = second - first
    as_large = abs(swapped[key]) >= abs(change) - 1e-12  # but for rounding
    found[key] = {
      'a': first,
      'b': second,
      'difference': change,
      'interval_95': _ends(drawn[key]),
      # Where a run has no value, NaN stays NaN.
      'p': (as_large.sum(0) + 1) / (_SWAPS + 1) + 0 * change,
    }
  return found


def _changes(sums: np.ndarray) -> dict[str, np.ndarray]:
  """Second minus first run in sums of counts [R, 2, K, C], [R, ...]."""
  return {key: v[:, 1] - v[:, 0] for key, v in rates(sums).items()}


def _drawn(counts: np.ndarray) -> np.ndarray:
  """Sums of as many images as there are, drawn with replacement, [R, ...]."""
  rng, n = np.random.default_rng(0), len(counts)
  return _sums(lambda r: rng.multinomial(n, [1 / n] * n, r), _DRAWS, counts)


def _sums(
  draw: Callable[[int], np.ndarray], total: int, counts: np.ndarray
) -> np.ndarray:
  """Adds the counts [N, ...] of images, each as often as `draw` [r, N] says."""
  flat = counts.reshape(len(counts), -1).astype(np.float64)  # exact to 2^53
  blocks = [draw(_AT_ONCE) @ flat for _ in range(total // _AT_ONCE)]
  return np.concatenate(blocks).reshape(-1, *counts.shape[1:])


def _ends(values: np.ndarray) -> np.ndarray:
  """The ends [2, ...] of the middle 95 % of values [R, ...], without NaN."""
  with warnings.catch_warnings(action='ignore', category=RuntimeWarning):
    return np.nanpercentile(values, (2.5, 97.5), axis=0)
