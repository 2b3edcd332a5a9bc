"""What cannot be built is refused before anything is read or started."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from miniature import SETTINGS, make_config

from deeplab_jax import build, deeplab_v3
from deeplab_jax import config as default_config
from deeplab_jax.prepare import prepare
from deeplab_jax.runtime.errors import UserError


@pytest.mark.parametrize(
  'key, value',
  [
    ('model.preset', 'pape'),
    ('model.backbone', 'vgg'),
    ('model.output_stride', 12),
    ('model.width', 0.0),
    ('model.width', 1e-9),
    ('model.width', 1 / 128),  # half a channel
    ('model.dtype', 'float16'),
    ('model.bn_decay', 1.0),
    ('model.bn_epsilon', -1.0),
    ('model.aspp_features', 0),
    ('model.multi_grid', ()),
    ('model.multi_grid', (1, 0)),
    ('model.aspp_rates', ()),
    ('model.aspp_rates', (6, -12)),
    ('model.rematerialization', 'all'),
    ('data.crop_size', (33,)),
    ('data.crop_size', (33, 33, 33)),
    ('data.scale', (2.0, 0.5)),
    ('data.scale', (0.0, 2.0)),
    ('data.scale', (1.0,)),
    ('data.scale', (0.5, 1e30)),
    ('data.flip', 1.5),
    ('data.color_jitter', (0.1, 0.1, 0.1)),
    ('data.color_jitter', (0.0, 0.0, 0.0, 0.6)),
    ('data.ignore_label', 256),
    ('eval.protocol', 'crop'),
    ('eval.crop_size', (513,)),
    ('eval.crop_size', (513, 0)),
    ('eval.overlap', 1.0),
    ('eval.scales', ()),
    ('eval.scales', (1.0, 0.0)),
    ('eval.scales', (5.0,)),
    ('loss.class_weights', ('median',)),
    ('loss.class_weights', (1, -2)),
    ('loss.class_weights', (1, 'nan')),
    ('loss.class_weights', ('inf', '1')),
    ('loss.class_weights', (0, 0)),
    ('loss.class_weights', (1, 1e39)),
    ('loss.hardest', 0.0),
    ('loss.hardest', 1.1),
    ('loss.label_smoothing', 1.0),
    ('loss.label_smoothing', -0.1),
    ('loss.auxiliary', -0.1),
    ('optimizer.learning_rate', 0.0),
    ('optimizer.momentum', 1.0),
    ('optimizer.power', -1.0),
    ('optimizer.warmup_steps', -1),
    ('optimizer.weight_decay', -0.1),
    ('optimizer.head_multiplier', -1.0),
    ('optimizer.clip_norm', -1.0),
  ],
)
def test_value_that_no_constructor_takes_is_named_with_its_key(key, value):
  config = make_config({key: value})
  default_config.validate(config)
  with pytest.raises(UserError) as error:
    build.check(config)
  section, _, name = key.rpartition('.')
  assert str(error.value).startswith(f'config.{section}: {name} ')
  assert str(error.value).endswith(f', got {value!r}')


def test_name_of_no_optimizer_is_answered_with_those_there_are():
  with pytest.raises(UserError) as error:
    build.check(make_config({'optimizer.name': 'lion'}))
  assert str(error.value) == (
    "config.optimizer: optimizer must be sgd or adam, got 'lion'"
  )


def test_a_setting_that_is_not_set_is_left_to_the_preset():
  preset = {'model.preset': 'keras'}
  for settings, same in (
    (preset, {**preset, 'model.bn_epsilon': 1.001e-5}),
    ({}, {'model.preset': 'paper'}),
  ):
    models = [build.make_model(make_config(s), 3) for s in (settings, same)]
    assert repr(models[0]) == repr(models[1])


def refusal(mode='train', *, memory=25_000_000_000, hosts=1, **changes):
  """What is said of settings; '' if they may fit."""
  config = default_config.get_config()
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  default_config.validate(config)
  try:
    build.check_machine(
      config, mode, memory=memory, threads=32_765, hosts=hosts
    )
  except UserError as error:
    return str(error)
  return ''


@pytest.mark.parametrize(
  'mode, key, value',
  [
    ('train', 'train.batch_size', 10**9),
    ('train', 'eval.batch_size', 10**9),
    ('eval', 'eval.batch_size', 10**9),
    ('train', 'data.crop_size', (100_000_000, 65)),
    ('train', 'data.crop_size', (65, 10**30)),
    ('train', 'model.width', 1e5),
    ('eval', 'model.width', 1e5),
    ('predict', 'model.width', 3e38),
    ('import', 'model.aspp_features', 10**9),
    ('train', 'model.aspp_rates', (6, 10**9)),
    ('eval', 'model.multi_grid', (1, 10**9, 1)),
    ('train', 'data.threads', 100_000),
    ('train', 'data.workers', 10**6),
  ],
)
def test_what_no_machine_can_hold_is_refused(mode, key, value):
  line = refusal(mode, **{key: value})
  assert line.startswith(f'config.{key}={value}')
  assert 'this machine' in line and '\n' not in line and len(line) < 250


@pytest.mark.parametrize(
  'mode, changes',
  [
    ('train', {}),
    # A recipe of the paper, and a workdir of a large cluster used elsewhere.
    ('train', {'model.width': 1.0, 'data.crop_size': (513, 513)}),
    ('predict', {'train.batch_size': 10**9, 'eval.batch_size': 10**9}),
    ('eval', {'train.batch_size': 10**9, 'data.workers': 10**6}),
    ('eval', {'eval.crop_size': (10**8, 65)}),  # of whole images it is unused
    ('train', {'eval.batch_size': 10**9, 'data.eval_split': ''}),
    ('train', {'eval.panels': 10**30, 'eval.buckets': 10**30}),
  ],
)
def test_what_may_fit_or_is_not_used_is_not_refused(mode, changes):
  assert refusal(mode, **changes) == ''


def test_a_batch_is_shared_by_the_hosts_and_held_twice():
  # Image and label, 4 bytes a pixel, in the thread that loads it and the step.
  need = 2 * 4 * 1000 * 65 * 65
  size = {'train__batch_size': 1000, 'data__crop_size': (65, 65)}
  size |= {'model__dtype': 'bfloat16', 'data__eval_split': ''}
  small = {'model__width': 1 / 64, 'model__aspp_features': 1}
  assert refusal(memory=need, **size, **small) == ''
  assert 'data.crop_size=(65, 65) need at least 0.0338 GB' in refusal(
    memory=need - 1, **size, **small
  )
  assert refusal(memory=-(-need // 4), hosts=4, **size, **small) == ''


def test_a_bound_on_the_parameters_is_below_their_number():
  model = deeplab_v3('resnet18', num_classes=1, width=0.25, aspp_features=64)
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 33, 33, 3)), train=False),
    jax.random.key(0),
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
  assert refusal('predict', memory=4 * count) == ''
  # And not far below: kernels of the last block and the ASPP are most of it.
  assert 'config.model.width' in refusal('predict', memory=2 * count)


def test_where_the_system_does_not_tell_nothing_is_refused():
  assert refusal(memory=None, train__batch_size=10**9) == ''


def test_checking_settings_starts_no_device():
  # JAX may start them only after a process has found its peers.
  program = (
    'from jax._src import xla_bridge as b\n'
    'from deeplab_jax import build, config\n'
    'build.check(config.get_config()); print(b.backends_are_initialized())'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout == 'False\n'


def test_links_out_of_the_data_folder_are_opened_only_if_allowed(
  voc_folder, tmp_path
):
  image = voc_folder / 'JPEGImages' / 'val_0.jpg'
  image.rename(tmp_path / 'other.jpg')
  image.symlink_to(tmp_path / 'other.jpg')
  config = make_config(
    SETTINGS,
    data__dir=str(voc_folder),
    data__prepared_dir=str(tmp_path / 'prepared'),
  )
  for use in (
    lambda: prepare(config, tmp_path / 'w'),
    lambda: build.open_dataset(config, 'val'),
  ):
    with pytest.raises(UserError, match=r'val_0\.jpg leads out of .*/mini, to'):
      use()
  config.data.allow_outside = True
  assert build.open_dataset(config, 'val').tally('val').num_images == 3
