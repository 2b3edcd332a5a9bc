"""Losses per pixel; the caller reduces."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def softmax_cross_entropy(
  logits: jax.Array, labels: jax.Array, ignore_label: int = 255
) -> jax.Array:
  """Cross-entropy of each pixel, 0 where the label is the ignore label.

  Args:
    logits: [..., C] float.
    labels: [...] integer, a class in 0..C-1 or `ignore_label`.
    ignore_label: marks pixels without a class (void).

  Returns:
    float32 [...], in nats.
  """
  logits = logits.astype(jnp.float32)
  # A comparison with an iota, since indexing by label has a scatter for its
  # gradient.
  classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  at_label = jnp.where(classes == labels[..., None], logits, 0).sum(-1)
  losses = jax.nn.logsumexp(logits, axis=-1) - at_label
  return jnp.where(labels == ignore_label, 0, losses)


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
