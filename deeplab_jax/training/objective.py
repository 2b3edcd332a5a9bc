"""What a training step minimizes: a weighted sum of losses over a batch."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deeplab_jax.runtime.errors import choose, require
from deeplab_jax.training.losses import (
  LOSSES,
  Across,
  Loss,
  hardest_pixels,
  pixel_weights,
)


def check_settings(
  terms: Iterable[Any],
  label_smoothing: float,
  hardest: float,
  class_weights: Sequence[float] | None,
  auxiliary: float = 0.0,
) -> None:
  """Raises `ValueError` for settings that no loss can have."""
  smoothing, weights = label_smoothing, class_weights
  require(0 <= smoothing < 1, 'label_smoothing must be in [0, 1)', smoothing)
  require(0 < hardest <= 1, 'hardest must be in (0, 1]', hardest)
  require(0 <= auxiliary < math.inf, 'auxiliary must be from 0', auxiliary)
  if weights is not None:
    numbers = all(isinstance(x, int | float) for x in weights)
    holds = numbers and min(weights) >= 0 and 0 < max(weights) < 2**128
    rule = 'class_weights must be finite numbers from 0, not all of them 0'
    require(holds, rule, weights)
  if all(_is_of_regions(loss) for loss, _ in read_terms(terms).values()):
    plain = not smoothing and hardest == 1 and weights is None
    rule = 'label_smoothing, hardest and class_weights need a loss of pixels'
    require(plain, f'{rule} among the terms', terms)


def _is_of_regions(loss: Loss) -> bool:
  return 'across' in inspect.signature(loss).parameters


def read_terms(terms: Iterable[Any]) -> dict[str, tuple[Loss, float]]:
  """Reads a weighted sum of losses: its functions and weights, by name.

  >>> [weight for _, weight in read_terms(('focal', 'dice:0.5')).values()]
  [1.0, 0.5]

  A term is a key of `LOSSES` or a function like its values, with the weight 1
  or its own: `'dice:0.5'`, `(function, 0.5)`. Raises `ValueError` for anything
  else, for a name that comes twice, and without a term.
  """
  found: dict[str, tuple[Loss, float]] = {}
  for term in terms:
    parts = term.split(':') if isinstance(term, str) else term
    pair = isinstance(parts, list | tuple) and len(parts) == 2
    loss, weight = parts if pair else (term, 1)
    function = choose('terms', loss, LOSSES)
    name = getattr(getattr(loss, 'func', loss), '__name__', str(loss))
    try:
      number = float(weight)
    except (TypeError, ValueError):
      number = math.nan
    rule = f'terms: the weight of {name} must be a number above 0'
    require(0 < number < 2**128, rule, weight)
    require(name not in found, 'terms must have different names', name)
    found[name] = function, number
  require(bool(found), 'terms must name a loss', terms)
  return found


def batch_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  terms: Iterable[Any] = ('cross_entropy',),
  label_smoothing: float = 0.0,
  class_weights: Sequence[float] | None = None,
  hardest: float = 1.0,
  ignore_label: int = 255,
  across: Across = lambda sums: sums,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
  """Computes a weighted sum of losses over a batch on all devices.

  `logits` are float [B, H, W, C], and `labels` [B, H, W] a class in 0..C-1 or
  `ignore_label`, of this device's images. `across` adds sums up over the
  devices, and a gradient passes it unchanged.

  `terms` are losses and their weights, see `read_terms`. A loss of pixels
  becomes its mean over the valid ones. `label_smoothing`, `class_weights` (see
  `pixel_weights`) and `hardest`, the share that `hardest_pixels` keeps by the
  weighted sum of these losses, shape these alone.

  Returns `loss` and, of several terms, each as `loss_NAME` before its weight;
  the weight of all pixels that count; and the number of those on this device.
  """
  check_settings(terms, label_smoothing, hardest, class_weights)
  chosen, given = read_terms(terms), (logits, labels, ignore_label)
  each, values, summed = {}, {}, jnp.zeros(())
  for name, (loss, weight) in chosen.items():
    if _is_of_regions(loss):
      values[name] = loss(*given, across=across)
    else:
      each[name] = loss(*given, label_smoothing)
      found, rule = each[name].shape, 'must return a value per pixel, as shaped'
      require(found == labels.shape, f'terms: {name} {rule}', found)
      summed += weight * each[name]
  weights = pixel_weights(labels, class_weights, ignore_label)
  if hardest < 1:  # by the loss alone: a weight makes no pixel harder
    weights *= hardest_pixels(summed, weights > 0, hardest)
  total = across(weights.sum())
  for name in each:  # dividing here spares a pass over the gradients
    share = (weights * each[name]).sum() / jnp.where(total > 0, total, 1)
    values[name] = across(share)
  result = {f'loss_{n}': values[n] for n in chosen if len(chosen) > 1}
  weighted = [weight * values[name] for name, (_, weight) in chosen.items()]
  result['loss'] = sum(weighted, jnp.zeros(()))
  return result, total, (weights > 0).sum()
