"""What all commands share: flags, a plain log, and errors in one line."""

import contextlib
import difflib
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import app, flags
from absl import logging as absl_logging

from deeplab_jax.runtime import watchdog
from deeplab_jax.runtime.errors import Preempted, UserError


def run(
  main: Callable[[list[str]], None], debug: flags.FlagHolder[bool]
) -> None:
  """Runs a command: parses its flags, calls it, and exits.

  `main` takes the name of the program and what `parse_flags` left. The flag
  `debug` shows tracebacks instead of one line.
  """
  if main.__module__ != '__main__':  # a console script: show its text and flags
    sys.modules['__main__'].__doc__ = sys.modules[main.__module__].__doc__
    for flag in flags.FLAGS.get_key_flags_for_module(main.__module__):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  log_to_stderr()

  def command(argv: list[str]) -> None:
    if not debug.value:  # what fails is raised; these tell it again, at length
      absl_logging.set_verbosity(absl_logging.FATAL)
      logging.getLogger('asyncio').disabled = True
      sys.unraisablehook = lambda _: None
    with watchdog.leaving(), one_line_errors(debug.value):
      main(argv)

  app.run(command, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the flags of the command; returns settings, inputs, and mistakes.

  `configure.override` reads settings, --config.section.key=value, and refuses
  what is misspelled.
  """
  with one_line_errors('--debug' in argv), named_options():
    try:
      return flags.FLAGS(argv, known_only=True)
    except SystemExit:  # absl exits with 1 after it has printed the help
      sys.stdout.flush()
      sys.exit(0)


@contextlib.contextmanager
def named_options(known: Sequence[str] = ()) -> Iterator[None]:
  """Turns what absl says about an option into a `UserError`.

  It proposes one of the `known` names, as 'workdir' or 'config.train.steps'.
  """
  try:
    yield
  except flags.UnrecognizedFlagError as error:
    name = error.flagname
    near = next((k for k in known if k.endswith(f'.{name}')), None)
    near = near or did_you_mean(name, known)
    raise UserError(
      f"option: Unknown command line flag '{name}'"
      + (f'; did you mean --{near}?' if near else '')
    ) from error
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f'option: {" ".join(str(error).split())}') from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """The one of `names` that is most like a misspelled one; '' if none is."""
  return next(iter(difflib.get_close_matches(name, names, 1)), '')


@contextlib.contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
  """Ends the process with one line on stderr instead of a traceback.

  The exit status is 1 for a `UserError` and for what the system refuses. It is
  128 and the signal's number for Ctrl-C, for output that nobody reads any more,
  and for `Preempted`. With `debug` errors show where they come from.
  """
  try:
    yield
  except Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(128 + stop.signal)
  except (UserError, OSError, KeyboardInterrupt) as error:
    if debug:
      raise
    sys.exit(_report(error))


def _report(error: BaseException) -> int:
  """Prints an error in one line; returns the exit status."""
  if isinstance(error, KeyboardInterrupt):
    print('interrupted', file=sys.stderr)
    return 128 + signal.SIGINT
  if isinstance(error, BrokenPipeError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    # What is still to be flushed at exit would fail again.
    os.dup2(nowhere, sys.stdout.fileno())
    try:
      print('broken pipe', file=sys.stderr, flush=True)
    except BrokenPipeError:
      os.dup2(nowhere, sys.stderr.fileno())
    return 128 + signal.SIGPIPE
  message = str(error)
  if isinstance(error, OSError):
    message = error.strerror or message
    if error.filename is not None:
      message = f'{error.filename}: {message}'
  line = plain(message).replace('\n', '\\n')
  print(f'error: {line}', file=sys.stderr)
  return 1


def plain(text: str) -> str:
  """Returns text, cut if endless, with control characters made visible."""
  shown = (c if c.isprintable() or c in '\n\t' else repr(c)[1:-1] for c in text)
  return ''.join(itertools.islice(shown, 20_000))


class _Plain(logging.Formatter):
  def format(self, record: logging.LogRecord) -> str:
    return plain(super().format(record))


def log_to_stderr() -> None:
  """Shows the package's own log as plain lines, and only warnings of others."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(_Plain('%(message)s'))
  own = logging.getLogger('deeplab_jax')
  own.addHandler(handler)
  own.setLevel(logging.INFO)
  own.propagate = False
