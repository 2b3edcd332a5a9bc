"""How a network looks at an image in evaluation: once, or many times.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation"
(2017), section 4.1: the image at several scales and mirrored, the
probabilities averaged.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.models.layers import check_choice, resample
from deeplab_jax.runtime.errors import require

PROTOCOLS = ('whole', 'center_crop', 'sliding_window')


@dataclasses.dataclass(frozen=True)
class Protocol:
  """One way to evaluate.

  Attributes:
    kind: 'whole', every image at its own size; 'center_crop', resized and cut
      by `transforms.CenterCrop`; or 'sliding_window'.
    crop_size: (height, width) of the crop or the window.
    overlap: of windows, see `sliding_window`.
    scales: see `probabilities`.
    flip: see `probabilities`.
  """

  kind: str = 'whole'
  crop_size: tuple[int, int] = (513, 513)
  overlap: float = 1 / 3
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False

  def __post_init__(self) -> None:
    check_choice('protocol', self.kind, PROTOCOLS)
    size, scales = self.crop_size, self.scales
    require(
      len(size) == 2 and min(size) >= 1,
      'crop_size must be (height, width) from 1',
      size,
    )
    require(0 <= self.overlap < 1, 'overlap must be in [0, 1)', self.overlap)
    require(
      len(scales) > 0 and min(scales) > 0 and max(scales) <= 4,
      'scales must be numbers above 0, at most 4',
      scales,
    )

  def view_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that the network sees of such an image at scale 1."""
    return self._window or size

  @property
  def _window(self) -> tuple[int, int] | None:
    return self.crop_size if self.kind == 'sliding_window' else None

  def scores(self, model: Any) -> Callable[..., jax.Array]:
    """What `evaluator.eval_step` takes, see `make_scores`."""
    return make_scores(
      model,
      scales=self.scales,
      flip=self.flip,
      window=self._window,
      overlap=self.overlap,
    )

  def describe(self, model: Any) -> dict[str, Any]:
    """What tells this evaluation from others, JSON values."""
    description = {
      'protocol': self.kind,
      'output_stride': model.backbone.output_stride,
      'scales': [float(scale) for scale in self.scales],
      'flip': self.flip,
    }
    if self.kind != 'whole':
      description['crop_size'] = list(self.crop_size)
    if self.kind == 'sliding_window':
      description['overlap'] = self.overlap
    return description


def in_words(description: dict[str, Any]) -> str:
  """Says what `Protocol.describe` gave."""
  size = 'x'.join(map(str, description.get('crop_size', ())))
  words = [
    {
      'whole': 'whole images',
      'center_crop': f'centre crop {size} of images resized to cover it',
      'sliding_window': f'sliding window {size}',
    }[description['protocol']],
    f'output stride {description["output_stride"]}',
  ]
  if description['scales'] != [1.0]:
    words.append(f'scales {" ".join(map(str, description["scales"]))}')
  if description['flip']:
    words.append('mirrored as well')
  return ', '.join(words)


def make_scores(
  model: Any,
  *,
  scales: Sequence[float] = (1.0,),
  flip: bool = False,
  window: tuple[int, int] | None = None,
  overlap: float = 0.0,
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
  """What `evaluator.eval_step` takes.

  Args:
    model: a `DeepLabV3`.
    scales: see `probabilities`.
    flip: see `probabilities`.
    window: (height, width), see `sliding_window`; None for the whole image.
    overlap: see `sliding_window`.

  Returns:
    A function of variables, images [B, H, W, 3] and sizes [B, 2] (height and
    width before padding) to scores [B, H, W, C]: the logits if the network
    looks once, else averaged probabilities.
  """
  if window is None and tuple(scales) == (1.0,) and not flip:
    return lambda variables, images, sizes: model.apply(
      variables, images, train=False, sizes=sizes
    )

  def scores(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
    view = functools.partial(
      probabilities, model, variables, scales=scales, flip=flip
    )
    if window is None:
      return view(images, sizes)
    return sliding_window(view, images, sizes, window=window, overlap=overlap)

  return scores


def probabilities(
  model: Any,
  variables: Any,
  images: jax.Array,
  sizes: jax.Array,
  *,
  scales: Sequence[float] = (1.0,),
  flip: bool = False,
) -> jax.Array:
  """Averages softmax probabilities over scales and the mirrored image.

  Pixel p of an image stands at p * scale in the scaled one, so that 513 becomes
  385 and 769 at scales 0.75 and 1.5, as in the DeepLab code.

  Args:
    model: a `DeepLabV3`.
    variables: of the model.
    images: [B, H, W, 3], padded at the bottom and the right.
    sizes: int [B, 2], height and width without padding.
    scales: factors on the size.
    flip: also look at the left-right mirrored image, its padding left in place.

  Returns:
    float32 [B, H, W, C].
  """
  size = images.shape[1:3]

  def look(
    scale: float, total: jax.Array, mirrored: jax.Array
  ) -> tuple[jax.Array, None]:
    view, own = _mirror(images, mirrored), sizes
    if scale != 1:
      scaled = tuple(int(_scaled(n, scale)) for n in size)
      own = _scaled(sizes, scale).astype(jnp.int32)
      view = resample(view.astype(jnp.float32), scaled, (1 / scale,) * 2, sizes)
    logits = model.apply(variables, view, train=False, sizes=own)
    seen = jax.nn.softmax(resample(logits, size, (scale,) * 2, own))
    return total + _mirror(seen, mirrored), None

  # Mirroring no column leaves an image as it is. The loop over both compiles
  # the network once for a scale, and holds one result at a time.
  widths = sizes[:, 1]
  views = jnp.stack([jnp.zeros_like(widths), widths][: 2 if flip else 1])
  total = jnp.zeros((*images.shape[:3], model.num_classes))
  for scale in scales:
    total, _ = lax.scan(functools.partial(look, scale), total, views)
  return total / (len(scales) * len(views))


def _scaled(sizes: Any, scale: float) -> Any:
  """Whole numbers: the pixels of a scaled side that lie on the side itself."""
  # Rounding must not take the last one.
  return ((sizes - 1) * scale + 1e-3) // 1 + 1


def sliding_window(
  view: Callable[[jax.Array, jax.Array], jax.Array],
  images: jax.Array,
  sizes: jax.Array,
  *,
  window: tuple[int, int],
  overlap: float,
) -> jax.Array:
  """Averages what each of several overlapping windows of an image shows.

  Windows stand on a grid, and at the far edges shift back into the image's own
  area; an image that is smaller than a window is padded to it.

  Args:
    view: maps windows [B, *window, 3] and the sizes [B, 2] of their unpadded
      part to probabilities [B, *window, C].
    images: [B, H, W, 3], padded at the bottom and the right.
    sizes: int [B, 2], height and width without padding.
    window: (height, width).
    overlap: share of a window, in [0, 1), that the next one covers again.

  Returns:
    float32 [B, H, W, C]; 0 in padding that no window reached.
  """
  height, width = images.shape[1:3]
  bottom, right = (
    max(0, w - n) for w, n in zip(window, (height, width), strict=True)
  )
  images = jnp.pad(
    images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode='edge'
  )
  room = np.subtract(images.shape[1:3], window)
  stride = [max(1, round(n * (1 - overlap))) for n in window]
  steps = [math.ceil(r / s) + 1 for r, s in zip(room, stride, strict=True)]
  grid = np.stack(np.indices(steps), -1).reshape(-1, 2)
  last = jnp.maximum(sizes - jnp.asarray(window), 0)
  own = jnp.minimum(sizes, jnp.asarray(window))

  def look(sums: tuple, place: jax.Array) -> tuple[tuple, None]:
    total, count = sums
    corner = jnp.minimum(place * jnp.asarray(stride), last)
    # Beyond the one that reaches the edge, windows would repeat it.
    needed = ((place - 1) * jnp.asarray(stride) < last) | (place == 0)
    weight = needed.all(-1).astype(jnp.float32)[:, None, None, None]
    seen = weight * view(_cut(images, corner, window), own)
    weight = jnp.broadcast_to(weight, (*seen.shape[:3], 1))
    return (_add(total, seen, corner), _add(count, weight, corner)), None

  classes = jax.eval_shape(view, images[:, : window[0], : window[1]], own)
  total = jnp.zeros((*images.shape[:3], classes.shape[-1]))
  count = jnp.zeros((*images.shape[:3], 1))
  (total, count), _ = lax.scan(look, (total, count), jnp.asarray(grid))
  return (total / jnp.maximum(count, 1))[:, :height, :width]


def _mirror(maps: jax.Array, widths: jax.Array) -> jax.Array:
  """Mirrors the first `widths` [B] columns of maps [B, H, W, C]."""
  column = jnp.arange(maps.shape[2])
  own = widths[:, None]
  source = jnp.where(column < own, own - 1 - column, column)
  return jnp.take_along_axis(maps, source[:, None, :, None], axis=2)


def _cut(
  maps: jax.Array, corners: jax.Array, window: tuple[int, int]
) -> jax.Array:
  """[B, H, W, C] -> [B, *window, C] from corners [B, 2] on."""
  return jax.vmap(
    lambda map_, corner: lax.dynamic_slice(
      map_, (*corner, 0), (*window, map_.shape[-1])
    )
  )(maps, corners)


def _add(maps: jax.Array, parts: jax.Array, corners: jax.Array) -> jax.Array:
  """Adds parts [B, h, w, C] to maps [B, H, W, C] from corners [B, 2] on."""
  sums = _cut(maps, corners, parts.shape[1:3]) + parts
  return jax.vmap(
    lambda map_, part, corner: lax.dynamic_update_slice(
      map_, part, (*corner, 0)
    )
  )(maps, sums, corners)
