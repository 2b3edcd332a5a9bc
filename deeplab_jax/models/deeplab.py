"""DeepLab v3: images in, class logits of the same size out.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation"
(2017).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.layers import Conv, resize_bilinear
from deeplab_jax.models.resnet import BACKBONES, ResNetV2, unit_geometry


class DeepLabV3(nn.Module):
  """Backbone, ASPP, class layer and bilinear upsampling.

  Attributes:
    backbone: maps normalised images to a dict with 'postnorm' features.
    aspp: maps those features to the ones the class layer reads.
    num_classes: channels of the logits.
    mean: subtracted from the RGB values (0..255) of the images.
    std: they are divided by this.
    dtype: of the computation; parameters and logits are float32.
  """

  backbone: nn.Module
  aspp: nn.Module
  num_classes: int = 21
  mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
  std: tuple[float, float, float] = (127.5, 127.5, 127.5)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Computes class logits.

    Args:
      images: [B, H, W, 3] RGB in 0..255, uint8 or float, any size.
      train: use the statistics of this batch in batch normalisation, and update
        the running ones in the 'batch_stats' collection.

    Returns:
      float32 [B, H, W, num_classes].
    """
    x = (images.astype(jnp.float32) - jnp.asarray(self.mean)) / jnp.asarray(
      self.std
    )
    x = self.backbone(x.astype(self.dtype), train=train)['postnorm']
    x = self.aspp(x, train=train)
    x = Conv(self.num_classes, use_bias=True, name='logits')(x)
    return resize_bilinear(x, images.shape[1:3])


def deeplab_v3(
  backbone: str = 'resnet50',
  *,
  num_classes: int = 21,
  output_stride: int = 16,
  multi_grid: tuple[int, ...] = (1, 2, 4),
  width: float = 1.0,
  aspp_rates: tuple[int, ...] = (6, 12, 18),
  aspp_features: int = 256,
  bn_decay: float = 0.9997,
  bn_epsilon: float = 1e-5,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
) -> DeepLabV3:
  """Builds a DeepLab v3; the defaults are the paper's.

  Args:
    backbone: a key of `BACKBONES`.
    num_classes: channels of the logits.
    output_stride: 8, 16 or 32, input pixels per feature pixel. The variables
      are the same at each.
    multi_grid: factor on the rate of each unit of block 4; a block of fewer
      units (ResNet-18 has two) takes the first ones.
    width: factor on the backbone's number of channels.
    aspp_rates: rates at output stride 16. They cover the same input pixels at
      the others: doubled at 8 (section 4.1), halved at 32.
    aspp_features: channels of each ASPP branch.
    bn_decay: of the running batch statistics.
    bn_epsilon: added to the variance.
    axis_name: mapped axis over whose devices batch statistics are averaged
      (synchronised BN); None for each device's own.
    dtype: of the computation, `jnp.float32` or `jnp.bfloat16`.

  Returns:
    A Flax module: `model.init(key, images, train=False)` and
    `model.apply(variables, images, train=False)` -> logits [B, H, W, classes].

  Raises:
    ValueError: for an unknown backbone, an impossible output stride, ...
  """
  if backbone not in BACKBONES:
    raise ValueError(
      f'backbone must be one of {", ".join(BACKBONES)}, got {backbone!r}'
    )
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1, got {num_classes}')
  norm = functools.partial(
    nn.BatchNorm,
    momentum=bn_decay,
    epsilon=bn_epsilon,
    axis_name=axis_name,
    dtype=dtype,
  )
  units, unit = BACKBONES[backbone]
  resnet = ResNetV2(
    units,
    unit,
    output_stride=output_stride,
    multi_grid=tuple(multi_grid)[: units[3]],
    width=width,
    norm=norm,
    dtype=dtype,
  )
  unit_geometry(units, output_stride, resnet.multi_grid)
  rates = tuple(max(1, rate * 16 // output_stride) for rate in aspp_rates)
  aspp = ASPP(rates, aspp_features, norm=norm, dtype=dtype)
  return DeepLabV3(resnet, aspp, num_classes, dtype=dtype)
