"""Losses of pixels and of regions, and which pixels count how much.

A loss of pixels gives a value for each pixel; the caller reduces. A loss of
regions divides sums over pixels, and gives one value for the batch: it takes a
function `across`, which adds such sums up over the devices.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.runtime.errors import require

Loss = Callable[..., jax.Array]
Across = Callable[[jax.Array], jax.Array]


def softmax_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  ignore_label: int = 255,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Computes the cross-entropy of each pixel, 0 at void.

  >>> softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([3, 255])).tolist()
  [1.3862943649291992, 0.0]

  `logits` are float [..., C]; `labels` are [...], a class in 0..C-1 or
  `ignore_label`. Szegedy et al., "Rethinking the Inception Architecture"
  (2016), section 7, spread the share `label_smoothing` of the target evenly
  over all classes. Returns float32 [...], in nats. Raises `ValueError` if the
  labels are not one for each pixel of the logits.
  """
  _check_shapes(logits, labels)
  logits = logits.astype(jnp.float32)
  # Not optax: its integer form has a scatter for its gradient, and its one-hot
  # form took 1.5 times the time and memory of this comparison on a CPU.
  classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  target = jnp.where(classes == labels[..., None], logits, 0).sum(-1)
  if label_smoothing:
    target += label_smoothing * (logits.mean(-1) - target)
  losses = jax.nn.logsumexp(logits, axis=-1) - target
  return jnp.where(labels == ignore_label, 0, losses)


def _check_shapes(logits: jax.Array, labels: jax.Array) -> None:
  shape, found = list(logits.shape), list(labels.shape)
  rule = f'labels must be {shape[:-1]}, one per pixel of the logits {shape}'
  require(found == shape[:-1], rule, found)


def focal(
  logits: jax.Array,
  labels: jax.Array,
  ignore_label: int = 255,
  label_smoothing: float = 0.0,
  *,
  gamma: float = 2.0,
) -> jax.Array:
  """Computes the focal loss of each pixel: `(1 - p)^gamma` times cross-entropy.

  >>> focal(jnp.zeros((2, 2)), jnp.array([1, 255]), gamma=0.0).tolist()
  [0.6931471824645996, 0.0]

  p is the probability of the pixel's class. Lin et al., "Focal Loss for Dense
  Object Detection" (2017), equation 4. The other arguments and the result are
  those of `softmax_cross_entropy`.
  """
  require(0 <= gamma < math.inf, 'gamma must be from 0', gamma)
  given = logits, labels, ignore_label
  wrong = -jnp.expm1(-softmax_cross_entropy(*given))
  # A power below 1 has no slope at 0.
  factor = jnp.maximum(wrong, jnp.finfo(wrong.dtype).tiny) ** gamma
  return factor * softmax_cross_entropy(*given, label_smoothing)


def dice(
  logits: jax.Array,
  labels: jax.Array,
  ignore_label: int = 255,
  *,
  across: Across = lambda sums: sums,
) -> jax.Array:
  """Computes one minus the soft Dice coefficient, a mean over the classes.

  >>> dice(jnp.zeros((3, 2)), jnp.array([0, 1, 255])).tolist()
  0.5

  For the probability p of a class and its target g, 0 or 1, the coefficient is
  `2 sum(p g) / (sum(p) + sum(g))`, over the valid pixels of the batch on all
  devices. The mean is over the classes that it shows; 0 without one. Milletari
  et al., "V-Net" (2016), section 3, has squares in the denominator; plain sums
  are those of Sudre et al., "Generalised Dice overlap" (2017), section 2.1.

  `logits` are float [..., C], and `labels` [...]. Returns a float32 scalar.
  """
  target, probability, valid = _regions(logits, labels, ignore_label)
  each = jnp.where(target, probability, 0), probability * valid, target
  axes = tuple(range(labels.ndim))
  sums = [jnp.sum(x, axes, dtype=jnp.float32) for x in each]
  common, predicted, true = across(jnp.stack(sums))
  present = true > 0
  ratio = 2 * common / jnp.where(present, predicted + true, 1)
  return _mean(1 - ratio, present)


def lovasz_softmax(
  logits: jax.Array,
  labels: jax.Array,
  ignore_label: int = 255,
  *,
  across: Across = lambda sums: sums,
) -> jax.Array:
  """Computes a convex surrogate of one minus the IoU of each image.

  >>> logits = jnp.array([[[[0.0, 0], [0, 0], [9, 0]]]])
  >>> jax.jit(lovasz_softmax)(logits, jnp.array([[[0, 1, 255]]])).tolist()
  0.5

  The errors `e = |g - p|` of a class, for its probability p and its target g, 0
  or 1, are sorted, the largest first: `sum_i e_i (J_i - J_(i-1))`, where J_i is
  one minus the IoU if the first i pixels are wrong. Berman et al., "The
  Lovasz-Softmax Loss" (2018), equations 8 to 11. The mean is over the classes
  that an image shows, then over the images that show any; 0 without one. It is
  taken by image, as a sort over devices would move all logits.

  `logits` are float [B, ..., C], `labels` [B, ...]. Returns a float32 scalar.
  """
  target, probability, valid = (
    x.reshape(len(labels), -1, x.shape[-1]).swapaxes(1, 2)
    for x in _regions(logits, labels, ignore_label)
  )
  errors = jnp.where(valid, jnp.abs(target - probability), -1)  # void last
  order = jnp.argsort(lax.stop_gradient(-errors), -1)
  errors = jnp.maximum(jnp.take_along_axis(errors, order, -1), 0)
  own = jnp.take_along_axis(target, order, -1)
  passed = jnp.cumsum(own, -1, dtype=jnp.int32)
  pixels = passed[..., -1:]
  union = pixels + jnp.arange(1, errors.shape[-1] + 1) - passed
  common, union = (x.astype(jnp.float32) for x in (pixels - passed, union))
  # J_i - J_(i-1), without the difference of two numbers that are almost equal.
  other = common / (union * jnp.maximum(union - 1, 1))
  steps = jnp.where(own, 1 / jnp.maximum(union, 1), other)
  present = pixels[..., 0] > 0
  each, shows = _mean((errors * steps).sum(-1), present), present.any(-1)
  total, images = across(jnp.stack([each.sum(), shows.sum()]))
  return total / jnp.maximum(images, 1)


def _regions(
  logits: jax.Array, labels: jax.Array, ignore_label: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Target bool, probability float32 and validity bool, each [..., C]."""
  _check_shapes(logits, labels)
  classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  valid = (labels != ignore_label)[..., None]
  target = valid & (classes == labels[..., None])
  probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  return target, probability, jnp.broadcast_to(valid, logits.shape)


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
  """The mean over the last axis where `counted`, 0 if that is nowhere."""
  total = jnp.where(counted, values, 0).sum(-1)
  return total / jnp.maximum(counted.sum(-1), 1)


# To add a loss: a function with the arguments and the result of one above.
LOSSES: dict[str, Loss] = {
  'cross_entropy': softmax_cross_entropy,
  'focal': focal,
  'dice': dice,
  'lovasz_softmax': lovasz_softmax,
}


def pixel_weights(
  labels: jax.Array,
  class_weights: Sequence[float] | None,
  ignore_label: int = 255,
) -> jax.Array:
  """Gives each pixel the weight of its class, float32 [...], and void 0.

  `class_weights` are C numbers from 0; None gives every class the weight 1.
  """
  valid = labels != ignore_label
  if class_weights is None:
    return valid.astype(jnp.float32)
  weights = jnp.asarray(class_weights, jnp.float32)
  classes = jnp.arange(len(weights), dtype=labels.dtype)
  chosen = jnp.where(labels[..., None] == classes, weights, 0).sum(-1)
  return jnp.where(valid, chosen, 0)


def hardest_pixels(
  losses: jax.Array, counted: jax.Array, share: float
) -> jax.Array:
  """Chooses the pixels of each image with the largest losses.

  This is online hard example mining, Shrivastava et al. (2016), on pixels. The
  choice of an image does not depend on other images, and so not on how a batch
  is split over devices. No gradient flows through it.

  `losses` are float [B, H, W], and `counted`, bool [B, H, W], are the pixels to
  choose from. Each image keeps the `share` of them, in (0, 1]: at least one
  pixel, and all ties with the last one. Returns bool [B, H, W].
  """
  shapes = [list(losses.shape), list(counted.shape)]
  rule = 'losses and counted must be [B, H, W] of one shape'
  require(losses.ndim == 3 and shapes[0] == shapes[1], rule, shapes)
  losses = lax.stop_gradient(losses)
  kept = jnp.clip(jnp.round(share * counted.sum((1, 2))).astype(jnp.int32), 1)
  candidates = jnp.where(counted, losses, -jnp.inf).reshape(len(losses), -1)
  threshold = jnp.take_along_axis(jnp.sort(candidates), -kept[:, None], axis=1)
  return counted & (losses >= threshold[..., None])


def median_frequency_weights(
  class_pixels: np.ndarray, class_image_pixels: np.ndarray
) -> np.ndarray:
  """Computes weights float64 [C] that make rare classes count as others do.

  Eigen & Fergus, "Predicting Depth, Surface Normals and Semantic Labels"
  (2015), section 6.2.1: the frequency of a class is its share of the pixels of
  the images that show it; its weight is the median frequency divided by it. A
  class without pixels has the weight 0 and no part in the median. The arguments
  are [C]: the pixels of each class, and all pixels of the images that show it.
  """
  weights, present = np.zeros(len(class_pixels)), class_pixels > 0
  if present.any():
    frequency = class_pixels[present] / class_image_pixels[present]
    weights[present] = np.median(frequency) / frequency
  return weights
