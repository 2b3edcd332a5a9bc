"""Images too large for one pass: in windows, with the result of the whole.

The features of a window are those of the whole image, except near the window's
edges, which are cut off. The head then reads them in windows of its own, and
its image pooling takes the mean of all features: no seam remains. Under the
decoder of v3+ there are `factor` rows of logits for a row of features.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn

from deeplab_jax.evaluation.protocols import Protocol, SlidingWindow
from deeplab_jax.models.aspp import ASPP, Decoder, ImagePooling
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.models.layers import Conv, resample
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.progress import logged

# Pixels to cut off at the edges of windows. If no feature depends on pixels
# farther away, the result is that of the whole image.
MARGIN = 256
Size = tuple[int, int]  # height, width


def check(model: DeepLabV3, protocol: Protocol, size: Size, side: int) -> None:
  """Raises `UserError` if an image (height, width) cannot be cut into windows.

  For `side` see `map_logits`.
  """
  if type(protocol).scores is SlidingWindow.scores:
    return
  advice = 'set config.predict.max_side, or config.eval.protocol=sliding_window'
  place = f'an image of {size[0]}x{size[1]} pixels is too large for'
  if not protocol.gives_logits:
    what = f'the protocol {protocol.name} with these scales and flip'
    raise UserError(f'{place} {what}; {advice}')
  for module, kind in ((model.aspp, ASPP), (model.decoder, Decoder | None)):
    if not isinstance(module, kind):
      raise UserError(f'{place} the head {type(module).__name__}; {advice}')
  stride = model.backbone.output_stride
  least = 2 * stride * max(-(-MARGIN // stride), _halo(model))
  if side // stride * stride <= least:
    raise UserError(
      f'{place} windows of config.predict.window={side}, which must be from'
      f' {least + stride}'
    )


def _halo(model: DeepLabV3) -> int:
  """Features on each side of a place on which its logits depend."""
  halo = max(model.aspp.rates)
  if model.decoder:
    halo += 1  # its 3x3, and interpolation
  # Low-level features see 29 pixels (ResNet-34), and the 3x3 another 4.
  least = -(-40 // model.backbone.output_stride)
  return max(halo, least) if model.low_level else halo


def scores_in_windows(
  model: DeepLabV3,
  variables: Any,
  protocol: Protocol,
  image: np.ndarray,
  side: int,
  *,
  softmax: bool,
) -> Iterator[np.ndarray]:
  """Yields a protocol's scores of one image [H, W, C], in parts.

  They are float32 [rows, W, C] and follow from the top; with `softmax` they are
  probabilities. For `side` see `map_logits`. Logs how far it is.
  Raises `UserError` as `check` does.
  """
  if type(protocol).scores is SlidingWindow.scores:
    scores = functools.partial(_scores(model, protocol), variables)
    return sliding_rows(scores, image, protocol.crop_size, protocol.overlap)
  check(model, protocol, image.shape[:2], side)
  maps = map_logits(model, variables, image, side)
  stride = 4 if model.low_level else model.backbone.output_stride
  center, places = model.pixel_center, []
  for length, cells in zip(image.shape[:2], maps.shape, strict=False):
    step = 1 / stride if model.pads_freely else cells / length
    rows = (np.arange(length) + center) * step - center
    places.append(np.clip(rows, 0, cells - 1))
  return interpolated_rows(maps, places, softmax=softmax)


@functools.lru_cache(maxsize=4)
def _scores(model: DeepLabV3, protocol: Protocol) -> Callable[..., jax.Array]:
  """Compiles the scores once for all images."""
  return jax.jit(protocol.scores(model))


def map_logits(
  model: DeepLabV3, variables: Any, image: np.ndarray, side: int
) -> np.ndarray:
  """Computes the logits of an image at its features, before upsampling.

  Args:
    model: a network with the head `ASPP`.
    variables: what `model.apply` takes.
    image: [H, W, C], as the network takes it.
    side: largest height and width of a window, in pixels.

  Returns:
    float32 [h, w, num_classes], the map that `DeepLabV3` upsamples.
  """
  stride = model.backbone.output_stride
  most, edge = side // stride, -(-MARGIN // stride)
  # A window ends where the image would, or strided layers would differ.
  rest = [1 if model.pads_freely else (n - 1) % stride + 1 for n in image.shape]
  cells = tuple(
    -(-(n - r) // stride) + 1
    for n, r in zip(image.shape[:2], rest, strict=False)
  )
  factor, fine, step = 1, cells, [1.0, 1.0]
  if model.low_level:
    factor = stride // 4
    sides = ((n - 1) * stride + r for n, r in zip(cells, rest, strict=False))
    fine = tuple(-(-n // 4) for n in sides)
    step = [n / m for n, m in zip(cells, fine, strict=True)]
    step = [1 / factor] * 2 if model.pads_freely else step

  def features(place: tuple[slice, ...], name: str) -> jax.Array:
    starts = [cut.start * stride for cut in place]
    ends = [
      (cut.stop - 1) * stride + r for cut, r in zip(place, rest, strict=False)
    ]
    pixels = image[starts[0] : ends[0], starts[1] : ends[1]]
    # Beyond the image is what becomes zero, as the network pads.
    shape = (1, *np.subtract(ends, starts), image.shape[2])
    window = np.full(shape, model.mean, np.float32)
    window[0, : pixels.shape[0], : pixels.shape[1]] = pixels
    return _features(model, variables, window, name)

  def logits(place: tuple[slice, ...]) -> jax.Array:
    low = features(place, 'low_level') if model.low_level else None
    pairs = zip(place, step, strict=True)
    shift = np.array([cut.start * (factor * by - 1) for cut, by in pairs])
    given = maps[place][None], low, mean, shift
    return _logits(model, variables, *given, tuple(step))

  def computed(
    compute: Callable[..., jax.Array], margin: int, size: Size, factor: int = 1
  ) -> np.ndarray:
    result, windows = np.zeros(0), _windows(cells, most, margin)
    for place, kept in logged(windows, len(windows), _words(image)):
      part = jax.device_get(compute(place))[0]
      if not result.size:
        result = np.empty((*size, part.shape[-1]), part.dtype)
      ends = [
        whole if k.stop == n else k.stop * factor
        for k, n, whole in zip(kept, cells, size, strict=True)
      ]
      there, own = (
        tuple(
          slice((k.start - p) * factor, end - p * factor)
          for k, p, end in zip(kept, starts, ends, strict=True)
        )
        for starts in ((0, 0), [p.start for p in place])
      )
      result[there] = part[own]
    return result

  maps = computed(lambda place: features(place, model.features), edge, cells)
  mean = maps.mean((0, 1), dtype=np.float32)
  return computed(logits, _halo(model), fine, factor)


def _words(image: np.ndarray) -> str:
  return f'windows of {image.shape[0]}x{image.shape[1]} pixels'


@functools.partial(jax.jit, static_argnums=(0, 3))
def _features(
  model: DeepLabV3, variables: Any, window: Any, name: str
) -> jax.Array:
  # The head is not computed, since nothing depends on it.
  _, seen = model.apply(
    variables,
    window,
    train=False,
    capture_intermediates=lambda module, _: module.name == 'backbone',
  )
  (maps,) = seen['intermediates']['backbone']['__call__']
  return maps[name]


@functools.partial(jax.jit, static_argnums=(0, 6))
def _logits(
  model: DeepLabV3,
  variables: Any,
  maps: jax.Array,
  low: jax.Array | None,
  mean: jax.Array,
  shift: jax.Array,
  step: tuple[float, float],
) -> jax.Array:
  def pool(next_: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, ImagePooling):
      args = (jnp.broadcast_to(mean, args[0].shape),)
    return next_(*args, **kwargs)

  def variables_of(name: str) -> Any:
    return {kind: tree[name] for kind, tree in variables.items()}

  x: Any
  with nn.intercept_methods(pool):
    x = model.aspp.apply(variables_of('aspp'), maps, train=False)
  if low is not None:
    center = model.pixel_center
    x = resample(x, low.shape[1:3], step, center=center, shift=shift)
  if model.decoder:
    x = model.decoder.apply(variables_of('decoder'), x, low, train=False)
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
  scores: Callable[..., jax.Array],
  image: np.ndarray,
  window: Size,
  overlap: float,
) -> Iterator[np.ndarray]:
  """Yields what `protocols.sliding_window` gives for one image, in parts.

  `scores` does that for images [1, h, W, 3] and sizes [1, 2]. It sees one line
  of windows at a time, and a pixel gets the mean of the lines that it is in.
  The parts, float32 [rows, W, C], follow from the top.
  """
  height, width = image.shape[:2]
  steps = [max(1, round(n * (1 - overlap))) for n in window]
  # Widths of the grid, so that few are compiled.
  room = max(width - window[1], 0)
  pads = (0, 0), (0, -(-room // steps[1]) * steps[1] - room), (0, 0)
  padded, last = np.pad(image, pads, 'edge'), max(height - window[0], 0)
  tops = [min(i * steps[0], last) for i in range(-(-last // steps[0]) + 1)]
  lines = zip(tops, [*tops[1:], height], strict=True)
  rest: np.ndarray = np.zeros((0, 1, 1), np.float32)
  of_rest: np.ndarray = np.zeros(0, np.float32)
  for top, below in logged(lines, len(tops), f'lines of {_words(image)}'):
    line = padded[None, top : top + window[0]]
    total = np.array(scores(line, np.array([[line.shape[1], width]])))[0]
    count = np.ones(len(total), np.float32)
    total[: len(rest)] += rest
    count[: len(rest)] += of_rest
    done = below - top
    yield total[:done, :width] / count[:done, None, None]
    rest, of_rest = total[done:], count[done:]


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
  """Brings an image [H, W, C] to another size, antialiased."""
  if size == image.shape[:2]:
    return image
  how = cv2.INTER_AREA if size < image.shape[:2] else cv2.INTER_LINEAR
  # OpenCV takes four channels at a time.
  parts = (image[..., i : i + 4] for i in range(0, image.shape[2], 4))
  found = [cv2.resize(x, size[::-1], interpolation=how) for x in parts]
  return np.concatenate([x.reshape(*size, -1) for x in found], -1)


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
