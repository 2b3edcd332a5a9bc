"""DeepLab v3: images in, class logits of the same size out.

At any size of the image, feature (i, j) stands at pixel (i, j) times the output
stride: the logits there are those of the feature map, and lie linearly between.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation"
(2017).
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.layers import (
  POOL_PADDINGS,
  REMATERIALIZATIONS,
  UPSAMPLINGS,
  BatchNorm,
  Conv,
  check_choice,
  check_map,
  on_cpu,
  resample,
)
from deeplab_jax.models.padding import blanked, within
from deeplab_jax.models.resnet import (
  BACKBONES,
  STRIDE_UNITS,
  ResNetV2,
  unit_geometry,
)
from deeplab_jax.runtime.errors import require


class DeepLabV3(nn.Module):
  """Backbone, ASPP, class layer and bilinear upsampling.

  Attributes:
    backbone: maps normalised images to a dict of features.
    aspp: maps those features to the ones the class layer reads.
    num_classes: channels of the logits.
    features: which of the backbone's the head reads, 'postnorm' or 'block4'.
    upsampling: 'align_corners' holds to the geometry above, at every size. With
      'asymmetric' the logits of a map of h rows are stretched over all H rows
      of the image, row i reading `i * h / H`: TensorFlow 1's default, with
      which the seed was trained.
    mean: subtracted from the RGB values (0..255) of the images.
    std: they are divided by this.
    dtype: of the computation; parameters and logits are float32.
  """

  backbone: nn.Module
  aspp: nn.Module
  num_classes: int = 21
  features: str = 'postnorm'
  upsampling: str = 'align_corners'
  mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
  std: tuple[float, float, float] = (127.5, 127.5, 127.5)
  dtype: Any = jnp.float32

  @property
  def pads_freely(self) -> bool:
    """Whether images of several sizes may be padded to one, see `__call__`.

    With 'asymmetric' upsampling padding moves the logits: images of each size
    need a batch of their own.
    """
    return self.upsampling == 'align_corners'

  def prepare(
    self, variables: dict[str, Any], size: tuple[int, int]
  ) -> dict[str, Any]:
    """Computes once what inference else computes from the kernels each time.

    On CPUs that are the transforms of Winograd's algorithm, 0.2 GB for
    ResNet-50; elsewhere there is nothing to gain and nothing is added.

    Args:
      variables: `params` and `batch_stats`.
      size: (height, width) of the images. At others, what does not suit them
        is computed as without.

    Returns:
      The variables with a collection 'prepared', for `apply` with `train` False
      until the parameters change. The logits are the same up to rounding.
    """
    variables = {k: v for k, v in variables.items() if k != 'prepared'}
    if not on_cpu():
      return variables
    images = jnp.zeros((1, *size, 3), jnp.uint8)

    @jax.jit
    def prepared(variables: dict[str, Any]) -> dict[str, Any]:
      return self.apply(variables, images, train=False, mutable=['prepared'])[1]

    return {**variables, **prepared(variables)}

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool, sizes: jax.Array | None = None
  ) -> jax.Array:
    """Computes class logits.

    Args:
      images: [B, H, W, 3] RGB in 0..255, uint8 or float, any size.
      train: use the statistics of this batch in batch normalisation, and update
        the running ones in the 'batch_stats' collection.
      sizes: int [B, 2], the height and width that each image had before it was
        padded at the bottom and the right to the size of the batch. Its logits
        are then those that it has alone, to rounding, whatever the padding
        shows (in training the statistics of the batch see the padding). None
        if all of H, W is image. Without `pads_freely` it changes nothing.

    Returns:
      float32 [B, H, W, num_classes].

    Raises:
      ValueError: for images or sizes of another shape, and for training with
        variables that `prepare` returned.
    """
    check_map('images', images, 3)
    if train and 'prepared' in self.variables:
      raise ValueError(
        "variables with 'prepared' are for inference: gradients would not reach"
        ' the kernels'
      )
    sizes = None if sizes is None else jnp.asarray(sizes)
    if sizes is not None and sizes.shape != (len(images), 2):
      raise ValueError(
        f'sizes must be [{len(images)}, 2], (height, width) of each image, got'
        f' {list(sizes.shape)}'
      )
    size = images.shape[1:3]
    x = (images.astype(jnp.float32) - jnp.asarray(self.mean)) / jnp.asarray(
      self.std
    )
    extended = tuple(map(self._extended, size))
    bottom, right = (n - own for n, own in zip(extended, size, strict=True))
    x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
    own, blanking = None, contextlib.nullcontext()
    if sizes is not None and self.pads_freely:
      x = jnp.where(within(sizes, extended), x, 0)
      own = self._extended(sizes)
      blanking = blanked(own, extended)
    with blanking:
      x = self.backbone(x.astype(self.dtype), train=train)[self.features]
      mask = None
      if own is not None:
        mask = within(-(-own // self.backbone.output_stride), x.shape[1:3])
      x = self.aspp(x, train=train, mask=mask)
    x = Conv(self.num_classes, use_bias=True, name='logits')(x)
    if self.pads_freely:
      step = (1 / self.backbone.output_stride,) * 2
    else:
      step = x.shape[1] / size[0], x.shape[2] / size[1]
    return resample(x, size, step)

  def _extended(self, size: Any) -> Any:
    """The sides that the backbone sees: with the last feature's pixel in it."""
    stride = self.backbone.output_stride
    return -(-(size - 1) // stride) * stride + 1 if self.pads_freely else size


_PAPER = {
  'stride_unit': 'last',
  'conv_bias': False,
  'stem_pool': 'symmetric',
  'features': 'postnorm',
  'aspp_activation': True,
  'scale_aspp_rates': True,
  'upsampling': 'align_corners',
  'mean': (127.5, 127.5, 127.5),
  'std': (127.5, 127.5, 127.5),
  'bn_epsilon': 1e-5,
}

# What the networks whose weights can be loaded differ in. 'slim', 'keras' and
# 'timm' are ImageNet backbones under the paper's head.
PRESETS: dict[str, dict[str, Any]] = {
  'paper': _PAPER,
  # The TF-slim DeepLab v3 that this project grew from, head and all.
  'seed': {
    **_PAPER,
    'conv_bias': True,
    'stem_pool': 'same',
    'features': 'block4',
    'aspp_activation': False,
    'scale_aspp_rates': False,
    'upsampling': 'asymmetric',
    'mean': (123.68, 116.78, 103.94),
    'std': (1.0, 1.0, 1.0),
  },
  'slim': {**_PAPER, 'conv_bias': True, 'stem_pool': 'same'},
  'keras': {
    **_PAPER,
    'conv_bias': True,
    'stem_pool': 'zero',
    'bn_epsilon': 1.001e-5,
  },
  'timm': {**_PAPER, 'stride_unit': 'first'},
}


def deeplab_v3(
  backbone: str = 'resnet50',
  *,
  preset: str = 'paper',
  num_classes: int = 21,
  output_stride: int = 16,
  multi_grid: tuple[int, ...] = (1, 2, 4),
  width: float = 1.0,
  aspp_rates: tuple[int, ...] = (6, 12, 18),
  aspp_features: int = 256,
  bn_decay: float = 0.9997,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rematerialization: str = '',
  stride_unit: str | None = None,
  conv_bias: bool | None = None,
  stem_pool: str | None = None,
  features: str | None = None,
  aspp_activation: bool | None = None,
  scale_aspp_rates: bool | None = None,
  upsampling: str | None = None,
  mean: tuple[float, float, float] | None = None,
  std: tuple[float, float, float] | None = None,
  bn_epsilon: float | None = None,
) -> DeepLabV3:
  """Builds a DeepLab v3; the defaults are the paper's.

  Args:
    backbone: a key of `BACKBONES`.
    preset: a key of `PRESETS`, which gives the arguments left at None: those in
      which the networks differ whose weights can be loaded; '' for 'paper'.
    num_classes: channels of the logits.
    output_stride: 8, 16 or 32, input pixels per feature pixel. The variables
      are the same at each.
    multi_grid: factor on the rate of each unit of block 4; a block of fewer
      units (ResNet-18 has two) takes the first ones.
    width: factor on the backbone's number of channels.
    aspp_rates: rates at output stride 16, see `scale_aspp_rates`.
    aspp_features: channels of each ASPP branch.
    bn_decay: of the running batch statistics.
    axis_name: mapped axis over whose devices batch statistics are averaged
      (synchronised BN); None for each device's own.
    dtype: of the computation, `jnp.float32` or `jnp.bfloat16`.
    rematerialization: what the backward pass computes again to save memory,
      see `ResNetV2`.
    stride_unit: 'last' or 'first', the unit of a block that strides.
    conv_bias: biases in the backbone, see `ResNetV2`.
    stem_pool: 'symmetric', 'same' or 'zero', see `layers.max_pool`.
    features: 'postnorm' or 'block4': the head reads block 4 behind or before
      the backbone's last BN and ReLU.
    aspp_activation: whether a ReLU follows each BN of the head.
    scale_aspp_rates: whether the rates cover the same input pixels at every
      output stride: doubled at 8 (section 4.1), halved at 32.
    upsampling: 'align_corners' or 'asymmetric', see `DeepLabV3`.
    mean: subtracted from the RGB values (0..255) of the images.
    std: they are divided by this.
    bn_epsilon: added to the variance; 0 is taken for None.

  Returns:
    A Flax module: `model.init(key, images, train=False)` and
    `model.apply(variables, images, train=False)` -> logits [B, H, W, classes].

  Raises:
    ValueError: for an unknown backbone, an impossible output stride, ...
  """
  check_choice('backbone', backbone, BACKBONES)
  check_choice('rematerialization', rematerialization, REMATERIALIZATIONS)
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1, got {num_classes}')
  own = {
    'stride_unit': stride_unit,
    'conv_bias': conv_bias,
    'stem_pool': stem_pool,
    'features': features,
    'aspp_activation': aspp_activation,
    'scale_aspp_rates': scale_aspp_rates,
    'upsampling': upsampling,
    'mean': mean,
    'std': std,
    'bn_epsilon': bn_epsilon or None,
  }
  settings = _settings(preset, own)
  check_settings(
    {
      **settings,
      'width': width,
      'aspp_rates': aspp_rates,
      'aspp_features': aspp_features,
      'bn_decay': bn_decay,
    },
    dtype,
  )
  norm = functools.partial(
    BatchNorm,
    momentum=bn_decay,
    epsilon=settings['bn_epsilon'],
    axis_name=axis_name,
    dtype=dtype,
  )
  units, unit = BACKBONES[backbone]
  resnet = ResNetV2(
    units,
    unit,
    output_stride=output_stride,
    multi_grid=tuple(multi_grid)[:2] if units[3] == 2 else tuple(multi_grid),
    width=width,
    stride_unit=settings['stride_unit'],
    conv_bias=settings['conv_bias'],
    stem_pool=settings['stem_pool'],
    rematerialization=rematerialization,
    norm=norm,
    dtype=dtype,
  )
  unit_geometry(units, output_stride, resnet.multi_grid)
  rates = tuple(aspp_rates)
  if settings['scale_aspp_rates']:
    rates = tuple(max(1, rate * 16 // output_stride) for rate in rates)
  return DeepLabV3(
    resnet,
    ASPP(
      rates,
      aspp_features,
      settings['aspp_activation'],
      norm=norm,
      dtype=dtype,
    ),
    num_classes,
    settings['features'],
    settings['upsampling'],
    tuple(settings['mean']),
    tuple(settings['std']),
    dtype,
  )


def check_settings(settings: dict[str, Any], dtype: Any) -> None:
  """Raises `ValueError` for values of which no network can be made."""
  width, rates = settings['width'], settings['aspp_rates']
  features, decay = settings['aspp_features'], settings['bn_decay']
  epsilon = settings['bn_epsilon']
  require(
    width > 0 and round(64 * width) >= 1,
    'width must be above 1/128, which leaves at least one of 64 channels',
    width,
  )
  require(
    len(rates) > 0 and min(rates) >= 1,
    'aspp_rates must be a tuple of numbers from 1',
    rates,
  )
  require(features >= 1, 'aspp_features must be at least 1', features)
  require(0 <= decay < 1, 'bn_decay must be in [0, 1)', decay)
  require(epsilon > 0, 'bn_epsilon must be above 0', epsilon)
  require(
    dtype in ('float32', 'bfloat16', jnp.float32, jnp.bfloat16),
    'dtype must be float32 or bfloat16',
    dtype,
  )


_CHOICES = {
  'stride_unit': STRIDE_UNITS,
  'stem_pool': POOL_PADDINGS,
  'features': ('postnorm', 'block4'),
  'upsampling': UPSAMPLINGS,
}


def _settings(preset: str, own: dict[str, Any]) -> dict[str, Any]:
  """Those of the preset, and `own` where it has a value."""
  check_choice('preset', preset or 'paper', PRESETS)
  own = {name: value for name, value in own.items() if value is not None}
  settings = {**PRESETS[preset or 'paper'], **own}
  for name, choices in _CHOICES.items():
    check_choice(name, settings[name], choices)
  return settings
