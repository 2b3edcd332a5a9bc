import json
import os
import sys
import time

import jax
import pytest

from deeplab_jax import deeplab_v3, flops, measure
from deeplab_jax.errors import UserError

_TINY = [
  '--crop=33',
  '--batch=4',
  '--repeat=2',
  '--config.model.backbone=resnet18',
  '--config.model.width=0.125',
  '--config.model.aspp_features=8',
]


@pytest.fixture
def measured(capsys):
  """Function (*options) -> the JSON object of the last line."""

  def run(*arguments):
    measure.main([*_TINY, *arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  return run


def test_the_default_network_is_that_of_the_paper():
  config = measure.default_network()
  model = config.model
  assert (model.backbone, model.width, model.output_stride) == (
    'resnet50',
    1.0,
    16,
  )
  assert config.data.crop_size == (513, 513)
  assert config.train.batch_size == 1


def test_a_train_step_compiles_once_and_names_its_layers(measured):
  result = measured('--mode=train', '--layers')
  assert result['compilations'] == 1
  assert result['devices'] == jax.device_count() == 4
  assert result['crop'] == [33, 33] and result['batch'] == 4
  assert 0 < result['seconds'] < result['first_seconds']
  assert result['images_per_second'] == pytest.approx(4 / result['seconds'])
  model = deeplab_v3('resnet18', width=0.125, aspp_features=8)
  forward = flops.total(flops.count_flops(model, (33, 33), batch_size=4))
  assert result['flops'] == 3 * forward.padded
  assert result['flops_on_map'] == 3 * forward.on_map
  assert result['utilization'] == pytest.approx(
    result['flops'] / result['seconds'] / result['matmul_flops_per_second']
  )
  assert result['peak_memory'] > 10**8
  assert len(result['layers']) == 10
  assert any('block' in layer['name'] for layer in result['layers'])


def test_input_and_evaluation_run_over_a_data_set(
  measured, voc_folder, tmp_path, monkeypatch
):
  monkeypatch.setattr(measure, '_WINDOW', 16)
  data = [
    '--config.data.name=folder',
    f'--config.data.dir={voc_folder}',
    f'--config.data.prepared_dir={tmp_path}',
  ]
  result = measured('--mode=input', *data)
  assert result['images_per_second'] == pytest.approx(4 / result['seconds'])
  result = measured('--mode=evaluation', *data)
  assert result['images'] == 3 and result['images_per_second'] > 0


@pytest.mark.slow
def test_compiling_is_timed_in_parts(measured):
  result = measured('--mode=compile')
  parts = [
    f'{step}_{part}_seconds'
    for step in ('forward', 'train')
    for part in ('trace', 'compile')
  ]
  assert all(result[part] > 0 for part in parts)
  assert result['seconds'] == pytest.approx(
    sum(result[part] for part in [*parts, 'create_seconds'])
  )


def test_a_start_ends_with_the_first_step():
  program = (
    'import sys, time\n'
    "print('resnet', file=sys.stderr)\n"
    'time.sleep(0.3)\n'
    "print('step 1/9  loss 1', file=sys.stderr, flush=True)\n"
    'time.sleep(60)\n'
  )
  start = time.monotonic()
  seconds = measure._first_step_seconds(
    [sys.executable, '-c', program], dict(os.environ)
  )
  assert 0.3 < seconds <= time.monotonic() - start < 30


def test_a_start_that_fails_says_why():
  program = 'raise SystemExit("error: config.seed is wrong")'
  with pytest.raises(UserError, match=r'first step: config\.seed is wrong'):
    measure._first_step_seconds([sys.executable, '-c', program], {})


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=forward', '--crop=0'], '--crop'),
    (['--mode=forward', '--crop=9'], 'crop_size'),
    (['--mode=sleep'], '--mode'),
    ([], '--mode'),
    (['--mode=train', '--batch=3'], 'batch of 3 .* 4 devices'),
    (['--mode=train', '--config.model.depth=3'], 'model.depth'),
    (['--mode=train', 'photo.jpg'], 'photo.jpg: not an option'),
    (['--mode=train', '--config=missing.py'], 'missing.py'),
  ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message):
  with pytest.raises(UserError, match=message) as error:
    measure.main(arguments)
  assert '\n' not in str(error.value)
