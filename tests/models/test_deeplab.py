"""ASPP and the whole network against formulas and hand counts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from flax import linen as nn
from miniature import needs_cpu

import deeplab_jax
from deeplab_jax import PRESETS, DeepLabV3, ResNetV2, deeplab_v3
from deeplab_jax.models import aspp, deeplab, layers, resnet
from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.resnet import PreActBasicUnit, PreActBottleneckUnit
from deeplab_jax.weights.mapping import flatten


def test_parameter_count_of_the_paper_network(random_variables):
  params = random_variables(deeplab_v3('resnet50'))['params']
  branch = 2048 * 256 + 2 * 256
  aspp = 2 * branch + 3 * (9 * 2048 * 256 + 2 * 256) + 5 * 256 * 256 + 2 * 256
  expected = 23_500_352 + aspp + 256 * 21 + 21
  assert sum(x.size for x in jax.tree.leaves(params)) == expected
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}


def numpy_branch(x, weights, stats, rate=1):
  """Convolution tap by tap, batch norm by its formula, ReLU."""
  kernel = weights['conv']['kernel']
  k = kernel.shape[0]
  pad = rate * (k // 2)
  height, width = x.shape[1:3]
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  y = 0
  for i in range(k):
    for j in range(k):
      part = padded[:, i * rate :, j * rate :][:, :height, :width]
      y = y + part @ kernel[i, j]
  norm, stat = weights['norm'], stats['norm']
  y = (y - stat['mean']) / np.sqrt(stat['var'] + 1e-5)
  return np.maximum(y * norm['scale'] + norm['bias'], 0)


def test_aspp_equals_its_numpy_transcription(random_variables):
  rates = (2, 3, 30)
  model = ASPP(rates, 8)
  x = np.random.default_rng(0).normal(size=(2, 9, 12, 16)).astype(np.float32)
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), x
  )
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda a: rng.uniform(0.1, 1, a.shape).astype(np.float32), variables
  )
  w, s = variables['params'], variables['batch_stats']
  mean = x.mean((1, 2), keepdims=True)
  pooled = numpy_branch(mean, w['pooling']['project'], s['pooling']['project'])
  branches = [np.broadcast_to(pooled, (2, 9, 12, 8))]
  branches.append(numpy_branch(x, w['conv'], s['conv']))
  for i, rate in enumerate(rates, 1):
    name = f'atrous{i}'
    branches.append(numpy_branch(x, w[name], s[name], rate))
  joined = np.concatenate(branches, -1)
  expected = numpy_branch(joined, w['project'], s['project'])
  ours = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@needs_cpu
def test_branches_in_turn_take_less_memory(monkeypatch):
  x = jnp.zeros((1, 33, 33, 128))
  variables = jax.eval_shape(
    functools.partial(ASPP(features=64).init, train=False),
    jax.random.key(0),
    x,
  )

  def memory():
    def loss(variables, x):
      return ASPP(features=64).apply(variables, x, train=False).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables, x)
    return program.compile().memory_analysis().temp_size_in_bytes

  in_turn = memory()
  monkeypatch.setattr(aspp, 'on_cpu', lambda: False)
  assert in_turn < 0.8 * memory()


@pytest.mark.parametrize(
  ('output_stride', 'rates'),
  [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))],
)
def test_aspp_rates_follow_the_output_stride(output_stride, rates):
  assert deeplab_v3(output_stride=output_stride).aspp.rates == rates


def test_rates_that_do_not_follow_the_output_stride_stay():
  for stride in (8, 16, 32):
    model = deeplab_v3(output_stride=stride, scale_aspp_rates=False)
    assert model.aspp.rates == (6, 12, 18)


def test_every_preset_sets_the_same_settings():
  for name, settings in PRESETS.items():
    assert settings.keys() == PRESETS['paper'].keys(), name


def test_default_is_the_preset_of_the_paper():
  paper = repr(deeplab_v3(preset='paper'))
  assert repr(deeplab_v3()) == repr(deeplab_v3(preset='')) == paper


@pytest.mark.parametrize('preset', PRESETS)
def test_arguments_come_before_the_preset(preset):
  values = {
    'mean': (1.0, 2.0, 3.0),
    'features': 'block4',
    'upsampling': 'asymmetric',
    'bn_epsilon': 0.5,
    'conv_bias': False,
    'stem_pool': 'zero',
    'stride_unit': 'first',
  }
  model = deeplab_v3(preset=preset, **values)
  assert model.mean == (1.0, 2.0, 3.0)
  assert model.std == PRESETS[preset]['std']
  assert model.aspp.activation == PRESETS[preset]['aspp_activation']
  assert (model.features, model.upsampling) == ('block4', 'asymmetric')
  backbone = model.backbone
  assert not backbone.conv_bias
  assert (backbone.stem_pool, backbone.stride_unit) == ('zero', 'first')
  assert backbone.norm.keywords['epsilon'] == 0.5
  assert model.aspp.norm.keywords['epsilon'] == 0.5


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_add_biases_to_the_variables_and_nothing_else(
  preset, random_variables
):
  def paths(preset):
    model = deeplab_v3('resnet18', num_classes=3, width=0.125, preset=preset)
    leaves = flatten(random_variables(model))
    return {path: leaf.shape for path, leaf in leaves.items()}

  paper, other = paths('paper'), paths(preset)
  assert paper.items() <= other.items()
  added = sorted(set(other) - set(paper))
  if PRESETS[preset]['conv_bias']:
    units = [f'block{b}/unit{u}/conv2' for b in (1, 2, 3, 4) for u in (1, 2)]
    units += [f'block{b}/unit1/shortcut' for b in (2, 3, 4)]
    expected = [f'params/backbone/{name}/bias' for name in (*units, 'stem')]
    assert added == sorted(expected)
  else:
    assert not added


@pytest.mark.parametrize('size', [(33, 33), (40, 65), (17, 90)])
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_logits_have_the_size_of_the_images_in_float32(
  size, output_stride, random_variables
):
  model = deeplab_v3(
    'resnet18',
    num_classes=5,
    width=0.125,
    output_stride=output_stride,
    dtype=jnp.bfloat16,
  )
  variables = random_variables(model)
  logits = jax.eval_shape(
    lambda x: model.apply(variables, x, train=False),
    jax.ShapeDtypeStruct((2, *size, 3), jnp.uint8),
  )
  assert logits.shape == (2, *size, 5)
  assert logits.dtype == jnp.float32


def one_unit_network(unit, output_stride, rate=1, upsampling='align_corners'):
  """A network of one unit a block, all of whose parts any size passes."""
  norm = functools.partial(nn.BatchNorm, momentum=0.9)
  backbone = ResNetV2(
    (1, 1, 1, 1),
    unit,
    output_stride=output_stride,
    multi_grid=(1,),
    width=0.125,
    norm=norm,
  )
  return DeepLabV3(
    backbone, ASPP((rate,), 8, norm=norm), 4, upsampling=upsampling
  )


def interpolated(features, size, stride):
  """What a map of pixels (i, j) * stride is at pixels (i, j), by scipy."""
  for axis, length in zip((1, 2), size, strict=True):
    known = np.arange(features.shape[axis]) * stride
    features = scipy.interpolate.interp1d(known, features, axis=axis)(
      np.arange(length)
    )
  return features


@pytest.mark.parametrize('cpu', [True, False])
@pytest.mark.parametrize('unit', [PreActBasicUnit, PreActBottleneckUnit])
@pytest.mark.parametrize('stride', [8, 16, 32])
def test_feature_i_j_stands_at_pixel_i_j_times_the_stride(
  monkeypatch, random_variables, stride, unit, cpu
):
  for module in (aspp, deeplab, layers, resnet):
    monkeypatch.setattr(module, 'on_cpu', lambda: cpu)
  model = one_unit_network(unit, stride, rate=2)
  variables = random_variables(model)
  apply = functools.partial(
    model.apply,
    train=False,
    capture_intermediates=lambda module, _: module.name == 'logits',
  )
  sizes = [(512, 512), (375, 500), (97, 129), (96, 128), (65, 50)]
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (1, *size, 3), np.uint8) for size in sizes]
  # One program for all sizes compiles in less time than one each.
  results = jax.jit(lambda images: [apply(variables, x) for x in images])(
    images
  )
  for size, (logits, captured) in zip(sizes, results, strict=True):
    (features,) = captured['intermediates']['logits']['__call__']
    features = np.asarray(features)
    assert logits.shape == (1, *size, 4)
    inside = np.asarray(logits)[:, ::stride, ::stride]
    own = features[:, : inside.shape[1], : inside.shape[2]]
    tolerance = 1e-5 * features.std()
    np.testing.assert_allclose(inside, own, atol=tolerance, rtol=0)
    np.testing.assert_allclose(
      logits, interpolated(features, size, stride), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize(
  ('preset', 'stride'),
  [('paper', 8), ('keras', 16), ('slim', 16), ('timm', 32)],
)
def test_an_image_has_its_own_logits_in_a_padded_batch(
  random_variables, stride, preset
):
  model = deeplab_v3(
    'resnet18', width=0.125, preset=preset, output_stride=stride
  )
  variables = random_variables(model)
  apply = jax.jit(functools.partial(model.apply, train=False))
  rng = np.random.default_rng(0)
  sizes = np.array([[50, 65], [81, 40]])
  # What the padding shows does not matter.
  batch = rng.integers(0, 256, (2, 97, 110, 3), np.uint8)
  padded = np.asarray(apply(variables, batch, sizes=sizes))
  for (height, width), image, found in zip(sizes, batch, padded, strict=True):
    own = np.s_[:height, :width]
    alone = np.asarray(apply(variables, image[own][None]))[0]
    np.testing.assert_allclose(found[own], alone, atol=2e-5 * alone.std())
  unaware = np.asarray(apply(variables, batch))[:, :40, :40]
  assert np.abs(unaware - padded[:, :40, :40]).max() > 0.01 * padded.std()


def test_bfloat16_stays_near_float32_with_float32_parameters(random_variables):
  images = np.random.default_rng(0).integers(0, 256, (2, 49, 65, 3), np.uint8)
  logits = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    model = deeplab_v3('resnet18', num_classes=5, width=0.25, dtype=dtype)
    variables = random_variables(model)
    apply = functools.partial(model.apply, train=True, mutable=['batch_stats'])
    updates = jax.eval_shape(apply, variables, images)[1]
    for leaf in jax.tree.leaves((variables, updates)):
      assert leaf.dtype == jnp.float32
    logits[dtype] = jax.jit(functools.partial(model.apply, train=False))(
      variables, images
    )
  exact, rounded = logits[jnp.float32], logits[jnp.bfloat16]
  assert 0 < np.abs(exact - rounded).mean() < 0.05 * exact.std()


def dot(ours, theirs):
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  return sum(np.vdot(np.float64(a), np.float64(b)) for a, b in pairs)


def test_forward_mode_reverse_mode_and_second_order_agree(random_variables):
  backbone = ResNetV2((1, 1, 1, 1), PreActBasicUnit, 16, (2,), width=0.125)
  model = DeepLabV3(backbone, ASPP((6,), 8), 4)
  variables = random_variables(model)
  rng = np.random.default_rng(0)

  def draw(_):
    images = rng.normal(0, 10, (2, 33, 49, 3)).astype(np.float32)
    return images, jax.tree.map(
      lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
      variables['params'],
    )

  (images, _), *directions = map(draw, range(3))
  at = images + 127, variables['params']

  def logits(images, params):
    variables_now = {**variables, 'params': params}
    return model.apply(
      variables_now, images, train=True, mutable=['batch_stats']
    )[0]

  def loss(values):
    return jnp.square(logits(*values)).mean()

  @jax.jit
  def run(values, direction, cotangent):
    _, forward = jax.jvp(logits, values, direction)
    _, pull = jax.vjp(logits, *values)
    _, curvature = jax.jvp(jax.grad(loss), (values,), (direction,))
    return forward, pull(cotangent), curvature

  cotangent = rng.normal(size=(2, 33, 49, 4)).astype(np.float32)
  curvatures = []
  for direction in directions:
    forward, backward, curvature = run(at, direction, cotangent)
    assert abs(dot(cotangent, forward)) > 1
    np.testing.assert_allclose(
      dot(cotangent, forward), dot(backward, direction), rtol=1e-3
    )
    curvatures.append(curvature)
  # The Hessian is symmetric.
  crossed = list(map(dot, curvatures, directions[::-1]))
  np.testing.assert_allclose(*crossed, rtol=1e-3)
  assert abs(crossed[0]) > 1e-3


@pytest.mark.parametrize(
  ('shape', 'hint'),
  [
    ((33, 49, 3), '; the batch axis is missing: images[None]'),
    (
      (2, 3, 33, 49),
      '; the channels are second: images.transpose(0, 2, 3, 1)',
    ),
    (
      (3, 33, 49),
      '; the batch axis is missing and the channels are first:'
      ' images.transpose(1, 2, 0)[None]',
    ),
    ((2, 33, 49, 1), ''),
    ((2, 33, 49, 4), ''),
    ((33, 49), ''),
    ((2, 0, 49, 3), ''),
    ((2, 33, 0, 3), ''),
    ((1, 2, 33, 49, 3), ''),
  ],
)
def test_images_of_another_shape_are_refused_with_what_mends_them(shape, hint):
  images = np.zeros(shape, np.uint8)
  apply = functools.partial(deeplab_v3('resnet18').apply, train=False)
  message = f'images must be [B, H, W, 3], got {list(shape)}{hint}'
  for call in (apply, jax.jit(apply)):
    with pytest.raises(ValueError) as error:
      call({}, images)
    assert str(error.value) == message
  if hint:
    mended = eval(hint.rpartition(': ')[2], {'images': images})
    assert mended.shape[1:] == (33, 49, 3)


@pytest.mark.parametrize('module', [ASPP(), deeplab_v3().backbone])
@pytest.mark.parametrize('shape', [(9, 9, 3), (9, 9), (1, 0, 9, 3)])
def test_maps_of_another_shape_are_refused(module, shape):
  message = re.escape(f'x must be [B, H, W, C], got {list(shape)}')
  with pytest.raises(ValueError, match=message):
    module.apply({}, np.zeros(shape, np.float32), train=False)


def test_uint8_and_float_images_give_the_same_logits(random_variables):
  model = deeplab_v3('resnet18', num_classes=3, width=0.125)
  variables = random_variables(model)
  images = np.random.default_rng(0).integers(0, 256, (1, 33, 33, 3), np.uint8)
  apply = jax.jit(functools.partial(model.apply, train=False))
  a = apply(variables, images)
  b = apply(variables, images.astype(np.float32))
  np.testing.assert_array_equal(a, b)


def test_the_image_is_normalised_to_minus_one_and_one():
  seen = []

  class Backbone(deeplab_jax.ResNetV2):
    def __call__(self, x, *, train):
      seen.append(np.asarray(x))
      return {'postnorm': x}

  model = deeplab_jax.DeepLabV3(
    Backbone((1, 1, 1, 1), None), ASPP((1,), 2), num_classes=2
  )
  images = np.stack([np.zeros((3, 3, 3)), np.full((3, 3, 3), 255.0)])
  model.init(jax.random.key(0), images, train=False)
  assert seen[0].shape == (2, 17, 17, 3)  # with the next feature's pixel
  np.testing.assert_array_equal(seen[0][0, :3, :3], -1)
  np.testing.assert_array_equal(seen[0][1, :3, :3], 1)
  assert np.abs(seen[0]).sum() == 2 * 3 * 3 * 3  # and nothing else


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    ({'backbone': 'resnet51'}, 'backbone must be one of resnet18, .*resnet51'),
    ({'preset': 'tf'}, 'preset must be one of paper, seed, .*, got .tf'),
    ({'features': 'block3'}, 'features must be one of postnorm, block4'),
    ({'upsampling': 'cubic'}, 'upsampling must be one of align_corners'),
    ({'stem_pool': 'none'}, 'stem_pool must be one of symmetric'),
    ({'stride_unit': 'all'}, 'stride_unit must be one of last, first'),
    ({'output_stride': 12}, 'output_stride must be 8, 16 or 32, got 12'),
    ({'num_classes': 0}, 'num_classes must be at least 1, got 0'),
    ({'multi_grid': (1,)}, 'multi_grid needs one factor for each of the 3'),
  ],
)
def test_impossible_arguments_are_named_at_construction(call, words):
  with pytest.raises(ValueError, match=words):
    deeplab_v3(**call)


PREPARED = {'width': 0.5, 'aspp_features': 64}


@pytest.fixture(scope='module')
def prepared_for_257(random_variables):
  """Model, its variables, and these as prepared for 257x257."""
  model = deeplab_v3('resnet18', **PREPARED)
  variables = random_variables(model)
  return model, variables, model.prepare(variables, (257, 257))


@needs_cpu
@pytest.mark.parametrize('size', [(257, 257), (400, 273), (160, 160)])
def test_prepared_variables_give_the_same_logits(size, prepared_for_257):
  model, variables, prepared = prepared_for_257
  images = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
  apply = jax.jit(functools.partial(model.apply, train=False))
  expected = np.asarray(apply(variables, images))
  assert np.ptp(expected) > 0.1
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(apply(prepared, images), expected, atol=atol)


@needs_cpu
def test_prepared_kernels_are_used_where_they_fit(prepared_for_257):
  model, plain, prepared = prepared_for_257
  # On 17 pixels rate 6 has lines of at most 3, on 25 pixels tiles of 3.
  rate6 = prepared['prepared']['aspp']['atrous1']['conv']['kernel']
  assert [k.shape for k in rate6] == [(4, 64, 256)] * 4
  zeros = {'conv': {'kernel': tuple(map(jnp.zeros_like, rate6))}}
  prepared = {**plain, 'prepared': {'aspp': {'atrous1': zeros}}}
  apply = jax.jit(functools.partial(model.apply, train=False))
  for size, used in (((257, 257), True), ((400, 400), False)):
    images = np.full((1, *size, 3), 90, np.uint8)
    same = np.array_equal(apply(prepared, images), apply(plain, images))
    assert same != used


@needs_cpu
def test_prepared_variables_cannot_be_trained(prepared_for_257):
  model, _, prepared = prepared_for_257
  images = np.zeros((1, 257, 257, 3), np.uint8)
  with pytest.raises(ValueError, match="'prepared' are for inference"):
    model.apply(prepared, images, train=True, mutable=['batch_stats'])


@needs_cpu
def test_preparing_again_keeps_nothing_of_other_parameters(
  prepared_for_257, random_variables
):
  model, _, old = prepared_for_257
  new = {**old, **random_variables(model, seed=1)}
  kept = model.prepare(new, (33, 33))  # where nothing is prepared
  assert not jax.tree.leaves(kept.get('prepared', {}))


def test_variables_that_are_all_mutable_are_not_prepared(random_variables):
  model = deeplab_v3('resnet18', **PREPARED)
  images = np.zeros((1, 257, 257, 3), np.uint8)
  apply = functools.partial(model.apply, train=True, mutable=True)
  _, updated = jax.eval_shape(apply, random_variables(model), images)
  assert set(updated) == {'params', 'batch_stats'}


@needs_cpu
def test_bfloat16_has_nothing_to_prepare(random_variables):
  model = deeplab_v3('resnet18', **PREPARED, dtype=jnp.bfloat16)
  prepared = model.prepare(random_variables(model), (257, 257))
  assert not jax.tree.leaves(prepared.get('prepared', {}))


def test_initial_variables_are_not_prepared():
  model = deeplab_v3('resnet18', **PREPARED)
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 257, 257, 3)), train=False),
    jax.random.key(0),
  )
  assert set(shapes) == {'params', 'batch_stats'}
