"""Cross-entropy against NumPy and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deeplab_jax.losses import (
  median_frequency_weights,
  softmax_cross_entropy,
)


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


def test_huge_logits_do_not_overflow():
  logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]])
  losses = softmax_cross_entropy(logits, jnp.asarray([0, 0]))
  np.testing.assert_allclose(losses, [0, 2e4])


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
