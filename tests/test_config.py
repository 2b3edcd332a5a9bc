"""Settings that cannot work are refused, with the key and the value."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from deeplab_jax import config as default_config
from deeplab_jax import deeplab_v3
from deeplab_jax.runtime.errors import UserError


def changed(key, value):
  """The default with one value of any type."""
  config = default_config.get_config()
  with config.ignore_type(), config.unlocked():
    config.update_from_flattened_dict({key: value})
  return config


def test_default_is_valid_and_locked():
  config = default_config.get_config()
  default_config.validate(config)
  with pytest.raises(AttributeError):
    config.train.step = 3


def test_every_rule_is_about_a_setting():
  for key in default_config._RULES:
    default_config.check_key(key)


@pytest.mark.parametrize(
  'key, value',
  [
    ('seed', -1),
    ('seed', 2**32),
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
    ('model.aspp_rates', (6, -12)),
    ('data.crop_size', (33,)),
    ('data.crop_size', (33, 33, 3)),
    ('data.crop_size', (33, 0)),
    ('data.scale', (2.0, 0.5)),
    ('data.scale', (0.0, 2.0)),
    ('data.scale', (1.0,)),
    ('data.scale', (0.5, 1e30)),
    ('data.color_jitter', (0.1, 0.1, 0.1)),
    ('data.color_jitter', (0.0, 0.0, 0.0, 0.6)),
    ('data.flip', 1.5),
    ('data.ignore_label', 256),
    ('data.on_bad_image', 'ignore'),
    ('data.holdout', 1.0),
    ('data.threads', -1),
    ('data.workers', -1),
    ('train.steps', 0),
    ('train.steps', 2**31),
    ('train.steps', 10**22),
    ('train.batch_size', 0),
    ('train.log_every', 0),
    ('train.eval_every', -5),
    ('eval.batch_size', 0),
    ('eval.panels', -1),
    ('eval.protocol', 'crop'),
    ('eval.buckets', 0),
    ('eval.crop_size', (513,)),
    ('eval.crop_size', (513, 0)),
    ('eval.overlap', 1.0),
    ('eval.scales', ()),
    ('eval.scales', (1.0, 0.0)),
    ('eval.scales', (5.0,)),
    ('eval.worst_and_best', -1),
    ('eval.step', 'last'),
    ('eval.step', '²'),
    ('data.train_split', ''),
    ('loss.class_weights', 'median'),
    ('loss.class_weights', '1,2,'),
    ('loss.class_weights', '1,-2'),
    ('loss.class_weights', '1,nan'),
    ('loss.class_weights', 'inf,1'),
    ('loss.class_weights', '0,0'),
    ('loss.class_weights', '1,1e39'),
    ('loss.hardest', 0.0),
    ('loss.hardest', 1.1),
    ('loss.label_smoothing', 1.0),
    ('loss.label_smoothing', -0.1),
    ('optimizer.name', 'lion'),
    ('optimizer.learning_rate', 0.0),
    ('optimizer.momentum', 1.0),
    ('optimizer.power', -1.0),
    ('optimizer.warmup_steps', -1),
    ('optimizer.weight_decay', -0.1),
    ('optimizer.head_multiplier', -1.0),
    ('optimizer.clip_norm', -1.0),
  ],
)
def test_value_out_of_range_is_named_with_its_key(key, value):
  with pytest.raises(UserError) as error:
    default_config.validate(changed(key, value))
  assert f'config.{key} must be ' in str(error.value)
  assert str(error.value).endswith(f', got {value!r}')


@pytest.mark.parametrize(
  'key, value, kind',
  [
    ('train.steps', 2.5, 'int'),
    ('train.steps', True, 'int'),
    ('train.sync_bn', 1, 'bool'),
    ('data.dir', None, 'str'),
    ('data.crop_size', (33.0, 33.0), 'int'),
    ('optimizer.learning_rate', '0.1', 'float'),
  ],
)
def test_value_of_another_type_is_named_with_its_key(key, value, kind):
  with pytest.raises(UserError) as error:
    default_config.validate(changed(key, value))
  message = f'config.{key} must be of type {kind}, got {value!r}'
  assert str(error.value) == message


@pytest.mark.parametrize('value', ['', 'median_frequency', '1,0,.5', '2e3'])
def test_class_weights_are_a_word_or_numbers_by_commas(value):
  default_config.validate(changed('loss.class_weights', value))


@pytest.mark.parametrize(
  'value', [float('nan'), float('inf'), 1e39, 10**39, -(10**39)]
)
def test_numbers_must_be_finite(value):
  with pytest.raises(UserError, match=r'config\.data\.flip must be finite'):
    default_config.validate(changed('data.flip', value))


def test_crop_must_hold_a_cell_of_the_feature_map():
  config = changed('data.crop_size', (97, 31))
  default_config.validate(config)  # the default's stride is 8
  config.model.output_stride = 32
  with pytest.raises(UserError, match=r'crop_size=\(97, 31\).*stride=32'):
    default_config.validate(config)


def refusal(mode='train', *, memory=25_000_000_000, hosts=1, **changes):
  """What is said of settings; '' if they may fit."""
  config = default_config.get_config()
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  default_config.validate(config)
  try:
    default_config.check_machine(
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
  assert line.startswith(f'config.{key}={value}: ')
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
  assert 'the loaded batches take at least' in refusal(
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
  assert 'the parameters' in refusal('predict', memory=2 * count)


def test_where_the_system_does_not_tell_nothing_is_refused():
  assert refusal(memory=None, train__batch_size=10**9) == ''


def test_paths_become_absolute_and_sources_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/me')
  config = default_config.get_config()
  config.data.dir, config.data.list = 'a/../b', '~/ids.txt'
  config.init_from, config.predict.output_dir = 'keras', 'out'
  default_config.make_paths_absolute(config, ['data.dir', 'data.list'])
  assert config.data.dir == f'{tmp_path}/b'
  assert config.data.list == '/home/me/ids.txt'
  assert config.predict.output_dir == 'out'
  default_config.make_paths_absolute(config)
  assert config.predict.output_dir == f'{tmp_path}/out'
  assert config.init_from == 'keras' and config.data.prepared_dir == ''
  for source in ('hf://timm/net', 'weights.h5'):
    config.init_from = source
    default_config.make_paths_absolute(config)
    assert config.init_from in (source, f'{tmp_path}/weights.h5')
  assert config.init_from == f'{tmp_path}/weights.h5'


def test_a_folder_is_not_ignored_for_generated_data():
  config = changed('data.dir', '/images')
  with pytest.raises(UserError, match=r'dir=/images is not used .*folder'):
    default_config.validate(config)
  config.data.name = 'folder'
  default_config.validate(config)


@pytest.mark.parametrize(
  'section, words',
  [
    ({}, 'config.optimizer.clip_norm is missing'),
    (3, 'config.optimizer is a section and cannot be set to 3'),
    ({'nme': 'sgd'}, 'unknown key config.optimizer.nme'),
  ],
)
def test_replaced_section_is_named(section, words):
  config = default_config.get_config()
  with config.ignore_type(), config.unlocked():
    config.optimizer = ml_collections.ConfigDict(section) if section != 3 else 3
  with pytest.raises(UserError, match=words.replace('.', r'\.')):
    default_config.validate(config)


@pytest.mark.parametrize(
  'key, words',
  [
    ('nokey', 'unknown key config.nokey; config has data, eval, init_allow'),
    (
      'train.step',
      'unknown key config.train.step; did you mean config.train.steps?'
      ' config.train has batch_size, ',
    ),
    (
      'eval.scale',
      'unknown key config.eval.scale; did you mean config.eval.scales? ',
    ),
    ('steps', 'unknown key config.steps; did you mean config.train.steps? '),
    ('no.train', 'unknown key config.no; config has '),
    ('seed.x', 'unknown key config.seed.x; config.seed is no section'),
  ],
)
def test_unknown_key_is_named_beside_those_there_are(key, words):
  with pytest.raises(UserError) as error:
    default_config.check_key(key)
  assert str(error.value).startswith(words)


def test_saved_configuration_reads_back_the_same(tmp_path):
  config = changed('data.crop_size', (65, 33))
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(default_config.to_json(config)))
  assert default_config.from_json(path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
  'text',
  ['{"train": {"ste', '{"train": {"step": 3}}', '[1]', '{"trian": {"x": 3}}'],
)
def test_damaged_or_strange_saved_configuration_is_named(tmp_path, text):
  path = tmp_path / 'config.json'
  path.write_text(text)
  with pytest.raises(UserError) as error:
    default_config.from_json(path)
  assert str(error.value).startswith(str(path))
  assert '\n' not in str(error.value)


RECIPE = """
from deeplab_jax import config as default
def get_config():
  config = default.get_config()
  {}
  return config
"""


def test_recipe_changes_the_default(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(RECIPE.format('config.train.steps = 7'))
  config = default_config.from_recipe(str(path))
  assert config.train.steps == 7
  expected = default_config.get_config()
  expected.train.steps = 7
  assert config.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
  'text, words',
  [
    ('def get_config(', 'SyntaxError'),
    ('import nosuchmodule', ', line 1: ModuleNotFoundError: No module named'),
    ('x = 1', "KeyError: 'get_config'"),
    ('def get_config(): pass', 'must return a ConfigDict, got None'),
    (RECIPE.format('1 / 0'), ', line 5: ZeroDivisionError'),
    (RECIPE.format('config.nokey = 3'), ', line 5: AttributeError: '),
    (RECIPE.format('config.train.steps = "x"'), ', line 5: TypeError: '),
    (RECIPE.format('raise SystemError("a\\nb")'), 'SystemError: a b'),
  ],
)
def test_recipe_that_fails_is_named_with_its_line(tmp_path, text, words):
  path = tmp_path / 'recipe.py'
  path.write_text(text)
  with pytest.raises(UserError) as error:
    default_config.from_recipe(str(path))
  message = str(error.value)
  assert message.startswith(f'--config={path}') and words in message
  assert '\n' not in message and len(message) < len(str(path)) + 250


@pytest.mark.parametrize('name', ['nope.py', ''])
def test_missing_recipe_is_named(tmp_path, name):
  path = tmp_path / name
  with pytest.raises(UserError, match='no such file') as error:
    default_config.from_recipe(str(path))
  assert str(path) in str(error.value)
