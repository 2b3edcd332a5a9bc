"""Losses per pixel; the caller reduces."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.runtime.errors import require


def check_settings(
  label_smoothing: float, hardest: float, class_weights: Sequence[float] | None
) -> None:
  """Raises `ValueError` for settings that no loss can have."""
  require(
    0 <= label_smoothing < 1,
    'label_smoothing must be in [0, 1)',
    label_smoothing,
  )
  require(0 < hardest <= 1, 'hardest must be in (0, 1]', hardest)
  if class_weights is not None:
    numbers = all(isinstance(x, int | float) for x in class_weights)
    require(
      numbers and min(class_weights) >= 0 and 0 < max(class_weights) < 2**128,
      'class_weights must be finite numbers from 0, not all of them 0',
      class_weights,
    )


def softmax_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  ignore_label: int = 255,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Cross-entropy of each pixel, 0 where the label is the ignore label.

  Args:
    logits: [..., C] float.
    labels: [...] integer, a class in 0..C-1 or `ignore_label`.
    ignore_label: marks pixels without a class (void).
    label_smoothing: share of the target spread evenly over all classes, that of
      the label among them: Szegedy et al., "Rethinking the Inception
      Architecture" (2016), section 7.

  Returns:
    float32 [...], in nats.

  Raises:
    ValueError: if the labels are not one for each pixel of the logits.
  """
  if logits.shape[:-1] != labels.shape:
    raise ValueError(
      f'labels must be {list(logits.shape[:-1])}, one for each pixel of the'
      f' logits {list(logits.shape)}, got {list(labels.shape)}'
    )
  logits = logits.astype(jnp.float32)
  # A comparison with an iota, since indexing by label has a scatter for its
  # gradient.
  classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  target = jnp.where(classes == labels[..., None], logits, 0).sum(-1)
  if label_smoothing:
    target += label_smoothing * (logits.mean(-1) - target)
  losses = jax.nn.logsumexp(logits, axis=-1) - target
  return jnp.where(labels == ignore_label, 0, losses)


def pixel_weights(
  labels: jax.Array, class_weights: Sequence[float], ignore_label: int = 255
) -> jax.Array:
  """Weight of each pixel by its class, 0 where the label is the ignore label.

  Args:
    labels: [...] integer, a class in 0..C-1 or `ignore_label`.
    class_weights: C numbers from 0.
    ignore_label: marks pixels without a class (void).

  Returns:
    float32 [...].
  """
  weights = jnp.asarray(class_weights, jnp.float32)
  classes = jnp.arange(len(weights), dtype=labels.dtype)
  chosen = jnp.where(labels[..., None] == classes, weights, 0).sum(-1)
  return jnp.where(labels == ignore_label, 0, chosen)


def hardest_pixels(
  losses: jax.Array, counted: jax.Array, share: float
) -> jax.Array:
  """Online hard example mining: which pixels of each image to learn from.

  Shrivastava et al., "Training Region-based Object Detectors with Online Hard
  Example Mining" (2016), on pixels. Each image keeps its own hardest, so that
  the choice does not depend on how a batch lies over the devices.

  Args:
    losses: [B, H, W] float; has no gradient through the choice.
    counted: [B, H, W] bool, the pixels to choose from.
    share: in (0, 1], of the counted pixels of each image; rounded to whole
      pixels, one at least.

  Returns:
    bool [B, H, W], within `counted`. Pixels as hard as the last one that fits
    the share are kept with it.

  Raises:
    ValueError: if the two are not [B, H, W] of one shape.
  """
  if losses.ndim != 3 or losses.shape != counted.shape:
    raise ValueError(
      'losses and counted must be [B, H, W] of one shape, got'
      f' {list(losses.shape)} and {list(counted.shape)}'
    )
  losses = lax.stop_gradient(losses)
  count = counted.sum((1, 2))
  kept = jnp.clip(jnp.round(share * count).astype(jnp.int32), 1)
  easy_first = jnp.sort(
    jnp.where(counted, losses, -jnp.inf).reshape(len(losses), -1)
  )
  threshold = jnp.take_along_axis(easy_first, -kept[:, None], axis=1)
  return counted & (losses >= threshold[..., None])


def median_frequency_weights(
  class_pixels: np.ndarray, class_image_pixels: np.ndarray
) -> np.ndarray:
  """A weight for each class that makes rare classes count as much as others.

  Eigen & Fergus, "Predicting Depth, Surface Normals and Semantic Labels"
  (2015), section 6.2.1: the frequency of a class is its share of the pixels of
  the images in which it is present, its weight the median frequency over it.

  Args:
    class_pixels: [C], pixels of each class in a split, as `Tally` counts them.
    class_image_pixels: [C], pixels of the images in which each class is.

  Returns:
    float64 [C]; 0 for a class without pixels, which has no part in the median.
  """
  weights = np.zeros(len(class_pixels), np.float64)
  present = np.asarray(class_pixels) > 0
  if present.any():
    frequency = class_pixels[present] / class_image_pixels[present]
    weights[present] = np.median(frequency) / frequency
  return weights
