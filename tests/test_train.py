"""Runs of the trainer: resuming, what they leave behind, how they stop."""

import contextlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from miniature import as_options, make_config, share_programs
from PIL import Image

from deeplab_jax import build, evaluate, import_weights, train
from deeplab_jax.evaluation.protocols import Protocol
from deeplab_jax.prepare import prepare
from deeplab_jax.runtime import own
from deeplab_jax.runtime.errors import Preempted, UserError
from deeplab_jax.runtime.files import held
from deeplab_jax.train import train_and_evaluate
from deeplab_jax.training import losses
from deeplab_jax.weights import load, networks
from deeplab_jax.weights.checkpoints import Checkpoints

pytestmark = pytest.mark.compiles

METRICS = {
  'miou',
  'pixel_accuracy',
  'mean_accuracy',
  'frequency_weighted_iou',
  'mean_precision',
  'mean_f1',
  'per_class_iou',
  'per_class_accuracy',
  'per_class_precision',
  'per_class_f1',
  'interval_95',
  'per_image_miou',
  'per_image_pixel_accuracy',
  'per_image_mean_accuracy',
  'per_image_frequency_weighted_iou',
  'images',
  'split',
  'protocol',
  'output_stride',
  'scales',
  'flip',
  'step',
}


@pytest.fixture(scope='module', autouse=True)
def programs():
  """Each program of these runs is traced once."""
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    yield


@pytest.fixture(scope='module')
def stopped(trained, tmp_path_factory):
  """The workdir of the same run, sent a SIGTERM in its third step."""
  workdir = tmp_path_factory.mktemp('stopped')
  show = train.Progress.update

  def update(progress, step, values):
    show(progress, step, values)
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.Progress, 'update', update)
    with pytest.raises(Preempted) as stop:
      train_and_evaluate(trained.config, workdir)
  assert (stop.value.signal, stop.value.step) == (signal.SIGTERM, 3)
  return workdir


def note(events, patch, owner, name, event=None):
  """Lets a function add `event`, or its name, to `events` when it is called."""
  function = getattr(owner, name)

  def noting(*arguments, **options):
    events.append(event or name)
    return function(*arguments, **options)

  patch.setattr(owner, name, noting)


@pytest.fixture(scope='module')
def unevaluated(trained, tmp_path_factory):
  """The same run without evaluation: config, workdir, result, texts, events.

  The events are how it saves, and 'config.json' when that is written.
  """
  workdir, events = tmp_path_factory.mktemp('unevaluated'), []
  config = make_config(trained.settings, data__eval_split='')
  save, write = Checkpoints.save, train.write_json

  def saving(checkpoints, state, *arguments, **named):
    events.append(int(state.step))
    save(checkpoints, state, *arguments, **named)

  def writing(path, value):
    assert (workdir / 'checkpoints' / '2').is_dir()
    events.append(path.name)
    write(path, value)

  with (
    pytest.MonkeyPatch.context() as patch,
    contextlib.redirect_stdout(io.StringIO()) as output,
    contextlib.redirect_stderr(io.StringIO()) as errors,
  ):
    patch.setattr(Checkpoints, 'save', saving)
    patch.setattr(train, 'write_json', writing)
    result = train_and_evaluate(config, workdir)
  return types.SimpleNamespace(
    config=config,
    workdir=workdir,
    result=result,
    output=output.getvalue(),
    errors=errors.getvalue(),
    events=events,
  )


def read_state(workdir, step):
  with Checkpoints(workdir) as saved:
    assert saved.latest_step == step
    variables = saved.open(step).variables
  return jax.tree_util.tree_leaves_with_path(variables)


def read_lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [
    {k: v for k, v in line.items() if k != 'images_per_second'}
    for line in lines
  ]


def assert_same_run(workdir, other):
  ours, theirs = read_state(workdir, 6), read_state(other, 6)
  assert len(ours) == len(theirs) > 0
  for (path, leaf), (_, expected) in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(leaf, expected, str(path))
  assert read_lines(workdir) == read_lines(other)


def test_run_stopped_after_three_steps_goes_on_as_if_it_never_stopped(
  trained, stopped, tmp_path
):
  workdir = shutil.copytree(stopped, tmp_path / 'w')
  assert [line['step'] for line in read_lines(workdir)] == [1, 2, 2, 3]
  read_state(workdir, 3)
  assert train_and_evaluate(trained.config, workdir) == trained.result
  assert_same_run(workdir, trained.workdir)


def test_run_in_a_thread_is_that_in_the_main_thread(trained, tmp_path):
  results = []
  thread = threading.Thread(
    target=lambda: results.append(train_and_evaluate(trained.config, tmp_path))
  )
  thread.start()
  thread.join()
  assert results == [trained.result]
  assert_same_run(tmp_path, trained.workdir)


def test_logged_speed_is_that_of_steps_after_the_first(
  trained, tmp_path, monkeypatch
):
  now = 0.0

  def taking(seconds, function):
    def run(*args, **named):
      nonlocal now
      now += next(seconds)
      return function(*args, **named)

    return run

  make, save = build.make_train_step, Checkpoints.save
  monkeypatch.setattr(
    build,
    'make_train_step',
    lambda *arguments, **of_data: taking(
      itertools.chain([60.0], itertools.repeat(2.0)),
      make(*arguments, **of_data),
    ),
  )
  monkeypatch.setattr(Checkpoints, 'save', taking(itertools.repeat(99.0), save))
  monkeypatch.setattr(train.time, 'monotonic', lambda: now)
  config = make_config(
    trained.settings,
    data__eval_split='',
    train__log_every=2,
    train__eval_every=3,
    train__steps=6,
  )
  train_and_evaluate(config, tmp_path)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  speeds = [json.loads(line)['images_per_second'] for line in lines]
  assert speeds == [config.train.batch_size / 2.0] * 3


def test_signal_during_set_up_stops_before_the_first_step(
  trained, tmp_path, monkeypatch
):
  create = train.steps.create_state

  def signalled(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return create(*arguments)

  monkeypatch.setattr(train.steps, 'create_state', signalled)
  with pytest.raises(Preempted, match='stopped at step 0;') as stop:
    train_and_evaluate(trained.config, tmp_path)
  assert stop.value.signal == signal.SIGTERM
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step is None


@pytest.mark.parametrize(
  'name, status',
  [
    ('SIGTERM', 143),
    pytest.param('SIGINT', 130, marks=pytest.mark.slow),
  ],
)
def test_signalled_process_saves_and_the_next_run_goes_on(
  trained, tmp_path, name, status
):
  workdir = tmp_path / 'w'
  settings = {**trained.settings, 'train.eval_every': 1}
  command = [sys.executable, '-m', 'deeplab_jax.main', f'--workdir={workdir}']
  process = subprocess.Popen(
    [*command, *as_options(settings)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if line.startswith('step 1/6'):
      process.send_signal(getattr(signal, name))
      break
  _, rest = process.communicate(timeout=120)
  assert process.returncode == status, rest
  with Checkpoints(workdir) as saved:
    step = saved.latest_step
  assert 1 <= step < 6
  assert rest.splitlines()[-1].startswith(f'stopped at step {step}')
  train_and_evaluate(make_config(settings), workdir)
  ours, theirs = read_state(workdir, 6), read_state(trained.workdir, 6)
  for (path, leaf), (_, expected) in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(leaf, expected, str(path))


def test_finished_workdir_is_reported_without_training(
  trained, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  before = (workdir / 'eval.json').read_text()
  (workdir / 'eval.json').unlink()
  monkeypatch.setattr(train, '_train', None)
  assert train_and_evaluate(trained.config, workdir) == trained.result
  assert (workdir / 'eval.json').read_text() == before
  assert 'pixel accuracy' in capsys.readouterr().out


def test_settings_that_change_are_named(trained, tmp_path, monkeypatch, caplog):
  caplog.set_level(logging.INFO)
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  monkeypatch.setattr(train, '_train', lambda *_: sys.exit())

  def said(**changes):
    caplog.clear()
    config = make_config(trained.settings, **changes)
    with contextlib.suppress(SystemExit):
      train_and_evaluate(config, workdir)
    return [m for m in caplog.messages if '(was ' in m]

  rate = 'config.optimizer.learning_rate=0.1 (was 0.05)'
  assert said() == []
  assert said(optimizer__learning_rate=0.1) == [
    f'not used, since no step is left: {rate}'
  ]
  (changed,) = said(optimizer__learning_rate=0.1, train__steps=8)
  assert changed.startswith('changed: ')
  assert rate in changed and 'config.train.steps=8 (was 6)' in changed
  (workdir / 'config.json').write_text('{')
  assert said(optimizer__learning_rate=0.1) == []


def test_workdir_whose_only_checkpoint_is_unevaluated_is_evaluated(
  trained, stopped, tmp_path
):
  workdir = shutil.copytree(stopped, tmp_path / 'w')
  for step in (workdir / 'checkpoints').iterdir():
    if step.name != '3':
      shutil.rmtree(step)
  result = train_and_evaluate(
    make_config(trained.settings, train__steps=3), workdir
  )
  assert result['step'] == 3 and result['images'] == 3
  assert json.loads((workdir / 'eval.json').read_text()) == result


def test_run_leaves_its_files(trained):
  workdir = trained.workdir
  result = json.loads((workdir / 'eval.json').read_text())
  assert result == trained.result
  assert set(result) == METRICS
  assert result['images'] == 3
  assert list(result['per_class_iou']) == ['ground', 'left', 'right', 'absent']
  assert result['per_class_accuracy']['absent'] is None
  config = json.loads((workdir / 'config.json').read_text())
  assert config['model']['width'] == 0.125
  assert config['data']['crop_size'] == [33, 33]
  lines = read_lines(workdir)
  assert [x['step'] for x in lines if 'loss' in x] == [1, 2, 3, 4, 5, 6]
  scores = {x['step']: x['eval_miou'] for x in lines if 'eval_miou' in x}
  assert list(scores) == [2, 4, 6]
  best = result['step']
  assert result['miou'] == scores[best] == max(scores.values())
  kept = {int(path.name) for path in (workdir / 'checkpoints').iterdir()}
  assert kept == {2, 4, 6}
  panels = sorted((workdir / 'panels').iterdir())
  assert [p.name for p in panels] == [f'step_{s:08d}.png' for s in (2, 4, 6)]
  assert all(np.asarray(Image.open(p)).shape[2:] == (3,) for p in panels)
  assert any((workdir / 'tensorboard').glob('events*'))


def test_a_second_run_in_a_workdir_is_refused_and_leaves_it_alone(
  trained, tmp_path
):
  workdir = tmp_path / 'w'
  unfinished = workdir / 'checkpoints' / '4.orbax-checkpoint-tmp'
  unfinished.mkdir(parents=True)
  with held(workdir):
    words = f'{workdir} is in use by process {os.getpid()} on .*--workdir'
    with pytest.raises(UserError, match=words):
      train_and_evaluate(trained.config, workdir)
    assert unfinished.exists()  # it may be the other one's
  assert sorted(os.listdir(workdir)) == ['checkpoints']


def test_a_run_whose_workdir_is_deleted_ends_with_one_line(trained, tmp_path):
  workdir = tmp_path / 'w'
  settings = {**trained.settings, 'train.steps': 500, 'train.eval_every': 40}
  command = [sys.executable, '-m', 'deeplab_jax.main', f'--workdir={workdir}']
  with subprocess.Popen(
    [*command, *as_options(settings)], stderr=subprocess.PIPE, text=True
  ) as process:
    for line in process.stderr:
      if line.startswith('step  50/500'):
        shutil.rmtree(workdir, ignore_errors=True)
        break
    rest = process.stderr.read()
  assert process.returncode == 1, rest
  said = [line for line in rest.splitlines() if not line.startswith('step')]
  assert said[-1].startswith(f'error: {workdir}'), rest
  assert 'was removed' in said[-1] and said[-1].endswith('start again'), rest
  assert 'Traceback' not in rest


def test_without_a_split_to_evaluate_a_run_saves_and_scores_nothing(
  trained, unevaluated, monkeypatch
):
  workdir = unevaluated.workdir
  assert unevaluated.result == {'step': 6}
  words = 'step 6, not evaluated: config.data.eval_split is empty'
  assert words in unevaluated.output
  assert [x for x in unevaluated.events if isinstance(x, int)] == [2, 4, 6]
  ours, theirs = read_state(workdir, 6), read_state(trained.workdir, 6)
  for (path, leaf), (_, expected) in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(leaf, expected, str(path))
  losses = [line for line in read_lines(trained.workdir) if 'loss' in line]
  assert read_lines(workdir) == losses
  assert not (workdir / 'eval.json').exists()
  assert not (workdir / 'panels').exists()
  with Checkpoints(workdir) as saved:
    assert saved.best_step == 6
  monkeypatch.setattr(train, '_train', None)
  assert train_and_evaluate(unevaluated.config, workdir) == {'step': 6}


def test_steps_follow_each_other_without_waiting(
  trained, tmp_path, monkeypatch
):
  events = []
  make = build.make_train_step

  def noting(*arguments, **of_data):
    step = make(*arguments, **of_data)
    holder = types.SimpleNamespace(step=step)
    note(events, monkeypatch, holder, 'step')
    note(events, monkeypatch, train.distributed, 'put')
    note(events, monkeypatch, jax, 'device_get', 'fetch')
    note(events, monkeypatch, jax, 'block_until_ready', 'fetch')
    return holder.step

  monkeypatch.setattr(build, 'make_train_step', noting)
  config = make_config(
    trained.settings,
    data__eval_split='',
    train__log_every=6,
    train__eval_every=6,
  )
  train_and_evaluate(config, tmp_path)
  # The next batch goes to the devices after the step was handed to them.
  loop = events[events.index('put') :]
  assert loop[:13] == ['put', *['step', 'put'] * 5, 'step', 'fetch']


def test_settings_of_the_loss_reach_the_step(trained, tmp_path, monkeypatch):
  received = {}
  monkeypatch.setattr(
    train.steps, 'pmap_train_step', lambda **settings: received.update(settings)
  )
  monkeypatch.setattr(build, 'make_iterator', lambda *_: sys.exit())
  config = make_config(
    trained.settings,
    loss__class_weights=(1, 2, 0, 0.5),
    loss__hardest=0.3,
    loss__label_smoothing=0.1,
    loss__terms=('cross_entropy', 'dice:0.5'),
    loss__auxiliary=0.4,
    train__batch_size=8,
    train__accumulate=2,
  )
  with pytest.raises(SystemExit):
    train_and_evaluate(config, tmp_path)
  assert received['accumulate'] == 2
  assert received['class_weights'] == (1, 2, 0, 0.5)
  assert (received['hardest'], received['label_smoothing']) == (0.3, 0.1)
  assert received['terms'] == ('cross_entropy', 'dice:0.5')
  assert received['auxiliary'] == 0.4 and received['model'].auxiliary


def halved(logits, labels, ignore_label, label_smoothing):
  return 0.5 * losses.softmax_cross_entropy(
    logits, labels, ignore_label, label_smoothing
  )


def signs(momentum):
  del momentum
  return optax.scale_by_sign()


class Small(Protocol):
  name = 'small'

  def scores(self, model):
    del model
    return lambda variables, images, sizes: jnp.zeros((*images.shape[:3], 4))


def test_a_recipe_passes_a_loss_an_optimizer_and_a_protocol_of_its_own(
  trained, tmp_path
):
  config = make_config(
    trained.settings,
    loss__terms=((halved, 1.0),),
    optimizer__name=signs,
    eval__protocol=Small,
    train__steps=1,
    optimizer__warmup_steps=0,
  )
  result = train_and_evaluate(config, tmp_path)
  assert result['protocol'] == 'small'
  assert result['per_class_accuracy']['ground'] == 1  # class 0 everywhere
  (line,) = (line for line in read_lines(tmp_path) if 'loss' in line)
  first = read_lines(trained.workdir)[0]
  np.testing.assert_allclose(line['loss'], first['loss'] / 2, rtol=1e-5)
  model = build.make_model(config, 4)
  start = train.steps.create_state(model, optax.identity(), config.seed).params
  with Checkpoints(tmp_path) as saved:
    params = saved.open(1).variables['params']
  moved = np.abs(params['logits']['bias'] - start['logits']['bias'])
  np.testing.assert_allclose(moved, config.optimizer.learning_rate, rtol=1e-5)


def test_a_run_goes_on_with_averages_which_are_evaluated_and_used(
  trained, stopped, tmp_path, caplog
):
  caplog.set_level(logging.INFO)
  workdir = shutil.copytree(stopped, tmp_path / 'w')
  changes = {'train__ema': 0.2, 'eval__step': 'latest'}
  config = make_config(trained.settings, **changes)
  train_and_evaluate(config, workdir)
  assert 'config.train.ema=0.2 (was None)' in caplog.text
  assert 'step 3, averages of the parameters (config.train.ema)' in caplog.text
  with Checkpoints(workdir) as saved:
    arrays, metrics = saved.open(6).arrays, saved.metrics(6)
  source = load.open_pretrained(str(workdir / 'checkpoints' / '6')).arrays
  assert any(name.startswith('ema/') for name in arrays)
  for path, leaf in read_state(trained.workdir, 6):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    # The parameters themselves go on as without.
    np.testing.assert_allclose(arrays[name], leaf, atol=1e-3)
    if name.startswith('params/'):
      used = arrays[name.replace('params', 'ema', 1)]
      assert (used != arrays[name]).any()
      np.testing.assert_array_equal(used, source[name])
  found = evaluate.evaluate(config, workdir)
  assert found == {**metrics, 'step': 6}

  # Switched off, it goes on with the parameters.
  shutil.rmtree(workdir / 'checkpoints' / '6')
  train_and_evaluate(trained.config, workdir)
  with Checkpoints(workdir) as saved:
    after = saved.open(6).arrays
  assert not any(name.startswith('ema/') for name in after)
  for name, leaf in after.items():
    np.testing.assert_allclose(leaf, arrays[name], atol=1e-3)


def test_terms_and_an_auxiliary_head_resume_bit_for_bit(
  trained, tmp_path, monkeypatch
):
  config = make_config(
    trained.settings,
    loss__terms=('cross_entropy', 'dice:0.5'),
    loss__auxiliary=0.4,
    data__eval_split='',
    train__steps=4,
  )
  one, two = tmp_path / 'one', tmp_path / 'two'
  train_and_evaluate(config, one)
  show = train.Progress.update

  def update(progress, step, values):
    show(progress, step, values)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(train.Progress, 'update', update)
    with pytest.raises(Preempted):
      train_and_evaluate(config, two)
  train_and_evaluate(config, two)
  for (path, leaf), (_, expected) in zip(
    read_state(two, 4), read_state(one, 4), strict=True
  ):
    np.testing.assert_array_equal(leaf, expected, str(path))
  for line, expected in zip(read_lines(two), read_lines(one), strict=True):
    assert line == expected
    terms = line['loss_cross_entropy'] + 0.5 * line['loss_dice']
    terms += 0.4 * line['loss_auxiliary']
    np.testing.assert_allclose(line['loss'], terms, rtol=1e-6)

  # The head is of training alone, and may be left out of another run.
  plain = make_config(trained.settings, init_from=str(one))
  model = build.to_json(config)['model']
  assert 'auxiliary' not in networks.open_network(one, '4', model).variables
  source, plain = import_weights.open_source(plain)
  with Checkpoints(trained.workdir) as saved:
    there = saved.open(6).variables
  variables, report = source.merge_into(there)
  assert jax.tree.structure(variables) == jax.tree.structure(there)
  assert set(report.unused.values()) == {'the network has no auxiliary head'}
  config.loss.auxiliary, config.train.steps = 0.0, 5
  with pytest.raises(UserError, match=r'needs the config\.loss\.auxiliary it'):
    train_and_evaluate(config, two)


def test_median_frequency_weights_are_those_of_the_training_labels(trained):
  pixels, held = np.zeros(4), np.zeros(4)
  for path in (trained.folder / 'SegmentationClass').glob('train_*'):
    counts = np.bincount(np.ravel(Image.open(path)), minlength=256)[:4]
    pixels += counts
    held += counts.sum() * (counts > 0)
  frequency = pixels[:3] / held[:3]
  expected = (*(np.median(frequency) / frequency), 0)  # one class is absent
  for name, power in (('median_frequency', 1), ('sqrt_median_frequency', 0.5)):
    config = make_config(trained.settings, loss__class_weights=(name,))
    dataset = build.open_dataset(config, 'train')
    weights = build.class_weights(config, dataset)
    np.testing.assert_allclose(weights, np.power(expected, power))


def test_class_weights_of_another_number_are_named(trained, tmp_path):
  config = make_config(trained.settings, loss__class_weights=(1, 2, 3))
  words = r'config\.loss\.class_weights=1,2,3 has 3 numbers, and mini 4 classes'
  with pytest.raises(UserError, match=words):
    train_and_evaluate(config, tmp_path)
  assert not (tmp_path / 'config.json').exists()


def test_learning_rate_follows_the_schedule_of_the_whole_run(trained):
  rates = [
    x['learning_rate'] for x in read_lines(trained.workdir) if 'loss' in x
  ]
  expected = [0.05 * min(s / 2, 1) * (1 - s / 6) ** 0.9 for s in range(6)]
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
  trained, tmp_path
):
  config = make_config(
    trained.settings,
    train__eval_every=1,
    optimizer__learning_rate=1e30,
    optimizer__warmup_steps=0,
  )
  with pytest.raises(UserError, match=r' at step [2-6]; .*learning_rate') as e:
    train_and_evaluate(config, tmp_path)
  step = int(str(e.value).split('at step ')[1].split(';')[0])
  assert f'checkpoint of step {step - 1} is kept' in str(e.value)
  leaves = read_state(tmp_path, step - 1)
  assert all(np.isfinite(leaf).all() for _, leaf in leaves)


@pytest.mark.parametrize(
  'value, words',
  [
    (0, 'if 255 marks a class, set --config.data.label_map=255:1'),
    (255, 'every pixel in train is void, 255'),
  ],
)
def test_labels_that_teach_nothing_are_refused_before_the_first_step(
  trained, tmp_path, monkeypatch, value, words
):
  monkeypatch.setattr(train, '_train', None)  # anything later would fail
  folder = shutil.copytree(trained.folder, tmp_path / 'mini')
  for path in (folder / 'SegmentationClass').iterdir():
    label = np.array(Image.open(path))
    Image.fromarray(np.where(label == 0, value, 255).astype(np.uint8)).save(
      path
    )
  config = make_config(trained.settings, data__dir=str(folder))
  with pytest.raises(UserError, match=f'train_split=train of mini: .*{words}'):
    train_and_evaluate(config, tmp_path / 'w')


def test_classes_without_a_pixel_are_warned_of_before_the_first_step(
  trained, tmp_path, monkeypatch, caplog
):
  said = []
  monkeypatch.setattr(
    train, '_train', lambda *_: said.extend(caplog.messages) or 1 / 0
  )
  with pytest.raises(ZeroDivisionError):
    train_and_evaluate(make_config(trained.settings), tmp_path / 'w')
  hint = '(if 255 marks a class, set --config.data.label_map=255:3)'
  line = f'absent in train {hint}; absent in val {hint}'
  assert f'classes without a pixel: {line}' in said


def settings_of(workdir):
  return json.loads((workdir / 'config.json').read_text())


def test_a_run_that_dies_before_it_saves_leaves_the_settings_as_they_were(
  trained, stopped, tmp_path, monkeypatch
):
  make = build.make_train_step

  def diverging(*arguments, **named):
    step = make(*arguments, **named)

    def run(state, batch):
      state, metrics = step(state, batch)
      return state, {**metrics, 'loss': np.full(1, np.nan)}

    return run

  monkeypatch.setattr(build, 'make_train_step', diverging)
  workdir = shutil.copytree(stopped, tmp_path / 'w')
  before = (workdir / 'config.json').read_text()
  config = make_config(trained.settings, train__log_every=2)
  for folder in (workdir, tmp_path / 'new'):
    with pytest.raises(UserError, match=r'loss is nan at step [14];'):
      train_and_evaluate(config, folder)
  assert (workdir / 'config.json').read_text() == before
  assert not (tmp_path / 'new' / 'config.json').exists()


def killed_in_evaluation(trained, workdir, step, number=signal.SIGKILL):
  """Trains until a signal comes after the first batch of an evaluation."""
  score = evaluate.score_checkpoint

  def scoring(*arguments, stop):
    *_, state = arguments
    if int(state.step) == step:
      if number == signal.SIGKILL:
        stop.requested = lambda: sys.exit(9)  # nothing more is written
      else:
        os.kill(os.getpid(), number)
    score(*arguments, stop=stop)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, 'score_checkpoint', scoring)
    train_and_evaluate(trained.config, workdir)


def test_signal_in_an_evaluation_stops_there_and_it_is_made_up_for(
  trained, tmp_path
):
  with pytest.raises(Preempted) as stop:
    killed_in_evaluation(trained, tmp_path, 4, signal.SIGTERM)
  assert stop.value.step == 4
  assert [x['step'] for x in read_lines(tmp_path)] == [1, 2, 2, 3, 4]
  read_state(tmp_path, 4)
  assert train_and_evaluate(trained.config, tmp_path) == trained.result
  assert_same_run(tmp_path, trained.workdir)


@pytest.mark.parametrize('step', [4, 6])  # the last one, too
def test_run_killed_in_an_evaluation_makes_up_for_it(trained, tmp_path, step):
  with pytest.raises(SystemExit):
    killed_in_evaluation(trained, tmp_path, step)
  read_state(tmp_path, step)
  assert train_and_evaluate(trained.config, tmp_path) == trained.result
  assert_same_run(tmp_path, trained.workdir)


# Orbax leaves a future of a reader that failed without an event loop.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damaged_latest_checkpoint_costs_the_steps_since_the_one_before(
  trained, stopped, tmp_path, caplog
):
  workdir = shutil.copytree(stopped, tmp_path / 'w')
  path = next((workdir / 'checkpoints' / '3' / 'state' / 'd').iterdir())
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  assert train_and_evaluate(trained.config, workdir) == trained.result
  assert_same_run(workdir, trained.workdir)
  (line,) = (m for m in caplog.messages if 'is damaged: ' in m)
  assert line.startswith(f'{workdir / "checkpoints" / "3"} is damaged: ')


@pytest.mark.parametrize(
  'changes, saved',
  [
    ({'train__save_every': 1, 'train__keep': 9}, {1, 2, 3, 4, 5, 6}),
    ({'train__save_every': 4}, {4, 6}),
    ({'train__save_minutes': 1e-9, 'train__log_every': 3}, {3, 6}),
    (
      {'train__save_every': 1, 'train__keep': 1, 'train__keep_every': 3},
      {3, 6},
    ),
  ],
)
def test_checkpoints_are_saved_apart_from_evaluations(
  trained, tmp_path, changes, saved
):
  changes = {'data__eval_split': '', 'train__eval_every': 100, **changes}
  train_and_evaluate(make_config(trained.settings, **changes), tmp_path)
  assert {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()} == saved


def with_bad_batches(monkeypatch, bad, seen):
  """Steps note a sum of their batch; the loss of those in `bad` is NaN."""
  make = build.make_train_step

  def making(*arguments, **named):
    step = make(*arguments, **named)

    def run(state, batch):
      seen.append(float(np.asarray(batch['image'], np.float64).sum()))
      state, metrics = step(state, batch)
      if len(seen) in bad:
        metrics = {**metrics, 'loss': np.full(jax.device_count(), np.nan)}
      return state, metrics

    return run

  monkeypatch.setattr(build, 'make_train_step', making)


def test_rollback_passes_over_the_batches_that_diverged(
  trained, tmp_path, monkeypatch, caplog
):
  usual, seen = [], []
  with monkeypatch.context() as patch:
    with_bad_batches(patch, (), usual)
    settings = {'data__eval_split': '', 'train__steps': 6}
    config = make_config(trained.settings, **settings, train__eval_every=2)
    config.train.steps = 9
    train_and_evaluate(config, tmp_path / 'usual')
  with_bad_batches(monkeypatch, (4,), seen)
  config = make_config(trained.settings, **settings, train__on_nan='rollback')
  workdir = tmp_path / 'w'
  train_and_evaluate(config, workdir)
  assert seen == usual[:4] + usual[4:8]
  line = 'loss is nan at step 4: back to step 2 and past 2 batches (1 of 3)'
  assert caplog.messages.count(line) == 1
  lines = {x['step']: x for x in read_lines(workdir)}
  assert sorted(lines) == [1, 2, 3, 4, 5, 6]
  assert [x.get('skipped_batches') for x in lines.values()] == [None] * 2 + [
    2
  ] * 4
  # A later run goes on with the batches after them.
  config.train.steps = 7
  train_and_evaluate(config, workdir)
  assert seen[8:] == usual[8:9]


def test_rollbacks_are_bounded(trained, tmp_path, monkeypatch):
  seen = []
  with_bad_batches(monkeypatch, range(3, 99), seen)
  config = make_config(
    trained.settings, data__eval_split='', train__on_nan='rollback'
  )
  with pytest.raises(
    UserError, match=r'loss is nan at step 3; .*step 2 is kept'
  ):
    train_and_evaluate(config, tmp_path)
  assert len(seen) == 2 + 4  # three times anew


def test_settings_are_written_once_the_first_checkpoint_is_whole(unevaluated):
  # The next save waits for the first one, and for what it wrote.
  assert unevaluated.events.index('config.json') < unevaluated.events.index(6)
  assert settings_of(unevaluated.workdir) == train.to_json(
    train.with_preset(unevaluated.config, 'paper')
  )


def test_a_stopped_run_notes_its_settings(stopped):
  assert settings_of(stopped)['train']['steps'] == 6


def test_batches_without_a_valid_pixel_are_warned_of_once_and_counted(
  trained, tmp_path, capsys
):
  config = make_config(
    trained.settings,
    data__eval_split='',
    loss__class_weights=(0, 0, 0, 1),  # the last one occurs in no label
  )
  train_and_evaluate(config, tmp_path)
  said = [x for x in capsys.readouterr().err.splitlines() if 'warning' in x]
  assert len(said) == 2
  assert 'batch of step 1 has no valid pixel' in said[0]
  assert 'void' in said[0] and 'config.loss.class_weights' in said[0]
  assert said[1] == 'warning: 6 batches had no valid pixel'
  lines = [line for line in read_lines(tmp_path) if 'loss' in line]
  assert [line['valid_pixels'] for line in lines] == [0] * 6
  assert [line['loss'] for line in lines] == [0] * 6


def test_compiling_is_said_once_before_the_first_step(unevaluated, capsys):
  assert 'warning' not in unevaluated.errors  # all batches have valid pixels
  lines = unevaluated.errors.splitlines()
  assert lines.count('compiling ...') == 1
  first, second, *_, last = lines[lines.index('compiling ...') + 1 :]
  # The first step was compiled: its time says nothing of others.
  assert first.startswith('step 1/6') and 'left' not in first
  assert second.endswith(' left') and last.endswith(' 00:00 left')
  train_and_evaluate(unevaluated.config, unevaluated.workdir)
  assert 'compiling' not in capsys.readouterr().err


def test_a_warm_up_beyond_the_last_step_is_refused_before_data_is_read(
  trained, tmp_path
):
  config = make_config(
    trained.settings, optimizer__warmup_steps=7, data__dir='/nope'
  )
  words = r'optimizer\.warmup_steps=7 must be at most config\.train\.steps=6'
  with pytest.raises(UserError, match=words):
    train_and_evaluate(config, tmp_path)


def test_patterns_of_no_parameter_are_refused_before_the_data_is_opened(
  trained, tmp_path
):
  config = make_config(
    trained.settings, train__freeze=('backbon/*',), data__dir='/nope'
  )
  with pytest.raises(UserError) as error:
    train_and_evaluate(config, tmp_path)
  assert str(error.value) == (
    'config.train: freeze must name parameters, as aspp/* or backbone/* or'
    " logits/*, got 'backbon/*'"
  )
  assert not (tmp_path / 'checkpoints').exists()
  # The preset may come with the weights: `keras` has this bias, `paper` not.
  config.train.freeze = ('backbone/stem/bias',)
  build.check_batches(config, {})


@pytest.mark.parametrize(
  'schedule, key, value',
  [
    ('poly', 'milestones', (0.3,)),
    ('cosine', 'milestone_factor', 0.5),
    ('cosine', 'power', 0.5),
    ('step', 'power', 0.0),
  ],
)
def test_settings_that_the_schedule_does_not_use_are_refused(
  trained, schedule, key, value
):
  key = f'optimizer.{key}'
  changes = {**trained.settings, key: value, 'optimizer.schedule': schedule}
  with pytest.raises(UserError) as error:
    build.check_batches(make_config(changes), {})
  assert str(error.value) == (
    f'config.{key}={value} has no effect with'
    f' config.optimizer.schedule={schedule}; leave it out'
  )
  build.check_batches(make_config(changes), {key: value})  # of an older run
  used = 'poly' if key == 'optimizer.power' else 'step'
  build.check_batches(make_config({**changes, 'optimizer.schedule': used}), {})


def test_a_run_that_had_such_a_warm_up_may_go_on(trained, tmp_path):
  # Before, the default was 20 steps whatever the number of steps.
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  settings = settings_of(workdir)
  settings['optimizer']['warmup_steps'] = 20
  (workdir / 'config.json').write_text(json.dumps(settings))
  config = make_config(trained.settings, optimizer__warmup_steps=20)
  assert train_and_evaluate(config, workdir) == trained.result


def test_evaluation_split_of_void_alone_is_named(trained, tmp_path):
  folder = shutil.copytree(trained.folder, tmp_path / 'void')
  for path in (folder / 'SegmentationClass').glob('val_*'):
    label = np.full_like(np.asarray(Image.open(path)), 255)
    Image.fromarray(label).save(path)
  config = make_config(trained.settings, data__dir=str(folder))
  with pytest.raises(UserError, match='eval_split=val has no pixel'):
    train_and_evaluate(config, tmp_path / 'w')


@pytest.mark.parametrize(
  'changes, warns',
  [
    ({}, False),
    ({'train__sync_bn': False}, True),
    ({'train__sync_bn': False, 'train__batch_size': 8}, False),
    ({'train__sync_bn': False, 'train__freeze_bn': True}, False),
  ],
)
def test_batch_normalization_over_one_image_is_warned_of(
  trained, caplog, changes, warns
):
  with caplog.at_level(logging.WARNING, 'deeplab_jax'):
    build.check_batches(make_config(trained.settings, **changes), {})
  assert ('sees one image at a time' in caplog.text) == warns


def test_batch_of_one_image_in_all_is_warned_of(trained, caplog, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  build.check_batches(make_config(trained.settings, train__batch_size=1), {})
  assert 'sees one image at a time' in caplog.text


def test_impossible_network_leaves_no_configuration_behind(trained, tmp_path):
  config = make_config(trained.settings, model__backbone='resnet19')
  with pytest.raises(UserError, match=r"config\.model: .*got 'resnet19'"):
    train_and_evaluate(config, tmp_path)
  assert not (tmp_path / 'config.json').exists()


CASES = Path(__file__).parents[2] / 'shared' / 'cases'
CROPS = CASES / 'crop_64_or_65'


@pytest.mark.slow
@pytest.mark.skipif(not CROPS.is_dir(), reason=f'{CROPS} is not here')
@pytest.mark.parametrize('crop', [64, 65])
def test_crops_of_any_size_train_masks_in_their_place(tmp_path, crop):
  config = make_config(
    {
      'data.name': 'folder',
      'data.dir': str(CROPS),
      'data.prepared_dir': str(tmp_path / 'prepared'),
      'data.crop_size': (crop, crop),
      'model.output_stride': 16,
      'train.steps': 100,
      'train.batch_size': 16,
      'train.eval_every': 100,
      'optimizer.name': 'adam',
      'optimizer.learning_rate': 0.01,
      'eval.save_predictions': True,
    }
  )
  assert train_and_evaluate(config, tmp_path)['miou'] > 0.8
  evaluate.evaluate(config, tmp_path)
  agreement = np.zeros((25, 25))
  with tarfile.open(tmp_path / 'eval' / 'val_whole.tar.gz') as archive:
    for entry in archive:
      found = np.asarray(Image.open(archive.extractfile(entry)))
      label = CROPS / 'SegmentationClass' / Path(entry.name).name
      inner = np.asarray(Image.open(label))[12:-12, 12:-12]
      windows = np.lib.stride_tricks.sliding_window_view(found, inner.shape)
      agreement += (windows == inner).mean((2, 3))
  best = np.unravel_index(agreement.argmax(), agreement.shape)
  assert np.abs(np.subtract(best, 12)).max() <= 2


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused(
  trained, tmp_path
):
  config = make_config(
    trained.settings, train__batch_size=8, train__accumulate=4
  )
  with pytest.raises(UserError) as error:
    train_and_evaluate(config, tmp_path)
  assert str(error.value) == (
    'config.train.batch_size=8 must be divisible by the 4 devices times'
    ' config.train.accumulate=4'
  )


def test_settings_of_a_run_are_noted_as_those_of_this_user(trained):
  assert own.wrote(settings_of(trained.workdir))


def colored(label):
  return np.array([[60, 120, 60], [220, 60, 60], [60, 60, 220]], np.uint8)[
    np.minimum(label, 2)
  ]


def in_grays(label):
  return np.array([0, 127, 255], np.uint8)[np.minimum(label, 2)]


@pytest.mark.parametrize(
  'case',
  [
    colored,
    in_grays,
    'labels_are_colors',
    'masks_0_and_255',
    'palette_order_differs',
  ],
)
def test_labels_train_with_what_prepare_proposes(
  trained, tmp_path, monkeypatch, capsys, case
):
  """It refuses with a line to paste; with that it trains and is scored."""
  folder = tmp_path / 'mini'
  if not callable(case) and not (CASES / case).is_dir():
    pytest.skip(f'{CASES / case} is not here')
  shutil.copytree(
    CASES / case if not callable(case) else trained.folder, folder
  )
  if callable(case):
    (folder / 'classes.txt').write_text('ground\nleft\nright\n')
    for path in (folder / 'SegmentationClass').iterdir():
      Image.fromarray(case(np.array(Image.open(path)))).save(path)
  changes = {
    'data__dir': str(folder),
    'train__steps': 2,
    'train__batch_size': 4,
  }
  changes['data__prepared_dir'] = str(tmp_path / 'prepared')
  config = make_config(trained.settings, **changes)
  with pytest.raises(UserError, match='or try what is proposed'):
    prepare(config, tmp_path / 'w')
  (line,) = (
    line
    for line in capsys.readouterr().out.splitlines()
    if ': --config.data.label_map=' in line and 'if 255' not in line
  )
  setting = line.partition('--config.data.')[2]
  for split in ('train', 'val'):
    with Image.open(tmp_path / 'w/prepare' / f'{split}_proposed.png') as page:
      assert page.width > 1000
  with pytest.raises(UserError, match=re.escape(setting)):
    train_and_evaluate(config, tmp_path / 'refused')
  config.data.label_map = setting.partition('=')[2]
  result = train_and_evaluate(config, tmp_path / 'w')
  assert result['step'] == 2 and 0 <= result['miou'] <= 1
