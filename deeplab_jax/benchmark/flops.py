"""Arithmetic of a network, counted from the shapes of its convolutions.

Two operations a multiplication and addition. Nothing is computed: the network
is traced. Normalisation, activations and upsampling, some 2 % of the whole,
are left out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax.models.layers import Conv


class Flops(NamedTuple):
  """Operations of a convolution, or of a network.

  Attributes:
    padded: of the convolution as written, padding included.
    on_map: without multiplications by padding: a tap counts at the output
      pixels for which it lies on the map.
  """

  padded: int
  on_map: int


def count_flops(
  model: nn.Module, size: tuple[int, int], batch_size: int = 1
) -> dict[str, Flops]:
  """Counts one forward pass of a network.

  Args:
    model: maps images [B, H, W, 3], with the keyword `train`.
    size: height and width of the images.
    batch_size: number of images.

  Returns:
    The operations of every convolution by its path, as 'block3/unit1/conv2'.
  """
  counts: dict[str, Flops] = {}

  def count(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if isinstance(module, Conv) and context.method_name == '__call__':
      counts['/'.join(module.path)] = conv_flops(
        args[0].shape,
        module.features,
        module.kernel_size,
        module.stride,
        module.rate,
      )
    return call(*args, **kwargs)

  images = jnp.zeros((batch_size, *size, 3), jnp.uint8)
  with nn.intercept_methods(count):
    jax.eval_shape(
      lambda key: model.init(key, images, train=False), jax.random.key(0)
    )
  return counts


def backward(counts: dict[str, Flops]) -> dict[str, Flops]:
  """Operations of the gradients of what `count_flops` returns, by its paths.

  Those of input and kernel each take as many as the convolution itself; the
  first one's input, the images, needs none.
  """
  gradients = {name: Flops(*(2 * n for n in counts[name])) for name in counts}
  first = next(iter(counts))
  return {**gradients, first: counts[first]}


def total(*counts: dict[str, Flops]) -> Flops:
  """Sums what `count_flops` and `backward` return."""
  convolutions = [count for part in counts for count in part.values()]
  return Flops(*map(sum, zip(*convolutions, strict=True)))


def conv_flops(
  shape: tuple[int, int, int, int],
  features: int,
  kernel_size: int = 1,
  stride: int = 1,
  rate: int = 1,
) -> Flops:
  """Counts a `layers.conv2d`.

  Args:
    shape: of the input, [B, H, W, Cin].
    features: channels of the output.
    kernel_size: taps along each axis, odd.
    stride: output pixel spacing in input pixels.
    rate: spacing of the taps in input pixels.
  """
  batch, height, width, channels = shape
  pixel = 2 * batch * channels * features
  padded, on_map = pixel, pixel
  for size in (height, width):
    places = range(0, size, stride)
    padded *= kernel_size * len(places)
    on_map *= sum(
      0 <= place + rate * (tap - kernel_size // 2) < size
      for place in places
      for tap in range(kernel_size)
    )
  return Flops(padded, on_map)
