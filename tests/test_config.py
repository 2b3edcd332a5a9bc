"""Settings that cannot work are refused, with the key and the value."""

import itertools
import json
import runpy
from fractions import Fraction
from pathlib import Path

import ml_collections
import pytest

from deeplab_jax import build, configure
from deeplab_jax import config as default_config
from deeplab_jax.runtime import own
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
  for keys, _, _ in default_config._RULES:
    for key in keys.split():
      default_config.check_key(key)


@pytest.mark.parametrize(
  'key, value',
  [
    ('seed', -1),
    ('seed', 2**32),
    ('data.threads', -1),
    ('data.tile', 63),
    ('data.workers', -1),
    ('train.steps', 0),
    ('train.steps', 2**31),
    ('train.steps', 10**22),
    ('train.ema', 1.0),
    ('train.dropout', 1.0),
    ('train.freeze_steps', -1),
    ('train.batch_size', 0),
    ('train.log_every', 0),
    ('train.eval_every', -5),
    ('eval.batch_size', 0),
    ('eval.panels', -1),
    ('eval.buckets', 0),
    ('eval.worst_and_best', -1),
    ('eval.step', 'last'),
    ('eval.step', '²'),
    ('data.train_split', ''),
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
    ('data.dir', 3, 'str'),
    ('data.train_split', None, 'str'),
    ('optimizer.clip_norm', '1', 'float'),
    ('optimizer.name', 3, 'str'),
    ('data.crop_size', (33.0, 33.0), 'int'),
    ('optimizer.learning_rate', '0.1', 'float'),
  ],
)
def test_value_of_another_type_is_named_with_its_key(key, value, kind):
  with pytest.raises(UserError) as error:
    default_config.validate(changed(key, value))
  message = f'config.{key} must be of type {kind}, got {value!r}'
  assert str(error.value) == message


@pytest.mark.parametrize(
  ('text', 'values'),
  [
    ('', ()),
    ('median_frequency', ('median_frequency',)),
    ('1,0,.5', (1, 0, 0.5)),
    ('(1, 0, .5)', (1, 0, 0.5)),
    ('2e3', (2000.0,)),
  ],
)
@pytest.mark.parametrize('by', ['option', 'recipe'])
def test_class_weights_are_a_word_or_numbers_by_commas(text, values, by):
  config = default_config.get_config()
  if by == 'option':
    argv = ['main', f'--config.loss.class_weights={text}']
    assert configure.override(config, argv) == []
  else:
    config.loss.class_weights = text
  default_config.validate(config)
  build.check(config)
  assert config.loss.class_weights == values


def test_patterns_are_words_by_commas():
  config = default_config.get_config()
  argv = ['main', '--config.init_allow=*/moving_mean, logits/*']
  argv.append('--config.train.freeze=backbone/*')
  configure.override(config, argv)
  default_config.validate(config)
  assert config.init_allow == ('*/moving_mean', 'logits/*')
  assert config.train.freeze == ('backbone/*',)


@pytest.mark.parametrize('spelling', ['', '0'])
def test_older_spellings_of_not_set_still_say_so(spelling):
  keys = {
    '': [
      'init_from',
      'model.preset',
      'model.rematerialization',
      'data.dir',
      'data.prepared_dir',
      'data.options.list',
      'predict.output_dir',
    ],
    '0': ['model.bn_epsilon', 'optimizer.clip_norm'],
  }[spelling]
  config = default_config.get_config()
  argv = ['main', *(f'--config.{key}={spelling}' for key in keys)]
  configure.override(config, argv)
  default_config.validate(config)
  assert config.to_dict() == default_config.get_config().to_dict()


def test_nothing_may_be_held_out():
  config = default_config.get_config()
  configure.override(config, ['main', '--config.data.options.holdout=0'])
  default_config.validate(config)
  assert config.data.options.holdout == 0


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


def test_paths_become_absolute_and_sources_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/me')
  config = default_config.get_config()
  config.data.dir, config.data.options.list = 'a/../b', '~/ids.txt'
  config.init_from, config.predict.output_dir = 'keras', 'out'
  configure.make_paths_absolute(config)
  assert config.data.dir == f'{tmp_path}/b'
  assert config.data.options.list == '/home/me/ids.txt'
  assert config.predict.output_dir == f'{tmp_path}/out'
  assert config.init_from == 'keras' and config.data.prepared_dir is None
  for source in ('hf://timm/net', 'weights.h5'):
    config.init_from = source
    configure.make_paths_absolute(config)
    assert config.init_from in (source, f'{tmp_path}/weights.h5')
  assert config.init_from == f'{tmp_path}/weights.h5'


@pytest.mark.parametrize(
  'section, words',
  [
    ({}, 'config.optimizer.clip_norm is missing'),
    (3, 'config.optimizer.clip_norm is missing: the section was replaced'),
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
    ('nokey', 'unknown key config.nokey; config has data, eval, export'),
    (
      'train.step',
      'unknown key config.train.step; did you mean config.train.steps?'
      ' config.train has accumulate, ',
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
  assert configure.from_json(path).to_dict() == config.to_dict()


# What version 0.1.0 wrote.
OLD = {
  'init_from': '',
  'init_allow': '*/a,b',
  'model': {'preset': '', 'bn_epsilon': 0.0, 'multi_grid': [1, 1, 1]},
  'data': {'dir': '', 'list': 'ids.txt', 'holdout': 0.2, 'scale': [1.0, 2.0]},
  'loss': {'class_weights': '1,2', 'name': 'cross_entropy'},
  'optimizer': {'clip_norm': 0.0},
}


@pytest.mark.parametrize(
  ('key', 'value', 'expected'),
  [
    ('loss.class_weights', '', ()),
    ('loss.class_weights', 'median_frequency', ('median_frequency',)),
    ('data.list', '', None),
    ('optimizer.clip_norm', 2.0, 2.0),
  ],
)
def test_settings_of_an_older_workdir_are_read(tmp_path, key, value, expected):
  section, name = key.split('.')
  saved = {**OLD, section: {**OLD[section], name: value}}
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(saved))
  own.remember(saved)
  config = default_config.get_config()
  config.init_allow = ('*/a', 'b')
  config.model.multi_grid, config.data.scale = (1, 1, 1), (1.0, 2.0)
  config.loss.class_weights = (1, 2)
  if key == 'data.list':
    assert expected is None  # then the share has no meaning
  else:
    config.data.options.update(list='ids.txt', holdout=0.2)
    config[section][name] = expected
  assert configure.from_json(path).to_dict() == config.to_dict()


def test_a_function_of_a_recipe_is_saved_by_name_and_needs_it_again(tmp_path):
  path = tmp_path / 'lion.py'
  path.write_text(
    'from deeplab_jax import config as default\n'
    'def optimizer(**settings): pass\n'
    'def get_config():\n'
    '  config = default.get_config()\n'
    '  config.optimizer.name = optimizer\n'
    '  config.data.options.folders = 3\n'
    '  return config\n'
  )
  config = configure.from_recipe(path)
  default_config.validate(config)
  assert callable(config.optimizer.name) and config.data.options.folders == 3
  saved = default_config.to_json(config)
  assert saved['optimizer']['name'] == 'lion.optimizer'
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(UserError) as error:
    configure.from_json(tmp_path / 'config.json')
  assert str(error.value) == (
    f'{tmp_path}/config.json cannot be used: config.optimizer.name='
    'lion.optimizer is a function of a recipe, which --config=RECIPE names;'
    ' pass --config, or remove it'
  )


@pytest.mark.parametrize('terms', [('mine.loss',), (('mine.loss', 0.5),)])
def test_a_term_of_a_recipe_needs_the_recipe_again(tmp_path, terms):
  saved = default_config.to_json(default_config.get_config())
  saved['loss']['terms'] = json.loads(json.dumps(terms))
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  words = r'loss\.terms=mine\.loss is a function of a recipe'
  with pytest.raises(UserError, match=words):
    configure.from_json(tmp_path / 'config.json')


def test_terms_are_read_from_an_option():
  config = default_config.get_config()
  text = '--config.loss.terms=cross_entropy:1,dice:0.5'
  configure.override(config, ['main', text])
  default_config.validate(config)
  assert config.loss.terms == ('cross_entropy:1', 'dice:0.5')


PLACES = {
  'data.dir': '/data',
  'data.prepared_dir': '/prepared',
  'data.options.list': '/ids.txt',
  'data.allow_outside': True,
  'init_from': '/weights.npz',
  'predict.output_dir': '/results',
  'export.output_dir': '/exported',
  'publish.to': '/published',
}


def test_places_are_taken_only_from_settings_that_this_user_wrote(
  tmp_path, caplog
):
  config = default_config.get_config()
  config.train.steps = 7
  config.update_from_flattened_dict(PLACES)
  values = default_config.to_json(config)
  for name in ('theirs', 'ours', 'moved'):
    (tmp_path / f'{name}.json').write_text(json.dumps(values, indent=2))

  def places(name):
    caplog.clear()
    found = default_config.flat(configure.from_json(tmp_path / f'{name}.json'))
    assert found['train.steps'] == 7
    return [key for key in PLACES if found[key]]

  assert places('theirs') == []
  (line,) = caplog.messages
  assert line.startswith(f'{tmp_path}/theirs.json: not taken from ')
  assert all(f'config.{key}' in line for key in PLACES)
  assert places('theirs') == [] and not caplog.messages  # said once
  own.remember(values)
  results = 'output_dir', 'publish.to'
  taken = [key for key in PLACES if not key.endswith(results)]
  assert places('ours') == places('moved') == taken
  values['data']['dir'] = '/elsewhere'
  (tmp_path / 'ours.json').write_text(json.dumps(values))
  assert places('ours') == []


def test_keras_is_no_place_and_is_taken_from_any_workdir(tmp_path, caplog):
  path = tmp_path / 'config.json'
  path.write_text('{"init_from": "keras"}')
  assert configure.from_json(path).init_from == 'keras'
  assert not caplog.messages


def test_without_a_folder_for_notes_settings_count_as_those_of_others(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv('XDG_STATE_HOME', '/dev/null')
  own.remember({'data': {'dir': '/data'}})
  path = tmp_path / 'config.json'
  path.write_text('{"data": {"dir": "/data"}}')
  assert configure.from_json(path).data.dir is None
  assert [('is not used' in line) for line in caplog.messages] == [True, False]


@pytest.mark.parametrize(
  'text',
  [
    *(
      '{"train": {"ste',
      '{"train": {"step": 3}}',
      '[1]',
      '{"trian": {"x": 3}}',
    ),
    *('[' * 99_999, '{"seed": ' * 99_999, f'{{"seed": {"9" * 9_999}}}'),
    '{"seed": 1}' + ' ' * 2**20,
  ],
  ids=itertools.count(),
)
def test_damaged_or_strange_saved_configuration_is_named(tmp_path, text):
  path = tmp_path / 'config.json'
  path.write_text(text)
  with pytest.raises(UserError) as error:
    configure.from_json(path)
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
  config = configure.from_recipe(str(path))
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
    configure.from_recipe(str(path))
  message = str(error.value)
  assert message.startswith(f'--config={path}') and words in message
  assert '\n' not in message and len(message) < len(str(path)) + 250


@pytest.mark.parametrize('name', ['nope.py', ''])
def test_missing_recipe_is_named(tmp_path, name):
  path = tmp_path / name
  with pytest.raises(UserError, match='no such file') as error:
    configure.from_recipe(str(path))
  assert str(path) in str(error.value)


def test_a_wrong_name_of_a_recipe_is_answered_with_those_there_are():
  with pytest.raises(UserError) as error:
    configure.from_recipe('camvid_resnet')
  assert str(error.value).startswith('--config=camvid_resnet: no such file')
  assert str(error.value).endswith(
    'known recipes: camvid_resnet18, camvid_resnet50, finetune, voc_resnet101,'
    ' voc_resnet50, voc_resnet50_seed, voc_resnet50_stage2'
  )


def test_the_page_of_settings_is_current_and_explains_each():
  folder = Path(__file__).parents[1] / 'docs'
  page = runpy.run_path(str(folder / 'settings.py'))['markdown']()
  assert page == (folder / 'settings.md').read_text()
  rows = [line.split('|')[1:-1] for line in page.splitlines()]
  meanings = {row[0].strip(' `'): row[2].strip() for row in rows if row}
  keys = set(default_config.flat(default_config.get_config()))
  assert keys <= set(meanings)
  assert all(meanings[key] for key in keys)


def test_a_log_may_be_a_class_beside_names():
  config = default_config.get_config()
  config.log.to = ('jsonl', Fraction)
  default_config.validate(config)
  assert config.log.to == ('jsonl', Fraction)
  assert default_config.to_json(config)['log'] == {
    'to': ['jsonl', 'fractions.Fraction']
  }
  for text, names in (('wandb', ('wandb',)), ('a, b', ('a', 'b')), ('', ())):
    config.log.to = text
    default_config.validate(config)
    assert config.log.to == names
