"""Every recipe loads, and the paper's one does a step at its own crop."""

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from deeplab_jax import config as default
from deeplab_jax import deeplab_v3, steps
from deeplab_jax.optimizers import make_optimizer

RECIPES = sorted((Path(__file__).parents[1] / 'experiments').glob('*.py'))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_names_its_command(path):
  module = load(path)
  default.validate(module.get_config())
  assert f'--config=experiments/{path.name}' in module.__doc__


def test_voc_recipe_is_the_schedule_of_the_paper():
  config = load(RECIPES[0].parent / 'voc_resnet50.py').get_config()
  assert config.data.crop_size == (513, 513)
  assert (config.train.batch_size, config.train.steps) == (16, 30_000)
  optimizer = config.optimizer
  assert (optimizer.name, optimizer.learning_rate) == ('sgd', 0.007)
  assert (optimizer.power, optimizer.momentum) == (0.9, 0.9)
  assert optimizer.weight_decay == 1e-4
  assert config.model.bn_decay == 0.9997
  assert config.model.output_stride == 16
  assert config.data.scale == (0.5, 2.0)


@pytest.mark.slow
def test_voc_step_at_crop_513_in_bfloat16_stays_within_2_percent():
  config = load(RECIPES[0].parent / 'voc_resnet50.py').get_config()
  rng = np.random.default_rng(0)
  size = config.data.crop_size
  batch = {
    'image': rng.integers(0, 256, (1, 2, *size, 3), np.uint8),
    'label': rng.integers(0, 21, (1, 2, *size), np.uint8),
  }
  settings = config.optimizer
  optimizer = make_optimizer(
    settings.name,
    settings.learning_rate,
    momentum=settings.momentum,
    weight_decay=settings.weight_decay,
  )
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    config.model.dtype = dtype
    model = deeplab_v3(
      num_classes=21, axis_name=steps.AXIS_NAME, **config.model
    )
    step = functools.partial(steps.train_step, model=model, optimizer=optimizer)
    # One device, whatever the suite simulates.
    step = jax.vmap(
      step, axis_name=steps.AXIS_NAME, in_axes=(None, 0), out_axes=(None, 0)
    )
    state, measures = jax.jit(step)(
      steps.create_state(model, optimizer, 0), batch
    )
    losses[dtype] = float(measures['loss'][0])
    assert int(state.step) == 1
  assert np.isfinite(losses['float32'])
  assert losses['bfloat16'] != losses['float32']
  np.testing.assert_allclose(losses['bfloat16'], losses['float32'], rtol=0.02)
