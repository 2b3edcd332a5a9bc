"""The four metrics of semantic segmentation, from confusion matrices.

A confusion matrix holds sums: matrices of batches and hosts are added, and
divided once, at the end. Averages over images have names of their own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.runtime.errors import require

NAMES = {
  'miou': 'mIoU',
  'pixel_accuracy': 'pixel accuracy',
  'mean_accuracy': 'mean accuracy',
  'frequency_weighted_iou': 'frequency weighted IoU',
}


def confusion_matrix(
  labels: jax.Array, predictions: jax.Array, num_classes: int, ignore_label: int
) -> jax.Array:
  """Counts the pixels of each pair of true and predicted class, int32 [C, C].

  >>> labels, predictions = np.array([0, 1, 1, 255]), np.array([0, 1, 0, 0])
  >>> confusion_matrix(labels, predictions, 2, 255).tolist()
  [[1, 0], [1, 1]]

  Rows are the truth, columns the prediction. A pixel whose label is
  `ignore_label`, or whose label or prediction is outside 0..C-1, does not
  count. One call can count 2^31 - 1 pixels: add the matrices of many batches in
  int64 on the host. Raises `ValueError` if labels and predictions, int [...],
  have different shapes.
  """
  shapes = jnp.shape(labels), jnp.shape(predictions)
  rule = 'labels and predictions must have one shape'
  require(shapes[0] == shapes[1], rule, shapes)
  labels = jnp.ravel(labels).astype(jnp.int32)
  predictions = jnp.ravel(predictions).astype(jnp.int32)
  counted = labels != ignore_label
  for classes in (labels, predictions):
    counted &= (classes >= 0) & (classes < num_classes)
  # Pixels that do not count share one extra bin, which is dropped.
  cells = num_classes * num_classes
  index = jnp.where(counted, labels * num_classes + predictions, cells)
  counts = jnp.bincount(index, length=cells + 1)[:cells]
  return counts.reshape(num_classes, num_classes).astype(jnp.int32)


def compute_metrics(
  confusion: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
  """Computes metrics in 0..1 in float64; what would be 0 / 0 is None.

  Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic
  Segmentation" (2015), section 5. With n_ij the pixels of class i predicted as
  j and t_i = sum_j n_ij:

    pixel accuracy          sum_i n_ii / sum_i t_i
    accuracy of class i     n_ii / t_i
    IoU of class i          n_ii / (t_i + sum_j n_ji - n_ii)
    frequency weighted IoU  sum_i t_i IoU_i / sum_i t_i

  `mean_accuracy` and `miou` are the means over the classes that have a value.
  A class that is predicted but occurs in no label has the IoU 0 and counts.

  The rows of `confusion`, int [C, C], are the truth, its columns the
  prediction. Raises `ValueError` if it is no such matrix, or a name occurs
  twice.
  """
  confusion, count = np.asarray(confusion), len(classes)
  fits = confusion.shape == (count, count) and confusion.dtype.kind in 'iu'
  found = confusion.dtype.name, *confusion.shape
  require(fits, f'confusion must hold integers [{count}, {count}]', found)
  require(len(set(classes)) == count, 'class names must differ', classes)
  confusion = confusion.astype(np.int64)
  hits, truth = np.diagonal(confusion), confusion.sum(axis=1)
  with np.errstate(invalid='ignore'):  # 0 / 0 is NaN here, and None below
    iou = hits / (truth + confusion.sum(axis=0) - hits)
    accuracy = hits / truth
    pixel_accuracy = hits.sum() / truth.sum()
    weighted_iou = sum(truth * np.nan_to_num(iou)) / truth.sum()
  return {
    'miou': _mean(iou),
    'pixel_accuracy': _mean(pixel_accuracy),
    'mean_accuracy': _mean(accuracy),
    'frequency_weighted_iou': _mean(weighted_iou),
    'per_class_iou': dict(zip(classes, map(_mean, iou), strict=True)),
    'per_class_accuracy': dict(zip(classes, map(_mean, accuracy), strict=True)),
  }


def image_metrics(confusions: np.ndarray) -> dict[str, np.ndarray]:
  """Computes the four metrics of each image by itself, float64 [N].

  As sthalles/deeplab_v3 and martinkersner/py_img_seg_eval, whose published
  numbers are means over images: accuracy is averaged over the classes in the
  image's label, and the sum of the IoUs is divided by the number of these. An
  image without a counted pixel has NaN. Raises `ValueError` if the matrices
  (rows truth) are not [N, C, C].
  """
  shape = np.shape(confusions)
  fits = len(shape) == 3 and shape[1] == shape[2]
  require(fits, 'confusions must be [N, C, C]', list(shape))
  hits = np.diagonal(confusions, axis1=1, axis2=2).astype(np.float64)
  truth = confusions.sum(axis=2)
  union = truth + confusions.sum(axis=1) - hits
  iou = hits / np.maximum(union, 1)
  accuracy = hits / np.maximum(truth, 1)
  with np.errstate(invalid='ignore'):
    classes, pixels = (truth > 0).sum(axis=1), truth.sum(axis=1)
    return {
      'per_image_miou': iou.sum(axis=1) / classes,
      'per_image_pixel_accuracy': hits.sum(axis=1) / pixels,
      'per_image_mean_accuracy': accuracy.sum(axis=1) / classes,
      'per_image_frequency_weighted_iou': (truth * iou).sum(axis=1) / pixels,
    }


def average(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
  """Averages `image_metrics` of images, without NaN; None where no value is."""
  keys = [f'per_image_{key}' for key in NAMES]
  return {key: _mean([row[key] for row in rows]) for key in keys}


def extremes(mious: dict[int, float], count: int) -> dict[str, list[int]]:
  """The images of the lowest and the highest mIoU; ties in their order."""
  rated = sorted(i for i, miou in mious.items() if not np.isnan(miou))
  return {
    'worst': sorted(rated, key=lambda i: mious[i])[:count],
    'best': sorted(rated, key=lambda i: -mious[i])[:count],
  }


def summary(metrics: dict[str, Any]) -> dict[str, float]:
  """The four numbers over the whole set, without those that have no value."""
  return {key: metrics[key] for key in NAMES if metrics[key] is not None}


def format_table(metrics: dict[str, Any]) -> str:
  """Writes a table, in percent, of `compute_metrics` and perhaps `average`."""
  ious, accuracies = metrics['per_class_iou'], metrics['per_class_accuracy']
  width = max(map(len, [*ious, *NAMES.values()]))
  head = f'{"class":<{width}}  {"IoU %":>7}  {"accuracy %":>10}'
  rule = '-' * len(head)

  def row(name: str, value: float | None) -> str:
    return f'{name:<{width}}  {_percent(value):>7}'

  lines = [head, rule]
  for name, iou in ious.items():
    lines.append(f'{row(name, iou)}  {_percent(accuracies[name]):>10}')
  lines += [rule, *(row(n, metrics[key]) for key, n in NAMES.items())]
  if 'per_image_miou' in metrics:
    lines += [rule, "averaged over images (the seed's)"]
    lines += [row(n, metrics[f'per_image_{k}']) for k, n in NAMES.items()]
  return '\n'.join(lines)


def _mean(values: Any) -> float | None:
  """The mean of the values that are not NaN, None if there are none."""
  present = np.ravel(values)[~np.isnan(np.ravel(values))]
  return float(sum(present) / len(present)) if len(present) else None


def _percent(value: float | None) -> str:
  return '-' if value is None else f'{100 * value:.2f}'
