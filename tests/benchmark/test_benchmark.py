import json
import os
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


@pytest.fixture(autouse=True)
def huge_pages(monkeypatch):
  """The benchmark sets nothing, unless a test takes this variable away."""
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')


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
    return {'seconds': 1.0 if 'deeplab_jax.benchmark' in command else 2.0}

  monkeypatch.setattr(benchmark, 'run', run)
  peer = "--peer=python 'a b.py' --c=1"
  benchmark.main(['', '--mode=train', peer, '--pairs=6', '--crop=65'])
  ours, peer = commands[:2]
  assert commands == [ours, peer] * 6
  assert peer == ['python', 'a b.py', '--c=1']
  assert {'--mode=train', '--crop=65', '--in_process'} <= set(ours)
  table, line = capsys.readouterr().out.splitlines()
  assert '0.500, median of 6 pairs' in table
  assert json.loads(line)['pairs'] == [[1.0, 2.0]] * 6


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
  with pytest.raises(OSError, match='no_such_program'):
    benchmark.run(['no_such_program'])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=forward,sleep'], '--mode=sleep'),
    (['--peer=true'], 'single --mode'),
    (['--mode=train', '--peer=true', '--pairs=x'], '--pairs'),
    (['--mode=train', '--peer=true', '--pairs=0'], '--pairs'),
    (['--mode=train', '--peer=true', '--pairs=4'], '--pairs=4: .* 5'),
    (['--mode=forward', '--json=/no/such/folder'], '/no/such/folder'),
    (['--mode=forward', '--crop=0'], '--crop'),
    (['--mode=forward', '--classes'], '--classes'),
  ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message):
  with pytest.raises((UserError, OSError), match=message) as error:
    benchmark.main(['', *arguments])
  assert '\n' not in str(error.value)


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
  }
  commands = []
  monkeypatch.setattr(
    benchmark, 'run', lambda command: commands.append(command) or measured
  )
  lines = tmp_path / 'lines'
  benchmark.main(['', '--mode=train', f'--json={lines}', '--batch=2'])
  benchmark.main(['', '--mode=train', f'--json={lines}'])
  written = lines.read_text().splitlines()
  assert [json.loads(line) for line in written] == [measured] * 2
  assert commands[0][1:3] == ['-m', 'deeplab_jax.benchmark']
  assert {'--batch=2', '--mode=train', '--in_process'} <= set(commands[0])
  table = capsys.readouterr().out
  for text in (
    'crop [513, 257], batch 2',
    '0.2500 s',
    '3.00 GFLOP',
    '43.1%',
    '1024 MiB',
  ):
    assert text in table


def test_parts_of_the_input_are_shown_by_speed_and_share():
  parts = {'decode': 0.003, 'Cutout': 0.001}
  lines = [*benchmark.format_measurement({'mode': 'input', 'parts': parts})]
  assert [line.split() for line in lines[1:]] == [
    ['decode', '333', 'images/s,', '75.0%', 'of', 'a', 'thread'],
    ['Cutout', '1000', 'images/s,', '25.0%', 'of', 'a', 'thread'],
  ]


def test_every_mode_is_measured_unless_some_are_named(monkeypatch, capsys):
  modes = []

  def run(command):
    modes.append(command[-2].removeprefix('--mode='))
    return {'mode': modes[-1], 'seconds': 1.0}

  monkeypatch.setattr(benchmark, 'run', run)
  benchmark.main([''])
  every = ['forward', 'train', 'input', 'evaluation', 'compile', 'startup']
  assert modes == every
  modes.clear()
  benchmark.main(['', '--config.seed', '3', '--mode=input,train'])
  assert modes == ['input', 'train']
  assert (
    '== input\n  seconds                   1.0000 s' in capsys.readouterr().out
  )


# In the place of Python and of the peer: shows its environment.
_SHELL = """#!/bin/sh
echo '{"mode": "x", "seconds": 1, "tunables": "'$GLIBC_TUNABLES'"}'
"""
_HUGE = 'glibc.malloc.hugetlb=1'


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    (None, _HUGE),
    ('', _HUGE),
    ('glibc.malloc.check=0', f'glibc.malloc.check=0:{_HUGE}'),
    ('glibc.malloc.hugetlb=0', 'glibc.malloc.hugetlb=0'),
    ('glibc.malloc.hugetlb=2:glibc.malloc.check=0',) * 2,
  ],
)
@pytest.mark.parametrize('compared', [False, True])
def test_ours_and_the_peer_ask_for_huge_pages_unless_the_caller_says_otherwise(
  monkeypatch, tmp_path, capsys, given, expected, compared
):
  program = tmp_path / 'program'
  program.write_text(_SHELL)
  program.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(program))
  if given is None:
    monkeypatch.delenv('GLIBC_TUNABLES')
  else:
    monkeypatch.setenv('GLIBC_TUNABLES', given)
  peer = [f'--peer={program}'] if compared else []
  benchmark.main(['', '--mode=train', *peer])
  output, errors = capsys.readouterr()
  result = json.loads(output.splitlines()[-1])
  seen = [result['ours'], result['peer']] if compared else [result]
  assert [one['tunables'] for one in seen] == [expected] * len(seen)
  line = f'measuring with GLIBC_TUNABLES={expected}\n'
  assert errors.startswith(line) == (given != expected)
  assert os.environ['GLIBC_TUNABLES'] == expected


def test_help_names_every_option(capsys):
  benchmark.main(['', '--help'])
  text = capsys.readouterr().out
  options = {'mode', 'config', 'json', 'peer', 'pairs', 'trace'}
  options |= {'crop', 'batch', 'classes', 'repeat'}
  assert {option for option in options if f'--{option}' in text} == options
