"""Evaluation protocols: whole images, center crops, windows, scales, flips."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.data import transforms
from deeplab_jax.models.layers import resample
from deeplab_jax.runtime.errors import require

Size = tuple[int, int]  # height, width


@dataclasses.dataclass(frozen=True)
class Protocol:
  """The protocol 'whole' (each image at its own size) and base of the others.

  `transform` is a class like `data.transforms.CenterCrop`. Made with
  `crop_size`, it brings each image and its label to that size on the host.
  """

  name: ClassVar[str] = 'whole'
  uses: ClassVar[tuple[str, ...]] = ()  # which of crop_size, overlap it reads
  transform: ClassVar[type[transforms.CenterCrop] | None] = None
  crop_size: Size = (513, 513)  # of a crop or a window
  overlap: float = 1 / 3  # share of a window that the next one covers
  scales: tuple[float, ...] = (1.0,)  # factors on the size
  flip: bool = False  # look at the mirrored image as well

  def __post_init__(self) -> None:
    size, scales = self.crop_size, self.scales
    fits = len(size) == 2 and min(size) >= 1
    require(fits, 'crop_size must be (height, width) from 1', size)
    require(0 <= self.overlap < 1, 'overlap must be in [0, 1)', self.overlap)
    fits = len(scales) > 0 and min(scales) > 0 and max(scales) <= 4
    require(fits, 'scales must be numbers above 0, at most 4', scales)

  @property
  def gives_logits(self) -> bool:
    """Whether `scores` are those of the network itself, without averages."""
    own = type(self).scores is Protocol.scores
    return own and self.scales == (1.0,) and not self.flip

  def scores(self, model: Any) -> Callable[..., jax.Array]:
    """Returns a function of variables, images and sizes, see `probabilities`.

    That function returns scores [B, H, W, C]; the highest is the prediction.
    """
    if self.gives_logits:
      return lambda variables, images, sizes: model.apply(
        variables, images, train=False, sizes=sizes
      )
    return functools.partial(
      probabilities, model, scales=self.scales, flip=self.flip
    )

  def describe(self, model: Any) -> dict[str, Any]:
    """Returns the settings that identify this evaluation, as JSON values."""
    used = {key: getattr(self, key) for key in ('scales', 'flip', *self.uses)}
    return {
      'protocol': self.name,
      'output_stride': model.backbone.output_stride,
      **{k: list(v) if isinstance(v, tuple) else v for k, v in used.items()},
    }


class CenterCrop(Protocol):
  """Center crops of the images, see `transforms.CenterCrop`."""

  name = 'center_crop'
  uses = ('crop_size',)
  transform = transforms.CenterCrop


class SlidingWindow(Protocol):
  """Overlapping windows of each image, see `sliding_window`."""

  name = 'sliding_window'
  uses = ('crop_size', 'overlap')

  def scores(self, model: Any) -> Callable[..., jax.Array]:
    """Averages the probabilities of the windows."""

    def scores(variables: Any, images: Any, sizes: Any) -> jax.Array:
      view = functools.partial(
        probabilities, model, variables, scales=self.scales, flip=self.flip
      )
      return sliding_window(view, images, sizes, self.crop_size, self.overlap)

    return scores


# To add a protocol, subclass `Protocol`, give it a name and list it here.
PROTOCOLS: dict[str, type[Protocol]] = {
  protocol.name: protocol for protocol in (Protocol, CenterCrop, SlidingWindow)
}


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

  Chen et al., "Rethinking Atrous Convolution" (2017), section 4.1. Scaling
  moves pixel p to p * scale, so 513 pixels become 385 at scale 0.75 and 769 at
  scale 1.5, as in the DeepLab code.

  `images` are [B, H, W, 3], padded at the bottom and right; `sizes`, int
  [B, 2], are height and width without padding. `scales` multiply the size, and
  `flip` averages over the mirrored images too. Returns float32 [B, H, W, C].
  """
  size = images.shape[1:3]

  def look(scale: float, total: Any, mirrored: Any) -> tuple[Any, None]:
    view, own = _mirror(images, mirrored), sizes
    if scale != 1:
      scaled = tuple(int(_scaled(n, scale)) for n in size)
      own = _scaled(sizes, scale).astype(jnp.int32)
      view = resample(view.astype(jnp.float32), scaled, (1 / scale,) * 2, sizes)
    logits = model.apply(variables, view, train=False, sizes=own)
    seen = jax.nn.softmax(resample(logits, size, (scale,) * 2, own))
    return total + _mirror(seen, mirrored), None

  # Width 0 mirrors nothing. The loop over both views compiles the network once
  # per scale, and holds one result at a time.
  widths = sizes[:, 1]
  views = jnp.stack([jnp.zeros_like(widths), widths][: 2 if flip else 1])
  total = jnp.zeros((*images.shape[:3], model.num_classes))
  for scale in scales:
    total, _ = lax.scan(functools.partial(look, scale), total, views)
  return total / (len(scales) * len(views))


def _scaled(sizes: Any, scale: float) -> Any:
  """Returns the length of a scaled side: floor((size - 1) * scale) + 1."""
  # Rounding must not lose the last pixel.
  return ((sizes - 1) * scale + 1e-3) // 1 + 1


def sliding_window(
  view: Callable[[jax.Array, jax.Array], jax.Array],
  images: jax.Array,
  sizes: jax.Array,
  window: Size,
  overlap: float,
) -> jax.Array:
  """Averages the probabilities of overlapping windows.

  Windows lie on a grid. At the far edges they shift back into the image; an
  image smaller than a window is padded to the window's size. `view` maps
  windows and the sizes of their unpadded parts to probabilities, as
  `probabilities` maps images. Padding that no window covers gets 0.
  """
  height, width = images.shape[1:3]
  bottom, right = max(0, window[0] - height), max(0, window[1] - width)
  images = jnp.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), 'edge')
  room = np.subtract(images.shape[1:3], window)
  stride = np.array([max(1, round(n * (1 - overlap))) for n in window])
  steps = [math.ceil(r / s) + 1 for r, s in zip(room, stride, strict=True)]
  grid = np.indices(steps).reshape(2, -1).T
  last = jnp.maximum(sizes - jnp.asarray(window), 0)
  own = jnp.minimum(sizes, jnp.asarray(window))

  def look(sums: tuple, place: jax.Array) -> tuple[tuple, None]:
    total, count = sums
    corner = jnp.minimum(place * stride, last)
    # Windows after the one that reaches the edge would only repeat it.
    needed = ((place - 1) * stride < last) | (place == 0)
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
  maps: jax.Array, corners: jax.Array, window: Sequence[int]
) -> jax.Array:
  """[B, H, W, C] -> [B, *window, C], from corners [B, 2] on."""
  size = (*window, maps.shape[-1])
  cut = jax.vmap(lambda m, corner: lax.dynamic_slice(m, (*corner, 0), size))
  return cut(maps, corners)


def _add(maps: jax.Array, parts: jax.Array, corners: jax.Array) -> jax.Array:
  """Adds parts [B, h, w, C] to maps [B, H, W, C], from corners [B, 2] on."""
  sums = _cut(maps, corners, parts.shape[1:3]) + parts
  put = jax.vmap(lambda m, sum_, c: lax.dynamic_update_slice(m, sum_, (*c, 0)))
  return put(maps, sums, corners)
