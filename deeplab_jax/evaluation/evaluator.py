"""Scores every image of a split, over all devices and hosts."""

import contextlib
import functools
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.data.buckets import FILLER, plan_batches
from deeplab_jax.data.pipeline import load_example, make_eval_iterator
from deeplab_jax.data.transforms import Transform
from deeplab_jax.evaluation import metrics, resampling
from deeplab_jax.evaluation.protocols import Protocol
from deeplab_jax.runtime import distributed, watchdog
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.runtime.files import write
from deeplab_jax.visualize import labels as visualize


def eval_step(
  variables: dict[str, Any],
  batch: dict[str, jax.Array],
  *,
  scores: Callable[..., jax.Array],
  num_classes: int,
  ignore_label: int = 255,
  boundary_iou: bool = False,
  axis_name: str | None = AXIS_NAME,
) -> dict[str, jax.Array]:
  """Predicts a batch and counts each image of it.

  `variables` are what `model.apply` takes, and `batch` is this device's share:
  `image` and `label` as in training, `size` int32 [b, 2] (height and width
  before padding) and `index` int32 [b]. `scores` is a `Protocol.scores`.
  `axis_name` is the mapped device axis; None if there is none.

  Returns `index` int32 [B], `confusion` int32 [B, C, C] (rows are labels),
  `prediction` uint8 [B, H, W] and, with `boundary_iou`, the `boundary_counts`
  int32 [B, 2, C] of all devices and hosts, the same on each.
  """
  prediction, _ = predict_step(variables, batch, scores=scores)

  def count(function: Callable[..., jax.Array], *maps: jax.Array) -> jax.Array:
    return jax.vmap(lambda *x: function(*x, num_classes, ignore_label))(*maps)

  maps = batch['label'], prediction
  own = {
    'index': batch['index'],
    'confusion': count(metrics.confusion_matrix, *maps),
    'prediction': prediction,
  }
  if boundary_iou:
    own['boundary'] = count(metrics.boundary_counts, *maps, batch['size'])
  if axis_name is None:
    return own
  return lax.all_gather(own, axis_name, tiled=True)


def predict_step(
  variables: Any, batch: dict[str, jax.Array], *, scores: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
  """Predicts `image` of a batch, padded from `size` [b, 2], if it is there.

  Returns classes uint8 [b, H, W] and the scores [b, H, W, C].
  """
  found = scores(variables, batch['image'], batch.get('size'))
  return jnp.argmax(found, -1).astype(jnp.uint8), found


def pmap_eval_step(**settings: Any) -> Callable[..., Any]:
  """Maps `eval_step` over all devices; its results have no device axis."""
  step = functools.partial(eval_step, **settings)
  return distributed.together(
    jax.pmap(step, AXIS_NAME, in_axes=(None, 0), out_axes=None)
  )


def pmap_predict_step(
  model: Any, protocol: Protocol, *, probabilities: bool
) -> Callable[..., Any]:
  """Maps prediction over the local devices, in the batch and the result.

  The function takes variables and a batch as `predict_step` does, and returns
  classes uint8 [D, b, H, W] and, if asked, probabilities [D, b, H, W, C].
  """
  scores = protocol.scores(model)

  def step(variables: Any, batch: dict[str, jax.Array]) -> Any:
    classes, found = predict_step(variables, batch, scores=scores)
    if protocol.gives_logits:
      found = jax.nn.softmax(found)
    return classes, found if probabilities else None

  return jax.pmap(step, in_axes=(None, 0), devices=jax.local_devices())


class Scores(NamedTuple):
  """What an evaluation found, with predictions that are kept compressed."""

  evaluator: 'Evaluator'
  metrics: dict[str, Any]  # JSON values, with the protocol and the `images`
  confusion: np.ndarray  # int64 [C, C], rows truth, columns prediction
  counts: np.ndarray  # int64 [N, K, C], `metrics.COUNTS` of each record
  mious: dict[int, float]  # of each record; NaN for one of void alone
  packed: dict[int, tuple[tuple[int, int], bytes]]  # shape, zlib's bytes

  def prediction(self, index: int) -> np.ndarray:
    """The classes uint8 [H, W] of a record."""
    shape, data = self.packed[index]
    return np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape)

  def picture(self, indices: Sequence[int]) -> np.ndarray | None:
    """The panel of records, with names, mIoU and legend; None for none."""
    if not indices:
      return None
    info, predictions = self.evaluator.info, map(self.prediction, indices)
    images, labels = zip(*map(self.evaluator.example, indices), strict=True)
    return visualize.panel(
      images,
      labels,
      list(predictions),
      info.palette,
      info.ignore_label,
      classes=info.classes,
      names=list(map(self.evaluator.name, indices)),
      mious=[self.mious[i] for i in indices],
    )


class Evaluator:
  """Scores a split by a protocol; batches are planned and compiled once.

  Attributes:
    info: what the labels mean.
    protocol: the `Protocol` that gives the scores.
    description: JSON values that describe the split and the protocol.
    view_size: (height, width) of the largest images or windows at scale 1.
  """

  def __init__(
    self,
    model: Any,
    dataset: Any,
    split: str,
    protocol: Protocol,
    *,
    batch_size: int,
    buckets: int,
    threads: int,
    boundary_iou: bool = False,
  ) -> None:
    """Plans the batches of a split of a `data.load.Dataset`.

    `batch_size` is that of all devices, rounded up to a multiple of their
    number. Batches have at most `buckets` sizes, each compiled; any number if
    padding would move the logits (`DeepLabV3.pads_freely`).
    """
    self.info, self.protocol = dataset.info, protocol
    self.description = {'split': split, **protocol.describe(model)}
    self._source, self._threads = dataset.source(split), threads
    self._sizes = dataset.sizes(split)
    self._transforms: tuple[Transform, ...] = ()
    if protocol.transform:
      self._sizes = [protocol.crop_size] * len(self._sizes)
      self._transforms = (protocol.transform(protocol.crop_size),)
    devices = jax.device_count()
    batch_size = min(batch_size, len(self._sizes))  # more would be filler alone
    self._plan = plan_batches(
      self._sizes,
      limit=buckets if model.pads_freely else None,
      batch_size=-(-batch_size // devices) * devices,
    )
    self.view_size = self._plan[-1].size
    if 'crop_size' in protocol.uses:
      self.view_size = protocol.crop_size
    self._step = pmap_eval_step(
      scores=protocol.scores(model),
      num_classes=self.info.num_classes,
      ignore_label=self.info.ignore_label,
      boundary_iou=boundary_iou,
    )

  @watchdog.phase('evaluation')
  def run(
    self,
    variables: dict[str, Any],
    keep: int,
    worst_and_best: int = 0,
    between: Callable[[], None] = lambda: None,
  ) -> Scores:
    """Scores every image of all hosts once, on every host.

    The variables must be replicated over the devices. It keeps the predictions
    of the first `keep` records, and of as many worst and best ones as asked.
    `between` is called after each batch, and may raise to end it.
    """
    iterator = make_eval_iterator(
      self._source,
      self._plan,
      self._transforms,
      ignore_label=self.info.ignore_label,
      fill=self.info.fill,
      host=jax.process_index(),
      hosts=jax.process_count(),
      threads=self._threads,
    )
    confusion = np.zeros((self.info.num_classes,) * 2, np.int64)
    mious: dict[int, float] = {}
    counts: dict[int, np.ndarray] = {}
    packed: dict[int, tuple[tuple[int, int], bytes]] = {}

    def count(results: Any) -> None:
      results = jax.device_get(results)
      confusion[:] += results['confusion'].sum(0, np.int64)
      found = metrics.class_counts(results['confusion'])
      if 'boundary' in results:
        found = np.concatenate([found, results['boundary']], 1)
      of_images = metrics.image_metrics(found)['per_image_miou']
      rows = {i: row for row, i in enumerate(results['index'].tolist())}
      rows.pop(FILLER, None)
      for index, row in rows.items():
        counts[index], mious[index] = found[row], of_images[row]
      chosen = metrics.extremes(mious, worst_and_best)
      shown = {*chosen['worst'], *chosen['best']}
      for index in rows:
        if index < keep or index in shown:
          height, width = self._sizes[index]
          data = results['prediction'][rows[index], :height, :width].tobytes()
          packed[index] = (height, width), zlib.compress(data, level=1)
      for index in [i for i in packed if i >= keep and i not in shown]:
        del packed[index]

    with contextlib.closing(iterator):
      pending = None  # one batch, so that the devices never wait for the host
      for batch in iterator:
        watchdog.progress()
        results = self._step(variables, distributed.shard(batch))
        if pending is not None:
          count(pending)
        pending = results
        between()
      count(pending)
    # In the order of the records, whatever the batches were.
    packed = dict(sorted(packed.items()))
    table = np.stack([counts[index] for index in sorted(counts)])
    classes, boundary = self.info.classes, table.sum(0)[3:]
    found = {
      **metrics.compute_metrics(confusion, classes, boundary),
      **{k: metrics.mean(v) for k, v in metrics.image_metrics(table).items()},
      'interval_95': resampling.intervals(table),
      **self.description,
      'images': len(table),
    }
    return Scores(self, found, confusion, table, mious, packed)

  def name(self, index: int) -> str:
    """The name of a record."""
    return self._source[index]['name'].decode()

  def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The image and the label of a record, as the protocol takes them."""
    return load_example(self._source[index], self._transforms)


def write_archive(
  path: str | os.PathLike,
  results: Iterable[tuple[str, bytes]],
  dataset: str = 'VOC2012',
) -> None:
  """Writes results/DATASET/Segmentation/comp6_test_cls/NAME.png as a .tar.gz.

  PASCAL VOC's server takes it; comp6 is the competition for training on any
  data. Equal results, each a name and a palette PNG (mode P), make equal bytes.
  """
  folder = f'results/{dataset}/Segmentation/comp6_test_cls'
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode='w') as archive:
    for name, png in results:
      entry = tarfile.TarInfo(f'{folder}/{name}.png')
      entry.size = len(png)
      archive.addfile(entry, io.BytesIO(png))
  write(path, gzip.compress(tar.getvalue(), mtime=0))
