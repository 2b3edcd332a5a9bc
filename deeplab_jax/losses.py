"""Losses per pixel; the caller reduces."""

import jax
import jax.numpy as jnp
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
