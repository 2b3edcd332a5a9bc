"""The metrics of semantic segmentation, from counts of pixels.

Counts are sums: those of batches and hosts are added, and divided once, at the
end. Averages over images have names of their own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.runtime.errors import require

NAMES = {
  'miou': 'mIoU',
  'pixel_accuracy': 'pixel accuracy',
  'mean_accuracy': 'mean accuracy',
  'frequency_weighted_iou': 'frequency weighted IoU',
}
MEANS = {
  **NAMES,
  'mean_precision': 'mean precision',
  'mean_f1': 'mean F1',
  'mean_boundary_iou': 'mean boundary IoU',
}
_COLUMNS = {
  'per_class_iou': 'IoU %',
  'per_class_accuracy': 'accuracy %',
  'per_class_precision': 'precision %',
  'per_class_f1': 'F1 %',
  'per_class_boundary_iou': 'boundary %',
}
# What is counted of each class, in the order of the counts [..., K, C]. The
# last two are there only if they were asked for.
COUNTS = 'tp', 'fp', 'fn', 'boundary_intersection', 'boundary_union'


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


def boundary_counts(
  labels: jax.Array,
  predictions: jax.Array,
  size: jax.Array,
  num_classes: int,
  ignore_label: int,
) -> jax.Array:
  """Counts intersection and union of boundary regions, int32 [2, C].

  Cheng et al., "Boundary IoU" (CVPR 2021): the boundary region of a mask is its
  pixels from which d steps, straight or diagonal, lead out of it or out of the
  image, with d = max(1, round(0.02 diagonal)) pixels. The boundary IoU is the
  IoU of these regions of label and prediction. Here each class is a mask.

  What `confusion_matrix` does not count is void in both maps: it is in no
  region, and a step to it leads out of no class. So a prediction that is right
  on all other pixels has the boundary IoU 1.

  The maps are [H, W], padded at the bottom and on the right; `size` is the
  height and width before.
  """
  rows, columns = map(jnp.arange, labels.shape)
  outside = (rows[:, None] >= size[0]) | (columns >= size[1])
  valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
  maps = jnp.stack([labels, predictions]).astype(jnp.int16)
  signed = jnp.stack([maps, -maps])  # whose minimum is the highest class
  above, below = np.int16(num_classes), np.int16(-num_classes)
  low = jnp.where(outside, below, jnp.where(valid, signed, above))
  pads = [(0, 0), (0, 0), (1, 1), (1, 1)]
  low = jnp.pad(low, pads, constant_values=below)

  def step(_: jax.Array, low: jax.Array) -> jax.Array:
    for window in ((1, 1, 3, 1), (1, 1, 1, 3)):
      low = lax.reduce_window(low, above, lax.min, window, (1,) * 4, 'SAME')
    return low

  reach = jnp.round(jnp.hypot(*size.astype(jnp.float32)) / 50).astype(int)
  low = lax.fori_loop(0, jnp.maximum(reach, 1), step, low)[..., 1:-1, 1:-1]
  regions = valid & (low < signed).any(0)
  classes = jnp.arange(num_classes)[:, None, None]
  of_class = regions[:, None] & (maps[:, None] == classes)
  counts = of_class.all(0).sum((1, 2)), of_class.any(0).sum((1, 2))
  return jnp.stack(counts).astype(jnp.int32)


def class_counts(confusions: np.ndarray) -> np.ndarray:
  """Counts tp, fp, fn of each class, int64 [..., 3, C].

  Of class i, with n_ij the pixels of class i predicted as j, these are n_ii,
  sum_j n_ji - n_ii and sum_j n_ij - n_ii. Takes int [..., C, C].
  """
  hits = np.diagonal(confusions, axis1=-2, axis2=-1).astype(np.int64)
  sums = (np.sum(confusions, axis, np.int64) - hits for axis in (-2, -1))
  return np.stack([hits, *sums], -2)


def rates(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Divides counts [..., K, C] of `COUNTS`; what would be 0 / 0 is NaN.

  Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic
  Segmentation" (2015), section 5; precision and F1 (Dice) as in van Rijsbergen,
  "Information Retrieval" (1979), chapter 7. With t_i = tp_i + fn_i:

    IoU of class i          tp_i / (t_i + fp_i)
    accuracy of class i     tp_i / t_i, also called recall
    precision of class i    tp_i / (tp_i + fp_i)
    F1 of class i           2 tp_i / (t_i + tp_i + fp_i), also called Dice
    pixel accuracy          sum_i tp_i / sum_i t_i
    frequency weighted IoU  sum_i t_i IoU_i / sum_i t_i

  `miou` and `mean_...` [...] are means over the classes that have a value;
  `per_class_...` are [..., C]. A class that is predicted but occurs in no label
  has the IoU 0 and counts. The boundary IoU is there if K is 5.
  """
  hits, wrong, missed, *boundary = np.moveaxis(counts.astype(float), -2, 0)
  truth, found = hits + missed, hits + wrong
  with np.errstate(invalid='ignore'):
    of_classes = {
      'iou': hits / (truth + wrong),
      'accuracy': hits / truth,
      'precision': hits / found,
      'f1': 2 * hits / (truth + found),
    }
    if boundary:
      of_classes['boundary_iou'] = boundary[0] / boundary[1]
    means = {
      f'mean_{key}': _sum(np.nan_to_num(x)) / (~np.isnan(x)).sum(-1)
      for key, x in of_classes.items()
    }
    weighted = _sum(truth * np.nan_to_num(of_classes['iou']))
    return {
      'miou': means.pop('mean_iou'),
      'pixel_accuracy': hits.sum(-1) / truth.sum(-1),
      'frequency_weighted_iou': weighted / truth.sum(-1),
      **means,
      **{f'per_class_{key}': x for key, x in of_classes.items()},
    }


def _sum(values: np.ndarray) -> np.ndarray:
  """Adds up the last axis, in its order."""
  return np.cumsum(values, -1)[..., -1]


def compute_metrics(
  confusion: np.ndarray,
  classes: Sequence[str],
  boundary: np.ndarray | Sequence[Any] = (),
) -> dict[str, Any]:
  """Computes `rates` in 0..1 as JSON values, None instead of NaN.

  The rows of `confusion`, int [C, C], are the truth, its columns the
  prediction; `boundary`, int [2, C], is a sum of `boundary_counts`. Raises
  `ValueError` if `confusion` is no such matrix, or a name occurs twice.
  """
  confusion, count = np.asarray(confusion), len(classes)
  fits = confusion.shape == (count, count) and confusion.dtype.kind in 'iu'
  found = confusion.dtype.name, *confusion.shape
  require(fits, f'confusion must hold integers [{count}, {count}]', found)
  require(len(set(classes)) == count, 'class names must differ', classes)
  values = rates(np.stack([*class_counts(confusion), *boundary]))
  return {
    key: dict(zip(classes, map(mean, x), strict=True)) if x.ndim else mean(x)
    for key, x in values.items()
  }


def image_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Computes the four metrics of each image by itself, float64 [N].

  As sthalles/deeplab_v3 and martinkersner/py_img_seg_eval, whose published
  numbers are means over images: accuracy is averaged over the classes in the
  image's label, and the sum of the IoUs is divided by the number of these. An
  image without a counted pixel has NaN. Takes counts [N, K, C] of `COUNTS`.
  """
  hits, wrong, missed, *_ = counts.swapaxes(0, 1)
  truth = hits + missed
  iou = hits / np.maximum(truth + wrong, 1)
  accuracy = hits / np.maximum(truth, 1)
  with np.errstate(invalid='ignore'):
    classes, pixels = (truth > 0).sum(axis=1), truth.sum(axis=1)
    return {
      'per_image_miou': iou.sum(axis=1) / classes,
      'per_image_pixel_accuracy': hits.sum(axis=1) / pixels,
      'per_image_mean_accuracy': accuracy.sum(axis=1) / classes,
      'per_image_frequency_weighted_iou': (truth * iou).sum(axis=1) / pixels,
    }


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
  """Writes a table, in percent, of what an evaluation found."""
  columns = {k: f'{title:>7}' for k, title in _COLUMNS.items() if k in metrics}
  means = {key: name for key, name in MEANS.items() if key in metrics}
  width = max(map(len, [*metrics['per_class_iou'], *means.values()]))

  def row(name: str, *values: float | None) -> str:
    cells = zip(values, columns.values(), strict=False)
    return '  '.join(
      [f'{name:<{width}}', *(f'{_percent(v):>{len(t)}}' for v, t in cells)]
    )

  head = '  '.join([f'{"class":<{width}}', *columns.values()])
  lines = [head, rule := '-' * len(head)]
  for name in metrics['per_class_iou']:
    lines.append(row(name, *(metrics[key][name] for key in columns)))
  lines += [rule, *(row(n, metrics[key]) for key, n in means.items())]
  if 'per_image_miou' in metrics:
    lines += [rule, "averaged over images (the seed's)"]
    lines += [row(n, metrics[f'per_image_{k}']) for k, n in NAMES.items()]
  if ends := metrics.get('interval_95', {}).get('miou'):
    low, high = map(_percent, ends)
    lines += [rule, f'95 % interval of mIoU: {low} to {high}']
  return '\n'.join(lines)


def mean(values: Any) -> float | None:
  """The mean of the values that are not NaN, None if there are none."""
  present = np.ravel(values)[~np.isnan(np.ravel(values))]
  return float(sum(present) / len(present)) if len(present) else None


def _percent(value: float | None) -> str:
  """Writes a share in percent, a dash for None."""
  return '-' if value is None else f'{100 * value:.2f}'
