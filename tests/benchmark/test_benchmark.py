import json
import sys

import pytest

from deeplab_jax.benchmark import __main__ as benchmark
from deeplab_jax.runtime.errors import UserError

# Writes who ran to the first argument; prints a time that grows with each run.
_PROGRAM = """
import json, sys
log, who, *times = sys.argv[1:]
with open(log, 'a') as file:
  file.write(who)
runs = open(log).read().count(who)
print('loading')
print(json.dumps({'seconds': float(times[runs - 1]), 'by': who}))
"""


def _program(log, who, *times):
  return [sys.executable, '-c', _PROGRAM, str(log), who, *map(str, times)]


def _says(text):
  return [sys.executable, '-c', text]


def test_a_peer_runs_in_turn_with_ours(tmp_path):
  log = tmp_path / 'log'
  result = benchmark.compare(
    _program(log, 'A', 1, 2, 3, 8, 5), _program(log, 'B', 2, 2, 2, 2, 2), 5
  )
  assert log.read_text() == 'ABABABABAB'
  assert result['pairs'] == [[1, 2], [2, 2], [3, 2], [8, 2], [5, 2]]
  # ratios .5, 1, 1.5, 2.5, 4
  assert result['ratio'] == {
    'median': 1.5,
    'lower_quartile': 1,
    'upper_quartile': 2.5,
    'min': 0.5,
    'max': 4,
  }
  assert result['ours']['by'] == 'A' and result['peer']['by'] == 'B'
  assert '1.500' in benchmark.format_pairs(result)


def test_a_peer_is_compared_by_its_command(monkeypatch, capsys):
  commands = []

  def run(command):
    commands.append(list(command))
    return {
      'seconds': 1.0 if 'deeplab_jax.benchmark.measure' in command else 2.0
    }

  monkeypatch.setattr(benchmark, 'run', run)
  benchmark.main(
    ['--mode=train', "--peer=python 'a b.py' --c=1", '--pairs=6', '--crop=65']
  )
  ours, peer = commands[:2]
  assert commands == [ours, peer] * 6
  assert peer == ['python', 'a b.py', '--c=1']
  assert {'--mode=train', '--crop=65'} <= set(ours)
  table, line = capsys.readouterr().out.splitlines()
  assert '0.500, median of 6 pairs' in table
  assert json.loads(line)['pairs'] == [[1.0, 2.0]] * 6


def test_one_pair_is_its_own_spread():
  assert set(benchmark.spread([0.7]).values()) == {0.7}


@pytest.mark.parametrize(
  ('program', 'message'),
  [
    ('print("done")', '"seconds"'),
    ('print("{}")', '"seconds"'),
    ('pass', '"seconds"'),
    ('raise SystemExit("error: no such crop")', 'failed: no such crop'),
    ('raise SystemExit(3)', 'failed: status 3'),
  ],
)
def test_a_program_that_says_no_time_is_named(program, message):
  with pytest.raises(UserError, match=message) as error:
    benchmark.run(_says(program))
  assert sys.executable in str(error.value)
  assert '\n' not in str(error.value)


def test_a_program_that_is_not_there_is_named():
  with pytest.raises(UserError, match='no_such_program'):
    benchmark.run(['no_such_program'])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=forward,sleep'], '--mode=sleep'),
    (['--peer=true'], 'single --mode'),
    (['--mode=train', '--peer=true', '--pairs=x'], '--pairs'),
    (['--mode=train', '--peer=true', '--pairs=0'], '--pairs'),
    (['--mode=train', '--peer=true', '--pairs=4'], '--pairs=4: .* least 5'),
    (['--mode=forward', '--json=/no/such/folder'], '/no/such/folder'),
  ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message):
  with pytest.raises(UserError, match=message):
    benchmark.main(arguments)


def test_the_table_shows_what_was_measured(monkeypatch, capsys, tmp_path):
  measured = {
    'mode': 'train',
    'crop': [513, 257],
    'batch': 2,
    'backbone': 'resnet50',
    'dtype': 'float32',
    'device': 'cpu',
    'seconds': 0.25,
    'images_per_second': 8.0,
    'flops': 3 * 10**9,
    'utilization': 0.431,
    'peak_memory': 2**30,
    'layers': [
      {
        'name': 'aspp/conv',
        'backward': True,
        'seconds': 0.05,
        'share': 0.2,
        'flops_on_map_per_second': 2e11,
      }
    ],
  }
  commands = []
  monkeypatch.setattr(
    benchmark, 'run', lambda command: commands.append(command) or measured
  )
  lines = tmp_path / 'lines'
  benchmark.main(['--mode=train', f'--json={lines}', '--batch=2'])
  benchmark.main(['--mode=train', f'--json={lines}'])
  assert [json.loads(line) for line in lines.open()] == [measured] * 2
  assert commands[0][1:3] == ['-m', 'deeplab_jax.benchmark.measure']
  assert {'--batch=2', '--mode=train', '--layers'} <= set(commands[0])
  table = capsys.readouterr().out
  for text in (
    '513x257',
    '0.2500 s',
    '3.00 GFLOP',
    '43.1%',
    '1024 MiB',
    '20.0%',
    '200 GFLOP/s  aspp/conv (backward)',
  ):
    assert text in table
