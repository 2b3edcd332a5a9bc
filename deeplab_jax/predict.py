"""`Predictor`, the one way to segment an image."""

import collections
import functools
import itertools
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax import build, import_weights, ops
from deeplab_jax.config import to_json, validate, with_preset
from deeplab_jax.configure import from_json
from deeplab_jax.data import buckets, pipeline
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.images import as_pixels
from deeplab_jax.evaluation import evaluator, protocols, windows
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import check_choice, naming, require
from deeplab_jax.runtime.files import as_path
from deeplab_jax.weights import load as sources
from deeplab_jax.weights import networks

log = logging.getLogger(__name__)

Size = tuple[int, int]  # height, width
_Result = tuple[np.ndarray, Any]  # classes; probabilities or None
_FAR = 3  # times larger or smaller than in training
_PROGRAMS = 32  # kept at once


class Predictor:
  """Segments images of any size; several threads may call it.

  ```
  predictor = Predictor.from_workdir('/tmp/deeplab')
  classes = predictor('photo.jpg')  # uint8 [H, W]
  classes, probabilities = predictor('photo.jpg', probabilities=True)
  ```

  An image is the path or the bytes of a file, which looks as in a viewer, a PIL
  image, or an array uint8 [H, W, 3] of RGB. A network of images as stored takes
  files and arrays of its channels and bits. Images are padded to a few sizes,
  so that few programs are compiled, without a change of their results (but not
  with the upsampling 'asymmetric', where padding would count). Images
  of more than `window` by `window` pixels are segmented in overlapping windows,
  and the seams do not show.

  Attributes:
    model: the network.
    variables: what `model.apply` takes.
    info: names, colors and values of the classes.
    protocol: whole images, sliding windows, scales, mirrored images.
    settings: the arguments of `deeplab_v3`, except `num_classes`.
    step: the step of the checkpoint.
    metrics: what that checkpoint reached, None if it was not evaluated.
    trained_size: (height, width) of the crops it was trained on, if known.
  """

  def __init__(
    self,
    model: DeepLabV3,
    variables: Any,
    info: DatasetInfo,
    *,
    protocol: protocols.Protocol | None = None,
    settings: dict[str, Any] | None = None,
    step: int = 0,
    metrics: dict[str, Any] | None = None,
    trained_size: Size | None = None,
    max_side: int | None = None,
    scale: float = 1.0,
    window: int = 1536,
    batch_size: int = 8,
    sizes: int = 4,
    threads: int = 0,
  ) -> None:
    """Takes the attributes above, and how to use the network.

    Without a `protocol` images are seen whole; center crops count as whole.
    Larger images than `max_side` are shrunk to it first, and the size of every
    image is multiplied by `scale`; the result has the size of the image. At a
    time go `batch_size` images to all devices, on CPUs one to each, padded to
    at most `sizes` sizes. As many `threads` decode images, 0 for one per core.
    Raises `ValueError` for a number out of its range.
    """
    numbers = {'max_side': max_side, 'window': window, 'sizes': sizes}
    for name, number in {**numbers, 'batch_size': batch_size}.items():
      least = number is None or number >= 1
      require(least, f'{name} must be at least 1', number)
    require(0 < scale <= 4, 'scale must be above 0, at most 4', scale)
    require(threads >= 0, 'threads must be at least 0', threads)
    fits = info.num_classes == model.num_classes
    require(fits, f'info must have {model.num_classes} classes', info.classes)
    protocol = protocol or protocols.Protocol()
    if protocol.transform:
      seen = protocol.scales, protocol.flip
      protocol = protocols.Protocol(scales=seen[0], flip=seen[1])
    self.model, self.variables, self.info = model, variables, info
    self.protocol, self.settings = protocol, settings or {}
    self.step, self.metrics, self.trained_size = step, metrics, trained_size
    self._max_side, self._scale, self._window = max_side, scale, window
    devices = jax.local_device_count()
    each = 1 if jax.default_backend() == 'cpu' else -(-batch_size // devices)
    self._rows = each * devices
    self._limit = sizes if model.pads_freely else None
    self.plan([])
    # More would mostly hold decoded images in memory.
    self.threads = min(threads or pipeline.cores(), 16)
    self._lock, self._on_devices = threading.Lock(), None
    self._warned: set[bool] = set()
    make_step = functools.partial(evaluator.pmap_predict_step, model, protocol)
    # A program for each size.
    self._step = functools.lru_cache(_PROGRAMS)(
      lambda size, probabilities: make_step(probabilities=probabilities)
    )

  @classmethod
  def from_workdir(
    cls, workdir: str | Path, step: str | int = 'best', **settings: Any
  ) -> Self:
    """Opens a checkpoint of a run: 'best', 'latest' or a step.

    `settings` are those of `config.eval` and `config.predict` to change, as
    `protocol='sliding_window'`, `flip=True` or `max_side=2000`, and
    `output_stride`. Raises `UserError` for what is not there or does not fit.
    """
    workdir = as_path(workdir)
    networks.check_workdir(workdir)
    config = from_json(workdir / 'config.json')
    config.eval.step = str(step)
    sections = {k: s for s in ('eval', 'predict') for k in config[s]}
    sections['output_stride'] = 'model'
    for key, value in settings.items():
      check_choice('a setting', key, sections)
      with config.ignore_type():  # `validate` looks at types
        config[sections[key]][key] = value
    validate(config)
    return cls.from_config(config, workdir)

  @classmethod
  def from_config(cls, config: ConfigDict, workdir: Path) -> Self:
    """Opens the checkpoint `config.eval.step`; all processes together."""
    network = networks.open_network(
      workdir, config.eval.step, to_json(config)['model']
    )
    with naming(f'the checkpoint in {workdir}'):
      info = DatasetInfo.from_json(network.dataset)
    config = with_preset(config, network.model['preset'])
    with naming('config.predict'):
      return cls(
        build.make_model(config, info.num_classes, **info.normalization),
        network.variables,
        info,
        protocol=build.make_protocol(config),
        settings=network.model,
        step=network.step,
        metrics=network.metrics,
        trained_size=config.data.crop_size,
        max_side=config.predict.max_side,
        scale=config.predict.scale,
        window=config.predict.window,
        batch_size=config.eval.batch_size,
        sizes=config.eval.buckets,
        threads=config.data.threads,
      )

  @classmethod
  def from_pretrained(
    cls,
    source: str | Path,
    info: DatasetInfo | None = None,
    num_classes: int | None = None,
    **settings: Any,
  ) -> Self:
    """Opens what `config.init_from` takes, with a class layer.

    `info` says what the classes are; 21 are PASCAL VOC's by default. Another
    `num_classes` keeps all but the class layer, which is drawn anew. `settings`
    are those of `__init__`, and for a workdir as it is of `from_workdir`.
    """
    own = sources.own_checkpoint(as_path(source := str(source)))
    if own and num_classes is None:
      require(info is None, 'a workdir says what its classes are', info)
      return cls.from_workdir(*own, **settings)
    network = import_weights.open_network(source, info, num_classes)
    return cls(**network, **settings)

  def __call__(self, image: Any, *, probabilities: bool = False) -> Any:
    """Segments an image, or a batch uint8 [B, H, W, 3] (or as stored).

    Returns classes uint8 [H, W]; with `probabilities` a pair of these and
    float32 [H, W, C]. A batch gives [B, H, W] and [B, H, W, C]. Raises
    `UserError` if an image cannot be read.
    """
    several = getattr(image, 'ndim', 3) == 4
    images = image if several else [image]
    found = list(self.map(images, probabilities=probabilities))
    if not several:
      return found[0]
    if not probabilities:
      return np.stack(found)
    return tuple(map(np.stack, zip(*found, strict=True)))

  def map(
    self, images: Iterable[Any], *, probabilities: bool = False
  ) -> Iterator[Any]:
    """Yields for each image, in order, what `__call__` returns.

    Images are decoded ahead, in threads. Those that are padded to one size go
    to the devices together.
    """
    chunk = self._rows if self._rows == 1 else 4 * self._rows
    decode = functools.partial(as_pixels, info=self.info)
    read = pipeline.in_background(decode, images, self.threads)
    while pictures := list(itertools.islice(read, chunk)):
      for classes, scores in self._segment(pictures, probabilities):
        yield (classes, scores) if probabilities else classes

  def plan(self, sizes: Iterable[Size]) -> None:
    """Chooses what to pad to, where the sizes of all images are known.

    Raises `UserError` if one is too large for the protocol.
    """
    small = [self._size_seen(size) for size in sizes if self.check(size)]
    self._buckets = buckets.Buckets(self._limit, small, 2 * self._window**2)

  def check(self, size: Size) -> bool:
    """Returns whether an image (height, width) is seen in one pass.

    Raises `UserError` if it is too large for that and for windows.
    """
    seen = self._size_seen(size)
    if self._is_large(seen):
      windows.check(self.model, self.protocol, seen, self._window)
    return not self._is_large(seen)

  def bucket(self, size: Size) -> Size:
    """Returns what an image of (height, width) is padded to, once scaled."""
    seen = self._size_seen(size)
    return seen if self._is_large(seen) else self._buckets.of(seen)

  def _size_seen(self, size: Size) -> Size:
    """The size at which the network sees an image."""
    factor = self._scale * min(1, (self._max_side or math.inf) / max(size))
    height, width = (max(1, round(n * factor)) for n in size)
    return height, width

  def _is_large(self, size: Size) -> bool:
    return math.prod(size) > self._window**2

  def _segment(
    self, images: Sequence[np.ndarray], probabilities: bool
  ) -> Iterator[_Result]:
    """Segments images, each scaled, and its result brought back."""
    shown = [windows.resized(x, self._size_seen(x.shape[:2])) for x in images]
    scaled = [s is not x for s, x in zip(shown, images, strict=True)]
    found = self._segment_shown(shown, probabilities or any(scaled))
    for image, result, is_scaled in zip(images, found, scaled, strict=True):
      if is_scaled:
        size = image.shape[:2]
        rows = windows.resized_scores(result[1], size)
        result = windows.joined(rows, size, probabilities)
      yield result

  def _segment_shown(
    self, images: Sequence[np.ndarray], probabilities: bool
  ) -> list[_Result]:
    """Segments images at their own size, those of one bucket together."""
    results: list[Any] = [None] * len(images)
    groups = collections.defaultdict(list)
    for index, image in enumerate(images):
      size = image.shape[:2]
      self._warn_if_far(size)
      if self._is_large(size):
        rows = windows.scores_in_windows(
          *(self.model, self._on_one_device, self.protocol),
          *(image, self._window),
          softmax=probabilities,
        )
        results[index] = windows.joined(rows, size, probabilities)
      else:
        groups[self._buckets.of(size)].append(index)
    running = []
    for size, group in groups.items():
      for start in range(0, len(group), self._rows):
        part = group[start : start + self._rows]
        batch = [images[index] for index in part]
        running.append((part, self._run(size, batch, probabilities)))
    for part, found in running:
      classes, scores = distributed.unshard(found)
      for row, index in enumerate(part):
        height, width = images[index].shape[:2]
        own = scores[row, :height, :width] if probabilities else None
        results[index] = classes[row, :height, :width], own
    return results

  def _run(
    self, size: Size, images: Sequence[np.ndarray], probabilities: bool
  ) -> Any:
    """Starts to segment images, padded to one size, on all devices."""
    channels, kind = images[0].shape[2], images[0].dtype
    batch: dict[str, np.ndarray] = {
      'image': np.zeros((self._rows, *size, channels), kind),
      'size': np.full((self._rows, 2), size, np.int32),
    }
    for row, image in enumerate(images):
      height, width = batch['size'][row] = image.shape[:2]
      batch['image'][row, :height, :width] = image
    if self.protocol.gives_logits and (batch['size'] == size).all():
      del batch['size']  # nothing is padded, and the program is faster
    with self._lock:
      step = self._step(size, probabilities)
    return step(self._ready(size), distributed.shard(batch))

  def _ready(self, size: Size) -> Any:
    """The variables on all devices, with transformed kernels."""
    with self._lock:
      if self._on_devices is None:
        if 'crop_size' in self.protocol.uses:
          size = self.protocol.crop_size
        variables = ops.cache_kernels(self.model, self.variables, size)
        self._on_devices = distributed.replicate(variables)
      return self._on_devices

  @functools.cached_property
  def _on_one_device(self) -> Any:
    return jax.device_put(self.variables, jax.local_devices()[0])

  def _warn_if_far(self, size: Size) -> None:
    """Warns once of images much larger, and once of much smaller ones."""
    if self.trained_size is None:
      return
    ratio = math.sqrt(math.prod(size) / math.prod(self.trained_size))
    larger = ratio > 1
    if max(ratio, 1 / ratio) > _FAR and larger not in self._warned:
      self._warned.add(larger)
      log.warning(
        'an image is %dx%d, and the network was trained on crops of %dx%d:'
        ' things may look too %s to it; set config.predict.%s',
        *(*size, *self.trained_size),
        *(('large', 'max_side') if larger else ('small', 'scale')),
      )
