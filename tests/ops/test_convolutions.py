"""Every way to convolve against XLA's, in float64, where little is rounded."""

import itertools

import jax
import numpy as np
import pytest
from miniature import xla_conv

from deeplab_jax.ops import convolutions, winograd

pytestmark = pytest.mark.compiles

SIZES = ((5, 8), (12, 7))
# Lines of 3 pixels, of 3 and 2, of 2, with one axis in tiles, and of 5 and 4.
LINES = (((12, 12), 4), ((9, 11), 4), ((8, 7), 4), ((12, 13), 4), ((33, 28), 8))


def value_and_gradients(conv, x, kernel, **settings):
  @jax.jit
  def run(x, kernel):
    y, pull = jax.vjp(lambda x, k: conv(x, k, **settings), x, kernel)
    return y, *pull(np.random.default_rng(1).normal(size=y.shape))

  return run(x, kernel)


def check_equal(conv, size, k=3, **settings):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, kernel = rng.normal(size=(2, *size, 5)), rng.normal(size=(k, k, 5, 4))
    ours = value_and_gradients(conv, x, kernel, **settings)
    theirs = value_and_gradients(xla_conv, x, kernel, **settings)
    for a, b in zip(ours, theirs, strict=True):
      assert a.dtype == np.float64
      np.testing.assert_allclose(a, b, atol=1e-9)


def gradients(size, k=3, **settings):
  """A map, a kernel, a gradient of the result, and XLA's of x and kernel."""
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, *size, 5)), rng.normal(size=(k, k, 5, 4))
  y, pull = jax.vjp(lambda x, k: xla_conv(x, k, **settings), x, kernel)
  gradient = rng.normal(size=y.shape)
  return x, kernel, gradient, pull(gradient)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('rate', [1, 2, 18])
def test_winograd_equals_xla(size, rate):
  check_equal(winograd.convolve, size, rate=rate)


@pytest.mark.parametrize(('size', 'rate'), LINES)
def test_winograd_of_lines_without_neighbours_equals_xla(size, rate):
  check_equal(winograd.convolve, size, rate=rate)


@pytest.mark.parametrize(
  ('rate', 'bound'), [(1, 1e-6), (8, 1.2e-6), (12, 5e-7), (18, 5e-7)]
)
def test_winograd_rounds_little(rate, bound):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 36, 36, 64)), rng.normal(size=(3, 3, 64, 8))
  with jax.enable_x64(True):
    exact = np.asarray(xla_conv(x, kernel, rate=rate))
  y = winograd.convolve(x.astype(np.float32), kernel.astype(np.float32), rate)
  assert y.dtype == np.float32
  error = np.sqrt(np.mean(np.square(y - exact)) / np.mean(np.square(exact)))
  assert error < bound


@pytest.mark.parametrize(
  ('size', 'shapes'),
  [
    ((9, 9), [(5, 5, 4)] * 5),
    ((6, 6), [(4, 5, 4)] * 4),
    ((9, 6), [(4, 5, 4)] * 5),
  ],
)
def test_winograd_kernels_fit_the_maps_that_they_are_for(size, shapes):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, 5)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 5, 4)).astype(np.float32)
  kernels = winograd.transform(kernel, size, 2)
  assert [k.shape for k in kernels] == shapes
  assert winograd.fits(kernels, size, 2)
  for other in {(9, 9), (6, 6), (9, 6), (6, 9)} - {size}:
    assert not winograd.fits(kernels, other, 2)
  y = winograd.convolve_transformed(x, kernels, 2)
  np.testing.assert_allclose(y, xla_conv(x, kernel, rate=2), atol=1e-4)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('form', ['by_taps', 'by_patches'])
@pytest.mark.parametrize(
  ('k', 'stride', 'rate'), [(3, 1, 1), (3, 2, 1), (3, 1, 4)]
)
def test_form_equals_xla(form, size, k, stride, rate):
  check_equal(getattr(convolutions, form), size, k, stride=stride, rate=rate)


@pytest.mark.parametrize(
  ('size', 'rate'), [*LINES, *itertools.product([(7, 9)], [1, 2, 3, 5, 18])]
)
def test_gradients_of_winograd_are_those_of_xla(size, rate):
  with jax.enable_x64(True):
    x, kernel, gradient, expected = gradients(size, rate=rate)
    to_x = winograd.convolve(gradient, kernel, rate, transposed=True)
    np.testing.assert_allclose(to_x, expected[0], atol=1e-9)
    to_kernel = winograd.kernel_gradient(x, gradient, rate)
    np.testing.assert_allclose(to_kernel, expected[1], atol=1e-9)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(
  ('k', 'stride', 'rate'),
  [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (5, 2, 1), (3, 1, 18)],
)
def test_gradients_by_taps_are_those_of_xla(size, k, stride, rate):
  with jax.enable_x64(True):
    x, kernel, gradient, expected = gradients(size, k, stride=stride, rate=rate)
    ours = convolutions.taps_kernel_gradient(x, gradient, k, stride, rate)
    np.testing.assert_allclose(ours, expected[1], atol=1e-9)
    if stride == 1:
      ours = convolutions.by_taps(gradient, kernel, rate=rate, transposed=True)
      np.testing.assert_allclose(ours, expected[0], atol=1e-9)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('offset', [-9, -2, 0, 1, 4, 9])
def test_pixels_under_a_tap_are_those_of_the_padded_map(offset, stride):
  x = np.arange(1.0, 15).reshape(2, 7)
  window, (before, behind) = convolutions.under_tap(x, 1, offset, stride)
  margin = 10
  padded = np.pad(x, ((0, 0), (margin, margin)))
  start = margin + offset
  np.testing.assert_array_equal(
    np.pad(window, ((0, 0), (before, behind))),
    padded[:, start : start + 7 : stride],
  )
  assert np.all(window > 0)


def test_winograd_share_of_hand_counted_products():
  # 3 tiles of 5 products a line; the taps reach 8, 9 and 8 pixels of 9.
  assert winograd.share((9, 9), 1) == pytest.approx((15 / 25) ** 2)
  # 12 lines of 4 products, and of 3; taps reach 21, 33, 21 pixels and 8, 20, 8.
  share = 48 / 75 * (36 / 36)
  assert winograd.share((33, 20), 12) == pytest.approx(share)


def test_matmul_keeps_the_leading_dimensions():
  rng = np.random.default_rng(0)
  x, matrix = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 5))
  y = convolutions.matmul(x.astype(np.float32), matrix.astype(np.float32))
  np.testing.assert_allclose(y, x @ matrix, atol=1e-5)


def test_winograd_refuses_other_kernels():
  x, kernel = np.zeros((1, 9, 9, 2)), np.zeros((5, 5, 2, 2))
  with pytest.raises(ValueError, match=r'must be 3x3, got \(5, 5\)'):
    winograd.convolve(x, kernel)
