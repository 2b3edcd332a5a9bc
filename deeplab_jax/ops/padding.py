"""Keeps the padding of images out of their features.

A batch holds images of several sizes, padded at the bottom and right. At an
image's edge a convolution reads features of the padding; in a batch of its own,
the image has zeros there. Setting these features to zero before every
convolution and pooling gives each image the same features as on its own.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

_sizes: contextvars.ContextVar[tuple[jax.Array, tuple[int, int]] | None] = (
  contextvars.ContextVar('sizes', default=None)
)


def within(sizes: jax.Array, size: Sequence[int]) -> jax.Array:
  """Marks the upper left `sizes` [B, 2] of each map: bool [B, *size, 1]."""
  rows, columns = (
    jnp.arange(length) < sizes[:, axis, None]
    for axis, length in enumerate(size)
  )
  return (rows[:, :, None] & columns[:, None])[..., None]


@contextlib.contextmanager
def padded(sizes: jax.Array, size: tuple[int, int]) -> Iterator[None]:
  """Inside the block, convolutions and poolings ignore the padding.

  `sizes`, int [B, 2], are the sizes of the images before padding, and `size` is
  the size of the batch. All are one more than a multiple of every stride s, so
  a map has (size - 1) / s + 1 rows.
  """
  token = _sizes.set((sizes, size))
  try:
    yield
  finally:
    _sizes.reset(token)


def blank(x: jax.Array, *, lowest: bool = False) -> jax.Array:
  """Sets padding to zero, or to the lowest value, which wins no maximum."""
  if (padding := _sizes.get()) is None:
    return x
  sizes, size = padding
  strides = [
    (length - 1) // max(rows - 1, 1)
    for length, rows in zip(size, x.shape[1:3], strict=True)
  ]
  own = (sizes - 1) // jnp.maximum(jnp.asarray(strides), 1) + 1
  value = x.min() if lowest else jnp.zeros((), x.dtype)
  return jnp.where(within(own, x.shape[1:3]), x, value)
