"""Scores every image of a split, over all devices and hosts."""

import dataclasses
import functools
import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from deeplab_jax.data.buckets import FILLER, plan_batches
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.pipeline import load_example, make_eval_iterator
from deeplab_jax.data.transforms import CenterCrop
from deeplab_jax.evaluation import metrics
from deeplab_jax.evaluation.metrics import confusion_matrix
from deeplab_jax.evaluation.protocols import Protocol
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.runtime.files import replacing
from deeplab_jax.visualize import labels as visualize


def eval_step(
  variables: dict[str, Any],
  batch: dict[str, jax.Array],
  *,
  scores: Callable[..., jax.Array],
  num_classes: int,
  ignore_label: int = 255,
  axis_name: str | None = AXIS_NAME,
) -> dict[str, jax.Array]:
  """Predicts a batch and counts each image of it.

  Args:
    variables: what `model.apply` takes.
    batch: this device's share, with `size` int32 [b, 2] (height and width of
      each image before padding) and `index` int32 [b].
    scores: maps (variables, image, size) to [b, H, W, C], highest at the class
      to predict, see `protocols.make_scores`.
    num_classes: C.
    ignore_label: marks pixels that are not counted.
    axis_name: of the mapped device axis; None where there is none, as under
      plain `jax.jit`. `jax.shard_map` needs `check_vma=False`.

  Returns:
    `index` int32 [B], `confusion` int32 [B, C, C] (rows are labels) and
    `prediction` uint8 [B, H, W] of the images of all devices and hosts, the
    same on each.
  """
  prediction = _likeliest(scores(variables, batch['image'], batch['size']))
  count = functools.partial(
    confusion_matrix, num_classes=num_classes, ignore_label=ignore_label
  )
  own = {
    'index': batch['index'],
    'confusion': jax.vmap(count)(batch['label'], prediction),
    'prediction': prediction,
  }
  if axis_name is None:
    return own
  return lax.all_gather(own, axis_name, tiled=True)


def predict_step(
  variables: dict[str, Any], batch: dict[str, jax.Array], *, model: nn.Module
) -> jax.Array:
  """Most likely class of each pixel of `image`, padded from `size` [b, 2].

  It needs no mapped axis.

  Returns:
    uint8 [b, H, W].
  """
  return _likeliest(
    model.apply(variables, batch['image'], train=False, sizes=batch['size'])
  )


def _likeliest(scores: jax.Array) -> jax.Array:
  return jnp.argmax(scores, -1).astype(jnp.uint8)


def pmap_eval_step(**settings: Any) -> Callable[..., Any]:
  """`eval_step` over all devices; its results have no device axis."""
  return jax.pmap(
    functools.partial(eval_step, **settings),
    axis_name=AXIS_NAME,
    in_axes=(None, 0),
    out_axes=None,
  )


def pmap_predict_step(**settings: Any) -> Callable[..., Any]:
  """`predict_step` over the local devices; batch and result have their axis."""
  return jax.pmap(
    functools.partial(predict_step, **settings),
    axis_name=AXIS_NAME,
    in_axes=(None, 0),
    devices=jax.local_devices(),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredImage:
  """What the evaluation knows of one image.

  Attributes:
    index: of the record.
    confusion: int32 [C, C], rows truth, columns prediction.
    measures: by name, see `metrics.measures_of_images`.
    prediction: uint8 [H, W], without padding.
  """

  index: int
  confusion: np.ndarray
  measures: dict[str, float]
  prediction: np.ndarray


class Evaluator:
  """Scores a split by one protocol; planned and compiled once.

  Attributes:
    info: what the labels mean.
    description: of the split and the protocol, JSON values.
  """

  def __init__(
    self,
    model: Any,
    source: Sequence[dict[str, bytes]],
    sizes: Sequence[tuple[int, int]],
    info: DatasetInfo,
    protocol: Protocol,
    *,
    split: str,
    batch_size: int,
    buckets: int,
    threads: int,
  ) -> None:
    """Plans the batches.

    Args:
      model: a `DeepLabV3`.
      source: the records, see `pipeline.make_train_iterator`.
      sizes: (height, width) of each record.
      info: what the labels mean.
      protocol: how to look at images.
      split: its name, for the description.
      batch_size: over all devices; rounded up to a multiple of their number.
      buckets: of how many sizes batches may be, each compiled; where padding
        would move the logits (`DeepLabV3.pads_freely`), of any number.
      threads: that load.
    """
    self.info = info
    self.description = {'split': split, **protocol.describe(model)}
    self._source, self._sizes, self._transforms = source, sizes, ()
    self._threads, self._model = threads, model
    if protocol.kind == 'center_crop':
      self._transforms = (CenterCrop(protocol.crop_size),)
      self._sizes = [protocol.crop_size] * len(sizes)
    devices = jax.device_count()
    batch_size = min(batch_size, len(sizes))  # more rows would be filler alone
    self._plan = plan_batches(
      self._sizes,
      limit=buckets if model.pads_freely else None,
      batch_size=-(-batch_size // devices) * devices,
    )
    self._view = protocol.view_size(self._plan[-1].size)
    self._step = pmap_eval_step(
      scores=protocol.scores(model),
      num_classes=info.num_classes,
      ignore_label=info.ignore_label,
    )

  def prepare(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables for `scored`, see `DeepLabV3.prepare`.

    They suit the largest images, or the window, at scale 1, and most layers at
    other sizes. It takes a second or so, which pays from some dozens of images
    on.
    """
    return self._model.prepare(variables, self._view)

  def scored(self, variables: dict[str, Any]) -> Iterator[ScoredImage]:
    """Yields every image of all hosts once, on every host.

    Args:
      variables: `params` and `batch_stats`, prepared or not, on the devices.
    """
    iterator = make_eval_iterator(
      self._source,
      self._plan,
      self._transforms,
      ignore_label=self.info.ignore_label,
      host=jax.process_index(),
      hosts=jax.process_count(),
      threads=self._threads,
    )
    try:
      # Fetched one batch late, so that the devices never wait for the host.
      pending = None
      for batch in iterator:
        results = self._step(variables, distributed.shard(batch))
        if pending is not None:
          yield from self._images(pending)
        pending = results
      yield from self._images(pending)
    finally:
      iterator.close()

  def _images(self, results: dict[str, jax.Array]) -> Iterator[ScoredImage]:
    results = jax.device_get(results)
    measures = metrics.measures_of_images(results['confusion'])
    for row, index in enumerate(results['index'].tolist()):
      if index != FILLER:
        height, width = self._sizes[index]
        yield ScoredImage(
          index,
          results['confusion'][row],
          {name: float(values[row]) for name, values in measures.items()},
          results['prediction'][row, :height, :width],
        )

  def name(self, index: int) -> str:
    """The name of a record."""
    return self._source[index]['name'].decode()

  def picture(self, predictions: Mapping[int, np.ndarray]) -> np.ndarray | None:
    """Image, label and prediction of records, a row each; None for none."""
    if not predictions:
      return None
    examples = [
      load_example(self._source[index], self._transforms)
      for index in predictions
    ]
    return visualize.panel(
      *zip(*examples, strict=True),
      list(predictions.values()),
      self.info.palette,
      self.info.ignore_label,
    )


def write_archive(
  path: str | os.PathLike,
  results: Iterable[tuple[str, bytes]],
  dataset: str = 'VOC2012',
) -> None:
  """Writes results/DATASET/Segmentation/comp6_test_cls/NAME.png.

  comp6 is the competition for training on any data. Equal results make equal
  bytes, and the file appears whole or not at all.

  Args:
    path: the .tar.gz to write.
    results: the name of each image and its palette PNG (mode P).
    dataset: as the server calls it.
  """
  with (
    replacing(path) as temporary,
    open(temporary, 'wb') as file,
    # A name or a time in the header would make two archives differ.
    gzip.GzipFile('', 'wb', fileobj=file, mtime=0) as packed,
    tarfile.open(fileobj=packed, mode='w') as archive,
  ):
    for name, png in results:
      entry = tarfile.TarInfo(
        f'results/{dataset}/Segmentation/comp6_test_cls/{name}.png'
      )
      entry.size = len(png)
      archive.addfile(entry, io.BytesIO(png))
