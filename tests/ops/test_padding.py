"""What counts as padding, for sizes drawn at random."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from deeplab_jax.ops import padding

cells = st.lists(
  st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=2
)


@few
@given(cells, st.sampled_from([1, 2, 4]), st.booleans())
def test_blank_keeps_each_image_and_nothing_else(cells, stride, lowest):
  rows, columns = np.max([*cells, (1, 1)], 0) + 1
  x = np.random.default_rng(0).uniform(1, 2, (2, rows, columns, 2))
  sizes = np.array(cells) * stride + 1
  size = int((rows - 1) * stride + 1), int((columns - 1) * stride + 1)
  with padding.padded(jnp.asarray(sizes), size):
    found = np.asarray(padding.blank(jnp.asarray(x), lowest=lowest))
  expected = np.full_like(x, x.min() if lowest else 0)
  for image, (height, width) in enumerate(np.array(cells) + 1):
    expected[image, :height, :width] = x[image, :height, :width]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert padding.blank(x) is x  # outside the block
