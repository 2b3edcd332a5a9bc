"""Losses per pixel, and which pixels count how much; the caller reduces."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.runtime.errors import require


def check_settings(
  label_smoothing: float, hardest: float, class_weights: Sequence[float] | None
) -> None:
  """Raises `ValueError` for settings that no loss can have."""
  smoothing, weights = label_smoothing, class_weights
  require(0 <= smoothing < 1, 'label_smoothing must be in [0, 1)', smoothing)
  require(0 < hardest <= 1, 'hardest must be in (0, 1]', hardest)
  if weights is not None:
    numbers = all(isinstance(x, int | float) for x in weights)
    holds = numbers and min(weights) >= 0 and 0 < max(weights) < 2**128
    rule = 'class_weights must be finite numbers from 0, not all of them 0'
    require(holds, rule, weights)


def softmax_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  ignore_label: int = 255,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Computes the cross-entropy of each pixel, 0 at void.

  >>> softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([3, 255])).tolist()
  [1.3862943649291992, 0.0]

  `logits` are float [..., C]; `labels` are [...], a class in 0..C-1 or
  `ignore_label`. Szegedy et al., "Rethinking the Inception Architecture"
  (2016), section 7, spread the share `label_smoothing` of the target evenly
  over all classes. Returns float32 [...], in nats. Raises `ValueError` if the
  labels are not one for each pixel of the logits.
  """
  shape, found = list(logits.shape), list(labels.shape)
  rule = (
    f'labels must be {shape[:-1]}, one for each pixel of the logits {shape}'
  )
  require(found == shape[:-1], rule, found)
  logits = logits.astype(jnp.float32)
  # Not optax: its integer form has a scatter for its gradient, and its one-hot
  # form took 1.5 times the time and memory of this comparison on a CPU.
  classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  target = jnp.where(classes == labels[..., None], logits, 0).sum(-1)
  if label_smoothing:
    target += label_smoothing * (logits.mean(-1) - target)
  losses = jax.nn.logsumexp(logits, axis=-1) - target
  return jnp.where(labels == ignore_label, 0, losses)


# To add a loss: a function with the arguments and the result of the one above.
LOSSES: dict[str, Callable[..., Any]] = {'cross_entropy': softmax_cross_entropy}


def pixel_weights(
  labels: jax.Array,
  class_weights: Sequence[float] | None,
  ignore_label: int = 255,
) -> jax.Array:
  """Gives each pixel the weight of its class, float32 [...], and void 0.

  `class_weights` are C numbers from 0; None gives every class the weight 1.
  """
  valid = labels != ignore_label
  if class_weights is None:
    return valid.astype(jnp.float32)
  weights = jnp.asarray(class_weights, jnp.float32)
  classes = jnp.arange(len(weights), dtype=labels.dtype)
  chosen = jnp.where(labels[..., None] == classes, weights, 0).sum(-1)
  return jnp.where(valid, chosen, 0)


def hardest_pixels(
  losses: jax.Array, counted: jax.Array, share: float
) -> jax.Array:
  """Chooses the pixels of each image with the largest losses.

  This is online hard example mining, Shrivastava et al. (2016), on pixels. The
  choice of an image does not depend on other images, and so not on how a batch
  is split over devices. No gradient flows through it.

  `losses` are float [B, H, W], and `counted`, bool [B, H, W], are the pixels to
  choose from. Each image keeps the `share` of them, in (0, 1]: at least one
  pixel, and all ties with the last one. Returns bool [B, H, W].
  """
  shapes = [list(losses.shape), list(counted.shape)]
  rule = 'losses and counted must be [B, H, W] of one shape'
  require(losses.ndim == 3 and shapes[0] == shapes[1], rule, shapes)
  losses = lax.stop_gradient(losses)
  kept = jnp.clip(jnp.round(share * counted.sum((1, 2))).astype(jnp.int32), 1)
  candidates = jnp.where(counted, losses, -jnp.inf).reshape(len(losses), -1)
  threshold = jnp.take_along_axis(jnp.sort(candidates), -kept[:, None], axis=1)
  return counted & (losses >= threshold[..., None])


def median_frequency_weights(
  class_pixels: np.ndarray, class_image_pixels: np.ndarray
) -> np.ndarray:
  """Computes weights float64 [C] that make rare classes count as others do.

  Eigen & Fergus, "Predicting Depth, Surface Normals and Semantic Labels"
  (2015), section 6.2.1: the frequency of a class is its share of the pixels of
  the images that show it; its weight is the median frequency divided by it. A
  class without pixels has the weight 0 and no part in the median. The arguments
  are [C]: the pixels of each class, and all pixels of the images that show it.
  """
  weights, present = np.zeros(len(class_pixels)), class_pixels > 0
  if present.any():
    frequency = class_pixels[present] / class_image_pixels[present]
    weights[present] = np.median(frequency) / frequency
  return weights
