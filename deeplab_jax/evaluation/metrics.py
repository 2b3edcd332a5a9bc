"""The four measures of semantic segmentation, from confusion matrices.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic
Segmentation", CVPR 2015, section 5. A confusion matrix holds sums, so
matrices of batches and hosts are added and divided only once, at the end. The
averages over images that some repositories report instead stand apart.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SUMMARY = {
  'miou': 'mIoU',
  'pixel_accuracy': 'pixel accuracy',
  'mean_accuracy': 'mean accuracy',
  'frequency_weighted_iou': 'frequency weighted IoU',
}
_PER_IMAGE = {f'per_image_{key}': name for key, name in _SUMMARY.items()}


def confusion_matrix(
  labels: jax.Array,
  predictions: jax.Array,
  num_classes: int,
  ignore_label: int,
) -> jax.Array:
  """Counts the pixels of every pair of true and predicted class.

  Made for use under `jax.jit` with `num_classes` and `ignore_label` static.
  The counts are exact integers; one call can hold 2^31 - 1 pixels, so add the
  matrices of many batches in int64 on the host.

  Args:
    labels: int [...], the true classes.
    predictions: int [...], the predicted classes, in the shape of `labels`.
    num_classes: the number of classes C.
    ignore_label: the label of pixels that do not count.

  Returns:
    int32 [C, C]: rows are the truth, columns the prediction. A pixel whose
    label is `ignore_label`, or whose label or prediction is outside 0..C-1,
    is not counted.

  Raises:
    ValueError: if the shapes differ.
  """
  if jnp.shape(labels) != jnp.shape(predictions):
    raise ValueError(
      'labels and predictions must have one shape, got '
      f'{jnp.shape(labels)} and {jnp.shape(predictions)}'
    )
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


def measures(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
  """Computes the measures of Long et al. 2015, section 5, in float64.

  With n_ij the pixels of class i predicted as j and t_i = sum_j n_ij:

    pixel accuracy          sum_i n_ii / sum_i t_i
    accuracy of class i     n_ii / t_i
    IoU of class i          n_ii / (t_i + sum_j n_ji - n_ii)
    frequency weighted IoU  sum_i t_i IoU_i / sum_i t_i

  `mean_accuracy` and `miou` are the means over the classes that have a value.
  A class that is predicted but occurs in no label has the IoU 0 and counts.

  Args:
    confusion: int [C, C], rows truth, columns prediction.
    classes: the C class names, each different.

  Returns:
    A dict with `miou`, `pixel_accuracy`, `mean_accuracy`,
    `frequency_weighted_iou` (floats in 0..1, all None if no pixel was
    counted), and `per_class_iou`, `per_class_accuracy` (dicts by class name).
    A class has the IoU None if it is neither in the labels nor in the
    predictions, and the accuracy None if it is not in the labels.

  Raises:
    ValueError: if the matrix is not [C, C] integers or a name occurs twice.
  """
  confusion = np.asarray(confusion)
  count = len(classes)
  if confusion.shape != (count, count) or confusion.dtype.kind not in 'iu':
    raise ValueError(
      f'confusion must hold integers [{count}, {count}], got '
      f'{confusion.dtype} {list(confusion.shape)}'
    )
  if len(set(classes)) != count:
    raise ValueError(f'class names must differ, got {list(classes)}')
  confusion = confusion.astype(np.int64)
  hits = np.diagonal(confusion)
  truth = confusion.sum(axis=1)
  union = truth + confusion.sum(axis=0) - hits
  iou = [_ratio(*pair) for pair in zip(hits, union, strict=True)]
  accuracy = [_ratio(*pair) for pair in zip(hits, truth, strict=True)]
  weighted = [
    pixels * value
    for pixels, value in zip(truth.tolist(), iou, strict=True)
    if value is not None
  ]
  return {
    'miou': _mean(iou),
    'pixel_accuracy': _ratio(hits.sum(), truth.sum()),
    'mean_accuracy': _mean(accuracy),
    'frequency_weighted_iou': _ratio(sum(weighted), truth.sum()),
    'per_class_iou': dict(zip(classes, iou, strict=True)),
    'per_class_accuracy': dict(zip(classes, accuracy, strict=True)),
  }


def measures_of_images(confusions: np.ndarray) -> dict[str, np.ndarray]:
  """Computes the four measures of each image by itself, in float64.

  As sthalles/deeplab_v3 and martinkersner/py_img_seg_eval do, whose published
  numbers are means over images: accuracy is averaged over the classes in the
  image's label, and the sum of the IoUs is divided by the number of these
  alone. Void pixels count nowhere.

  Args:
    confusions: int [N, C, C], rows truth, columns prediction.

  Returns:
    `per_image_miou`, `per_image_pixel_accuracy`, `per_image_mean_accuracy` and
    `per_image_frequency_weighted_iou`, each [N]; NaN for an image without a
    counted pixel.

  Raises:
    ValueError: if the matrices are not [N, C, C].
  """
  shape = np.shape(confusions)
  if len(shape) != 3 or shape[1] != shape[2]:
    raise ValueError(f'confusions must be [N, C, C], got {list(shape)}')
  hits = np.diagonal(confusions, axis1=1, axis2=2).astype(np.float64)
  truth = confusions.sum(axis=2)
  union = truth + confusions.sum(axis=1) - hits
  iou = hits / np.maximum(union, 1)
  accuracy = hits / np.maximum(truth, 1)
  with np.errstate(invalid='ignore'):  # 0 / 0 is the NaN that is promised
    classes, pixels = (truth > 0).sum(axis=1), truth.sum(axis=1)
    return {
      'per_image_miou': iou.sum(axis=1) / classes,
      'per_image_pixel_accuracy': hits.sum(axis=1) / pixels,
      'per_image_mean_accuracy': accuracy.sum(axis=1) / classes,
      'per_image_frequency_weighted_iou': (truth * iou).sum(axis=1) / pixels,
    }


def average(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
  """Averages what images have in each measure; None where none has a value.

  Args:
    rows: one dict an image, of `measures_of_images`; NaN counts for nothing.
  """
  return {
    key: _mean([row[key] for row in rows if not math.isnan(row[key])])
    for key in _PER_IMAGE
  }


def summary(measures: dict[str, Any]) -> dict[str, float]:
  """The single numbers over the whole set, where they have a value."""
  return {key: measures[key] for key in _SUMMARY if measures[key] is not None}


def format_table(measures: dict[str, Any]) -> str:
  """Writes what `measures` returns as a plain text table, in per cent.

  Args:
    measures: the dict that `measures` returns, also with the means of
      `measures_of_images`.

  Returns:
    Aligned lines without a last newline: one for each class with its IoU and
    accuracy, then the four measures, and those averaged over images under a
    heading. What is absent reads "-".
  """
  per_image = {key: n for key, n in _PER_IMAGE.items() if key in measures}
  names = [*measures['per_class_iou'], *_SUMMARY.values()]
  width = max(len(name) for name in names)
  head = f'{"class":<{width}}  {"IoU %":>7}  {"accuracy %":>10}'
  rule = '-' * len(head)
  lines = [head, rule]
  for name, iou in measures['per_class_iou'].items():
    accuracy = _percent(measures['per_class_accuracy'][name])
    lines.append(f'{name:<{width}}  {_percent(iou):>7}  {accuracy:>10}')
  lines.append(rule)
  for key, name in _SUMMARY.items():
    lines.append(f'{name:<{width}}  {_percent(measures[key]):>7}')
  if per_image:
    lines += [rule, "averaged over images (the seed's)"]
  for key, name in per_image.items():
    lines.append(f'{name:<{width}}  {_percent(measures[key]):>7}')
  return '\n'.join(lines)


def _ratio(part: float, whole: float) -> float | None:
  return float(part) / float(whole) if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
  present = [value for value in values if value is not None]
  return sum(present) / len(present) if present else None


def _percent(value: float | None) -> str:
  return '-' if value is None else f'{100 * value:.2f}'
