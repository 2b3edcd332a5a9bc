import json
import os
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from miniature import SETTINGS, as_options

from deeplab_jax import deeplab_v3
from deeplab_jax.benchmark import __main__ as benchmark
from deeplab_jax.benchmark import measure, timing
from deeplab_jax.config import get_config, validate
from deeplab_jax.configure import override
from deeplab_jax.models.layers import Conv
from deeplab_jax.runtime import host
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training import steps

pytestmark = pytest.mark.compiles

# The programs of the run that other tests train, which are compiled once.
_TINY = [
  *as_options({k: v for k, v in SETTINGS.items() if k != 'data.name'}),
  '--crop=33',
  '--batch=4',
  '--classes=4',
  '--repeat=2',
]


@pytest.fixture(autouse=True)
def configured(monkeypatch):
  """Keeps the options of the whole process, which tell programs apart.

  Gives the calls of `host.configure`.
  """
  calls = []
  monkeypatch.setattr(host, 'configure', lambda: calls.append(0))
  yield calls
  jax.config.update('jax_enable_compilation_cache', True)


@pytest.fixture
def measured(capsys):
  """Function (*options) -> the JSON object of the last line."""

  def run(*arguments):
    benchmark.main(['', '--in_process', *_TINY, *arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  return run


def operations():
  """Multiplications and additions of convolutions, without padding, by path."""
  model = deeplab_v3('resnet18', num_classes=4, width=0.125, aspp_features=8)
  counts = {}

  def count(call, args, kwargs, context):
    conv = context.module
    if isinstance(conv, Conv) and context.method_name == '__call__':
      batch, *sizes, channels = args[0].shape
      done = 2 * batch * channels * conv.features
      taps = conv.rate * (np.arange(conv.kernel_size) - conv.kernel_size // 2)
      for size in sizes:
        places = np.arange(0, size, conv.stride)[:, None] + taps
        done *= np.count_nonzero((places >= 0) & (places < size))
      counts['/'.join(conv.path)] = done
    return call(*args, **kwargs)

  images = np.zeros((4, 33, 33, 3), np.uint8)
  with nn.intercept_methods(count):
    jax.eval_shape(
      lambda key: model.init(key, images, train=False), jax.random.key(0)
    )
  return counts


def test_the_default_network_is_that_of_the_paper():
  config = measure.default_network()
  model = config.model
  assert (model.backbone, model.width, model.output_stride) == (
    'resnet50',
    1.0,
    16,
  )
  assert config.data.crop_size == (513, 513)
  assert config.train.batch_size == jax.local_device_count()


def test_a_train_step_compiles_once(measured, configured):
  result = measured('--mode=train')
  assert len(configured) == 1
  assert result['compilations'] == 1
  assert result['devices'] == jax.device_count() == 4
  assert result['crop'] == [33, 33] and result['batch'] == 4
  assert 0 < result['seconds'] < result['first_seconds']
  assert result['images_per_second'] == pytest.approx(4 / result['seconds'])
  counts = operations()
  # Result and both gradients take as many each; the images need no gradient.
  # Each device updates all parameters, which counts in so small a network.
  expected = 3 * sum(counts.values()) - counts['backbone/stem']
  assert expected < result['flops'] < 1.5 * expected
  assert result['utilization'] == pytest.approx(
    result['flops'] / result['seconds'] / result['matmul_flops_per_second']
  )
  assert result['peak_memory'] > 10**8


def test_a_forward_pass_computes_the_logits_once(measured, monkeypatch):
  monkeypatch.setattr(timing, 'matmul_rate', lambda dtype: 1e9)
  result = measured('--mode=forward', '--peer=true')
  assert result['compilations'] == result['devices'] == 1
  assert 0 < result['seconds'] < result['first_seconds']
  expected = sum(operations().values())
  assert expected < result['flops'] < 1.5 * expected
  assert result['utilization'] == pytest.approx(
    result['flops'] / result['seconds'] / 1e9
  )


def test_a_trace_of_a_call_is_written_where_it_was_asked_for(
  measured, monkeypatch, tmp_path
):
  monkeypatch.setattr(timing, 'matmul_rate', lambda dtype: 1e9)
  measured('--mode=forward', f'--trace={tmp_path}')
  assert len(list(tmp_path.rglob('*.xplane.pb'))) == 1


def test_the_train_step_has_the_loss_that_training_has(measured, monkeypatch):
  used = {}

  def noting(**settings):
    used.update(settings)
    raise UserError('noted')

  monkeypatch.setattr(steps, 'pmap_train_step', noting)
  with pytest.raises(UserError, match='noted'):
    measured(
      '--mode=train',
      '--classes=3',
      '--config.loss.hardest=0.5',
      '--config.loss.label_smoothing=0.1',
      '--config.loss.class_weights=median_frequency',
      '--config.train.freeze_bn=True',
    )
  assert (used['hardest'], used['label_smoothing']) == (0.5, 0.1)
  assert used['freeze_bn'] and len(used['class_weights']) == 3


def test_input_and_evaluation_run_over_a_data_set(
  measured, voc_folder, tmp_path, monkeypatch
):
  monkeypatch.setattr(measure, '_WINDOW', 16)
  data = [
    '--config.data.name=folder',
    f'--config.data.dir={voc_folder}',
    f'--config.data.prepared_dir={tmp_path}',
    '--config.eval.buckets=1',  # one program instead of three
  ]
  result = measured('--mode=input', '--config.data.noise=9', *data)
  assert result['images_per_second'] == pytest.approx(4 / result['seconds'])
  assert list(result['parts']) == [
    'decode',
    'RandomScaleCropFlip',
    'GaussianNoise',
  ]
  assert all(0 < seconds < 0.1 for seconds in result['parts'].values())
  result = measured('--mode=evaluation', *data)
  assert result['images'] == 3 and result['images_per_second'] > 0
  assert 'crop' not in result


@pytest.mark.slow
def test_compiling_is_timed_in_parts(measured):
  result = measured('--mode=compile')
  parts = [
    f'{step}_{part}_seconds'
    for step in ('forward', 'train')
    for part in ('trace', 'compile')
  ]
  parts.append('cache_kernels_seconds')
  assert all(result[part] > 0 for part in parts)
  assert result['seconds'] == pytest.approx(
    sum(result[part] for part in [*parts, 'create_seconds'])
  )


def test_a_start_has_the_crop_and_the_batch_asked_for(monkeypatch, capsys):
  commands = []

  def note(command, programs):
    assert command[2].endswith('main') and os.path.isabs(programs)
    commands.append(command)
    return float(len(commands))

  monkeypatch.setattr(timing, 'first_step_seconds', note)
  monkeypatch.setattr(sys, 'executable', 'true')  # imports in no time
  given = ['--mode=startup', '--crop=33', '--batch=2', '--config.seed=7']
  benchmark.main(['', '--in_process', *given])
  result = json.loads(capsys.readouterr().out)
  assert (result['cold_seconds'], result['warm_seconds']) == (1, 2)
  for command in commands:
    config = get_config()
    assert override(config, command[3:]) == []
    validate(config)
    assert config.data.crop_size == (33, 33)
    assert (config.train.batch_size, config.seed) == (2, 7)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=forward', '--crop=0'], '--crop'),
    (['--mode=forward', '--crop=9'], 'crop_size'),
    (['--mode=sleep'], '--mode'),
    ([], '--mode'),
    (['--mode=train', '--batch=3'], 'batch of 3 .* 4 devices'),
    (['--mode=compile', '--batch=3'], 'batch of 3 .* 4 devices'),
    (['--mode=train', '--config.model.depth=3'], 'model.depth'),
    (['--mode=train', 'photo.jpg'], 'photo.jpg: not an option'),
    (['--mode=train', '--cropp=65'], "'cropp'; did you mean --crop"),
    (['--mode=train', '--config=missing.py'], 'missing.py'),
  ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message):
  with pytest.raises(UserError, match=message) as error:
    benchmark.main(['', '--in_process', *arguments])
  assert '\n' not in str(error.value)
