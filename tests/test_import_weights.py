"""Importing, and what can be done at once with what was imported."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import as_options, make_config
from reference import fill, keras_shapes, slim_shapes, write_keras

from deeplab_jax import config as default_config
from deeplab_jax import import_weights, train
from deeplab_jax.checkpoints import Checkpoints
from deeplab_jax.errors import UserError
from deeplab_jax.weights import load
from deeplab_jax.weights.mapping import flatten

BASE = 4


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A small ResNet50V2 as Keras writes it, with kernels of the right size."""
  arrays = fill(keras_shapes(BASE))
  for name, array in arrays.items():
    if name.endswith('kernel'):
      array *= np.prod(array.shape[:-1]) ** -0.5
  return write_keras(tmp_path_factory.mktemp('source') / 'r50.h5', arrays)


def run(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'deeplab_jax.main', *map(str, arguments)],
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def imported(source, trained, tmp_path_factory):
  """A workdir made by the command alone, the network left to the source."""
  workdir = tmp_path_factory.mktemp('imported') / 'w'
  done = run(
    f'--workdir={workdir}',
    '--mode=import',
    f'--config.init_from={source}',
    '--config.model.aspp_features=8',
    *as_options({k: v for k, v in trained.settings.items() if 'data' in k}),
  )
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_import_reports_and_remembers_the_network(imported, source):
  workdir, done = imported
  assert 'loaded: 270 arrays' in done.stderr
  assert 'the file holds a backbone alone' in done.stderr
  config = json.loads((workdir / 'config.json').read_text())
  assert config['model']['preset'] == 'keras'
  assert config['model']['backbone'] == 'resnet50'
  assert config['model']['width'] == BASE / 64
  assert config['model']['bn_epsilon'] == 1.001e-5
  with Checkpoints(workdir, read_only=True) as saved:
    metadata = saved.metadata(0)
    variables = flatten(saved.restore_variables(0))
  assert metadata['model'] == {**config['model'], 'num_classes': 4}
  np.testing.assert_array_equal(
    variables['params/backbone/stem/kernel'],
    load.read_keras(source)['conv1_conv/kernel'],
  )


def test_imported_network_is_evaluated_and_predicts_at_once(imported, trained):
  workdir, _ = imported
  done = run(f'--workdir={workdir}', '--mode=eval')
  assert done.returncode == 0, done.stderr
  assert 'step 0, 3 images' in done.stdout
  assert json.loads((workdir / 'eval.json').read_text())['step'] == 0
  image = next((trained.folder / 'JPEGImages').iterdir())
  done = run(f'--workdir={workdir}', '--mode=predict', image)
  assert done.returncode == 0, done.stderr
  assert (workdir / 'predictions' / f'{image.stem}.png').exists()


def test_training_goes_on_from_what_was_imported(imported, trained, tmp_path):
  workdir = shutil.copytree(imported[0], tmp_path / 'w')
  config = default_config.from_json(workdir / 'config.json')
  config.train.update(trained.config.train)
  config.train.steps = config.train.eval_every = 1
  assert train.train_and_evaluate(config, workdir)['step'] in (0, 1)
  with Checkpoints(workdir, read_only=True) as saved:
    assert saved.latest_step == 1
    assert saved.metadata(1)['model']['preset'] == 'keras'


def test_import_into_a_workdir_in_use_is_refused(imported, source):
  workdir, _ = imported
  done = run(
    f'--workdir={workdir}', '--mode=import', f'--config.init_from={source}'
  )
  assert done.returncode == 1
  assert done.stderr.count('\n') == 1
  assert f'{workdir} has a checkpoint of step 0' in done.stderr


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


def test_settings_that_were_given_are_not_adopted(source):
  config = make_config({'model.width': 0.5}, init_from=str(source))
  import_weights.adopt_settings(config, {'model.width'})
  assert config.model.backbone == 'resnet50'
  assert config.model.width == 0.5
  assert config.model.aspp_features == 256
  with pytest.raises(UserError, match='contradicts'):
    import_weights.open_source(config)


def test_seed_checkpoint_brings_the_classes_of_voc(monkeypatch, tmp_path):
  shapes = list(slim_shapes(BASE))
  monkeypatch.setitem(
    load._KINDS,
    'TensorFlow',
    load._KINDS['TensorFlow']._replace(read=lambda path: fill(shapes)),
  )
  path = tmp_path / 'seed.ckpt'
  path.write_bytes(bytes.fromhex('57fb808b247547db'))
  config = make_config({}, init_from=str(path))
  import_weights.adopt_settings(config, set())
  import_weights.import_weights(config, tmp_path / 'w')
  with Checkpoints(tmp_path / 'w', read_only=True) as saved:
    metadata = saved.metadata(0)
  assert metadata['model']['preset'] == 'seed'
  assert metadata['model']['num_classes'] == 21
  assert metadata['dataset']['classes'][15] == 'person'


def test_training_starts_from_pretrained_weights(
  source, trained, tmp_path, caplog
):
  config = make_config(
    trained.settings,
    init_from=str(source),
    model__backbone='resnet50',
    model__width=BASE / 64,
    optimizer__learning_rate=1e-30,
    train__steps=1,
    train__freeze_bn=True,
  )
  with caplog.at_level('INFO', 'deeplab_jax'):
    train.train_and_evaluate(config, tmp_path)
  assert 'loaded: 270 arrays' in caplog.text
  with Checkpoints(tmp_path, read_only=True) as saved:
    assert saved.metadata(1)['model']['preset'] == 'keras'
    variables = flatten(saved.restore_variables(1))
  np.testing.assert_allclose(
    variables['params/backbone/stem/kernel'],
    load.read_keras(source)['conv1_conv/kernel'],
  )
  # resumes without the source, which '' and a wrong preset both show
  config.init_from = '/nowhere'
  train.train_and_evaluate(config, tmp_path)
  config.model.preset = 'timm'
  with pytest.raises(UserError, match='preset keras there, timm asked for'):
    train.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize('place', ['', 'checkpoints', 'checkpoints/6'])
def test_fine_tuning_to_other_classes_keeps_all_but_the_class_layer(
  trained, tmp_path, caplog, place
):
  folder = shutil.copytree(trained.folder, tmp_path / 'more')
  with (folder / 'classes.txt').open('a') as file:
    file.write('more\n')
  config = make_config(
    trained.settings,
    init_from=str(trained.workdir / place),
    data__dir=str(folder),
    optimizer__learning_rate=1e-30,
    train__steps=1,
    train__freeze_bn=True,
  )
  if place:  # the training once is enough
    pretrained, _ = import_weights.open_source(config)
    assert pretrained.num_classes == 4 and pretrained.presets == ('paper',)
    return
  with caplog.at_level('INFO', 'deeplab_jax'):
    result = train.train_and_evaluate(config, tmp_path / 'w')
  assert list(result['per_class_iou'])[-1] == 'more'
  assert (
    'kept at the initial value: 2 arrays (the file has other classes):'
    ' logits/bias, logits/kernel'
  ) in caplog.text
  with (
    Checkpoints(trained.workdir, read_only=True) as before,
    Checkpoints(tmp_path / 'w', read_only=True) as after,
  ):
    old = flatten(before.restore_variables(before.step_named('best')))
    new = flatten(after.restore_variables(1))
  for path, array in old.items():
    if path.startswith('params/logits'):
      assert new[path].shape[-1] == 5
    else:
      np.testing.assert_allclose(new[path], array, err_msg=path)


def test_reading_another_run_leaves_it_as_it_is(trained, tmp_path):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  folder = workdir / 'checkpoints'
  shutil.copytree(folder / '6', folder / '7.orbax-checkpoint-tmp')
  before = sorted(os.listdir(folder))
  load.open_pretrained(str(workdir))
  assert sorted(os.listdir(folder)) == before
