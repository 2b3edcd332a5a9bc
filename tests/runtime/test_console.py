"""Commands end in one line, with the status that a shell expects."""

import logging
import signal
import subprocess
import sys

import pytest
from absl import flags

from deeplab_jax.runtime import console
from deeplab_jax.runtime.errors import Preempted, UserError


@pytest.mark.parametrize('debug', [False, True])
def test_a_stop_by_a_signal_has_the_status_of_the_signal(debug, capsys):
  with pytest.raises(SystemExit) as stop, console.one_line_errors(debug):
    raise Preempted(signal.SIGTERM, 7)
  assert stop.value.code == 143
  assert capsys.readouterr() == (
    '',
    'stopped at step 7; the same command goes on from there\n',
  )


@pytest.mark.parametrize(
  ('error', 'status', 'line'),
  [
    (UserError('no such file'), 1, 'error: no such file'),
    (OSError(28, 'No space left on device'), 1, 'error: No space left on dev'),
    (OSError(13, 'Permission denied', 'a'), 1, 'error: a: Permission denied'),
    (OSError('odd'), 1, 'error: odd'),
    (KeyboardInterrupt(), 130, 'interrupted'),
  ],
)
def test_an_error_is_one_line_or_with_debug_raised(error, status, line, capsys):
  with pytest.raises(SystemExit) as stop, console.one_line_errors():
    raise error
  output, errors = capsys.readouterr()
  assert stop.value.code == status and output == ''
  assert errors.startswith(line) and errors.count('\n') == 1
  with pytest.raises(type(error)), console.one_line_errors(debug=True):
    raise error


def test_names_move_no_cursor_and_have_an_end(capsys):
  name = 'ä \x1b[2J\x9b\r\n' + 'x' * 10**6
  with pytest.raises(SystemExit), console.one_line_errors():
    raise UserError(name)
  logger = logging.getLogger('deeplab_jax')
  before, level = list(logger.handlers), logger.level
  try:
    console.log_to_stderr()
    logger.warning('two\nlines of %s', name)
  finally:
    logger.handlers[:], logger.propagate = before, True
    logger.setLevel(level)
  first, *others = capsys.readouterr().err.splitlines()
  assert first.startswith(r'error: ä \x1b[2J\x9b\r\nxxx') and len(first) < 10**5
  assert others[:2] == ['two', r'lines of ä \x1b[2J\x9b\r']


def test_a_mistake_of_ours_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError), console.one_line_errors():
    raise ZeroDivisionError


@pytest.mark.parametrize(
  ('option', 'near'),
  [
    ('steps', 'config.train.steps'),
    ('workdri', 'workdir'),
    ('xyz', None),
  ],
)
def test_a_misspelled_option_is_named_with_the_one_meant(option, near):
  values = flags.FlagValues()
  with (
    pytest.raises(UserError) as error,
    console.named_options(
      ['workdir', 'config.eval.step', 'config.train.steps']
    ),
  ):
    values(['program', f'--{option}=1'])
  hint = f'; did you mean --{near}?' if near else ''
  assert str(error.value) == (
    f"option: Unknown command line flag '{option}'{hint}"
  )


PROGRAM = """
import logging, sys
from absl import flags
from deeplab_jax.runtime import console
from deeplab_jax.runtime.errors import UserError
COUNT = flags.DEFINE_integer('count', 1, 'A number.', lower_bound=1)
DEBUG = flags.DEFINE_bool('debug', False, 'Tracebacks.')
def main(argv):
  logging.getLogger('deeplab_jax.x').info('count %d', COUNT.value)
  logging.getLogger('other').info('nobody asked')
  print(*argv[1:])
  if COUNT.value == 3:
    raise UserError('three')
console.run(main, DEBUG)
"""


def program(*options):
  return subprocess.run(
    [sys.executable, '-c', PROGRAM, *options], capture_output=True, text=True
  )


def test_a_program_runs_with_its_flags():
  done = program('--count=2', '--config.a=1', 'x')
  assert done.returncode == 0
  assert (done.stdout, done.stderr) == ('--config.a=1 x\n', 'count 2\n')
  done = program('--count=3')
  assert (done.returncode, done.stderr) == (1, 'count 3\nerror: three\n')


def test_a_flag_that_cannot_be_parsed_is_one_line():
  done = program('--count=0')
  assert (done.returncode, done.stdout) == (1, '')
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: option: ') and '--count=0' in line


def test_help_is_no_error():
  done = program('--help')
  assert (done.returncode, done.stderr) == (0, '') and '--count' in done.stdout


def test_the_log_is_plain_lines(capsys):
  own = logging.getLogger('deeplab_jax')
  before = own.handlers[:], own.level, own.propagate
  try:
    console.log_to_stderr()
    logging.getLogger('deeplab_jax.training').info('step %d', 3)
    assert capsys.readouterr().err == 'step 3\n'
  finally:
    own.handlers[:], own.propagate = before[0], before[2]
    own.setLevel(before[1])
