"""The command line: modes, settings, and one line for each mistake."""

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from miniature import as_options, make_config
from PIL import Image

from deeplab_jax import config as default_config
from deeplab_jax import main
from deeplab_jax.runtime import console, own
from deeplab_jax.runtime.errors import Preempted, UserError

pytestmark = pytest.mark.compiles


@pytest.fixture
def command(capsys):
  """Function (*arguments) -> exit status, standard output and error."""
  log = logging.getLogger('deeplab_jax')
  before = log.handlers[:], log.level, log.propagate

  def run(*arguments):
    argv = ['main', *map(str, arguments)]
    status = 0
    with flagsaver.flagsaver(), mock.patch.dict(os.environ):
      flags.FLAGS.unparse_flags()
      try:
        console.log_to_stderr()
        rest = console.parse_flags(argv)
        with console.one_line_errors(flags.FLAGS.debug):
          main.main(rest)
      except SystemExit as stop:
        status = stop.code
      finally:
        flags.FLAGS.mark_as_parsed()
        log.handlers[:], log.propagate = before[0], before[2]
        log.setLevel(before[1])
    return status, *capsys.readouterr()

  return run


@pytest.fixture
def refused(command):
  """Function (*arguments) -> the one line that says what is wrong."""

  def run(*arguments):
    status, output, errors = command(*arguments)
    assert status == 1 and output == ''
    (line,) = errors.splitlines()
    assert line.startswith('error: ')
    return line

  return run


@pytest.fixture
def received(monkeypatch):
  """What drivers that do nothing were called with."""
  calls = []
  for mode in main._RUN:
    note = functools.partial(_note, calls, mode)
    monkeypatch.setitem(main._RUN, mode, note)
  return calls


def _note(calls, *call):
  calls.append(call)


def raising(error):
  """A function of any arguments that raises an error."""

  def function(*_):
    raise error

  return function


def test_a_process_that_must_not_be_alone_is_refused(refused, tmp_path):
  line = refused('--distributed=on', f'--workdir={tmp_path}')
  assert '--distributed=on must find several' in line
  assert line.endswith('; start all of them, or use --distributed=off')


@pytest.mark.parametrize(
  'option, words',
  [
    ('--config.nokey=1', 'unknown key config.nokey;'),
    (
      '--config.train.step=3',
      'unknown key config.train.step; did you mean config.train.steps? config',
    ),
    ('--config.nope.key=1', 'unknown key config.nope;'),
    ('--noconfig.train.sync', 'unknown key config.train.sync;'),
    ('--config.train.steps=abc', '--config.train.steps=abc: invalid literal'),
    ('--config.train.steps=2.5', '--config.train.steps=2.5: '),
    ('--config.train.steps=', '--config.train.steps='),
    ('--config.train.sync_bn=maybe', '--config.train.sync_bn=maybe: '),
    ('--config.optimizer={}', 'is missing: the section was replaced'),
    ('--config.optimizer=3', '--config.optimizer=3'),
    ('--config.data.crop_size=(33,)', 'crop_size must be (height, width)'),
    ('--config.data.crop_size=33', 'crop_size must be (height, width)'),
    ('--config.data.crop_size=(33,a)', "of type int, got ('(33', 'a)')"),
    ('--config.data.crop_size=(5,5)', 'config.data.crop_size=(5, 5) must be'),
    (
      '--config.model.output_stride=12',
      'config.model: output_stride must be 8, 16 or 32',
    ),
    ('--config.model.multi_grid=(1,)', 'config.model: multi_grid needs'),
    ('--config.model.backbone=vgg', 'config.model: backbone must be one of'),
    ('--config.train.batch_size=6', 'config.train.batch_size=6 must be divis'),
    ('--config.optimizer.learning_rate=nan', 'learning_rate must be finite'),
    ('--config.data.name=voc', "config.data.name: no data set 'voc'"),
    ('--config.data.dir=/nope', '/nope: no such dataset folder'),
    ('--config.data.train_split=all', 'ImageSets/Segmentation/all.txt'),
    ('--config.seed=-1', 'config.seed must be in 0..2^32 - 1, got -1'),
    ('--config=/nope.py', '--config=/nope.py: no such file'),
    ('--nope=1', "Unknown command line flag 'nope'"),
    ('--mod=eval', "flag 'mod'; did you mean --mode?"),
    ('-mod=eval', "flag 'mod'; did you mean --mode?"),
    ('--confg=a.py', "flag 'confg'; did you mean --config?"),
    ('--nodebgu', "flag 'nodebgu'; did you mean --debug?"),
    ('--confg.train.steps=3', 'did you mean --config.train.steps?'),
    ('--train.steps=3', 'did you mean --config.train.steps?'),
    ('--steps=3', 'did you mean --config.train.steps?'),
    ('--seed=3', 'did you mean --config.seed?'),
    ('--config.train.steps=%s' % (10**22), 'steps must be in 1..2^31 - 1, '),
    ('--config.train.batch_size=99999', 'train.batch_size must be in 1..2^16'),
    ('--config.eval.batch_size=99999', 'eval.batch_size must be in 1..2^16, '),
    ('--config.data.crop_size=(20000,65)', 'at most 2^14, got (20000, 65)'),
    ('--config.model.width=1e-9', 'config.model: width must be above 1/128'),
    ('--config.model.width=17', 'config.model.width must be at most 16, got'),
    ('--config.model.aspp_rates=(5000,)', 'must be at most 4096, got (5000,)'),
    ('--config.data.threads=9999', 'config.data.threads must be in 0..1024'),
    ('--config.data.workers=9999', 'config.data.workers must be in 0..1024'),
    (
      '--config.optimizer.warmup_steps=999',
      'warmup_steps=999 must be at most config.train.steps=',
    ),
    ('--config.data={}', 'is missing: the section was replaced'),
    (
      '--mode=test',
      '--mode=test: value should be one of'
      ' <prepare|train|import|eval|predict|report|compare|export|publish>',
    ),
    ('image.jpg', 'image.jpg: not an option; --mode=train has no inputs'),
    (
      '--config.log.to=jsonl,tensorbord',
      'config.log: to must be tensorboard or jsonl or wandb or mlflow, got'
      " 'tensorbord'",
    ),
    ('--config.log.to=5', 'config.log: to must be tensorboard or'),
  ],
)
def test_option_that_cannot_work_is_refused_in_one_line(
  trained, tmp_path, refused, option, words
):
  key = option.partition('=')[0].removeprefix('--config.')
  settings = {
    name: value
    for name, value in trained.settings.items()
    if name != key and not name.startswith(f'{key}.')
  }
  line = refused(f'--workdir={tmp_path}', *as_options(settings), option)
  assert words in line


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_missing_extra_is_named_before_training(
  trained, tmp_path, refused, monkeypatch, name
):
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  options = as_options(trained.settings), f'--config.log.to=jsonl,{name}'
  line = refused(f'--workdir={tmp_path}/w', *options[0], options[1])
  assert line.startswith(f'error: config.log: to={name}: ')
  assert line.endswith(f"pip install 'deeplab_jax[{name}]'")
  assert not (tmp_path / 'w').exists()


def test_a_missing_extra_matters_to_training_alone(
  trained, tmp_path, command, monkeypatch, received
):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  options = f'--workdir={trained.workdir}', '--config.log.to=wandb'
  assert command(*options, '--mode=eval')[0] == 0
  assert [name for name, *_ in received] == ['eval']


def test_the_mode_report_writes_the_page_again(trained, tmp_path, command):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  (workdir / 'report.html').unlink()
  status, output, _ = command(f'--workdir={workdir}', '--mode=report')
  assert (status, output) == (0, f'report: {workdir}/report.html\n')
  assert (workdir / 'report.html').stat().st_size > 1000


def test_a_workdir_without_a_run_has_no_report(refused, tmp_path):
  line = refused(f'--workdir={tmp_path}/w', '--mode=report')
  assert f'nothing to report in {tmp_path}/w; train there first' in line
  assert not (tmp_path / 'w').exists()


def test_the_mode_compare_takes_two_workdirs_and_needs_none(
  trained, command, refused
):
  pair = trained.workdir, trained.workdir
  status, output, errors = command('--mode=compare', *pair)
  assert (status, errors) == (0, '')
  assert '3 images' in output
  assert 'The difference is not significant' in output
  assert 'takes two workdirs' in refused('--mode=compare', pair[0])


def test_missing_workdir_is_refused(refused):
  assert '--workdir=DIR is missing' in refused()


def test_misspelt_workdir_is_named(refused, tmp_path):
  line = refused(f'--workdri={tmp_path}')
  assert "Unknown command line flag 'workdri'; did you mean --workdir?" in line


@pytest.mark.parametrize('mode', ['eval', 'predict'])
def test_impossible_networks_are_refused_in_all_modes(trained, refused, mode):
  line = refused(
    f'--workdir={trained.workdir}',
    f'--mode={mode}',
    '--config.model.width=1e5',
    *([trained.folder] if mode == 'predict' else []),
  )
  assert 'config.model.width must be at most 16' in line


@pytest.mark.parametrize(
  'options',
  [
    ['--config.eval.scales=(1.0,)', '--config.eval.scales=(0.5,)'],
    ['--config.eval.scales', '(1.0,)', '--config.eval.scales', '(0.5,)'],
    ['-config.eval.scales', '(1.0,)', '--config.eval.scales=(0.5,)'],
    ['--config.eval.scales=1.0,2.0', '-config.eval.scales=0.5'],
    ['--config.eval.scales=(0.5,)'],
  ],
)
def test_of_a_tuple_given_twice_the_last_counts(
  trained, command, received, options
):
  workdir = f'--workdir={trained.workdir}'
  assert (
    command(*options[:2], workdir, *options[2:], '--mode=predict', 'x')[0] == 0
  )
  ((_, config, _, inputs),) = received
  assert config.eval.scales == (0.5,) and inputs == ['x']
  assert config.data.crop_size == (33, 33)


def test_what_stands_after_two_dashes_is_no_option(trained, command, received):
  workdir = f'--workdir={trained.workdir}'
  option = '--config.eval.scales=(2.0,)'
  scales = '--config.eval.scales=(0.5,)'
  command(workdir, '--mode=predict', scales, '--', option)
  ((_, config, _, inputs),) = received
  assert config.eval.scales == (0.5,) and inputs == [option]


def test_a_run_by_relative_paths_goes_on_from_another_folder(
  trained, command, tmp_path, monkeypatch
):
  here, elsewhere = tmp_path / 'here', tmp_path / 'elsewhere'
  shutil.copytree(trained.folder, here / 'mini')
  elsewhere.mkdir()
  settings = {
    **trained.settings,
    'data.dir': 'mini',
    'data.prepared_dir': 'prepared',
    'data.eval_split': '',
  }
  monkeypatch.chdir(here)
  assert command('--workdir=w', *as_options(settings))[0] == 0
  saved = json.loads((here / 'w' / 'config.json').read_text())
  assert saved['data']['dir'] == str(here / 'mini')
  assert saved['data']['prepared_dir'] == str(here / 'prepared')
  monkeypatch.chdir(elsewhere)
  options = '--mode=eval', '--config.data.eval_split=val'
  status, output, _ = command('--workdir=../here/w', *options)
  assert status == 0 and '3 images' in output


@pytest.mark.parametrize('by', ['option', 'recipe'])
def test_relative_paths_of_options_and_recipes_become_absolute(
  command, received, tmp_path, monkeypatch, by
):
  monkeypatch.chdir(tmp_path)
  paths = {
    'data.dir': 'images',
    'data.options.list': '../ids.txt',
    'init_from': 'weights.h5',
    'predict.output_dir': '~/masks',
  }
  options = ['--config.data.name=folder', *as_options(paths)]
  if by == 'recipe':
    (tmp_path / 'recipe.py').write_text(
      'from deeplab_jax import config as default\n'
      'def get_config():\n'
      '  config = default.get_config()\n'
      f'  config.update_from_flattened_dict({paths!r})\n'
      '  config.data.name = "folder"\n'
      '  return config\n'
    )
    options = ['--config=recipe.py']
  monkeypatch.setattr(main.import_weights, 'config_of', lambda *_: None)
  assert command('--workdir=w', *options)[0] == 0
  ((_, config, _),) = received
  assert config.data.dir == f'{tmp_path}/images'
  assert config.data.options.list == f'{tmp_path.parent}/ids.txt'
  assert config.init_from == f'{tmp_path}/weights.h5'
  assert config.predict.output_dir == os.path.expanduser('~/masks')


def test_relative_paths_of_an_older_workdir_mean_the_current_folder(
  trained, command, received, tmp_path, monkeypatch
):
  saved = json.loads((trained.workdir / 'config.json').read_text())
  saved['data']['dir'] = 'mini'
  del saved['data']['options']
  saved['data'] |= {'list': 'old.txt', 'holdout': 0.1}
  own.remember(saved)
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  monkeypatch.chdir(tmp_path)
  command('--workdir=.', '--config.data.options.list=new.txt')
  ((_, config, _),) = received
  assert config.data.dir == f'{tmp_path}/mini'
  assert config.data.options.list == f'{tmp_path}/new.txt'


def test_without_recipe_the_weights_decide_and_options_win(
  trained, command, received, tmp_path
):
  source = f'--config.init_from={trained.workdir}'
  for mode in ('train', 'import'):
    options = f'--workdir={tmp_path}/w', f'--mode={mode}', source
    assert command(*options, '--config.model.aspp_features=9')[0] == 0
    _, config, _ = received.pop()
    expected = make_config(
      {},
      init_from=str(trained.workdir),
      model__preset='paper',
      model__width=0.125,
      model__output_stride=trained.settings['model.output_stride'],
      model__aspp_features=9,
    )
    assert config.to_dict() == expected.to_dict()


def test_a_recipe_by_name_decides_before_the_weights(
  trained, command, received, tmp_path
):
  source = f'--config.init_from={trained.workdir}'
  options = f'--workdir={tmp_path}/w', '--config=camvid_resnet18', source
  assert command(*options)[0] == 0
  ((_, config, _),) = received
  assert config.model.width == 0.5 and config.model.aspp_features == 64


def test_a_recipe_without_a_network_takes_that_of_the_weights_or_workdir(
  trained, command, received, refused, tmp_path
):
  workdir, recipe = f'--workdir={tmp_path}', '--config=finetune'
  assert 'SOURCE' in refused(workdir, recipe)
  source = f'--config.init_from={trained.workdir}'
  assert command(workdir, recipe, source, '--config.train.steps=7')[0] == 0
  _, config, _ = received.pop()
  assert config.model.width == 0.125 and config.train.steps == 7
  assert config.train.freeze == ('backbone/*',)
  # Once the run has begun, the source may be gone.
  (tmp_path / 'config.json').write_text(
    json.dumps(default_config.to_json(config))
  )
  gone = f'--config.init_from={tmp_path}/gone'
  assert command(workdir, recipe, gone)[0] == 0
  _, again, _ = received.pop()
  assert again.model.to_dict() == config.model.to_dict()
  assert again.train.steps == 300


def test_interrupt_ends_in_one_line(command, monkeypatch, tmp_path):
  stop = raising(KeyboardInterrupt())
  monkeypatch.setitem(main._RUN, 'train', stop)
  status, output, errors = command(f'--workdir={tmp_path}')
  assert (status, output, errors) == (130, '', 'interrupted\n')
  with pytest.raises(KeyboardInterrupt):
    command(f'--workdir={tmp_path}', '--debug')


def test_a_preempted_run_ends_with_the_status_of_the_signal(
  command, monkeypatch, tmp_path
):
  stop = raising(Preempted(signal.SIGTERM, 3))
  monkeypatch.setitem(main._RUN, 'train', stop)
  line = 'stopped at step 3; the same command goes on from there\n'
  assert command(f'--workdir={tmp_path}') == (143, '', line)


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (OSError(13, 'Permission denied', 'a.json'), 'a.json: Permission denied'),
  ],
)
def test_what_the_system_refuses_is_one_line(
  command, monkeypatch, tmp_path, error, line
):
  monkeypatch.setitem(main._RUN, 'prepare', raising(error))
  arguments = f'--workdir={tmp_path}', '--mode=prepare'
  assert command(*arguments) == (1, '', f'error: {line}\n')
  with pytest.raises(OSError, match=line.split(': ')[-1]):
    command(*arguments, '--debug')


@pytest.mark.parametrize(
  'start',
  [
    ['-m', 'deeplab_jax.main'],
    ['-c', 'from deeplab_jax.main import entry; entry()'],  # as a script does
  ],
)
def test_help_is_no_error(start):
  run = subprocess.run(
    [sys.executable, *start, '--help'], capture_output=True, text=True
  )
  assert (run.returncode, run.stderr) == (0, '')
  assert 'The command: ' in run.stdout and '--workdir' in run.stdout


def test_a_closed_pipe_ends_in_one_line_after_all_files(trained, tmp_path):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  reading, writing = os.pipe()
  os.close(reading)
  options = f'--workdir={workdir}', '--mode=eval'
  run = subprocess.run(
    [sys.executable, '-m', 'deeplab_jax.main', *options],
    stdout=writing,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(writing)
  assert run.returncode == 128 + signal.SIGPIPE
  assert run.stderr.splitlines()[-1] == 'broken pipe'
  assert 'Traceback' not in run.stderr
  for ending in ('.json', '_worst.png', '_best.png'):
    assert (workdir / f'eval/val_whole{ending}').is_file()


@pytest.mark.parametrize('mode', ['train', 'eval', 'predict', 'prepare'])
def test_workdir_that_is_a_file_is_refused(refused, tmp_path, mode):
  path = tmp_path / 'file'
  path.write_text('')
  assert str(path) in refused(
    f'--workdir={path}',
    f'--mode={mode}',
    *(['x.jpg'] if mode == 'predict' else []),
  )
  assert str(path) in refused(f'--workdir={path}/w', f'--mode={mode}')


@pytest.mark.parametrize('mode', ['eval', 'predict', 'export'])
def test_workdir_without_checkpoint_is_refused(refused, tmp_path, mode):
  line = refused(f'--workdir={tmp_path}/w', f'--mode={mode}')
  assert f'no checkpoint in {tmp_path}/w' in line
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('text', ['def get_config(', 'def get_config(): 1 / 0'])
def test_recipe_that_fails_is_refused(refused, tmp_path, text):
  path = tmp_path / 'recipe.py'
  path.write_text(text)
  assert str(path) in refused(f'--workdir={tmp_path}', f'--config={path}')


@pytest.mark.parametrize('mode', ['train', 'eval', 'predict'])
def test_workdir_of_another_network_is_refused(trained, refused, mode):
  line = refused(
    f'--workdir={trained.workdir}',
    f'--mode={mode}',
    '--config.model.width=0.25',
    *([trained.folder] if mode == 'predict' else []),
  )
  assert 'width 0.125 there, 0.25 asked for' in line


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_workdir_of_other_classes_is_refused(trained, refused, tmp_path, mode):
  folder = shutil.copytree(trained.folder, tmp_path / 'more')
  with (folder / 'classes.txt').open('a') as file:
    file.write('one more\n')
  line = refused(
    f'--workdir={trained.workdir}',
    f'--mode={mode}',
    f'--config.data.dir={folder}',
  )
  assert 'num_classes 4 there, 5 asked for' in line


@pytest.mark.parametrize('mode', ['train', 'eval', 'predict'])
def test_where_all_are_damaged_each_checkpoint_has_a_line(
  trained, command, tmp_path, mode
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  for step in (workdir / 'checkpoints').iterdir():
    (step / 'metadata' / 'metadata').write_text('{')
  inputs = [trained.folder] if mode == 'predict' else []
  status, _, errors = command(f'--workdir={workdir}', f'--mode={mode}', *inputs)
  *skipped, last = [x for x in errors.splitlines() if 'is damaged' in x]
  assert status == 1 and len(skipped) == 2
  assert all(line.endswith('it is skipped') for line in skipped)
  assert last.startswith(f'error: {workdir / "checkpoints"}')


def test_checkpoint_of_another_optimizer_is_refused(trained, command, tmp_path):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  status, _, errors = command(
    f'--workdir={workdir}',
    '--config.train.steps=7',
    '--config.optimizer.name=adam',
  )
  line = errors.splitlines()[-1]
  assert status == 1 and 'needs the config.optimizer it came from' in line


def test_damaged_saved_configuration_is_refused(refused, tmp_path):
  (tmp_path / 'config.json').write_text('{')
  assert str(tmp_path / 'config.json') in refused(f'--workdir={tmp_path}')


def test_unreadable_image_stops_training(trained, refused, tmp_path):
  folder = shutil.copytree(trained.folder, tmp_path / 'bad')
  path = folder / 'JPEGImages' / 'train_3.jpg'
  path.write_bytes(path.read_bytes()[:300])
  settings = {**trained.settings, 'data.dir': folder}
  line = refused(f'--workdir={tmp_path}/w', *as_options(settings))
  assert str(path) in line and "config.data.on_bad_image='skip'" in line


def test_debug_shows_where_a_mistake_was_found(command, tmp_path):
  with pytest.raises(UserError, match='unknown key'):
    command(f'--workdir={tmp_path}', '--debug', '--config.nokey=1')
  with pytest.raises(UserError, match='Unknown command line flag'):
    command(f'--workdir={tmp_path}', '--debug', '--nope')


@pytest.mark.parametrize('debug', [False, True])
def test_process_prints_one_line_or_with_debug_a_traceback(tmp_path, debug):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'deeplab_jax.main',
      f'--workdir={tmp_path}',
      '--config.data.name=folder',
      '--config.data.dir=/nope',
      *(['--debug'] if debug else []),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and done.stdout == ''
  if debug:
    assert 'Traceback (most recent call last)' in done.stderr
    assert 'UserError: /nope: no such dataset folder' in done.stderr
  else:
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: /nope: no such dataset folder')


def test_without_recipe_a_new_workdir_takes_the_default(
  command, received, tmp_path
):
  assert command(f'--workdir={tmp_path}/w')[0] == 0
  ((name, config, workdir),) = received
  assert name == 'train' and workdir == tmp_path / 'w'
  assert config.to_dict() == default_config.get_config().to_dict()


@pytest.mark.parametrize('mode', ['train', 'eval', 'predict'])
def test_without_recipe_a_workdir_takes_its_own_settings(
  trained, command, received, mode
):
  inputs = ['a.jpg', 'b'] if mode == 'predict' else []
  options = [f'--workdir={trained.workdir}', f'--mode={mode}']
  override = ['--config.eval.step=latest', '--noconfig.train.sync_bn']
  assert command(*override, *options, *inputs)[0] == 0
  ((_, config, _, *rest),) = received
  expected = make_config(
    trained.settings,
    eval__step='latest',
    train__sync_bn=False,
    model__preset='paper',
  )
  assert config.to_dict() == expected.to_dict()
  assert rest == ([inputs] if inputs else [])


def test_recipe_comes_before_the_workdirs_settings_wherever_it_stands(
  trained, command, received, tmp_path
):
  path = tmp_path / 'recipe.py'
  path.write_text(
    'from deeplab_jax import config as default\n'
    'def get_config():\n'
    '  config = default.get_config()\n'
    '  config.train.steps, config.train.batch_size = 7, 12\n'
    '  return config\n'
  )
  command(
    '--config.train.batch_size=8',
    f'--workdir={trained.workdir}',
    f'--config={path}',
  )
  ((_, config, _),) = received
  expected = default_config.get_config()
  expected.train.steps, expected.train.batch_size = 7, 8
  assert config.to_dict() == expected.to_dict()


FUNCTIONS = """
import optax
from deeplab_jax import config as default
from deeplab_jax.data import folder
from deeplab_jax.evaluation.protocols import PROTOCOLS
from deeplab_jax.models.resnet import BACKBONES
from deeplab_jax.training.losses import softmax_cross_entropy

def backbone(**settings):
  print('my backbone')
  return BACKBONES['resnet18'](**settings)

def data(*, directory, prepared_dir, splits, ignore_label, words):
  print(words)
  return folder.load(
    directory=directory,
    prepared_dir=prepared_dir,
    splits=splits,
    ignore_label=ignore_label,
    label_map='',
    on_bad_image='stop',
  )

def loss(*arguments):
  print('my loss')
  return softmax_cross_entropy(*arguments)

def optimizer(momentum):
  print('my optimizer')
  return optax.scale_by_lion()

def protocol(**settings):
  print('my protocol')
  return PROTOCOLS['whole'](**settings)

def get_config():
  config = default.get_config()
  config.model.backbone, config.data.name = backbone, data
  config.loss.terms, config.optimizer.name = (loss,), optimizer
  config.eval.protocol = protocol
  config.data.options.words = 'my data'
  return config
"""


def test_a_recipe_may_pass_functions_and_is_named_again(
  trained, command, tmp_path
):
  (tmp_path / 'mine.py').write_text(FUNCTIONS)
  names = 'model.backbone', 'data.name', 'optimizer.name'
  settings = {k: v for k, v in trained.settings.items() if k not in names}
  settings |= {'train.steps': 1, 'optimizer.warmup_steps': 0}
  recipe = f'--config={tmp_path}/mine.py', f'--workdir={tmp_path}/w'
  status, output, _ = command(*recipe, *as_options(settings))
  assert status == 0
  for what in ('backbone', 'data', 'loss', 'optimizer', 'protocol'):
    assert f'my {what}\n' in output
  saved = json.loads((tmp_path / 'w' / 'config.json').read_text())
  assert saved['model']['backbone'] == 'mine.backbone'
  assert saved['eval']['protocol'] == 'mine.protocol'
  status, _, errors = command(recipe[1], '--mode=eval')
  assert status == 1 and 'which --config=RECIPE names' in errors
  more = *recipe, '--mode=eval', *as_options(settings)
  assert command(*more)[0] == 0
  lion = '--config.optimizer.name=mine.optimizer'
  status, _, errors = command(*recipe, *as_options(settings), lion)
  assert status == 1 and 'mine.optimizer is a function of a recipe' in errors


def test_a_workdir_of_somebody_else_steers_no_paths(trained, command, tmp_path):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  saved = json.loads((workdir / 'config.json').read_text())
  saved['predict']['output_dir'] = str(tmp_path / 'elsewhere')
  (workdir / 'config.json').write_text(json.dumps(saved))
  picture = trained.folder / 'JPEGImages' / 'val_0.jpg'
  status, _, errors = command(f'--workdir={workdir}', '--mode=predict', picture)
  (line,) = errors.splitlines()
  assert status == 0 and line == (
    f'{workdir}/config.json: not taken from a file that others may have'
    ' written: config.predict.output_dir, config.data.dir,'
    ' config.data.prepared_dir; give them as options if needed'
  )
  assert (workdir / 'predictions' / 'val_0.png').exists()
  assert not (tmp_path / 'elsewhere').exists()
  status, _, errors = command(f'--workdir={workdir}', '--mode=eval')
  assert status == 1 and errors.startswith('error: config.data.dir is empty')


def test_workdir_alone_is_enough_to_evaluate_and_predict(
  trained, command, tmp_path
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  before = json.loads((workdir / 'eval.json').read_text())
  status, output, errors = command(f'--workdir={workdir}', '--mode=eval')
  assert (status, errors) == (0, '')
  assert 'frequency weighted IoU' in output
  found = json.loads((workdir / 'eval/val_whole.json').read_text())
  assert found == before
  pictures = trained.folder / 'JPEGImages' / 'val_*'
  status, output, errors = command(
    f'--workdir={workdir}', '--mode=predict', pictures
  )
  assert (status, errors) == (0, '')
  # A head, a rule, four classes, and where the results are.
  assert len(output.splitlines()) == 7
  for index in range(3):
    name = f'val_{index}'
    with (
      Image.open(workdir / 'predictions' / f'{name}.png') as result,
      Image.open(trained.folder / 'JPEGImages' / f'{name}.jpg') as source,
    ):
      assert result.size == source.size


def test_prepare_needs_no_workdir(trained, command):
  options = ['--mode=prepare', *as_options(trained.settings)]
  status, output, _ = command(*options)
  assert status == 0 and 'class weights by median frequency' in output
  *_, page = output.splitlines()
  assert page.startswith(trained.settings['data.prepared_dir'])
  with Image.open(page) as image:
    assert image.format == 'PNG'


def test_prepare_ends_a_report_of_errors_with_one_line(
  trained, command, tmp_path
):
  folder = shutil.copytree(trained.folder, tmp_path / 'bad')
  (folder / 'JPEGImages' / 'val_1.jpg').unlink()
  settings = {**trained.settings, 'data.dir': folder}
  status, output, errors = command('--mode=prepare', *as_options(settings))
  assert status == 1 and "there is no image 'val_1'" in output
  assert errors.splitlines()[-1] == (
    f'error: {folder}: cannot be used; correct the 1 error listed above'
  )


def test_main_joins_no_cluster_here():
  assert jax.process_count() == 1
