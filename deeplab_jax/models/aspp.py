"""Heads: atrous spatial pyramid pooling, the decoder of v3+, and a plain one.

ASPP is from Chen et al., "Rethinking Atrous Convolution for Semantic Image
Segmentation" (2017), section 3.3.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax.models.layers import Conv, ConvNormRelu
from deeplab_jax.runtime.errors import check_map


class ImagePooling(nn.Module):
  """Mean over the map, 1x1 convolution, BN and ReLU, spread over the map."""

  features: int
  activation: bool = True
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, C] to [B, H, W, features]; pools where `mask` is true."""
    y = jnp.mean(x, (1, 2), dtype=jnp.float32, keepdims=True, where=mask)
    shared = self.activation, self.norm, self.dtype
    project = ConvNormRelu(self.features, 1, 1, *shared, name='project')
    y = project(y, train=train)
    return jnp.broadcast_to(y, (*x.shape[:3], self.features))


class ASPP(nn.Module):
  """Image pooling, a 1x1 branch and an atrous 3x3 branch per rate, projected.

  Attributes:
    rates: rates of the 3x3 branches, in pixels of the feature map.
    features: channels of every branch and of the output.
    activation: whether a ReLU follows each batch normalization.
    norm, dtype: see `ResNetV2`.
  """

  rates: tuple[int, ...] = (6, 12, 18)
  features: int = 256
  activation: bool = True
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, C] to [B, H, W, features]; `mask` as in the pooling."""
    check_map('x', x)
    shared = self.activation, self.norm, self.dtype
    conv = functools.partial(ConvNormRelu, self.features)
    pooling = ImagePooling(self.features, *shared, name='pooling')
    maps = [pooling(x, train=train, mask=mask)]
    maps.append(conv(1, 1, *shared, name='conv')(x, train=train))
    for i, rate in enumerate(self.rates, 1):
      maps.append(conv(3, rate, *shared, name=f'atrous{i}')(x, train=train))
    project = conv(1, 1, *shared, name='project')
    return project(jnp.concatenate(maps, -1), train=train)


class Decoder(nn.Module):
  """One 3x3 convolution before the class layer; in v3+ of finer features, too.

  Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic
  Image Segmentation" (2018), section 3.1, without separable convolutions.

  Attributes:
    features: channels of the output.
    low_level_features: channels to which the finer map of v3+ is reduced, or 0
      for none.
    norm, dtype: see `ResNetV2`.
  """

  features: int = 256
  low_level_features: int = 48
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, low_level: jax.Array | None, *, train: bool
  ) -> jax.Array:
    """Maps [B, H, W, C], with a map [B, H, W, D] in v3+, to features."""
    shared = True, self.norm, self.dtype
    if low_level is not None:
      reduce = ConvNormRelu(self.low_level_features, 1, 1, *shared, name='low')
      x = jnp.concatenate([reduce(low_level, train=train), x], -1)
    conv = ConvNormRelu(self.features, 3, 1, *shared, name='conv')
    return conv(x, train=train)


class FCNHead(nn.Module):
  """3x3 convolution to a quarter of the channels, BN, ReLU, class layer.

  Zhao et al., "Pyramid Scene Parsing Network" (2017), section 3.3.
  """

  num_classes: int
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps [B, H, W, C] to float32 logits [B, H, W, num_classes]."""
    features, shared = max(1, x.shape[-1] // 4), (True, self.norm, self.dtype)
    x = ConvNormRelu(features, 3, 1, *shared, name='conv')(x, train=train)
    return Conv(self.num_classes, use_bias=True, name='logits')(x)
