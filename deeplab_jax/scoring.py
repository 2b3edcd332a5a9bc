"""Scores every image of a split, over all devices and hosts."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deeplab_jax import distributed, metrics, steps, visualize
from deeplab_jax.data.buckets import FILLER, plan_batches
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.pipeline import load_example, make_eval_iterator
from deeplab_jax.data.transforms import CenterCrop
from deeplab_jax.protocols import Protocol


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
    self._step = steps.pmap_eval_step(
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
