"""Losses and weights against NumPy and optax."""

import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deeplab_jax.training import losses as module
from deeplab_jax.training.losses import (
  LOSSES,
  dice,
  focal,
  hardest_pixels,
  lovasz_softmax,
  median_frequency_weights,
  pixel_weights,
  softmax_cross_entropy,
)
from deeplab_jax.training.objective import batch_loss

pytestmark = pytest.mark.compiles


def test_loss_of_each_pixel_equals_the_numpy_formula_and_void_is_zero():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (2, 4, 5, 6))
  labels = rng.integers(0, 6, (2, 4, 5)).astype(np.uint8)
  labels[0, :2] = 255
  losses = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for index in np.ndindex(labels.shape):
    void = labels[index] == 255
    expected = 0 if void else -np.log(p[index][labels[index]])
    np.testing.assert_allclose(losses[index], expected, atol=1e-5)


def test_gradient_equals_optax_and_is_zero_at_void():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(3, 7, 4)).astype(np.float32))
  labels = rng.integers(0, 4, (3, 7))
  labels[1, 2:5] = 9
  valid = labels != 9

  def theirs(logits):
    safe = np.where(valid, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    return jnp.sum(jnp.where(valid, losses, 0))

  ours = jax.grad(
    lambda x: softmax_cross_entropy(x, jnp.asarray(labels), 9).sum()
  )(logits)
  np.testing.assert_allclose(ours, jax.grad(theirs)(logits), atol=1e-6)
  np.testing.assert_array_equal(np.asarray(ours)[~valid], 0)


def test_examples_in_the_docstrings_hold():
  assert doctest.testmod(module) == (0, 5)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_loss_equals_that_of_optax_on_one_hot_labels(smoothing):
  rng = np.random.default_rng(7)
  logits = jnp.asarray(rng.normal(0, 3, (2, 4, 5, 6)), jnp.float32)
  labels = rng.integers(0, 6, (2, 4, 5), np.int32)
  target = optax.smooth_labels(jax.nn.one_hot(labels, 6), smoothing)
  np.testing.assert_allclose(
    softmax_cross_entropy(logits, labels, label_smoothing=smoothing),
    optax.softmax_cross_entropy(logits, target),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  'shape', [(2, 4, 5, 1), (2, 4, 5, 6), (4, 5), (2, 5, 4), (1, 4, 5)]
)
def test_labels_of_another_shape_are_refused(shape):
  labels = jnp.zeros(shape, jnp.uint8)
  words = re.escape(
    'labels must be [2, 4, 5], one per pixel of the logits'
    f' [2, 4, 5, 6], got {list(shape)}'
  )
  with pytest.raises(ValueError, match=words):
    jax.jit(softmax_cross_entropy)(jnp.zeros((2, 4, 5, 6)), labels)


@pytest.mark.parametrize('shapes', [((4, 5), (4, 5)), ((2, 4, 5), (1, 4, 5))])
def test_hardest_pixels_of_other_shapes_are_refused(shapes):
  losses, counted = (jnp.zeros(shape) for shape in shapes)
  words = re.escape(f'got {list(map(list, shapes))}')
  with pytest.raises(ValueError, match=words):
    hardest_pixels(losses, counted > 0, 0.5)


def test_huge_logits_do_not_overflow():
  logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]])
  losses = softmax_cross_entropy(logits, jnp.asarray([0, 0]))
  np.testing.assert_allclose(losses, [0, 2e4])


@pytest.mark.parametrize('smoothing', [0.1, 0.5])
def test_smoothed_loss_is_the_cross_entropy_with_the_smoothed_target(smoothing):
  rng = np.random.default_rng(2)
  logits = rng.normal(0, 3, (2, 4, 5, 6))
  labels = rng.integers(0, 6, (2, 4, 5)).astype(np.uint8)
  labels[1, :2] = 255
  losses = softmax_cross_entropy(
    jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing
  )
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for index in np.ndindex(labels.shape):
    expected = 0
    if labels[index] != 255:
      target = np.full(6, smoothing / 6)
      target[labels[index]] += 1 - smoothing
      expected = -(target * np.log(p[index])).sum()
    np.testing.assert_allclose(losses[index], expected, atol=1e-5)


def test_gradient_of_the_smoothed_loss_is_prediction_minus_target():
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(3, 7, 4))
  labels = rng.integers(0, 4, (3, 7))
  labels[1, 2:5] = 9
  ours = jax.grad(
    lambda x: softmax_cross_entropy(x, jnp.asarray(labels), 9, 0.2).sum()
  )(jnp.asarray(logits, jnp.float32))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = p - (0.8 * np.eye(10)[labels][..., :4] + 0.2 / 4)
  expected[labels == 9] = 0
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_each_pixel_weighs_as_its_class_and_void_nothing():
  labels = np.array([[[0, 1, 2], [2, 1, 255]]], np.uint8)
  weights = pixel_weights(jnp.asarray(labels), (0.5, 0, 3))
  assert weights.dtype == jnp.float32
  np.testing.assert_array_equal(weights, [[[0.5, 0, 3], [3, 0, 0]]])


@pytest.mark.parametrize(
  'table, expected', [((4, 5, 6), [4, 0, 6]), (None, [1, 0, 1])]
)
def test_ignore_label_among_the_classes_weighs_nothing(table, expected):
  weights = pixel_weights(jnp.arange(3), table, ignore_label=1)
  np.testing.assert_array_equal(weights, expected)


def test_gradient_of_the_weighted_loss_is_weighted_and_has_no_scatter():
  rng = np.random.default_rng(4)
  logits = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 4, (2, 3, 5)))
  table = np.array([0.2, 1, 0, 7])

  def weighted(logits):
    losses = softmax_cross_entropy(logits, labels, label_smoothing=0.1)
    return (pixel_weights(labels, table) * losses).sum()

  one = jax.grad(
    lambda x: softmax_cross_entropy(x, labels, label_smoothing=0.1).sum()
  )(logits)
  np.testing.assert_allclose(
    jax.grad(weighted)(logits), table[labels][..., None] * one, atol=1e-6
  )
  assert 'scatter' not in jax.jit(jax.grad(weighted)).lower(logits).as_text()


def plain_hardest(losses, counted, share):
  """One image at a time: the rounded share of those counted, and ties."""
  mask = np.zeros(losses.shape, bool)
  for index in range(len(losses)):
    values = np.sort(losses[index][counted[index]])[::-1]
    if values.size:
      last = values[max(1, round(share * values.size)) - 1]
      mask[index] = counted[index] & (losses[index] >= last)
  return mask


@pytest.mark.parametrize('share', [1e-6, 0.07, 0.3, 0.9, 1.0])
@pytest.mark.parametrize('levels', [3, 10_000])
def test_hardest_pixels_equal_a_loop_over_the_images(share, levels):
  rng = np.random.default_rng(5)
  losses = (rng.integers(0, levels, (4, 9, 11)) / levels).astype(np.float32)
  counted = rng.random((4, 9, 11)) < np.array([0, 0.2, 0.7, 1])[:, None, None]
  mask = hardest_pixels(jnp.asarray(losses), jnp.asarray(counted), share)
  expected = plain_hardest(losses, counted, share)
  np.testing.assert_array_equal(mask, expected)
  assert not expected[0].any() and expected[1:].any((1, 2)).all()
  if share == 1:
    np.testing.assert_array_equal(mask, counted)


def test_ties_at_the_limit_are_kept():
  losses = jnp.asarray([[[3.0, 2, 2, 2, 1, 0, 0, 0]]])
  mask = hardest_pixels(losses, losses >= 0, 0.25)
  np.testing.assert_array_equal(mask, [[[1, 1, 1, 1, 0, 0, 0, 0]]])


def test_hardest_pixels_of_an_image_do_not_depend_on_the_others():
  rng = np.random.default_rng(6)
  losses = rng.random((3, 5, 7)) * np.array([1, 100, 1e-3])[:, None, None]
  counted = np.ones(losses.shape, bool)
  mask = hardest_pixels(jnp.asarray(losses), jnp.asarray(counted), 0.2)
  np.testing.assert_array_equal(mask.sum((1, 2)), 7)


def test_median_frequency_weights_of_a_set_counted_by_hand():
  # Images of 10 pixels: one of 8 and 2 of the classes 0 and 1, one of class 0
  # alone, one of 5 and 5 of the classes 0 and 3. Frequencies 23/30, 2/10, 5/10.
  weights = median_frequency_weights(
    np.array([23, 2, 0, 5]), np.array([30, 10, 0, 10])
  )
  assert weights.dtype == np.float64
  np.testing.assert_allclose(weights, [15 / 23, 2.5, 0, 1], rtol=1e-12)


def test_median_of_an_even_number_of_classes_lies_between_the_middle_two():
  weights = median_frequency_weights(np.array([1, 3]), np.array([10, 10]))
  np.testing.assert_allclose(weights, [2, 2 / 3], rtol=1e-12)


def test_a_set_without_labelled_pixels_has_no_weights():
  none = np.zeros(3, np.int64)
  np.testing.assert_array_equal(median_frequency_weights(none, none), 0)


def drawn(shape, classes, seed=0, scale=2.0):
  """Logits, and labels of all classes but the last, with void."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, max(classes - 1, 1), shape).astype(np.uint8)
  labels[rng.random(shape) < 0.2] = 255
  return rng.normal(0, scale, (*shape, classes)).astype(np.float32), labels


def softmax(logits):
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def plain_focal(logits, labels, gamma=2.0):
  """The mean over the valid pixels, for one value."""
  valid = labels != 255
  index = np.where(valid, labels, 0)[..., None].astype(int)
  p = np.take_along_axis(softmax(logits), index, -1)[..., 0]
  return (-((1 - p) ** gamma) * np.log(p))[valid].mean()


def plain_cross_entropy(logits, labels):
  return plain_focal(logits, labels, gamma=0.0)


def plain_dice(logits, labels):
  """Milletari's coefficient with plain sums, class by class."""
  p, valid, losses = softmax(logits), labels != 255, []
  for c in np.unique(labels[valid]):
    own, target = p[valid][:, c], labels[valid] == c
    losses.append(1 - 2 * own[target].sum() / (own.sum() + target.sum()))
  return np.mean(losses)


def plain_lovasz(logits, labels):
  """Berman's definition: the Jaccard loss of each set of wrong pixels."""
  images = []
  for p, label in zip(softmax(logits), labels, strict=True):
    p, label, losses = p[label != 255], label[label != 255], []
    for c in np.unique(label):
      truth = label == c
      errors = np.where(truth, 1 - p[:, c], p[:, c])
      wrong, before, loss = np.zeros(len(label), bool), 0.0, 0.0
      for i in np.argsort(-errors, kind='stable'):
        wrong[i] = True
        predicted = truth ^ wrong
        jaccard = 1 - (truth & predicted).sum() / (truth | predicted).sum()
        loss, before = loss + errors[i] * (jaccard - before), jaccard
      losses.append(loss)
    images += [np.mean(losses)] if losses else []
  return np.mean(images)


PLAIN = {
  'cross_entropy': plain_cross_entropy,
  'focal': plain_focal,
  'dice': plain_dice,
  'lovasz_softmax': plain_lovasz,
}


SOFT = {**LOSSES, 'half': functools.partial(focal, gamma=0.5)}


@jax.jit
def values_and_slopes(logits, labels):
  """Of every loss over a batch, as a step takes it: value, gradient."""

  def value(logits, loss):
    return batch_loss(logits, labels, terms=(loss,))[0]['loss']

  return {
    name: jax.value_and_grad(value)(logits, loss) for name, loss in SOFT.items()
  }


@pytest.mark.parametrize('classes', [1, 3])
def test_every_loss_equals_its_numpy_oracle(classes):
  assert PLAIN.keys() == LOSSES.keys()
  logits, labels = drawn((2, 3, 5), classes, seed=classes)
  labels[1, :1] = 255
  found = values_and_slopes(logits, labels)
  for name, plain in PLAIN.items():
    value, expected = found[name][0], plain(np.float64(logits), labels)
    assert value.dtype == jnp.float32 and value.shape == ()
    np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)


def test_gradients_equal_finite_differences_and_are_zero_at_void():
  logits, labels = drawn((2, 3, 5), 3, seed=1)
  labels[1, 0] = 255
  found, step = values_and_slopes(logits, labels), 1e-5
  for name, plain in PLAIN.items():
    expected = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
      moved = np.zeros(logits.shape)
      moved[index] = step
      above, below = (plain(logits + s * moved, labels) for s in (1, -1))
      expected[index] = (above - below) / (2 * step)
    slope = found[name][1]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(
      slope, expected, atol=1e-3 * largest, err_msg=name
    )
    np.testing.assert_array_equal(slope[labels == 255], 0)


@pytest.mark.parametrize('case', ['void', 'one class', 'huge', 'bfloat16'])
def test_extreme_batches_give_finite_values_and_gradients(case):
  logits, labels = drawn((2, 3, 5), 1 if case == 'one class' else 3)
  if case == 'void':
    labels[:] = 255
  if case == 'huge':
    logits *= 1e4
  logits = jnp.asarray(logits, jnp.bfloat16 if case == 'bfloat16' else None)
  for value, slope in values_and_slopes(logits, labels).values():
    assert value.dtype == jnp.float32 and slope.dtype == logits.dtype
    assert np.isfinite(value) and np.isfinite(slope.astype(np.float32)).all()
    if case in ('void', 'one class'):
      np.testing.assert_allclose(value, 0, atol=1e-6)
      np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_lovasz_of_three_pixels_counted_by_hand():
  # Class 1 at 0.8, 0.3, 0.6 is right at the first pixel alone. Its errors are
  # 0.6, 0.3, 0.2 and the Jaccard losses 1/2, 2/3, 1. Those of class 0 are 0.6,
  # 0.3, 0.2 and 1/2, 1, 1. The second image is void and does not count.
  p = np.array([[[0.8, 0.3, 0.6]], [[0.1, 0.2, 0.9]]])
  logits = np.log(np.stack([1 - p, p], -1)).astype(np.float32)
  labels = np.array([[[1, 0, 0]], [[255, 255, 255]]])
  one = 0.6 / 2 + 0.3 / 6 + 0.2 / 3
  zero = 0.6 / 2 + 0.3 / 2
  found = jax.jit(lovasz_softmax)(logits, labels)
  np.testing.assert_allclose(found, (one + zero) / 2, rtol=1e-6)


@pytest.mark.parametrize('name', ['dice', 'lovasz_softmax'])
def test_hard_predictions_give_dice_and_iou_of_the_masks(name):
  labels = np.array([[[0, 0, 1, 1, 1, 255]]])
  predicted = np.array([[[0, 1, 1, 1, 0, 1]]])
  dice = [2 / 4, 4 / 6]
  iou = [1 / 3, 2 / 4]
  expected = 1 - np.mean(dice if name == 'dice' else iou)
  logits = 200 * np.eye(3, dtype=np.float32)[predicted]
  found = jax.jit(LOSSES[name])(logits, labels)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 5.0])
def test_focal_is_smoothed_cross_entropy_times_a_factor(gamma):
  logits, labels = drawn((2, 3, 5), 4)
  loss = functools.partial(focal, gamma=gamma, label_smoothing=0.1)
  found = jax.jit(loss)(logits, labels)
  p = softmax(np.float64(logits))
  target = 0.9 * np.eye(256)[labels][..., :4] + 0.1 / 4
  own = np.where(labels == 255, 0, (np.eye(256)[labels][..., :4] * p).sum(-1))
  expected = -((1 - own) ** gamma) * (target * np.log(p)).sum(-1)
  expected[labels == 255] = 0
  np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize('gamma', [-1.0, float('nan')])
def test_gamma_below_zero_is_refused(gamma):
  with pytest.raises(ValueError, match='gamma must be from 0, got'):
    focal(jnp.zeros((2, 4)), jnp.zeros(2, int), gamma=gamma)


def test_sums_over_a_large_batch_stay_exact():
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 3, (8, 129, 129, 3)).astype(np.float32)
  labels = rng.integers(0, 3, (8, 129, 129)).astype(np.uint8)
  found = jax.jit(dice)(logits, labels)
  expected = plain_dice(np.float64(logits), labels)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
