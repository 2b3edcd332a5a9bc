"""Keeps what an image is padded with out of its features.

A batch holds images of several sizes, padded at the bottom and the right. A
convolution there reads the features of the padding, where it reads its own
zeros if the image is alone. Blanking them before every convolution and pooling
gives each image the features that it has alone.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax.models.layers import Conv, MaxPool


def within(sizes: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Marks the upper left `sizes` [B, 2] of each map: bool [B, *size, 1]."""
  rows, columns = (
    jnp.arange(length) < sizes[:, axis, None]
    for axis, length in enumerate(size)
  )
  return (rows[:, :, None] & columns[:, None])[..., None]


def blanked(
  sizes: jax.Array, size: tuple[int, int]
) -> contextlib.AbstractContextManager[None]:
  """Blanks the padding for what is called within.

  Args:
    sizes: int [B, 2], height and width of each image without padding.
    size: height and width of the batch. Like `sizes` they are one more than
      multiples of every stride s, so that a map has (size - 1) / s + 1 rows.
  """

  def intercept(
    call: Callable[..., Any], args: Any, kwargs: Any, context: Any
  ) -> Any:
    if context.method_name == '__call__' and _reaches_out(context.module):
      args = (_blank(context.module, args[0]), *args[1:])
    return call(*args, **kwargs)

  def _blank(module: nn.Module, x: jax.Array) -> jax.Array:
    strides = [
      (length - 1) // max(rows - 1, 1)
      for length, rows in zip(size, x.shape[1:3], strict=True)
    ]
    counts = (sizes - 1) // jnp.maximum(jnp.asarray(strides), 1) + 1
    # What pads a maximum must not win.
    pools = isinstance(module, MaxPool) and module.padding != 'zero'
    return jnp.where(
      within(counts, x.shape[1:3]),
      x,
      x.min() if pools else jnp.zeros((), x.dtype),
    )

  return nn.intercept_methods(intercept)


def _reaches_out(module: nn.Module) -> bool:
  """Whether a place of the module's result depends on others of its input."""
  if isinstance(module, Conv):
    return module.kernel_size > 1
  return isinstance(module, MaxPool)
