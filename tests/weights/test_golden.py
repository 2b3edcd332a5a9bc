"""The numbers of the reference networks, from their own code.

`tests/golden/README.md` says how they were computed. Weights follow a formula
of the variable's name; they pass through the project's own name mappings.
"""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from reference import (
  UNITS,
  slim_shapes,
  timm_shapes,
  torchvision_shapes,
  weight,
)

from deeplab_jax import deeplab_v3
from deeplab_jax.training.optimizers import make_optimizer, poly_schedule
from deeplab_jax.training.steps import TrainState, train_step
from deeplab_jax.weights.mapping import flatten, merge_variables
from deeplab_jax.weights.tf_slim import map_tf_slim
from deeplab_jax.weights.timm import map_timm
from deeplab_jax.weights.torchvision import map_torchvision

pytestmark = pytest.mark.compiles

GOLDEN = Path(__file__).parents[1] / 'golden'
SIZES = ((97, 129), (96, 128))


def empty(model):
  """The shapes of a model's variables."""
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False)
  )


def variables_of(model, shapes, kind, mapper, initial):
  arrays = {name: weight(name, shape, kind) for name, shape in shapes}
  names = mapper(arrays)
  return merge_variables(
    empty(model),
    names.apply(arrays),
    initial=initial,
    unused=names.unused,
    unknown=names.unknown,
  )


@pytest.fixture(scope='module')
def seed_variables():
  model = deeplab_v3('resnet50', preset='seed')
  variables, report = variables_of(
    model, slim_shapes(), 'slim', map_tf_slim, {}
  )
  assert not report.initial
  assert set(report.unused.values()) == {'ImageNet classifier'}
  return variables


@pytest.fixture(scope='module')
def timm_variables():
  model = deeplab_v3('resnet50', preset='timm')
  initial = {'*/aspp/*': 'backbone', '*/logits/*': 'backbone'}
  merged, _ = variables_of(model, timm_shapes(), 'torch', map_timm, initial)
  return {key: merged[key]['backbone'] for key in merged}


def assert_equal_to_golden(ours, expected, what):
  assert ours.shape == expected.shape
  difference = np.abs(ours - expected).max() / expected.std()
  print(f'{what}: {difference:.2e} of the standard deviation')
  assert difference < 1e-4, what


def image_of(size):
  return (
    np.random.default_rng(7).integers(0, 256, (1, *size, 3)).astype(np.float32)
  )


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('stride', [16, 8])
def test_seed_network_gives_the_numbers_of_its_own_code(
  stride, size, seed_variables
):
  golden = np.load(GOLDEN / 'seed_resnet_v2_50.npz')
  model = deeplab_v3('resnet50', preset='seed', output_stride=stride)
  apply = functools.partial(
    model.apply,
    train=False,
    capture_intermediates=lambda module, method: (
      module.name in ('backbone', 'logits') and method == '__call__'
    ),
  )
  upsampled, captured = jax.jit(apply)(seed_variables, image_of(size))
  inner = captured['intermediates']
  (features,) = inner['backbone']['__call__']
  (logits,) = inner['logits']['__call__']
  ours = {
    'block4': features['block4'][..., ::16],
    'postnorm': features['postnorm'][..., ::16],
    'logits': logits,
    'upsampled': upsampled[:, ::4, ::4],
  }
  for key, value in ours.items():
    name = f'os{stride}_{size[0]}x{size[1]}/{key}'
    assert_equal_to_golden(np.asarray(value), golden[name], f'seed {name}')


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('stride', [32, 16, 8])
def test_timm_backbone_gives_the_numbers_of_its_own_code(
  stride, size, timm_variables
):
  golden = np.load(GOLDEN / 'timm_resnetv2_50.npz')
  model = deeplab_v3(
    'resnet50', preset='timm', output_stride=stride, multi_grid=(1, 1, 1)
  )
  apply = jax.jit(functools.partial(model.backbone.apply, train=False))
  ours = apply(timm_variables, image_of(size) / 127.5 - 1)['postnorm']
  name = f'os{stride}_{size[0]}x{size[1]}/features'
  assert_equal_to_golden(
    np.asarray(ours)[..., ::16], golden[name], f'timm {name}'
  )


@pytest.fixture(scope='module')
def torch_segmenter():
  """Makes the variables of a network of golden/torch_segmenters.npz once."""

  @functools.cache
  def make(head):
    shapes = dict(torchvision_shapes(head))
    names = map_torchvision(shapes)
    settings = {**names.settings, 'preset': names.presets[0]}
    settings['auxiliary'] = head == 'torchvision'
    model = deeplab_v3('resnet50_v1', **settings)
    variables, report = variables_of(
      model, shapes.items(), 'torch', map_torchvision, {}
    )
    assert not report.initial and not report.unused
    return settings, variables

  return make


@pytest.mark.parametrize(
  ('head', 'place'),
  [
    ('torchvision', 'torchvision_v3_r50/os8_97x129'),
    ('torchvision', 'torchvision_v3_r50/os8_96x128'),
    ('vainf', 'vainf_v3_r50/os16_97x129'),
    ('vainf', 'vainf_v3_r50/os16_96x128'),
    ('vainf', 'vainf_v3_r50/os8_97x129'),
    ('v3plus', 'vainf_v3plus_r50/os16_97x129'),
    ('v3plus', 'vainf_v3plus_r50/os16_96x128'),
  ],
)
def test_segmenters_of_pytorch_give_the_numbers_of_their_own_code(
  head, place, torch_segmenter
):
  golden = np.load(GOLDEN / 'torch_segmenters.npz')
  settings, variables = torch_segmenter(head)
  stride, *size = map(int, re.findall(r'os(\d+)_(\d+)x(\d+)', place)[0])
  model = deeplab_v3('resnet50_v1', output_stride=stride, **settings)
  apply = functools.partial(
    model.apply,
    train=False,
    mutable=['intermediates'],
    capture_intermediates=lambda module, method: (
      module.name in ('backbone', 'logits') and method == '__call__'
    ),
  )
  upsampled, captured = jax.jit(apply)(variables, image_of(size))
  inner = captured['intermediates']
  (features,) = inner['backbone']['__call__']
  (logits,) = inner['logits']['__call__']
  ours = {
    'features': features['block4'][..., ::32],
    'logits': logits,
    'upsampled': upsampled[:, ::8, ::8],
  }
  if f'{place}/aux' in golden:
    ours['aux'] = inner['auxiliary_logits'][0][:, ::8, ::8]
  assert sum(name.startswith(f'{place}/') for name in golden) == len(ours)
  for key, value in ours.items():
    name = f'{place}/{key}'
    assert_equal_to_golden(np.asarray(value), golden[name], name)


# The names of `golden/torch_train_step.py`, by ours.
TORCH_MODULES = {
  'backbone/stem': 'conv1',
  'backbone/postnorm': 'postnorm',
  'aspp/conv': 'aspp.0',
  'aspp/atrous1': 'aspp.1',
  'aspp/atrous2': 'aspp.2',
  'aspp/atrous3': 'aspp.3',
  'aspp/pooling/project': 'pool',
  'aspp/project': 'project',
  'logits': 'logits',
}
TORCH_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


def torch_name(path):
  """'params/backbone/block2/unit1/norm1/scale' -> 'units.3.bn1.weight'."""
  _, *modules, leaf = path.split('/')
  leaf = TORCH_LEAVES[leaf]
  if modules[1:] and modules[1].startswith('block'):
    block, unit = int(modules[1][-1]), int(modules[2].removeprefix('unit'))
    index = sum(UNITS[: block - 1]) + unit - 1
    return f'units.{index}.{modules[3].replace("norm", "bn")}.{leaf}'
  if modules[0] == 'aspp':  # a Sequential of convolution and normalization
    *modules, layer = modules
    leaf = f'{("conv", "norm").index(layer)}.{leaf}'
  return f'{TORCH_MODULES["/".join(modules)]}.{leaf}'


def by_torch_name(tree):
  """Leaves by PyTorch's names and in its layout, OIHW."""
  return {
    torch_name(path): leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
    for path, leaf in flatten(tree).items()
  }


def torch_data():
  """The batch of `golden/torch_train_step.py`."""
  rng = np.random.default_rng(5)
  image = rng.integers(0, 256, (4, 97, 81, 3)).astype(np.uint8)
  label = rng.integers(0, 5, (4, 13, 11)).astype(np.uint8)
  label = label.repeat(8, 1).repeat(8, 2)[:, :97, :81].copy()
  label[rng.random(label.shape) < 0.15] = 255
  label[0, :50] = 255
  return {'image': image, 'label': label}


@pytest.fixture(scope='module')
def torch_model():
  """The model, and its variables by the formula."""
  model = deeplab_v3(
    'resnet50',
    num_classes=5,
    output_stride=16,
    width=1 / 8,
    aspp_features=16,
    bn_decay=0.9,
  )

  def fill(path, leaf):
    name = torch_name('/'.join(key.key for key in path))
    if leaf.ndim < 4:
      return weight(name, leaf.shape, 'torch')
    shape = [leaf.shape[axis] for axis in (3, 2, 0, 1)]
    return weight(name, shape, 'torch').transpose(2, 3, 1, 0)

  return model, jax.tree_util.tree_map_with_path(fill, empty(model))


def test_network_evaluates_as_in_pytorch(torch_model):
  model, variables = torch_model
  apply = jax.jit(functools.partial(model.apply, train=False))
  ours = np.asarray(apply(variables, torch_data()['image']))
  expected = np.load(GOLDEN / 'torch_train_step.npz')['eval_logits']
  ours = ours[:, ::8, ::8].transpose(0, 3, 1, 2)
  assert_equal_to_golden(ours, expected, 'torch logits')


@pytest.fixture(scope='module')
def five_steps(torch_model):
  """The states after each step, their metrics, and the first gradients."""
  model, variables = torch_model
  keep = optax.GradientTransformation(
    lambda params: jax.tree.map(np.zeros_like, params),
    lambda gradients, state, params: (gradients, gradients),
  )
  optimizer = optax.chain(
    keep,
    make_optimizer('sgd', poly_schedule(0.001, 10), weight_decay=1e-4),
  )
  params = variables['params']
  state = TrainState(
    step=np.zeros((), np.int32),
    params=params,
    batch_stats=variables['batch_stats'],
    opt_state=optimizer.init(params),
  )
  step = jax.jit(
    functools.partial(
      train_step, model=model, optimizer=optimizer, axis_name=None
    )
  )
  states, metrics, batch = [], [], torch_data()
  for _ in range(5):
    state, values = step(state, batch)
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(values))
  return states, metrics, states[0].opt_state[0]


def assert_close(ours, golden, prefix, bound, scale):
  """Compares all arrays under a prefix, as shares of a scale of each."""
  names = [name for name in golden if name.startswith(f'{prefix}/')]
  differences = [
    np.abs(ours[name] - golden[name]).max() / scale(golden[name])
    for name in names
  ]
  print(f'torch {prefix}: at most {max(differences):.2e} of {len(names)}')
  assert max(differences) <= bound, names[np.argmax(differences)]
  return differences


def test_first_step_is_that_of_pytorch(five_steps):
  golden = np.load(GOLDEN / 'torch_train_step.npz')
  states, metrics, gradients = five_steps
  np.testing.assert_allclose(metrics[0]['loss'], golden['losses'][0], atol=1e-5)
  ours = by_torch_name({'params': gradients})
  ours = {f'grad/{name}': array for name, array in ours.items()}
  # A value that rounds to the other side of a ReLU's zero moves gradients by up
  # to 2.1e-3. Whether one does depends on the CPU and on XLA's options: by them
  # the median is 4e-5 to 7e-4.
  differences = assert_close(
    ours, golden, 'grad', 5e-3, lambda gradient: np.abs(gradient).max()
  )
  assert len(differences) == 69 and np.median(differences) < 1.5e-3
  norm = golden['grad_norms'][0]
  np.testing.assert_allclose(metrics[0]['grad_norm'], norm, rtol=1e-4)
  ours = by_torch_name({'batch_stats': states[0].batch_stats})
  ours = {
    f'mean/{name.removesuffix(".running_mean")}': array
    for name, array in ours.items()
    if name.endswith('.running_mean')
  }
  # All the means there are.
  differences = assert_close(ours, golden, 'mean', 1e-5, lambda _: 1)
  assert len(differences) == len(ours)


def test_second_step_starts_where_that_of_pytorch_does(five_steps):
  golden = np.load(GOLDEN / 'torch_train_step.npz')
  _, metrics, _ = five_steps
  np.testing.assert_allclose(metrics[1]['loss'], golden['losses'][1], atol=2e-4)
  norm = golden['grad_norms'][1]
  np.testing.assert_allclose(metrics[1]['grad_norm'], norm, rtol=1e-2)


# From the third step on rounding decides: weights that differ by 1e-7 of
# themselves end up to 0.12 and 0.62 of the movement away. Without momentum it
# would be shorter by 60 %.
@pytest.mark.parametrize(
  'name, bound',
  [
    ('logits.weight', 0.25),
    ('conv1.weight', 0.8),
    ('units.15.conv2.weight', 0.8),
  ],
)
def test_five_steps_go_where_those_of_pytorch_go(
  five_steps, torch_model, name, bound
):
  states, _, _ = five_steps
  start = by_torch_name({'params': torch_model[1]['params']})[name]
  end = by_torch_name({'params': states[4].params})[name]
  expected = np.load(GOLDEN / 'torch_train_step.npz')[f'param5/{name}']
  length = np.linalg.norm(expected - start)
  difference = np.linalg.norm(end - expected) / length
  print(f'torch {name}: {difference:.2f} of the movement')
  assert difference < bound
  np.testing.assert_allclose(np.linalg.norm(end - start), length, rtol=0.25)
