"""The exceptions that stand for bad input, and for a stop by a signal."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


class UserError(ValueError):
  """Something the user gave cannot be used.

  The message is one line that names the culprit (file, key or value) and says
  what to do. A command prints it without a traceback and exits with status 1.
  """


class UnreadableError(UserError):
  """A file that is there but is damaged."""


class Preempted(Exception):
  """A signal stopped the work after a step, and its checkpoint is saved.

  A command exits with the shell's status for the signal.

  Attributes:
    signal: its number.
    step: the last one that was done.
  """

  def __init__(self, signal: int, step: int) -> None:
    super().__init__(
      f'stopped at step {step}; the same command goes on from there'
    )
    self.signal, self.step = signal, step


def require(holds: bool, rule: str, value: Any) -> None:
  """Raises `ValueError` with a rule and the value that breaks it.

  >>> require(0 <= 2 < 1, 'momentum must be in [0, 1)', 2)
  Traceback (most recent call last):
  ValueError: momentum must be in [0, 1), got 2
  """
  if not holds:
    raise ValueError(f'{rule}, got {value!r}')


def choose(what: str, name: Any, choices: Mapping[str, Any]) -> Any:
  """Returns the choice of that name; a function or class stands for itself."""
  chosen = choices.get(name, name)
  require(callable(chosen), f'{what} must be {" or ".join(choices)}', name)
  return chosen


@contextlib.contextmanager
def naming(culprit: str) -> Iterator[None]:
  """Turns a `ValueError` into a `UserError` about `culprit`."""
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{culprit}: {error}') from error
