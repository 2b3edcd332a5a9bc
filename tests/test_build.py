"""What cannot be built is refused before anything is read or started."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from miniature import SETTINGS, make_config
from PIL import Image

from deeplab_jax import build
from deeplab_jax import config as default_config
from deeplab_jax.configure import from_json, from_recipe
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
    ('data.rotate', -1.0),
    ('data.blur', -0.5),
    ('data.noise', 300.0),
    ('data.cutout', 1.5),
    ('data.crop_max_share', 0.0),
    ('data.transforms', ('blur',)),
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
  shown = value[0] if name == 'transforms' else value
  assert str(error.value).endswith(f', got {shown!r}')


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


_RECIPE = """
import dataclasses
import numpy as np
from deeplab_jax.config import get_config as default


def invert(image, label, rng):
  return image ^ np.uint8(255), label


@dataclasses.dataclass(frozen=True)
class Shift:
  by: int

  def __call__(self, image, label, rng):
    return np.roll(image, self.by, 0), np.roll(label, self.by, 0)


def get_config():
  config = default()
  config.data.transforms = (invert, Shift(3))
  return config
"""


@pytest.mark.xdist_group('alone')  # starts a loader process
def test_a_recipe_adds_transforms_in_one_line(voc_folder, tmp_path):
  (tmp_path / 'own.py').write_text(_RECIPE)
  config = from_recipe(tmp_path / 'own.py')
  changes = {
    **SETTINGS,
    'data.dir': str(voc_folder),
    'data.prepared_dir': str(tmp_path / 'prepared'),
    'data.workers': 1,
  }
  config.update_from_flattened_dict(changes)
  default_config.validate(config)
  build.check(config)
  dataset = build.open_dataset(config, 'train', 'val')
  with contextlib.closing(build.make_iterator(config, dataset, 2)) as batches:
    found = next(batches)
  plain = make_config(changes, data__workers=0)
  with contextlib.closing(build.make_iterator(plain, dataset, 2)) as batches:
    expected = next(batches)
  np.testing.assert_array_equal(
    found['image'], np.roll(255 - expected['image'], 3, 1)
  )
  np.testing.assert_array_equal(
    found['label'], np.roll(expected['label'], 3, 1)
  )
  # A workdir keeps the names; to use it, the recipe is needed again.
  saved = default_config.to_json(config)
  assert saved['data']['transforms'] == ['own.invert', 'own.Shift']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  again = from_json(tmp_path / 'config.json')
  with pytest.raises(UserError, match=r"--config=RECIPE, got 'own\.invert'$"):
    build.check(again)


def test_records_are_drawn_by_class_if_the_setting_says_so(
  voc_folder, tmp_path
):
  # One of six images shows `right`: half of the rows are drawn by class, and
  # one of three classes is that one.
  for number in range(5):
    path = voc_folder / 'SegmentationClass' / f'train_{number}.png'
    with Image.open(path) as label:
      label.paste(0, (0, 0, *label.size))
      label.paste(1, (0, 0, 20, 20))
      label.save(path)
  config = make_config(
    SETTINGS,
    data__dir=str(voc_folder),
    data__prepared_dir=str(tmp_path / 'prepared'),
    data__crop_size=(80, 80),
    data__scale=(1.0, 1.0),
  )
  dataset = build.open_dataset(config, 'train', 'val')
  for share, expected in (
    (0.0, 1 / 6),
    (0.5, 1 / 12 + (1 + 1 / 6 + 1 / 6) / 6),
  ):
    config.data.class_sampling = share
    batches = build.make_iterator(config, dataset, count=600)
    with contextlib.closing(batches):
      label = next(batches)['label']
    found = (label == 2).any((1, 2)).mean()
    assert found == pytest.approx(expected, abs=4 * (0.25 / 600) ** 0.5 * 0.9)
  config.data.class_sampling = 1.5
  with pytest.raises(UserError, match=r'config\.data\.class_sampling must be'):
    default_config.validate(config)


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
