"""The door: both forms of everything against XLA's own operations."""

import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from miniature import needs_cpu, xla_conv

from deeplab_jax import deeplab_v3, ops
from deeplab_jax.models.resnet import PreActBasicUnit, ResNetV2
from deeplab_jax.ops import convolutions, winograd

pytestmark = pytest.mark.compiles

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
def test_conv2d_in_the_form_of_xla_equals_xla(k, stride, rate):
  with ops.use('xla'):
    assert_equals_xla((9, 12), k, stride, rate, 3, 4)


@pytest.mark.parametrize('shape', [(2, 2, 3, 4), (4, 4, 3, 4), (1, 3, 3, 4)])
def test_kernels_that_are_not_odd_and_square_are_refused(shape):
  with pytest.raises(ValueError, match=f'odd and square, got .{shape[0]}, '):
    ops.conv2d(jnp.ones((1, 9, 9, 3)), jnp.ones(shape))


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
  (_, ours), our_gradients = run(ops.conv2d, x, kernel)
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

  for a, b in zip(results(ops.conv2d), results(xla_conv), strict=True):
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
  ours = results(ops.conv2d, jnp.bfloat16)
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

  for name, module, function in (
    ('winograd', winograd, 'convolve'),
    ('winograd', winograd, 'kernel_gradient'),
    ('taps', convolutions, 'by_taps'),
    ('taps', convolutions, 'taps_kernel_gradient'),
    ('patches', convolutions, 'by_patches'),
    ('xla', convolutions, 'by_xla'),
  ):
    form = getattr(module, function)
    monkeypatch.setattr(module, function, noting(name, form))
  x = jax.ShapeDtypeStruct((1, size, size, channels), dtype)
  kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)

  def run(x, kernel):
    y, back = jax.vjp(lambda x, k: ops.conv2d(x, k, 1, rate), x, kernel)
    return back(y)

  with ops.use('cpu'):
    jax.eval_shape(run, x, kernel)
  assert ' '.join(used) == forms
  used.clear()
  with ops.use('xla'):
    jax.eval_shape(run, x, kernel)
  assert used == ['xla']


@needs_cpu
@pytest.mark.parametrize(('k', 'rate'), [(1, 1), (3, 1), (3, 2), (3, 18)])
def test_donated_kernels_are_updated_without_a_copy(k, rate):
  """XLA copies a kernel that may be read after its update."""
  shapes = {'a': (k, k, 64, 96), 'b': (k, k, 96, 64)}

  def step(kernels, x):
    def loss(kernels):
      y = nn.relu(ops.conv2d(x, kernels['a'], 1, rate))
      return jnp.square(ops.conv2d(y, kernels['b'], 1, rate)).mean()

    gradients = jax.grad(loss)(kernels)
    return jax.tree.map(lambda p, g: p - 0.1 * g, kernels, gradients)

  kernels = {n: jax.ShapeDtypeStruct(s, 'float32') for n, s in shapes.items()}
  x = jax.ShapeDtypeStruct((1, 33, 33, 64), 'float32')
  compiled = jax.jit(step, donate_argnums=0).lower(kernels, x).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == k * k * 64 * 96 * 8
  assert not re.findall(
    rf'f32\[{k},{k},\d+,\d+\]\S* copy\(', compiled.as_text()
  )


def test_an_unknown_form_is_refused():
  with pytest.raises(ValueError, match="one of xla, cpu, got 'gpu'"):
    ops.use('gpu').__enter__()


SIZE = (257, 257)


def make_network(dtype=jnp.float32):
  """The least network that takes every form at 257x257."""
  backbone = ResNetV2(
    (1, 1, 1, 1), PreActBasicUnit, multi_grid=(2,), width=0.5, dtype=dtype
  )
  return deeplab_v3(backbone, aspp_features=64, dtype=dtype)


@pytest.fixture(scope='module')
def network(random_variables):
  model = make_network()
  return model, random_variables(model)


def image_of(size):
  return np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)


def relative(ours, theirs):
  return float(abs(ours - theirs).max() / abs(theirs).max())


def test_the_whole_network_is_the_same_in_both_forms(network):
  model, variables = network
  images = image_of(SIZE)

  @jax.jit
  def value_and_gradient(params):
    def loss(params):
      logits = model.apply({**variables, 'params': params}, images, train=False)
      return jnp.square(logits).mean(), logits

    return jax.grad(loss, has_aux=True)(params)

  results = {}
  for form in ops.FORMS:
    with ops.use(form):
      results[form] = value_and_gradient(variables['params'])
  gradients, logits = zip(*(results[form] for form in ops.FORMS), strict=True)
  ours, theirs = gradients[1], gradients[0]
  assert 0 < relative(logits[1], logits[0]) < 1e-5
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert relative(a, b) < 1e-4


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_what_is_traced_for_another_platform_takes_the_forms_of_xla(platform):
  model = make_network()
  images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.uint8)
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), images
  )

  def convolutions_of(platform):
    apply = jax.jit(functools.partial(model.apply, train=False))
    exported = jax.export.export(apply, platforms=[platform])
    text = exported(variables, images).mlir_module()
    return text.count('stablehlo.convolution')

  kernels = [p for p in flatten_dict(variables['params']) if p[-1] == 'kernel']
  assert convolutions_of(platform) == len(kernels)
  assert convolutions_of('cpu') < len(kernels)
  with ops.use('xla'):
    assert convolutions_of('cpu') == len(kernels)


@pytest.fixture(scope='module')
def cached(network):
  return ops.cache_kernels(*network, SIZE)


@needs_cpu
@pytest.mark.parametrize('size', [SIZE, (400, 273), (160, 160)])
def test_cached_kernels_give_the_same_logits(size, network, cached):
  model, variables = network
  apply = jax.jit(functools.partial(model.apply, train=False))
  expected = np.asarray(apply(variables, image_of(size)))
  assert np.ptp(expected) > 0.1
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(apply(cached, image_of(size)), expected, atol=atol)


@needs_cpu
def test_cached_kernels_are_used_where_they_fit(network, cached):
  model, plain = network
  # On 17 pixels rate 6 has lines of at most 3, on 25 pixels tiles of 3.
  path = ('aspp', 'atrous1', 'conv', 'kernel')
  kernel = flatten_dict(cached['params'])[path]
  assert [k.shape for k in kernel.transformed] == [(4, 64, 256)] * 4
  zeros = tuple(map(jnp.zeros_like, kernel.transformed))
  params = flatten_dict(plain['params'])
  params[path] = ops.CachedKernel(kernel.kernel, zeros)
  changed = {**plain, 'params': unflatten_dict(params)}
  apply = jax.jit(functools.partial(model.apply, train=False))
  for size, used in ((SIZE, True), ((400, 400), False)):
    images = np.full((1, *size, 3), 90, np.uint8)
    same = np.array_equal(apply(changed, images), apply(plain, images))
    assert same != used


@needs_cpu
def test_gradients_reach_the_image_and_never_a_cached_kernel(network, cached):
  model, variables = network

  def loss(variables, images):
    return jnp.square(model.apply(variables, images, train=False)).mean()

  with pytest.raises(ValueError, match='cache_kernels are for inference'):
    jax.eval_shape(jax.grad(loss, allow_int=True), cached, image_of(SIZE))
  images = image_of(SIZE).astype(np.float32)
  gradient = jax.jit(jax.grad(loss, argnums=1))
  assert relative(gradient(cached, images), gradient(variables, images)) < 1e-4


@needs_cpu
def test_caching_again_keeps_nothing_of_other_parameters(network, cached):
  model, variables = network
  again = ops.cache_kernels(model, cached, (33, 33))  # where nothing is cached
  assert jax.tree.structure(again) == jax.tree.structure(variables)


@needs_cpu
def test_bfloat16_has_nothing_to_cache(random_variables):
  model = make_network(jnp.bfloat16)
  variables = random_variables(model)
  cached = ops.cache_kernels(model, variables, SIZE)
  assert jax.tree.structure(cached) == jax.tree.structure(variables)


def test_nothing_is_cached_for_the_forms_of_xla(network):
  with ops.use('xla'):
    cached = ops.cache_kernels(*network, SIZE)
  assert jax.tree.structure(cached) == jax.tree.structure(network[1])


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
    y = ops.max_pool(x.transpose(axes), padding)
    assert y.shape == (1, 3, 3, 1)
    line = y.transpose(axes)[0, 1, :, 0]
    np.testing.assert_array_equal(line, expected)


@pytest.mark.parametrize('stride', [1, 2, 3])
def test_subsampling_keeps_every_nth_pixel_also_of_symbolic_sizes(stride):
  x = np.random.default_rng(0).normal(size=(2, 8, 7, 3)).astype(np.float32)
  expected = x[:, ::stride, ::stride]
  np.testing.assert_array_equal(ops.subsample(x, stride), expected)
  shape = jax.export.symbolic_shape('b, h, w, 3')
  exported = jax.export.export(jax.jit(lambda x: ops.subsample(x, stride)))(
    jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  np.testing.assert_array_equal(exported.call(x), expected)


class _OthersLayers(nn.Module):
  """A backbone of Flax's own layers."""

  output_stride: int = 8

  @nn.compact
  def __call__(self, x, *, train):
    for _ in range(3):
      x = nn.relu(nn.Conv(8, (3, 3), 2, padding=1)(x))
    return {'postnorm': nn.Dense(8)(x)}


def test_layers_of_others_take_the_kernels_as_they_are(random_variables):
  model = deeplab_v3(_OthersLayers(), num_classes=3, aspp_features=8)
  variables = random_variables(model)
  cached = ops.cache_kernels(model, variables, SIZE)
  logits = [
    jax.jit(functools.partial(model.apply, train=False))(v, image_of(SIZE))
    for v in (cached, variables)
  ]
  assert relative(*logits) < 1e-5
