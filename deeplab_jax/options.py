"""What the commands share: settings of the config, and errors in one line."""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from deeplab_jax import config as default_config
from deeplab_jax.errors import UserError

SETTING = re.compile(r'--?(?:no)?config\.([^=]+)')


def override(
  config: ml_collections.ConfigDict, argv: Sequence[str]
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """Applies --config.section.key=value; returns the rest of `argv` as well.

  Raises:
    UserError: for an unknown setting or option, or a value that does not parse.
  """
  for argument in argv:
    setting = SETTING.match(argument)
    if setting:
      default_config.check_key(setting[1])
  values = flags.FlagValues()
  with named_options():
    result = config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=list(argv)
    )
    inputs = values(argv)[1:]
  return result.value, inputs


class Parser(argparse.ArgumentParser):
  """For commands that take options of their own beside the settings.

  What it does not know, as settings, `parse_known_args` hands on.
  """

  def __init__(self, name: str, description: str) -> None:
    super().__init__(
      name,
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,  # --config would swallow --config.section.key
    )

  def error(self, message: str) -> NoReturn:
    """Raises what is wrong instead of printing the usage."""
    raise UserError(f'option: {message}')


def positive_int(text: str) -> int:
  """Type of an option that counts something, from 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'must be a number from 1, got {text!r}')
  return int(text)


@contextlib.contextmanager
def named_options() -> Iterator[None]:
  """Turns what absl says about an option into a `UserError`."""
  try:
    yield
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f'option: {" ".join(str(error).split())}') from error


@contextlib.contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
  """Ends the process in one line, unless `debug`.

  A `UserError`, and what the system refuses, exit with status 1, Ctrl-C and a
  reader of our output that has gone with the shell's status for them.
  """
  if debug:
    yield
    return
  try:
    yield
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except BrokenPipeError:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    # What is still to be flushed at exit would fail again.
    os.dup2(nowhere, sys.stdout.fileno())
    try:
      print('broken pipe', file=sys.stderr, flush=True)
    except BrokenPipeError:
      os.dup2(nowhere, sys.stderr.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except OSError as error:
    place = f'{error.filename}: ' if error.filename is not None else ''
    print(f'error: {place}{error.strerror or error}', file=sys.stderr)
    sys.exit(1)


def log_to_stderr() -> None:
  """Shows the package's own log as plain lines, and others' warnings alone."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  own = logging.getLogger('deeplab_jax')
  own.addHandler(handler)
  own.setLevel(logging.INFO)
  own.propagate = False
