"""Resampling against hand-computed values and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models import layers

pytestmark = pytest.mark.compiles


def test_resampling_equals_hand_computed_cases():
  x = jnp.asarray([[0.0, 2.0, 6.0]]).reshape(1, 1, 3, 1)
  y = layers.resample(x, (2, 5), (1, 0.5))
  np.testing.assert_allclose(y[0, :, :, 0], [[0, 1, 2, 4, 6]] * 2, atol=1e-6)
  # Past the end it stays; upscaled and thinned out alike.
  y = layers.resample(x, (1, 8), (1, 0.5))
  np.testing.assert_allclose(y[0, 0, :, 0], [0, 1, 2, 4, 6, 6, 6, 6], atol=1e-6)
  y = layers.resample(x, (1, 2), (1, 1.5))
  np.testing.assert_allclose(y[0, 0, :, 0], [0, 4], atol=1e-6)


def test_resampling_stays_at_the_last_pixel_of_each_map():
  x = np.random.default_rng(0).normal(size=(3, 6, 7, 2)).astype(np.float32)
  sizes = np.array([[6, 7], [4, 2], [1, 5]])
  run = jax.jit(lambda x, sizes: layers.resample(x, (9, 8), (0.6, 1.1), sizes))
  ours = run(x, sizes)
  for map_, (height, width), found in zip(x, sizes, ours, strict=True):
    own = jnp.asarray(map_[None, :height, :width])
    expected = layers.resample(own, (9, 8), (0.6, 1.1))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('size', [(513, 513), (512, 500), (1, 17)])
def test_resampling_keeps_every_input_pixel(size):
  x = np.random.default_rng(0).normal(size=(1, 33, 33, 2)).astype(np.float32)
  y = layers.resample(jnp.asarray(x), size, (1 / 16, 1 / 16))
  assert y.shape == (1, *size, 2)
  kept = y[:, ::16, ::16]
  np.testing.assert_array_equal(kept, x[:, : kept.shape[1], : kept.shape[2]])


@pytest.mark.parametrize('step', [(0.3, 0.7), (1, 1), (1.7, 0.1)])
def test_resampling_equals_numpy_interpolation_along_each_axis(step):
  x = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
  y = layers.resample(jnp.asarray(x)[None, :, :, None], (10, 9), step)
  rows = np.stack(
    [np.interp(np.arange(10) * step[0], np.arange(7), c) for c in x.T], 1
  )
  both = np.stack(
    [np.interp(np.arange(9) * step[1], np.arange(4), r) for r in rows]
  )
  np.testing.assert_allclose(y[0, :, :, 0], both, atol=1e-5)
