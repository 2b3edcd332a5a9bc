"""Convolution against XLA's own, resizing against hand-computed values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deeplab_jax.models import layers


def xla_conv(x, kernel, stride, rate):
  pad = rate * (kernel.shape[0] // 2)
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(pad, pad)] * 2,
    rhs_dilation=(rate, rate),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


SIZES = ((5, 8), (9, 9), (12, 7))
KINDS = (
  (1, 1, 1),
  (1, 2, 1),
  (3, 1, 1),
  (3, 2, 1),
  (3, 1, 2),
  (3, 1, 4),
  (3, 1, 18),
  (7, 2, 1),
)
CASES = [(size, *kind) for size, kind in itertools.product(SIZES, KINDS)]


@pytest.mark.parametrize(('size', 'k', 'stride', 'rate'), CASES)
def test_conv2d_equals_xla_in_value_and_gradient(size, k, stride, rate):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, 3)).astype(np.float32)
  kernel = rng.normal(size=(k, k, 3, 4)).astype(np.float32)
  weights = rng.normal(size=xla_conv(x, kernel, stride, rate).shape)

  def loss(conv, x, kernel):
    y = conv(x, kernel, stride, rate)
    return (y * weights).sum(), y

  run = jax.jit(
    jax.value_and_grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0
  )
  (_, ours), our_gradients = run(layers.conv2d, x, kernel)
  (_, theirs), their_gradients = run(xla_conv, x, kernel)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  for a, b in zip(our_gradients, their_gradients, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_resize_with_aligned_corners_equals_a_hand_computed_case():
  x = jnp.asarray([[0.0, 2.0, 6.0]]).reshape(1, 1, 3, 1)
  y = layers.resize_bilinear(x, (2, 5))
  np.testing.assert_allclose(y[0, :, :, 0], [[0, 1, 2, 4, 6]] * 2, atol=1e-6)


def test_resize_keeps_every_input_pixel_at_513():
  x = np.random.default_rng(0).normal(size=(1, 33, 33, 2)).astype(np.float32)
  y = layers.resize_bilinear(jnp.asarray(x), (513, 513))
  assert y.shape == (1, 513, 513, 2)
  np.testing.assert_allclose(y[:, ::16, ::16], x, atol=1e-5)


def test_resize_equals_numpy_interpolation_along_each_axis():
  x = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
  y = layers.resize_bilinear(jnp.asarray(x)[None, :, :, None], (10, 9))
  rows = np.stack(
    [np.interp(np.linspace(0, 6, 10), np.arange(7), c) for c in x.T], 1
  )
  both = np.stack(
    [np.interp(np.linspace(0, 3, 9), np.arange(4), r) for r in rows]
  )
  np.testing.assert_allclose(y[0, :, :, 0], both, atol=1e-5)


def test_resize_of_one_pixel_spreads_it_and_to_one_pixel_takes_the_corner():
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  np.testing.assert_array_equal(layers.resize_bilinear(x, (1, 1)), [[[[0.0]]]])
  spread = layers.resize_bilinear(jnp.full((1, 1, 1, 1), 5.0), (3, 4))
  np.testing.assert_array_equal(spread, np.full((1, 3, 4, 1), 5.0))


def test_asymmetric_resize_equals_hand_computed_cases():
  x = jnp.asarray([[0.0, 2.0, 6.0]]).reshape(1, 1, 3, 1)
  y = layers.resize_bilinear(x, (2, 6), 'asymmetric')
  expected = [[0, 1, 2, 4, 6, 6]] * 2
  np.testing.assert_allclose(y[0, :, :, 0], expected, atol=1e-6)
  y = layers.resize_bilinear(x, (1, 2), 'asymmetric')
  np.testing.assert_allclose(y[0, :, :, 0], [[0, 4]], atol=1e-6)


# Windows of 3 at stride 2 over 5 and 6 negative values, by hand.
@pytest.mark.parametrize(
  ('padding', 'size', 'expected'),
  [
    ('symmetric', 5, [-4, -2, -1]),
    ('same', 5, [-4, -2, -1]),
    ('zero', 5, [0, -2, 0]),
    ('symmetric', 6, [-5, -3, -1]),
    ('same', 6, [-4, -2, -1]),
    ('zero', 6, [0, -3, -1]),
  ],
)
def test_pooling_pads_as_asked(padding, size, expected):
  row = jnp.arange(-size, 0.0)
  x = jnp.broadcast_to(row[:, None], (1, size, size, 1))
  for axes in ((0, 1, 2, 3), (0, 2, 1, 3)):
    y = layers.max_pool(x.transpose(axes), padding)
    assert y.shape == (1, 3, 3, 1)
    line = y.transpose(axes)[0, 1, :, 0]
    np.testing.assert_array_equal(line, expected)


@pytest.mark.parametrize(
  'scale, expected',
  [(0.5, 257), (0.75, 385), (1.0, 513), (1.25, 641), (1.5, 769), (1.75, 897)],
)
def test_scales_of_513_are_those_of_the_deeplab_code(scale, expected):
  assert layers.aligned_size(513, 16, 'align_corners', scale) == expected
  assert layers.aligned_size(512, 16, 'asymmetric', scale) == expected - 1


def test_no_scale_leaves_nothing():
  assert layers.aligned_size(9, 8, 'align_corners', 0.01) == 1
  assert layers.aligned_size(9, 8, 'asymmetric', 0.01) == 8


@pytest.mark.parametrize('upsampling', ['align_corners', 'asymmetric'])
@pytest.mark.parametrize(('size', 'stride'), [(360, 8), (513, 16), (17, 32)])
def test_at_an_aligned_size_features_return_to_their_pixels(
  size, stride, upsampling
):
  padded = layers.aligned_size(size, stride, upsampling)
  assert size <= padded < size + stride
  count = -(-padded // stride)
  x = np.random.default_rng(0).normal(size=(1, count, count, 2))
  x = x.astype(np.float32)
  y = layers.resize_bilinear(jnp.asarray(x), (padded, padded), upsampling)
  np.testing.assert_allclose(y[:, ::stride, ::stride], x, atol=1e-5)
