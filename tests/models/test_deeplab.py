"""ASPP and the whole network against formulas and hand counts."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from flax import linen as nn
from flax.traverse_util import unflatten_dict

import deeplab_jax
from deeplab_jax import (
  PRESETS,
  DeepLabV3,
  ResNetV2,
  deeplab_v3,
  deeplab_v3plus,
  ops,
)
from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.deeplab import check_backbone
from deeplab_jax.models.resnet import (
  BACKBONES,
  PreActBasicUnit,
  PreActBottleneckUnit,
)
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.mapping import flatten

pytestmark = pytest.mark.compiles


def test_parameter_count_of_the_paper_network():
  model = deeplab_v3('resnet50')
  init = functools.partial(model.init, train=False)
  images = jnp.zeros((1, 33, 33, 3))
  params = jax.eval_shape(init, jax.random.key(0), images)['params']
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
  assert repr(deeplab_v3()) == paper


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
  added = sorted(p for p in set(other) - set(paper) if '/decoder/' not in p)
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


# Of stride, unit and form, each meets each of the other two.
@pytest.mark.parametrize(
  ('stride', 'unit', 'form'),
  [
    (8, PreActBasicUnit, 'cpu'),
    (8, PreActBottleneckUnit, 'xla'),
    (16, PreActBasicUnit, 'xla'),
    (16, PreActBottleneckUnit, 'cpu'),
    (32, PreActBasicUnit, 'cpu'),
    (32, PreActBottleneckUnit, 'xla'),
  ],
)
def test_feature_i_j_stands_at_pixel_i_j_times_the_stride(
  random_variables, stride, unit, form
):
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
  run = jax.jit(lambda images: [apply(variables, x) for x in images])
  with ops.use(form):
    results = run(images)
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
  ('preset', 'stride', 'more'),
  [
    ('paper', 8, {}),
    ('keras', 16, {}),
    ('slim', 16, {}),
    ('timm', 32, {}),
    ('paper', 16, {'decoder': 'v3plus'}),
    ('timm', 16, {'decoder': 'v3plus', 'backbone': 'resnet18_v1'}),
  ],
)
def test_an_image_has_its_own_logits_in_a_padded_batch(
  random_variables, stride, preset, more
):
  settings = {'backbone': 'resnet18', **more}
  model = deeplab_v3(
    width=0.125, preset=preset, output_stride=stride, **settings
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


def test_the_image_is_normalized_to_minus_one_and_one():
  seen = []

  class Backbone(deeplab_jax.ResNetV2):
    def __call__(self, x, *, train):
      seen.append(np.asarray(x))
      return {'postnorm': x}

  model = deeplab_jax.DeepLabV3(
    Backbone((1, 1, 1, 1), None, multi_grid=(1,)),
    ASPP((1,), 2),
    num_classes=2,
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
    ({'upsampling': 'cubic'}, 'upsampling must be one of align_corners'),
    ({'stem_pool': 'none'}, 'stem_pool must be one of symmetric'),
    ({'stride_unit': 'all'}, 'stride_unit must be one of last, first'),
    ({'output_stride': 12}, 'output_stride must be 8, 16 or 32, got 12'),
    ({'num_classes': 0}, 'num_classes must be from 1, got 0'),
    ({'multi_grid': (1,)}, 'multi_grid needs one factor from 1 for each of'),
    ({'width': 1e-3}, 'width must be above 1.128, which .*, got 0.001'),
    ({'rematerialization': 'all'}, 'rematerialization must be one of none'),
    ({'rates': (6,)}, 'a setting must be one of multi_grid, .*, got .rates'),
  ],
)
def test_impossible_arguments_are_named_at_construction(call, words):
  with pytest.raises(ValueError, match=words):
    deeplab_v3(**call)


@pytest.mark.parametrize(
  ('name', 'stride'),
  [
    *((name, 16) for name in BACKBONES),
    *itertools.product(('resnet18', 'resnet50'), (8, 32)),
  ],
)
def test_every_backbone_keeps_the_contract(name, stride):
  model = deeplab_v3(name, output_stride=stride, width=0.0625)
  check_backbone(model.backbone)


class Pool(nn.Module):
  """A backbone of anyone's, as small as they get."""

  output_stride: int = 8
  lost: int = 0
  key: str = 'postnorm'

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(4, (1, 1), name='conv')(x)[:, :: self.output_stride]
    return {self.key: x[:, self.lost :, :: self.output_stride]}


def test_any_module_that_keeps_the_contract_is_a_backbone():
  check_backbone(Pool())
  model = deeplab_v3(Pool(), num_classes=3, aspp_features=4)
  assert model.aspp.rates == (12, 24, 36)  # by its own output stride
  logits, _ = jax.eval_shape(
    lambda key: model.init_with_output(
      key, jnp.zeros((1, 30, 41, 3)), train=False
    ),
    jax.random.key(0),
  )
  assert logits.shape == (1, 30, 41, 3)
  made = deeplab_v3(
    lambda output_stride, **_: Pool(output_stride), output_stride=32
  )
  assert made.backbone == Pool(32)


@pytest.mark.parametrize(
  ('module', 'words'),
  [
    (nn.Dense(3), 'output_stride must be a whole number, got None'),
    (
      Pool(lost=1),
      re.escape("'postnorm' of images [2, 33, 17, 3] must be [2, 5, 3, 4]"),
    ),
    (Pool(key='x'), re.escape("no 'postnorm' among the maps ['x']")),
  ],
)
def test_a_module_that_breaks_the_contract_is_told_how(module, words):
  with pytest.raises(ValueError, match=words):
    check_backbone(module)


@pytest.mark.parametrize('preset', ['timm', 'seed'])
def test_an_auxiliary_head_is_computed_if_asked_and_changes_nothing_else(
  preset,
):
  backbone = ResNetV2(
    (1, 1, 1, 1),
    PreActBasicUnit,
    output_stride=32,
    multi_grid=(1,),
    width=0.125,
    stride_unit=PRESETS[preset]['stride_unit'],
  )
  small = {'num_classes': 3, 'aspp_features': 4, 'aspp_rates': (6,)}
  make = functools.partial(deeplab_v3, backbone, preset=preset, **small)
  plain, model = make(), make(auxiliary=True)
  images = np.random.default_rng(0).uniform(0, 255, (2, 65, 97, 3))
  images = images.astype(np.float32)
  key = jax.random.key(0)
  init = jax.jit(lambda m: m.init(key, images, train=False), static_argnums=0)
  variables = init(model)
  assert variables.keys() == {'params', 'batch_stats'}
  main, heads = {}, {}
  for path, x in flatten(variables).items():
    (heads if '/auxiliary/' in path else main)[path] = x
  assert {path: x.shape for path, x in heads.items()} == {
    'params/auxiliary/conv/conv/kernel': (3, 3, 32, 8),
    **{f'params/auxiliary/conv/norm/{n}': (8,) for n in ('scale', 'bias')},
    'params/auxiliary/logits/kernel': (1, 1, 8, 3),
    'params/auxiliary/logits/bias': (3,),
    **{f'batch_stats/auxiliary/conv/norm/{n}': (8,) for n in ('mean', 'var')},
  }
  alone = flatten(init(plain))
  assert main.keys() == alone.keys()
  for path, x in alone.items():
    np.testing.assert_array_equal(main[path], x, path)

  # Without its variables it cannot be computed, and is not.
  without = unflatten_dict(main, sep='/')
  apply = functools.partial(model.apply, train=False)

  @jax.jit
  def run(variables, without, images):
    backbone = {k: v['backbone'] for k, v in without.items()}
    x = _normalized(model, images)
    maps = model.backbone.apply(backbone, x, train=False)
    both = apply(variables, images, mutable=['intermediates'])
    return maps, apply(without, images), both

  maps, logits, (both, state) = run(variables, without, images)
  np.testing.assert_array_equal(both, logits)
  (second,) = state['intermediates']['auxiliary_logits']
  assert second.shape == logits.shape and second.dtype == jnp.float32

  # The stride of block 3 is 16 with timm, else 32; its maps are read there.
  weights = variables['params']['auxiliary']
  stats = variables['batch_stats']['auxiliary']
  x = numpy_branch(np.asarray(maps['block3']), weights['conv'], stats['conv'])
  x = x @ weights['logits']['kernel'][0, 0] + weights['logits']['bias']
  if preset == 'seed':  # whose rows lie elsewhere, but for the first
    x, second = x[:, :1, :1], second[:, :1, :1]
  else:
    second = second[:, ::16, ::16]
  np.testing.assert_allclose(second, x, atol=1e-5 * np.abs(x).max())


def test_v3plus_is_v3_with_its_decoder():
  model = deeplab_v3plus('resnet18', width=0.125)
  v3 = deeplab_v3('resnet18', width=0.125, decoder='v3plus')
  assert repr(model) == repr(v3)
  assert model.decoder.low_level_features == 48
  with pytest.raises(ValueError, match='decoder must be one of none, conv, v3'):
    deeplab_v3('resnet18', decoder='v4')


def _normalized(model, images):
  return (images - np.asarray(model.mean)) / np.asarray(model.std)


@pytest.mark.parametrize(
  ('head', 'name'),
  [({'auxiliary': True}, 'block3'), ({'decoder': 'v3plus'}, 'low_level')],
)
def test_a_backbone_without_a_map_that_a_head_needs_is_told_so(head, name):
  class Plain(nn.Module):
    output_stride: int = 2

    @nn.compact
    def __call__(self, x, *, train):
      return {'postnorm': nn.Conv(4, (3, 3), 2, padding=1, name='conv')(x)}

  model = deeplab_v3(Plain(), aspp_features=4, **head)
  words = f"needs the map '{name}' of the backbone, which gives postnorm"
  with pytest.raises(UserError, match=words):
    jax.eval_shape(
      functools.partial(model.init, train=False),
      jax.random.key(0),
      jnp.zeros((1, 33, 33, 3)),
    )
