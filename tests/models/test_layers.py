"""Convolution against XLA's own, resizing against hand-computed values."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from miniature import xla_conv

from deeplab_jax.models import layers
from deeplab_jax.ops import convolutions

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
CASES = [(size, *kind, 3, 4) for size, kind in itertools.product(SIZES, KINDS)]
# The kernel's gradient takes another form for many input channels, and all
# three take Winograd's for many of both where that saves products.
CASES += [
  (size, 3, stride, rate, 80, features)
  for sizes, features in ((((5, 8), (9, 9)), 4), (((16, 17), (20, 18)), 64))
  for size in sizes
  for stride, rate in ((1, 1), (2, 1), (1, 2), (1, 6))
]


@pytest.mark.parametrize(
  ('size', 'k', 'stride', 'rate', 'channels', 'features'), CASES
)
def test_conv2d_equals_xla_in_value_and_gradient(
  size, k, stride, rate, channels, features
):
  assert_equals_xla(size, k, stride, rate, channels, features)


@pytest.mark.parametrize(
  ('k', 'stride', 'rate'),
  [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 1, 6)],
)
def test_conv2d_on_accelerators_equals_xla(monkeypatch, k, stride, rate):
  monkeypatch.setattr(layers, 'on_cpu', lambda: False)
  assert_equals_xla((9, 12), k, stride, rate, 3, 4)


@pytest.mark.parametrize('shape', [(2, 2, 3, 4), (4, 4, 3, 4), (1, 3, 3, 4)])
def test_kernels_that_are_not_odd_and_square_are_refused(shape):
  with pytest.raises(ValueError, match=f'odd and square, got .{shape[0]}, '):
    layers.conv2d(jnp.ones((1, 9, 9, 3)), jnp.ones(shape))


def assert_equals_xla(size, k, stride, rate, channels, features):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, channels)).astype(np.float32)
  kernel = rng.normal(size=(k, k, channels, features)).astype(np.float32)
  weights = rng.normal(size=xla_conv(x, kernel, stride, rate).shape)

  def loss(conv, x, kernel):
    y = conv(x, kernel, stride, rate)
    return (y * weights).sum(), y

  run = jax.jit(
    jax.value_and_grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0
  )
  (_, ours), our_gradients = run(layers.conv2d, x, kernel)
  (_, theirs), their_gradients = run(xla_conv, x, kernel)
  for a, b in zip(
    (ours, *our_gradients), (theirs, *their_gradients), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=max(1e-4, 5e-5 * b.std()))


# One of each form, forward and backward: XLA's and patches, products of one
# tap, strided, by taps, and Winograd's.
DIFFERENTIATED = [
  ((5, 8), 3, 1, 1, 3, 4),
  ((5, 8), 1, 1, 1, 80, 4),
  ((9, 9), 1, 2, 1, 3, 4),
  ((5, 8), 3, 2, 1, 80, 4),
  ((5, 8), 3, 1, 6, 80, 4),
  ((16, 17), 3, 1, 1, 64, 64),
]


@pytest.mark.parametrize(
  ('size', 'k', 'stride', 'rate', 'channels', 'features'), DIFFERENTIATED
)
def test_conv2d_equals_xla_in_forward_mode_and_second_order(
  size, k, stride, rate, channels, features
):
  rng = np.random.default_rng(0)
  shapes = (2, *size, channels), (k, k, channels, features)
  values, directions = (
    tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    for _ in range(2)
  )

  def results(conv):
    def nonlinear(x, kernel):
      y = conv(x, kernel, stride, rate)
      return jnp.sin(y / (k * channels**0.5))

    def loss(*values):
      return jnp.square(nonlinear(*values)).sum()

    @jax.jit
    def run(values, directions):
      gradient = jax.grad(loss, (0, 1))
      return (
        jax.jvp(nonlinear, values, directions)[1],
        *jax.jvp(gradient, values, directions)[1],
      )

    return run(values, directions)

  for a, b in zip(results(layers.conv2d), results(xla_conv), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
  ('rate', 'channels'),
  [(1, 64), (2, 64), (4, 64), (6, 64), (12, 64), (1, 80), (6, 80)],
)
def test_conv2d_in_bfloat16_is_as_exact_as_xla(rate, channels):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 17, 17, channels)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, channels, channels)).astype(np.float32)
  weights = rng.normal(size=x.shape).astype(np.float32)

  def results(conv, dtype):
    y, back = jax.vjp(
      lambda x, k: conv(x, k, 1, rate), x.astype(dtype), kernel.astype(dtype)
    )
    return [a.astype(np.float32) for a in (y, *back(weights.astype(dtype)))]

  exact = results(xla_conv, np.float32)
  ours = results(layers.conv2d, jnp.bfloat16)
  theirs = results(xla_conv, jnp.bfloat16)
  for a, b, c in zip(ours, theirs, exact, strict=True):
    assert 0 < jnp.square(a - c).mean() <= 1.1 * jnp.square(b - c).mean()


@pytest.mark.parametrize(
  ('size', 'rate', 'channels', 'dtype', 'forms'),
  [
    (33, 1, 64, jnp.float32, 'winograd winograd winograd'),
    (33, 6, 64, jnp.float32, 'winograd winograd winograd'),
    # Lines of 5 pixels, of 3 and of 2.
    (33, 8, 80, jnp.float32, 'winograd winograd winograd'),
    (33, 12, 64, jnp.float32, 'winograd winograd winograd'),
    (33, 18, 80, jnp.float32, 'taps taps taps'),
    (33, 4, 64, jnp.bfloat16, 'taps taps patches'),
    (33, 3, 80, jnp.bfloat16, 'xla xla taps'),
    (33, 1, 16, jnp.float32, 'xla xla patches'),
    (9, 1, 64, jnp.float32, 'xla xla patches'),
    (33, 1, 64, jnp.bfloat16, 'xla xla patches'),
  ],
)
def test_the_form_that_pays_is_chosen_forward_and_backward(
  monkeypatch, size, rate, channels, dtype, forms
):
  used = []

  def noting(name, form):
    return lambda *args, **named: used.append(name) or form(*args, **named)

  for name, function in (
    ('winograd', 'by_winograd'),
    ('winograd', 'winograd_kernel_gradient'),
    ('taps', 'by_taps'),
    ('taps', 'taps_kernel_gradient'),
    ('patches', 'by_patches'),
    ('xla', 'by_xla'),
  ):
    form = getattr(convolutions, function)
    monkeypatch.setattr(convolutions, function, noting(name, form))
  x = jax.ShapeDtypeStruct((1, size, size, channels), dtype)
  kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)

  def run(x, kernel):
    y, back = jax.vjp(lambda x, k: layers.conv2d(x, k, 1, rate), x, kernel)
    return back(y)

  jax.eval_shape(run, x, kernel)
  assert ' '.join(used) == (forms if layers.on_cpu() else 'xla')


@pytest.mark.skipif(not layers.on_cpu(), reason='XLA schedules otherwise there')
@pytest.mark.parametrize(('k', 'rate'), [(1, 1), (3, 1), (3, 2), (3, 18)])
def test_donated_kernels_are_updated_without_a_copy(k, rate):
  """XLA copies a kernel that may be read after its update."""
  shapes = {'a': (k, k, 64, 96), 'b': (k, k, 96, 64)}

  def step(kernels, x):
    def loss(kernels):
      y = nn.relu(layers.conv2d(x, kernels['a'], 1, rate))
      return jnp.square(layers.conv2d(y, kernels['b'], 1, rate)).mean()

    gradients = jax.grad(loss)(kernels)
    return jax.tree.map(lambda p, g: p - 0.1 * g, kernels, gradients)

  kernels = {n: jax.ShapeDtypeStruct(s, 'float32') for n, s in shapes.items()}
  x = jax.ShapeDtypeStruct((1, 33, 33, 64), 'float32')
  compiled = jax.jit(step, donate_argnums=0).lower(kernels, x).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == k * k * 64 * 96 * 8
  assert not re.findall(
    rf'f32\[{k},{k},\d+,\d+\]\S* copy\(', compiled.as_text()
  )


@pytest.mark.parametrize('size', [*SIZES, (1, 2)])
@pytest.mark.parametrize('padding', layers.POOL_PADDINGS)
@pytest.mark.parametrize('cpu', [True, False])
def test_max_pool_equals_flax_in_value_and_gradient(
  monkeypatch, cpu, padding, size
):
  monkeypatch.setattr(layers, 'on_cpu', lambda: cpu)
  rng = np.random.default_rng(0)
  # Few values, so that windows have several largest ones.
  x = rng.integers(-3, 0, (2, *size, 3)).astype(np.float32)

  def flax_pool(x):
    if padding == 'zero':
      x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pads = {'same': 'SAME', 'zero': 'VALID', 'symmetric': [(1, 1)] * 2}
    return nn.max_pool(x, (3, 3), (2, 2), pads[padding])

  def value_and_gradient(pool):
    def run(x, weights):
      y, to_x = jax.vjp(pool, x)
      return y, to_x(weights)[0]

    return jax.jit(run)

  ours = value_and_gradient(lambda x: layers.max_pool(x, padding))
  theirs = value_and_gradient(flax_pool)
  weights = rng.normal(size=flax_pool(x).shape).astype(np.float32)
  (y, gradient), (expected_y, expected) = ours(x, weights), theirs(x, weights)
  np.testing.assert_array_equal(y, expected_y)
  # Which of several largest values gets it may differ, but not how much.
  np.testing.assert_allclose(gradient.sum(), expected.sum(), rtol=1e-5)
  x = rng.normal(size=x.shape).astype(np.float32)
  np.testing.assert_allclose(
    ours(x, weights)[1], theirs(x, weights)[1], atol=1e-6
  )
  x[0, 0, 0], x[0, size[0] // 2, size[1] // 2] = np.nan, np.nan
  expected = np.isnan(theirs(x, weights)[0])
  assert expected.any() and not expected.all()
  np.testing.assert_array_equal(np.isnan(ours(x, weights)[0]), expected)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_batch_norm_equals_flax_in_value_statistics_and_gradient(train, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(2, 3, (4, 5, 6, 7)), dtype)
  weights = rng.normal(size=x.shape)
  variables = {
    'params': {'scale': rng.normal(size=7), 'bias': rng.normal(size=7)},
    'batch_stats': {'mean': rng.normal(size=7), 'var': rng.uniform(1, 2, 7)},
  }
  variables = jax.tree.map(lambda v: v.astype(np.float32), variables)
  results = []
  for kind in (layers.BatchNorm, nn.BatchNorm):
    norm = kind(momentum=0.9, epsilon=1e-3, dtype=dtype)

    def loss(params, x, norm=norm):
      y, updated = norm.apply(
        {**variables, 'params': params},
        x,
        use_running_average=not train,
        mutable=['batch_stats'],
      )
      assert y.dtype == dtype
      return (y * weights).sum(), (y, updated)

    results.append(
      jax.grad(loss, argnums=(0, 1), has_aux=True)(variables['params'], x)
    )
  tolerance = 1e-4 if dtype == jnp.float32 else 0.05
  assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, atol=tolerance * max(1, abs(b).max()))


def test_batch_norm_makes_the_variables_of_flax():
  x = jnp.ones((2, 3, 3, 5))
  ours, theirs = (
    kind().init(jax.random.key(0), x, use_running_average=True)
    for kind in (layers.BatchNorm, nn.BatchNorm)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


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
