"""What the commands share: settings of the config, and errors in one line."""

import argparse
import contextlib
import itertools
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
from deeplab_jax.runtime.errors import UserError

SETTING = re.compile(r'--?(?:no)?config\.([^=]+)')


def override(
  config: ml_collections.ConfigDict,
  argv: Sequence[str],
  known: Sequence[str] = (),
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """Applies --config.section.key=value; returns the rest of `argv` as well.

  Args:
    config: what is changed; an option given twice counts as it comes last.
    argv: the program's name and its arguments.
    known: names of the program's other options, to propose for a misspelt one.

  Raises:
    UserError: for an unknown setting or option, or a value that does not parse.
  """
  for key in settings_in(argv):
    default_config.check_key(key)
  argv = _without_earlier_tuples(argv)
  values = flags.FlagValues()
  with named_options(known):
    result = config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=list(argv)
    )
    inputs = values(argv)[1:]
  return result.value, inputs


def settings_in(argv: Sequence[str]) -> list[str]:
  """The keys that arguments set, 'train.steps', in their order."""
  options = itertools.takewhile(lambda argument: argument != '--', argv)
  return [match[1] for match in map(SETTING.match, options) if match]


def _without_earlier_tuples(argv: Sequence[str]) -> list[str]:
  """Leaves out each option of a tuple that comes again later.

  ml_collections would join them to one tuple.
  """
  defaults = default_config.get_config()
  kept, seen = list(argv), set(settings_in(argv))
  end = kept.index('--') if '--' in kept else len(kept)
  for place in reversed(range(end)):
    setting = SETTING.match(kept[place])
    if setting and type(default_config.value_of(defaults, setting[1])) is tuple:
      if setting[1] not in seen:
        words = 1 if '=' in kept[place] else 2  # '--config.key value'
        del kept[place : place + words]
      seen.discard(setting[1])
  return kept


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
def named_options(known: Sequence[str] = ()) -> Iterator[None]:
  """Turns what absl says about an option into a `UserError`.

  Args:
    known: names of options, to propose beside the settings for a misspelt one.
  """
  try:
    yield
  except flags.UnrecognizedFlagError as error:
    settings = [f'config.{key}' for key in default_config.all_keys()]
    near = next(
      (s for s in settings if s.endswith(f'.{error.flagname}')),
      default_config.did_you_mean(error.flagname, [*known, *settings]),
    )
    raise UserError(
      f"option: Unknown command line flag '{error.flagname}'"
      + (f'; did you mean --{near}?' if near else '')
    ) from error
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
