"""Images too large for one pass: in windows, with the result of the whole.

The features of a window are those of the whole image, except near the window's
edges, which are cut off. The head then reads them in windows of its own, and
its image pooling takes the mean of all features: no seam remains.
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn

from deeplab_jax.evaluation.protocols import (
  Protocol,
  SlidingWindow,
  probabilities,
)
from deeplab_jax.models.aspp import ASPP, ImagePooling
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.models.layers import Conv
from deeplab_jax.runtime.errors import UserError

log = logging.getLogger(__name__)

MARGIN = 256  # pixels
_SECONDS = 10  # between two lines about an image
Note = Callable[[int, int], None]  # of windows: done, in all
Size = tuple[int, int]  # height, width


def check(
  model: DeepLabV3,
  protocol: Protocol,
  size: Size,
  side: int,
  margin: int = MARGIN,
) -> None:
  """Raises `UserError` if an image (height, width) cannot be cut into windows.

  For `side` and `margin` see `map_logits`.
  """
  if type(protocol).scores is SlidingWindow.scores:
    return
  advice = 'set config.predict.max_side, or config.eval.protocol=sliding_window'
  place = f'an image of {size[0]}x{size[1]} pixels is too large for'
  if not protocol.gives_logits:
    what = f'the protocol {protocol.name} with these scales and flip'
    raise UserError(f'{place} {what}; {advice}')
  if not isinstance(model.aspp, ASPP):
    raise UserError(f'{place} the head {type(model.aspp).__name__}; {advice}')
  stride = model.backbone.output_stride
  least = 2 * stride * max(-(-margin // stride), *model.aspp.rates)
  if side // stride * stride <= least:
    raise UserError(
      f'{place} windows of config.predict.window={side}, which must be from'
      f' {least + stride}'
    )


def scores_in_windows(
  model: DeepLabV3,
  variables: Any,
  protocol: Protocol,
  image: np.ndarray,
  side: int,
  *,
  softmax: bool,
  margin: int = MARGIN,
) -> Iterator[np.ndarray]:
  """Yields a protocol's scores of one image uint8 [H, W, 3], in parts.

  They are float32 [rows, W, C] and follow from the top; with `softmax` they are
  probabilities. For `side` and `margin` see `map_logits`. Logs how far it is.
  Raises `UserError` as `check` does.
  """
  size, note = image.shape[:2], _progress(image.shape[:2])
  if type(protocol).scores is SlidingWindow.scores:
    view = _view(model, protocol.scales, protocol.flip)
    return sliding_rows(
      functools.partial(view, variables),
      *(image, protocol.crop_size, protocol.overlap, model.num_classes),
      note=note,
    )
  check(model, protocol, size, side, margin)
  maps = map_logits(model, variables, image, side, margin=margin, note=note)
  places = []
  for length, cells in zip(size, maps.shape, strict=False):
    stride = model.backbone.output_stride
    step = 1 / stride if model.pads_freely else cells / length
    places.append(np.minimum(np.arange(length) * step, cells - 1))
  return interpolated_rows(maps, places, softmax=softmax)


@functools.lru_cache(maxsize=4)
def _view(
  model: DeepLabV3, scales: tuple[float, ...], flip: bool
) -> Callable[..., jax.Array]:
  """Compiles `protocols.probabilities` once for the windows of all images."""
  view = functools.partial(probabilities, model, scales=scales, flip=flip)
  return jax.jit(view)


def _progress(size: Size) -> Note:
  """Logs how far the windows of a large image are, every few seconds."""
  start = last = time.monotonic()

  def note(done: int, total: int) -> None:
    nonlocal last
    if (now := time.monotonic()) - last > _SECONDS:
      last = now
      left = (now - start) * (total - done) / done
      log.info('%dx%d: window %d of %d, %.0f s left', *size, done, total, left)

  return note


def map_logits(
  model: DeepLabV3,
  variables: Any,
  image: np.ndarray,
  side: int,
  *,
  margin: int = MARGIN,
  note: Note = lambda done, total: None,
) -> np.ndarray:
  """Computes the logits of an image at its features, before upsampling.

  Args:
    model: a network with the head `ASPP`.
    variables: what `model.apply` takes.
    image: uint8 [H, W, 3].
    side: largest height and width of a window, in pixels.
    margin: pixels to cut off at the edges of windows. If no feature depends on
      pixels farther away, the result is that of the whole image.
    note: called after each window.

  Returns:
    float32 [h, w, num_classes], the map that `DeepLabV3` upsamples.
  """
  stride, halo = model.backbone.output_stride, max(model.aspp.rates)
  most, edge = side // stride, -(-margin // stride)
  # A window ends where the image would, or strided layers would differ.
  rest = [1 if model.pads_freely else (n - 1) % stride + 1 for n in image.shape]
  cells = tuple(
    -(-(n - r) // stride) + 1
    for n, r in zip(image.shape[:2], rest, strict=False)
  )

  def features(place: tuple[slice, ...]) -> jax.Array:
    starts = [cut.start * stride for cut in place]
    ends = [
      (cut.stop - 1) * stride + r for cut, r in zip(place, rest, strict=False)
    ]
    pixels = image[starts[0] : ends[0], starts[1] : ends[1]]
    window = np.zeros((1, *np.subtract(ends, starts), 3), np.uint8)
    window[0, : pixels.shape[0], : pixels.shape[1]] = pixels
    return _features(model, variables, window, np.array(pixels.shape[:2]))

  def logits(place: tuple[slice, ...]) -> jax.Array:
    return _logits(model, variables, maps[place][None], mean)

  passes = _windows(cells, most, edge), _windows(cells, most, halo)
  count, total = itertools.count(1), sum(map(len, passes))

  def joined(compute: Callable[..., jax.Array], windows: Any) -> np.ndarray:
    result = np.zeros(0)
    for place, kept in windows:
      part = jax.device_get(compute(place))[0]
      if not result.size:
        result = np.empty((*cells, part.shape[-1]), part.dtype)
      own = tuple(
        slice(k.start - p.start, k.stop - p.start)
        for k, p in zip(kept, place, strict=True)
      )
      result[kept] = part[own]
      note(next(count), total)
    return result

  maps = joined(features, passes[0])
  mean = maps.mean((0, 1), dtype=np.float32)
  return joined(logits, passes[1])


@functools.partial(jax.jit, static_argnums=0)
def _features(
  model: DeepLabV3, variables: Any, window: jax.Array, size: jax.Array
) -> jax.Array:
  x = (window - jnp.asarray(model.mean)) / jnp.asarray(model.std)
  height, width = (np.arange(n) for n in window.shape[1:3])
  inside = (height[:, None] < size[0]) & (width < size[1])
  x = jnp.where(inside[None, ..., None], x, 0).astype(model.dtype)
  own = {kind: tree['backbone'] for kind, tree in variables.items()}
  maps: Any = model.backbone.apply(own, x, train=False)
  return maps[model.features]


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  model: DeepLabV3, variables: Any, maps: jax.Array, mean: jax.Array
) -> jax.Array:
  def pool(next_: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, ImagePooling):
      args = (jnp.broadcast_to(mean, args[0].shape),)
    return next_(*args, **kwargs)

  own = {kind: tree['aspp'] for kind, tree in variables.items()}
  with nn.intercept_methods(pool):
    x = model.aspp.apply(own, maps, train=False)
  layer = Conv(model.num_classes, use_bias=True)
  logits: Any = layer.apply({'params': variables['params']['logits']}, x)
  return logits


def _windows(
  size: Size, most: int, margin: int
) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
  """Lays windows of at most `most` rows and columns over a map.

  Returns where each one lies, and which part of the map is taken from it.
  """
  axes = []
  for length in size:
    axis, kept, shape = [], 0, min(most, length)
    while kept < length:
      start = min(max(kept - margin, 0), length - shape)
      stop = start + shape
      end = stop if stop == length else stop - margin
      axis.append((slice(start, stop), slice(kept, end)))
      kept = end
    axes.append(axis)
  return [
    ((rows, columns), (kept_rows, kept_columns))
    for (rows, kept_rows), (columns, kept_columns) in itertools.product(*axes)
  ]


def sliding_rows(
  view: Callable[..., jax.Array],
  image: np.ndarray,
  window: Size,
  overlap: float,
  num_classes: int,
  *,
  note: Note = lambda done, total: None,
) -> Iterator[np.ndarray]:
  """Yields what `protocols.sliding_window` gives for one image, in parts.

  `view` maps windows [1, h, w, 3] and sizes [1, 2] to probabilities
  [1, h, w, C]. The parts, float32 [rows, W, C], follow from the top; only the
  rows of one line of windows are in memory.
  """
  size = image.shape[:2]
  room = [(0, max(0, w - n)) for w, n in zip(window, size, strict=True)]
  padded = np.pad(image, (*room, (0, 0)), 'edge')
  own, starts, counts = np.minimum(size, window)[None], [], []
  for length, extent in zip(padded.shape, window, strict=False):
    last, step = length - extent, max(1, round(extent * (1 - overlap)))
    places = [min(p * step, last) for p in range(-(-last // step) + 1)]
    count = np.zeros(length, np.float32)
    for place in places:
      count[place : place + extent] += 1
    starts.append(places)
    counts.append(count)
  (tops, lefts), (of_rows, of_columns) = starts, counts
  total = np.zeros((window[0], padded.shape[1], num_classes), np.float32)
  for line, top in enumerate(tops):
    for column, left in enumerate(lefts, 1):
      cut = padded[top : top + window[0], left : left + window[1]]
      total[:, left : left + window[1]] += np.asarray(view(cut[None], own))[0]
      note(line * len(lefts) + column, len(tops) * len(lefts))
    below = tops[line + 1] if top != tops[-1] else len(padded)
    done = below - top
    seen = total[:done] / (of_rows[top:below, None] * of_columns)[..., None]
    yield seen[: size[0] - top, : size[1]]
    total = np.concatenate([total[done:], np.zeros_like(total[:done])])


def interpolated_rows(
  maps: np.ndarray,
  positions: Sequence[np.ndarray],
  *,
  softmax: bool,
  rows: int = 128,
) -> Iterator[np.ndarray]:
  """Yields scores [rows, W, C] in parts, from the top.

  They are `maps` [h, w, C], interpolated linearly at the `positions` of the H
  rows and W columns, which are in 0..h-1 and 0..w-1.
  """
  # By numpy: JAX would compile this for every size of image.
  for start in range(0, len(positions[0]), rows):
    part = maps
    for axis, places in enumerate(
      (positions[0][start : start + rows], positions[1])
    ):
      low = np.floor(places).astype(int)
      high = np.minimum(low + 1, part.shape[axis] - 1)
      share = np.expand_dims(np.float32(places - low), (1 - axis, 2))
      part = part.take(low, axis) * (1 - share) + part.take(high, axis) * share
    yield scipy.special.softmax(part, -1) if softmax else part


def resized(image: np.ndarray, size: Size) -> np.ndarray:
  """Brings an image uint8 [H, W, 3] to another size, antialiased."""
  if size == image.shape[:2]:
    return image
  how = cv2.INTER_AREA if size < image.shape[:2] else cv2.INTER_LINEAR
  return cv2.resize(image, size[::-1], interpolation=how)


def resized_scores(scores: np.ndarray, size: Size) -> Iterator[np.ndarray]:
  """Yields scores [h, w, C] at another size, the inverse of `resized`."""
  places = [
    # Corners meet corners, as OpenCV has it.
    np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1)
    for n, m in zip(size, scores.shape, strict=False)
  ]
  return interpolated_rows(scores, places, softmax=False)


def joined(
  rows: Iterable[np.ndarray], size: Size, probabilities: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """Takes the classes of scores [rows, W, C], and keeps these if asked."""
  classes, scores, top = np.empty(size, np.uint8), None, 0
  for part in rows:
    here = slice(top, top := top + len(part))
    classes[here] = part.argmax(-1)
    if probabilities:
      if scores is None:
        scores = np.empty((*size, part.shape[-1]), np.float32)
      scores[here] = part
  return classes, scores
