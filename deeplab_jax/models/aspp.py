"""Atrous spatial pyramid pooling with image-level features.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation"
(2017), section 3.3.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from deeplab_jax.models.layers import (
  BatchNorm,
  ConvNormRelu,
  check_map,
  on_cpu,
)


class ImagePooling(nn.Module):
  """Mean over the map, 1x1 convolution, BN and ReLU, spread over the map.

  Without `activation` the ReLU is left out.
  """

  features: int
  activation: bool = True
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, C] to [B, H, W, features], constant over H and W.

    `mask`, bool [B, H, W, 1], says which places have a part in the mean.
    """
    mean = jnp.mean(x, (1, 2), dtype=jnp.float32, keepdims=True, where=mask)
    y = ConvNormRelu(
      self.features,
      activation=self.activation,
      norm=self.norm,
      dtype=self.dtype,
      name='project',
    )(mean, train=train)
    return jnp.broadcast_to(y, (*x.shape[:3], self.features))


class ASPP(nn.Module):
  """A 1x1 branch, an atrous 3x3 branch a rate and image pooling, projected.

  Attributes:
    rates: of the 3x3 branches, in pixels of the feature map.
    features: channels of every branch and of the output.
    activation: whether a ReLU follows each batch normalisation.
    norm: batch normalisation, see `ResNetV2`.
    dtype: of the computation.
  """

  rates: tuple[int, ...] = (6, 12, 18)
  features: int = 256
  activation: bool = True
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, C] to [B, H, W, features].

    `mask`, bool [B, H, W, 1], says which places are image and not padding: the
    pooling's mean is over them.
    """
    check_map('x', x)
    shared = {
      'activation': self.activation,
      'norm': self.norm,
      'dtype': self.dtype,
    }
    pooling = ImagePooling(self.features, **shared, name='pooling')
    branches = [
      functools.partial(pooling, mask=mask),
      ConvNormRelu(self.features, **shared, name='conv'),
    ]
    branches += [
      ConvNormRelu(self.features, 3, rate, **shared, name=f'atrous{i}')
      for i, rate in enumerate(self.rates, 1)
    ]
    maps = []
    for branch in branches:
      if on_cpu() and maps:
        # One after another, in the backward pass too, lest what they need
        # beside their results is kept for all at once.
        x, maps[-1] = lax.optimization_barrier((x, maps[-1]))
      maps.append(branch(x, train=train))
    y = jnp.concatenate(maps, -1)
    return ConvNormRelu(self.features, **shared, name='project')(y, train=train)
