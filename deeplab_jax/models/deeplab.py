"""DeepLab v3 and v3+: images in, class logits of the same size out.

Feature (i, j) lies at pixel (i, j) * output_stride, whatever the image size.
At those pixels the logits are the feature map's own; between them they are
interpolated linearly. The other ways of `upsampling` are those of other code.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation"
(2017), and for v3+ "Encoder-Decoder with Atrous Separable Convolution for
Semantic Image Segmentation" (2018).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from deeplab_jax import ops
from deeplab_jax.models.aspp import ASPP, Decoder, FCNHead
from deeplab_jax.models.layers import Conv, resample
from deeplab_jax.models.resnet import BACKBONES
from deeplab_jax.runtime.errors import (
  UserError,
  check_choice,
  check_map,
  require,
)


class Backbone(Protocol):
  """What `DeepLabV3` needs from its backbone module; see `check_backbone`.

  It takes normalized images [B, H, W, C] and returns a dict of maps
  [B, h, w, C]. The map that the head reads has h = ceil(H / output_stride) rows
  and ceil(W / output_stride) columns. The decoder of v3+ needs 'low_level', a
  map of ceil(H / 4) rows and ceil(W / 4) columns.
  """

  output_stride: int

  def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Computes the features of every stage."""


def check_backbone(backbone: Any, features: str = 'postnorm') -> None:
  """Checks that a module fits `Backbone` by tracing it; nothing is computed.

  Raises:
    ValueError: saying what the module gives and what is needed.
  """
  stride = getattr(backbone, 'output_stride', None)
  if not isinstance(stride, int) or stride < 1:
    raise ValueError(f'output_stride must be a whole number, got {stride!r}')
  for size in ((4 * stride + 1, 2 * stride + 1), (97, 130), (64, 64)):
    for train in (False, True):
      init = functools.partial(backbone.init_with_output, train=train)
      images = jnp.zeros((2, *size, 3))
      maps, _ = jax.eval_shape(init, jax.random.key(0), images)
      if features not in maps:
        raise ValueError(f'no {features!r} among the maps {list(maps)}')
      wanted = [2, *(-(-n // stride) for n in size), maps[features].shape[-1]]
      if list(maps[features].shape) != wanted:
        raise ValueError(
          f'{features!r} of images {list(images.shape)} must be {wanted}, got'
          f' {list(maps[features].shape)}'
        )


class DeepLabV3(nn.Module):
  """Backbone, ASPP, perhaps a decoder, class layer and bilinear upsampling.

  Attributes:
    backbone: maps normalized images to features, see `Backbone`.
    aspp: turns those features into the input of the class layer.
    num_classes: channels of the logits.
    features: name of the map that the head reads, 'postnorm' or 'block4'.
    upsampling: 'align_corners' is the geometry described above. 'asymmetric'
      stretches the map's h rows over the image's H, so that row i reads row
      i * h / H: TensorFlow 1's default, used to train the seed network.
      'half_pixel' reads row (i + 1/2) * h / H - 1/2: PyTorch's default.
    mean, std: of each channel; values v become (v - mean) / std.
    dtype: type to compute in; parameters and logits are always float32.
    auxiliary: a head on the map 'block3', or None. It is computed only if the
      collection 'intermediates' is mutable, and gives 'auxiliary_logits' there.
    decoder: refines what the ASPP gives, see `Decoder`, or None.
  """

  backbone: nn.Module
  aspp: nn.Module
  num_classes: int = 21
  features: str = 'postnorm'
  upsampling: str = 'align_corners'
  mean: tuple[float, ...] = (127.5, 127.5, 127.5)
  std: tuple[float, ...] = (127.5, 127.5, 127.5)
  dtype: Any = jnp.float32
  auxiliary: nn.Module | None = None
  decoder: Any = None

  def __post_init__(self) -> None:
    choices = ('align_corners', 'asymmetric', 'half_pixel')
    check_choice('upsampling', self.upsampling, choices)
    if self.num_classes < 1:
      raise ValueError(f'num_classes must be from 1, got {self.num_classes}')
    super().__post_init__()

  @property
  def pads_freely(self) -> bool:
    """Whether padding images to a common size leaves their logits unchanged."""
    return self.upsampling == 'align_corners'

  @property
  def low_level(self) -> bool:
    """Whether the decoder reads the map 'low_level', as in v3+."""
    return bool(self.decoder and self.decoder.low_level_features)

  @property
  def pixel_center(self) -> float:
    """Where a pixel of a map is sampled, from its upper left corner."""
    return 0.5 if self.upsampling == 'half_pixel' else 0.0

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool, sizes: jax.Array | None = None
  ) -> jax.Array:
    """Computes class logits.

    Args:
      images: [B, H, W, C], RGB in 0..255 or as stored, integers or float.
      train: use the batch's own statistics in batch normalization, and update
        the running ones in the collection 'batch_stats'.
      sizes: int [B, 2], height and width of each image before padding at the
        bottom and right. Each image then gets the same logits as on its own,
        whatever the padding holds (in training, though, batch statistics
        include the padding). Ignored unless `pads_freely`.

    Returns:
      float32 [B, H, W, num_classes].

    Raises:
      ValueError: if images or sizes have the wrong shape.
    """
    check_map('images', images, len(self.mean))
    if sizes is not None:  # else the number of images may be a symbol
      rule = f'sizes must be [{len(images)}, 2], (height, width) of each image'
      shape = list(jnp.shape(sizes))
      require(shape == [len(images), 2], rule, shape)
    stride, size = self.backbone.output_stride, images.shape[1:3]
    x = images.astype(jnp.float32) - jnp.asarray(self.mean)
    x /= jnp.asarray(self.std)
    # Pad until the pixel of the last feature is included.
    extended = tuple(self._extended(n) for n in size)
    bottom, right = (n - own for n, own in zip(extended, size, strict=True))
    x = lax.pad(x, 0.0, ((0, 0, 0), (0, bottom, 0), (0, right, 0), (0, 0, 0)))
    mask, padding = None, contextlib.ExitStack()
    if sizes is not None and self.pads_freely:
      sizes = jnp.asarray(sizes)
      x = jnp.where(ops.within(sizes, extended), x, 0)
      sizes = self._extended(sizes)
      padding.enter_context(ops.padded(sizes, extended))
      mask = ops.within(
        -(-sizes // stride), [-(-n // stride) for n in extended]
      )
    with padding:
      maps = self.backbone(x.astype(self.dtype), train=train)
      x = self.aspp(maps[self.features], train=train, mask=mask)
      if self.decoder:
        fine = None
        if self.low_level:
          fine = _needed(maps, 'low_level', 'decoder of v3+')
          x = self._resampled(x, fine.shape[1:3], (4 / stride,) * 2)
          stride = 4
        x = self.decoder(x, fine, train=train)
    if self.has_variable('dropout', 'scale'):  # [B, 1, 1, C], from training
      x *= self.get_variable('dropout', 'scale').astype(x.dtype)
    wanted = self.is_mutable_collection('intermediates')
    if self.auxiliary and (wanted or self.is_initializing()):
      y = _needed(maps, 'block3', 'auxiliary head')
      y = self.auxiliary(y, train=train)
      pairs = zip(y.shape[1:3], extended, strict=True)
      step = [(rows - 1) / max(n - 1, 1) for rows, n in pairs]
      y = self._resampled(y, size, step)
      self.sow('intermediates', 'auxiliary_logits', y)
    x = Conv(self.num_classes, use_bias=True, name='logits')(x)
    return self._resampled(x, size, (1 / stride, 1 / stride))

  def _resampled(self, x: jax.Array, size: Any, step: Any) -> jax.Array:
    """Reads a map at `size` points; `step` counts for 'align_corners' alone."""
    if self.upsampling != 'align_corners':
      step = x.shape[1] / size[0], x.shape[2] / size[1]
    return resample(x, size, step, center=self.pixel_center)

  def _extended(self, size: Any) -> Any:
    stride = self.backbone.output_stride
    return -(-(size - 1) // stride) * stride + 1 if self.pads_freely else size


def _needed(maps: dict[str, jax.Array], name: str, by: str) -> jax.Array:
  if name not in maps:
    rule = f'the {by} needs the map {name!r} of the backbone'
    raise UserError(f'{rule}, which gives {", ".join(maps)}')
  return maps[name]


_PAPER: dict[str, Any] = {
  'multi_grid': (1, 2, 4),
  'width': 1.0,
  'stride_unit': 'last',
  'conv_bias': False,
  'stem_pool': 'symmetric',
  'rematerialization': 'none',
  'aspp_rates': (6, 12, 18),
  'aspp_features': 256,
  'aspp_activation': True,
  'scale_aspp_rates': True,
  'auxiliary': None,
  'decoder': 'none',
  'features': 'postnorm',
  'upsampling': 'align_corners',
  'mean': (127.5, 127.5, 127.5),
  'std': (127.5, 127.5, 127.5),
  'bn_decay': 0.9997,
  'bn_epsilon': 1e-5,
  'axis_name': None,
}

_TORCHVISION = _PAPER | {
  'multi_grid': (1, 1, 1),
  'stride_unit': 'first',
  'aspp_rates': (12, 24, 36),
  'scale_aspp_rates': False,
  'decoder': 'conv',
  'upsampling': 'half_pixel',
  'mean': (123.675, 116.28, 103.53),
  'std': (58.395, 57.12, 57.375),
}

# 'slim', 'keras' and 'timm' take ImageNet backbones under the paper's head.
PRESETS: dict[str, dict[str, Any]] = {
  'paper': _PAPER,
  # The TF-slim DeepLab v3 that this project grew from, head and all.
  'seed': _PAPER
  | {
    'conv_bias': True,
    'stem_pool': 'same',
    'features': 'block4',
    'aspp_activation': False,
    'scale_aspp_rates': False,
    'upsampling': 'asymmetric',
    'mean': (123.68, 116.78, 103.94),
    'std': (1.0, 1.0, 1.0),
  },
  'slim': _PAPER | {'conv_bias': True, 'stem_pool': 'same'},
  'keras': _PAPER
  | {'conv_bias': True, 'stem_pool': 'zero', 'bn_epsilon': 1.001e-5},
  'timm': _PAPER | {'stride_unit': 'first'},
  'torchvision': _TORCHVISION,  # whose rates are for output stride 8
  'vainf': _TORCHVISION | {'aspp_rates': (6, 12, 18), 'scale_aspp_rates': True},
}
DECODERS = {'none': None, 'conv': 0, 'v3plus': 48}  # low-level features
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
  'aspp_rates': ('numbers from 1', lambda x: len(x) > 0 and min(x) >= 1),
  'aspp_features': ('at least 1', lambda x: x >= 1),
  'bn_decay': ('in [0, 1)', lambda x: 0 <= x < 1),
  'bn_epsilon': ('above 0', lambda x: x > 0),
}
_OF_BACKBONE = (
  *('multi_grid', 'width', 'stride_unit', 'conv_bias', 'stem_pool'),
  'rematerialization',
)


def deeplab_v3(
  backbone: Any = 'resnet50',
  *,
  num_classes: int = 21,
  output_stride: int = 16,
  preset: str = 'paper',
  dtype: Any = jnp.float32,
  **overrides: Any,
) -> DeepLabV3:
  """Builds a DeepLab v3; the defaults are the paper's.

  Args:
    backbone: a key of `BACKBONES`, a function like its values, or a `Backbone`
      module, which keeps its own output stride and settings.
    num_classes: channels of the logits.
    output_stride: 8, 16 or 32; the variables are the same at each.
    preset: a key of `PRESETS`.
    dtype: type to compute in, `jnp.float32` or `jnp.bfloat16`.
    **overrides: replace the preset's settings, which `ResNetV2`, `ASPP` and
      `DeepLabV3` explain. `aspp_rates` are for output stride 16;
      `scale_aspp_rates` doubles them at 8 (section 4.1) and halves them at 32.
      `bn_decay` is the decay of the running batch statistics. `axis_name` is
      the mapped axis; batch statistics are averaged over its devices.
      A true `auxiliary` adds an `FCNHead` for training. `decoder` is 'none',
      'conv', a 3x3 convolution before the class layer, or 'v3plus', see
      `Decoder`.

  Raises:
    ValueError: for an unknown name or an impossible value.
  """
  check_choice('preset', preset, PRESETS)
  for name in overrides:
    check_choice('a setting', name, _PAPER)
  settings = PRESETS[preset] | overrides
  for name, (rule, holds) in _RULES.items():
    require(holds(settings[name]), f'{name} must be {rule}', settings[name])
  known = ('float32', 'bfloat16', jnp.float32, jnp.bfloat16)
  require(dtype in known, 'dtype must be float32 or bfloat16', dtype)
  check_choice('decoder', settings['decoder'], DECODERS)
  norm = functools.partial(
    nn.BatchNorm,
    momentum=settings['bn_decay'],
    epsilon=settings['bn_epsilon'],
    axis_name=settings['axis_name'],
    dtype=dtype,
  )
  if not isinstance(backbone, nn.Module):
    if isinstance(backbone, str):
      check_choice('backbone', backbone, BACKBONES)
      backbone = BACKBONES[backbone]
    own = {key: settings[key] for key in _OF_BACKBONE}
    backbone = backbone(
      output_stride=output_stride, norm=norm, dtype=dtype, **own
    )
  stride = backbone.output_stride if settings['scale_aspp_rates'] else 16
  rates = [max(1, rate * 16 // stride) for rate in settings['aspp_rates']]
  features, activation = settings['aspp_features'], settings['aspp_activation']
  aspp = ASPP(tuple(rates), features, activation, norm, dtype)
  if settings['auxiliary']:
    settings['auxiliary'] = FCNHead(num_classes, norm, dtype)
  low_level = DECODERS[settings['decoder']]
  decoder = Decoder(features, low_level or 0, norm, dtype)
  settings['decoder'] = None if low_level is None else decoder
  names = 'auxiliary', 'decoder', 'features', 'upsampling', 'mean', 'std'
  head = {key: settings[key] for key in names}
  return DeepLabV3(backbone, aspp, num_classes, dtype=dtype, **head)


def deeplab_v3plus(*args: Any, **settings: Any) -> DeepLabV3:
  """Builds a DeepLab v3+: `deeplab_v3` with `decoder='v3plus'`.

  Its decoder joins 48 channels of the features at stride 4, so that edges are
  finer than the output stride. The rest is as in `deeplab_v3`.
  """
  return deeplab_v3(*args, decoder='v3plus', **settings)
