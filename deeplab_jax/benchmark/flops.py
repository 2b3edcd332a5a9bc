"""Arithmetic of a network, counted from the shapes of its convolutions.

A multiplication with its addition counts as two operations. Normalization,
activations and upsampling, about 2 % of the whole, are left out.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax.models.layers import Conv


class Flops(NamedTuple):
  """Operations of a convolution or a network."""

  padded: int  # as the convolution is written, padding included
  on_map: int  # without the multiplications by padding


def count_flops(
  model: nn.Module, size: tuple[int, int], batch_size: int = 1
) -> dict[str, Flops]:
  """Counts one forward pass on images [batch_size, *size, 3].

  Returns the operations of each convolution by its path, as
  'block3/unit1/conv2'. The network is only traced.
  """
  counts: dict[str, Flops] = {}

  def count(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    conv = context.module
    if isinstance(conv, Conv) and context.method_name == '__call__':
      counts['/'.join(conv.path)] = conv_flops(
        args[0].shape, conv.features, conv.kernel_size, conv.stride, conv.rate
      )
    return call(*args, **kwargs)

  images = jnp.zeros((batch_size, *size, 3), jnp.uint8)
  with nn.intercept_methods(count):
    jax.eval_shape(
      lambda key: model.init(key, images, train=False), jax.random.key(0)
    )
  return counts


def backward(counts: dict[str, Flops]) -> dict[str, Flops]:
  """Counts the gradients, from what `count_flops` returns.

  Those of input and kernel take as many operations each as the convolution.
  The input of the first one, the images, needs no gradient.
  """
  gradients = {name: Flops(2 * a, 2 * b) for name, (a, b) in counts.items()}
  first = next(iter(counts))
  return gradients | {first: counts[first]}


def total(counts: Iterable[Flops]) -> Flops:
  """Sums the operations of several convolutions."""
  return Flops(*map(sum, zip(*counts, strict=True)))


def conv_flops(
  shape: tuple[int, ...],
  features: int,
  kernel_size: int = 1,
  stride: int = 1,
  rate: int = 1,
) -> Flops:
  """Counts a `models.layers.Conv` on an input of `shape` [B, H, W, Cin]."""
  batch, *sizes, channels = shape
  padded = on_map = 2 * batch * channels * features
  for size in sizes:
    outputs = range(0, size, stride)
    taps = [rate * (tap - kernel_size // 2) for tap in range(kernel_size)]
    padded *= len(outputs) * len(taps)
    on_map *= sum(0 <= place + tap < size for place in outputs for tap in taps)
  return Flops(padded, on_map)
