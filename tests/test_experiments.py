"""Every recipe loads, and the paper's one does a step at its own crop."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from miniature import one_device_step

from deeplab_jax import build, configure
from deeplab_jax import config as default
from deeplab_jax.import_weights import open_source
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training import steps

EXPERIMENTS = Path(__file__).parents[1] / 'experiments'
RECIPES = sorted(EXPERIMENTS.glob('*.py'))


def load(name):
  return configure.from_recipe(name)


def description(path):
  return ast.get_docstring(ast.parse(path.read_text()))


def changes(config, base):
  """Settings by dotted key that differ from those of another recipe."""
  base = default.flat(base)
  return {k: v for k, v in default.flat(config).items() if v != base[k]}


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_names_its_command(path):
  config = load(path.stem)
  default.validate(config)
  build.check(config)
  assert default.flat(config) == default.flat(configure.from_recipe(path))
  text = description(path)
  assert f'--config={path.stem} ' in text
  for key in re.findall(r'--config\.([\w.]+)=', text):
    default.check_key(key)


@pytest.mark.parametrize(
  'path', sorted(EXPERIMENTS.glob('voc_*.py')), ids=lambda path: path.stem
)
def test_voc_recipe_ends_with_command_hardware_and_published_number(path):
  command, end = description(path).split('\n\n')[-2:]
  assert command.startswith('python -m deeplab_jax.main --config=voc_')
  hardware, published = end.split('\nPublished, not ours')
  assert hardware.startswith('Hardware, an estimate: ')
  assert re.search(r'\d', published)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_says_only_what_differs_from_its_base(path):
  function = ast.parse(path.read_text()).body[-1]
  base, *assignments, _ = function.body
  name = re.search(r"from_recipe\('(\w+)'\)", ast.unparse(base))
  config = load(name[1]) if name else default.get_config()
  said = [
    ast.unparse(line.targets[0]).removeprefix('config.') for line in assignments
  ]
  assert sorted(said) == sorted(changes(load(path.stem), config))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_ends_with_command_and_result(path):
  command, result = description(path).split('\n\n')[-2:]
  assert command.startswith('python -m deeplab_jax.main --config=')
  assert re.search('^(Result|Published, not ours)', result, re.MULTILINE)


def test_stage_one_is_the_schedule_of_the_paper():
  config = load('voc_resnet50')
  data, train, optimizer = config.data, config.train, config.optimizer
  assert data.name == 'voc2012_segmentation/trainaug'
  assert (data.train_split, data.eval_split) == ('train', 'val')
  assert (data.crop_size, data.scale) == ((513, 513), (0.5, 2.0))
  assert (train.batch_size, train.steps) == (16, 30_000)
  assert not train.freeze_bn
  assert (optimizer.name, optimizer.learning_rate) == ('sgd', 0.007)
  assert (optimizer.power, optimizer.momentum) == (0.9, 0.9)
  assert (optimizer.weight_decay, optimizer.warmup_steps) == (1e-4, 0)
  assert (config.model.backbone, config.model.width) == ('resnet50', 1)
  assert config.model.output_stride == 16
  assert config.model.multi_grid == (1, 2, 4)
  assert config.model.aspp_rates == (6, 12, 18)
  assert config.model.aspp_features == 256
  assert config.model.bn_decay == 0.9997
  assert config.init_from == 'keras'


def test_resnet101_differs_by_its_backbone_alone():
  config = load('voc_resnet101')
  changed = changes(config, load('voc_resnet50'))
  assert changed == {'model.backbone': 'resnet101'}


def test_stage_two_is_that_of_the_paper():
  config = load('voc_resnet50_stage2')
  assert changes(config, load('voc_resnet50')) == {
    'init_from': 'STAGE1_WORKDIR',
    'model.output_stride': 8,
    'data.name': 'voc2012_segmentation/voc2012',
    'data.train_split': 'trainval',
    'data.eval_split': '',
    'train.freeze_bn': True,
    'optimizer.learning_rate': 0.001,
  }


@pytest.mark.parametrize(
  'name, source',
  [
    ('voc_resnet50_stage2', 'STAGE1_WORKDIR'),
    ('voc_resnet50_seed', 'resnet_v2_50_2017_04_14.tar.gz'),
  ],
)
def test_recipe_without_its_weights_names_them(name, source, tmp_path):
  config = load(name)
  assert config.init_from == source
  config.init_from = str(tmp_path / source)
  with pytest.raises(UserError, match=source):
    open_source(config)


def test_seed_recipe_is_the_training_of_the_seed():
  config = load('voc_resnet50_seed')
  assert changes(config, load('voc_resnet50')) == {
    'init_from': 'resnet_v2_50_2017_04_14.tar.gz',
    'model.preset': 'seed',
    'model.bn_decay': 0.997,
    'data.name': 'voc2012_segmentation/list',
    'data.options.list': 'custom_train.txt',
    'data.options.holdout': 0.1,
    'data.eval_split': 'holdout',
    'data.color_jitter': (0.125, 0.5, 0.5, 0.2),
    'train.batch_size': 8,
    'train.steps': 60_000,
    'optimizer.name': 'adam',
    'optimizer.learning_rate': 1e-5,
    'optimizer.power': 0.0,
    'optimizer.weight_decay': 0.0,
  }


@pytest.mark.slow
def test_voc_step_at_crop_513_in_bfloat16_stays_within_2_percent():
  config = load('voc_resnet50')
  rng = np.random.default_rng(0)
  size = config.data.crop_size
  batch = {
    'image': rng.integers(0, 256, (1, 2, *size, 3), np.uint8),
    'label': rng.integers(0, 21, (1, 2, *size), np.uint8),
  }
  _, optimizer = build.make_schedule_and_optimizer(config)
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    config.model.dtype = dtype
    model = build.make_model(config, 21)
    step = one_device_step(model=model, optimizer=optimizer)
    state, metrics = step(steps.create_state(model, optimizer, 0), batch)
    losses[dtype] = float(metrics['loss'][0])
    assert int(state.step) == 1
  assert np.isfinite(losses['float32'])
  assert losses['bfloat16'] != losses['float32']
  np.testing.assert_allclose(losses['bfloat16'], losses['float32'], rtol=0.02)
