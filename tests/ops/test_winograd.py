"""Short convolutions by few products, against NumPy's."""

import numpy as np
import pytest

from deeplab_jax.ops.winograd import form_of, line, tiles

pytestmark = pytest.mark.compiles


def convolve(form, kernel, x):
  return form.output @ ((form.kernel @ kernel) * (form.input @ x))


@pytest.mark.parametrize('pixels', range(2, 10))
def test_line_between_zeros(pixels):
  form = line(pixels)
  assert (form.tile, form.border) == (pixels, 0)
  assert form.products == pixels + pixels // 2
  for seed in range(3):
    rng = np.random.default_rng(seed)
    kernel, x = rng.normal(size=3), rng.normal(size=pixels)
    expected = np.correlate(np.pad(x, 1), kernel, 'valid')
    np.testing.assert_allclose(convolve(form, kernel, x), expected, atol=1e-10)


@pytest.mark.parametrize('points', [(0.0, 1.0, -1.0), (0.0, 1.0, -0.5, -2.0)])
def test_tile_among_neighbours(points):
  form = tiles(points)
  assert (form.tile, form.border) == (len(points) - 1, 1)
  assert form.products == len(points) + 1
  rng = np.random.default_rng(0)
  kernel, x = rng.normal(size=3), rng.normal(size=form.tile + 2)
  expected = np.correlate(x, kernel, 'valid')
  np.testing.assert_allclose(convolve(form, kernel, x), expected, atol=1e-10)


@pytest.mark.parametrize('pixels', range(2, 10))
def test_line_has_small_numbers(pixels):
  """Rounding is in proportion to the products of the numbers."""
  form = line(pixels)
  kernel, x = (np.linalg.norm(a, axis=1) for a in (form.kernel, form.input))
  size = np.sqrt(np.mean(np.square(form.output) @ np.square(kernel * x)))
  direct = np.sqrt(3 - 2 / pixels)  # taps a pixel
  assert size < 2 * direct


def test_lines_of_pairs_and_of_five_have_many_zeros():
  for pixels, zeros, of_kernel in ((2, 2, 4), (5, 14, 6)):
    form = line(pixels)
    assert np.count_nonzero(form.input == 0) == zeros
    assert np.count_nonzero(form.output == 0) == zeros
    assert np.count_nonzero(form.kernel == 0) == of_kernel


@pytest.mark.parametrize(
  ('size', 'rate', 'products', 'tile', 'count'),
  [
    (33, 1, 5, 3, 11),
    (33, 4, 5, 3, 3),
    (17, 4, 5, 3, 2),  # lines of 5, but at a small rate
    (33, 6, 5, 3, 2),
    (33, 7, 5, 3, 2),  # of 5 as well
    (33, 8, 7, 5, 1),
    (65, 8, 5, 3, 3),
    (65, 12, 5, 3, 2),  # of 6
    (32, 8, 6, 4, 1),
    (33, 12, 4, 3, 1),
    (33, 18, 3, 2, 1),
    (33, 33, 5, 3, 1),  # single pixels
  ],
)
def test_choice(size, rate, products, tile, count):
  form = form_of(size, rate)
  assert (form.products, form.tile) == (products, tile)
  assert form.cover(size, rate) == count
