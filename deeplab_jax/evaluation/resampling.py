"""How sure a score is: images drawn again, and two runs swapped on images.

Counts are `metrics.COUNTS` of single images. Sums of them are scored as those
of a real set are, exactly.
"""

import warnings
from collections.abc import Iterable, Iterator

import numpy as np

from deeplab_jax.evaluation.metrics import rates

_DRAWS, _SWAPS = 2000, 10_000
_BLOCK = 2**22  # numbers that are held at once


def intervals(counts: np.ndarray) -> dict[str, list[float]]:
  """Returns the 95 % percentile interval of each measure over a whole set.

  Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13:
  2,000 times (seed 0) N of the N images are drawn with replacement, and scored;
  2.5 % of these values lie below the interval, and 2.5 % above. It shows what
  other images of the same kind would change, not what another training would.
  Takes counts int [N, K, C]. Without a value, or for one image, none is there.
  """
  found = rates(_sums(_draws(counts), counts))
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
  is the share of the 2^N ways to swap whose difference is as large as the real
  one, in either direction. Where these are more than 10,000, so many random
  ones stand for them (seed 0), and the real one is added (Phipson and Smyth,
  "Permutation P-values Should Never Be Zero", 2010).
  """
  total, change = counts.sum(0), counts[:, 1] - counts[:, 0]
  both, drawn = rates(total), _differences(_sums(_draws(counts), counts))
  as_large, trials = dict.fromkeys(both, np.array(0)), 0
  for swaps in _swaps(counts):
    moved = _sums([swaps], change)
    swapped = _differences(np.stack([total[0] + moved, total[1] - moved], 1))
    trials += len(swaps)
    for key, (a, b) in both.items():
      least = abs(b - a) - 1e-12  # as large, but for rounding
      as_large[key] = as_large[key] + (abs(swapped[key]) >= least).sum(0)
  one = trials == _SWAPS  # random ones
  found = {}
  for key, (a, b) in both.items():
    p = (as_large[key] + one) / (trials + one) + 0 * (b - a)  # NaN stays NaN
    ends = _ends(drawn[key])
    found[key] = {
      'a': a,
      'b': b,
      'difference': b - a,
      'interval_95': ends,
      'p': p,
    }
  return found


def _differences(sums: np.ndarray) -> dict[str, np.ndarray]:
  """Second minus first run in sums of counts [R, 2, K, C], [R, ...]."""
  return {key: v[:, 1] - v[:, 0] for key, v in rates(sums).items()}


def _sums(weights: Iterable[np.ndarray], counts: np.ndarray) -> np.ndarray:
  """Adds the counts [N, ...] of images, each as often as its weight [r, N]."""
  flat = counts.reshape(len(counts), -1).astype(np.float64)  # exact to 2^53
  sums = np.concatenate([block @ flat for block in weights])
  return sums.reshape(-1, *counts.shape[1:])


def _draws(counts: np.ndarray) -> Iterator[np.ndarray]:
  """Yields how often each image is drawn, int [r, N]."""
  rng, n = np.random.default_rng(0), len(counts)
  for rows in _blocks(_DRAWS, counts):
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in rows)
    yield np.stack(list(drawn))


def _swaps(counts: np.ndarray) -> Iterator[np.ndarray]:
  """Yields where runs are swapped, 0 or 1 [r, N]: all ways, or random ones."""
  rng, n = np.random.default_rng(0), len(counts)
  every = 2**n < _SWAPS
  for rows in _blocks(2**n if every else _SWAPS, counts):
    random = rng.integers(2, size=(len(rows), n))
    yield np.array(rows)[:, None] >> np.arange(n) & 1 if every else random


def _blocks(total: int, counts: np.ndarray) -> Iterator[range]:
  """Divides 0..total-1 so that little memory is needed."""
  step = max(1, _BLOCK // max(counts.shape[0], counts[0].size))
  for start in range(0, total, step):
    yield range(start, min(start + step, total))


def _ends(values: np.ndarray) -> np.ndarray:
  """The ends [2, ...] of the middle 95 % of values [R, ...], without NaN."""
  with warnings.catch_warnings(action='ignore', category=RuntimeWarning):
    return np.nanpercentile(values, (2.5, 97.5), axis=0)
