"""What cannot be built is refused before anything is read or started."""

import subprocess
import sys

import pytest
from miniature import SETTINGS, make_config

from deeplab_jax import build
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
    ('optimizer.learning_rate', 0.0),
    ('optimizer.momentum', 1.0),
    ('optimizer.power', -1.0),
    ('optimizer.warmup_steps', -1),
    ('optimizer.weight_decay', -0.1),
    ('optimizer.head_multiplier', -1.0),
    ('optimizer.clip_norm', -1.0),
    ('optimizer.schedule', 'linear'),
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
    "config.optimizer: optimizer must be sgd or adam or adamw, got 'lion'"
  )


def test_a_setting_that_is_not_set_is_left_to_the_preset():
  preset = {'model.preset': 'keras'}
  for settings, same in (
    (preset, {**preset, 'model.bn_epsilon': 1.001e-5}),
    ({}, {'model.preset': 'paper'}),
  ):
    models = [build.make_model(make_config(s), 3) for s in (settings, same)]
    assert repr(models[0]) == repr(models[1])


@pytest.mark.parametrize(
  'key, value',
  [
    ('train.batch_size', 10**9),
    ('eval.batch_size', 10**9),
    ('data.crop_size', (100_000_000, 65)),
    ('data.crop_size', (65, 10**30)),
    ('eval.crop_size', (10**30, 65)),
    ('model.width', 1e5),
    ('model.width', 3e38),
    ('model.aspp_features', 10**9),
    ('model.aspp_rates', (6, 10**9)),
    ('model.multi_grid', (1, 10**9, 1)),
    ('data.threads', 100_000),
    ('data.workers', 10**6),
  ],
)
def test_what_no_machine_can_hold_is_refused(key, value):
  config = default_config.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as error:
    default_config.validate(config)
  assert str(error.value).startswith(f'config.{key} must be ')
  assert len(str(error.value)) < 120


def test_a_batch_whose_images_are_too_many_for_their_size_is_refused():
  config = default_config.get_config()
  changes = {'train.batch_size': 4096, 'data.crop_size': (512, 512)}
  config.update_from_flattened_dict(changes)  # of a large pod
  default_config.validate(config)
  config.data.crop_size = (512, 513)
  with pytest.raises(UserError, match=r'4096 and .*\(512, 513\) make more'):
    default_config.validate(config)


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
