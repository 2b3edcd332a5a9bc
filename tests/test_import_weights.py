"""Importing, and what can be done at once with what was imported."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from miniature import as_options, make_config
from reference import fill, keras_shapes, slim_shapes, write_keras

from deeplab_jax import configure, import_weights, train
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights import load
from deeplab_jax.weights.checkpoints import Checkpoints
from deeplab_jax.weights.mapping import flatten

pytestmark = pytest.mark.compiles

BASE = 4


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A small ResNet50V2 as Keras writes it."""
  arrays = fill(keras_shapes(BASE))
  rng = np.random.default_rng(0)
  for name, array in arrays.items():
    if name.endswith('kernel'):
      array[:] = rng.normal(0, np.prod(array.shape[:-1]) ** -0.5, array.shape)
  return write_keras(tmp_path_factory.mktemp('source') / 'r50.h5', arrays)


def run(*arguments):
  """Runs the command and returns what it wrote."""
  done = subprocess.run(
    [sys.executable, '-m', 'deeplab_jax.main', *map(str, arguments)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done


def data_options(trained):
  """The data set and little else: the network is left to the source."""
  return as_options({k: v for k, v in trained.settings.items() if 'data' in k})


@pytest.fixture(scope='module')
def imported(trained, tmp_path_factory):
  """A workdir made by the command, of a checkpoint of this project."""
  workdir = tmp_path_factory.mktemp('imported') / 'w'
  source = f'--config.init_from={trained.workdir}'
  options = data_options(trained)
  done = run(f'--workdir={workdir}', '--mode=import', source, *options)
  return workdir, done


def test_import_reports_and_remembers_the_network(imported, trained):
  workdir, done = imported
  assert f'weights of {trained.workdir}, preset paper' in done.stderr
  assert 'kept at the initial value: nothing' in done.stderr
  config = json.loads((workdir / 'config.json').read_text())
  assert config['model']['preset'] == 'paper'
  assert config['model']['backbone'] == 'resnet18'
  assert config['model']['width'] == 0.125
  assert config['model']['aspp_features'] == 8
  with (
    Checkpoints(workdir) as saved,
    Checkpoints(trained.workdir) as original,
  ):
    metadata = saved.open(0).metadata
    variables = flatten(saved.open(0).variables)
    expected = original.open('best').variables
  assert metadata['model'] == {**config['model'], 'num_classes': 4}
  for path, array in flatten(expected).items():
    np.testing.assert_array_equal(variables[path], array, path)


def check_eval_and_predict(workdir, trained):
  evaluated = run(f'--workdir={workdir}', '--mode=eval')
  assert 'step 0, 3 images' in evaluated.stdout
  result = json.loads((workdir / 'eval/val_whole.json').read_text())
  assert result['step'] == 0
  image = next((trained.folder / 'JPEGImages').iterdir())
  run(f'--workdir={workdir}', '--mode=predict', image)
  assert (workdir / 'predictions' / f'{image.stem}.png').exists()


def test_imported_network_is_evaluated_and_predicts_at_once(imported, trained):
  check_eval_and_predict(imported[0], trained)


def test_training_goes_on_from_what_was_imported(imported, trained, tmp_path):
  workdir = shutil.copytree(imported[0], tmp_path / 'w')
  config = make_config(
    trained.settings, train__steps=1, optimizer__warmup_steps=0
  )
  train.train_and_evaluate(config, workdir)
  with Checkpoints(workdir) as saved:
    assert saved.latest_step == 1
    assert saved.open(1).metadata['model']['preset'] == 'paper'


def test_import_into_a_workdir_in_use_is_refused(imported):
  config = configure.from_json(imported[0] / 'config.json')
  with pytest.raises(UserError, match='has a checkpoint of step 0; import'):
    import_weights.import_weights(config, imported[0])


@pytest.mark.slow
def test_keras_file_is_imported_evaluated_and_trained_on(
  source, trained, tmp_path
):
  workdir = tmp_path / 'w'
  options = [
    f'--config.init_from={source}',
    '--config.model.aspp_features=8',
    *data_options(trained),
  ]
  done = run(f'--workdir={workdir}', '--mode=import', *options)
  assert 'loaded: 270 arrays' in done.stderr
  assert 'the file holds a backbone alone' in done.stderr
  model = json.loads((workdir / 'config.json').read_text())['model']
  assert model['preset'] == 'keras' and model['backbone'] == 'resnet50'
  assert model['width'] == BASE / 64 and model['bn_epsilon'] == 1.001e-5
  check_eval_and_predict(workdir, trained)
  more = ['--config.train.steps=1', '--config.train.batch_size=4']
  run(f'--workdir={workdir}', *more)
  run(f'--workdir={tmp_path / "v"}', *options, *more)
  for folder in (workdir, tmp_path / 'v'):
    with Checkpoints(folder) as saved:
      assert saved.latest_step == 1
      assert saved.open(1).metadata['model']['preset'] == 'keras'


def test_mapping_is_listed_without_loading(source, tmp_path, capsys):
  workdir = tmp_path / 'w'
  config = make_config(
    {},
    init_from=str(source),
    list=True,
    model__backbone='resnet50',
    model__width=BASE / 64,
  )
  import_weights.import_weights(config, workdir)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 271
  assert 'conv1_conv/kernel -> params/backbone/stem/kernel' in lines
  assert lines[-1] == 'preset: keras'
  assert not workdir.exists()


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'model__preset': 'timm'}, 'preset keras, which contradicts preset=timm'),
    (
      {'model__backbone': 'resnet101'},
      'looks like resnet50, which contradicts'
      ' config.model.backbone=resnet101 (there resnet50)',
    ),
    ({'model__width': 0.5}, 'config.model.width=0.5 (there 0.0625)'),
    ({'model__bn_epsilon': 1e-3}, 'config.model.bn_epsilon=0.001 (there 1.001'),
  ],
)
def test_configuration_that_contradicts_the_source_is_refused(
  source, changes, words
):
  settings = {
    'init_from': str(source),
    'model.backbone': 'resnet50',
    'model.width': BASE / 64,
  }
  with pytest.raises(UserError) as error:
    import_weights.open_source(make_config(settings, **changes))
  assert str(error.value).startswith(str(source))
  assert words in str(error.value)


def test_the_weights_fix_the_network_and_options_win(source):
  config = import_weights.config_of(str(source))
  expected = make_config(
    {},
    init_from=str(source),
    model__preset='keras',
    model__backbone='resnet50',
    model__width=BASE / 64,
    model__aspp_features=256,
  )
  assert config.to_dict() == expected.to_dict()
  import_weights.open_source(config)
  configure.override(config, ['main', '--config.model.width=0.5'])
  with pytest.raises(UserError, match='contradicts'):
    import_weights.open_source(config)


def test_seed_checkpoint_brings_the_classes_of_voc(monkeypatch, tmp_path):
  shapes = list(slim_shapes(BASE))
  monkeypatch.setitem(
    load._KINDS,
    'TensorFlow',
    (lambda path: fill(shapes), *load._KINDS['TensorFlow'][1:]),
  )
  path = tmp_path / 'seed.ckpt'
  path.write_bytes(bytes.fromhex('57fb808b247547db'))
  config = import_weights.config_of(str(path))
  pretrained, config = import_weights.open_source(config)
  assert config.model.preset == 'seed'
  assert config.model.aspp_features == 256
  info = import_weights._dataset_info(config, pretrained)
  assert info.num_classes == 21 and info.classes[15] == 'person'


def test_classes_are_those_of_the_training_split_without_another(
  trained, source
):
  config = make_config(
    trained.settings,
    data__eval_split='',
    init_from=str(source),
    model__backbone='resnet50',
    model__width=BASE / 64,
  )
  pretrained, config = import_weights.open_source(config)
  info = import_weights._dataset_info(config, pretrained)
  assert info.classes == ('ground', 'left', 'right', 'absent')


def test_bands_are_refused_for_weights_of_rgb(trained, tmp_path):
  config = import_weights.config_of(str(trained.workdir))
  config.data.as_stored = True
  with pytest.raises(UserError, match=r'as_stored=True contradicts .*RGB'):
    import_weights.import_weights(config, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('place', ['', 'checkpoints', 'checkpoints/6'])
def test_any_folder_of_a_run_is_a_source(trained, place):
  pretrained = load.open_pretrained(str(trained.workdir / place))
  assert pretrained.num_classes == 4
  assert pretrained.presets == ('paper',)
  assert pretrained.settings['backbone'] == 'resnet18'


def test_fine_tuning_to_other_classes_keeps_all_but_the_class_layer(
  trained, tmp_path, caplog
):
  folder = shutil.copytree(trained.folder, tmp_path / 'more')
  with (folder / 'classes.txt').open('a') as file:
    file.write('more\n')
  config = make_config(
    trained.settings,
    init_from=str(trained.workdir),
    data__dir=str(folder),
    optimizer__learning_rate=1e-30,
    optimizer__warmup_steps=0,
    train__steps=1,
    train__freeze_bn=True,
  )
  workdir = tmp_path / 'w'
  with caplog.at_level('INFO', 'deeplab_jax'):
    result = train.train_and_evaluate(config, workdir)
  assert list(result['per_class_iou'])[-1] == 'more'
  assert (
    'kept at the initial value: 2 arrays (the file has other classes):'
    ' logits/bias, logits/kernel'
  ) in caplog.text
  with (
    Checkpoints(trained.workdir) as before,
    Checkpoints(workdir) as after,
  ):
    old = flatten(before.open('best').variables)
    new = flatten(after.open(1).variables)
  for path, array in old.items():
    if path.startswith('params/logits'):
      assert new[path].shape[-1] == 5
    else:
      np.testing.assert_allclose(new[path], array, err_msg=path)
  # Once there is a checkpoint the source is no longer needed.
  config.init_from = '/nowhere'
  assert train.train_and_evaluate(config, workdir) == result
  config.model.preset = 'timm'
  with pytest.raises(UserError, match='preset paper there, timm asked for'):
    train.train_and_evaluate(config, workdir)


def test_reading_another_run_leaves_it_as_it_is(trained, tmp_path):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  folder = workdir / 'checkpoints'
  shutil.copytree(folder / '6', folder / '7.orbax-checkpoint-tmp')
  before = sorted(os.listdir(folder))
  load.open_pretrained(str(workdir))
  assert sorted(os.listdir(folder)) == before
