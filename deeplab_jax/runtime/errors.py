"""The exceptions for bad input and for a stop by a signal."""

import contextlib
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class UserError(ValueError):
  """Something the user gave cannot be used.

  The message is one line that names the culprit (file, key or value) and says
  what to do. A command prints it without a traceback and exits with status 1.
  """


class UnreadableError(UserError):
  """A file that is there but is damaged."""


class LabelError(UserError):
  """Labels that do not fit the classes; a label map may make them fit."""


def first_line(error: Exception) -> str:
  """Returns what the system refused, else the beginning of an error's message.

  Without a message it is the name of the error's type.
  """
  message = str(error).strip() or type(error).__name__
  if refused := re.search(r"\[os_error_code='(\d+)'", message):  # TensorStore
    return os.strerror(int(refused[1]))
  return textwrap.shorten(message.splitlines()[0], 200).rstrip(':')


class Preempted(Exception):
  """A signal stopped the work after `step`, and its checkpoint is saved.

  A command exits with the shell's status for the number of the signal.
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
  """Returns the choice of that name; functions and classes pass unchanged."""
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


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises `ValueError` unless the setting `name` has one of its values."""
  require(
    value in choices, f'{name} must be one of {", ".join(choices)}', value
  )


def check_map(name: str, x: Any, channels: int | None = None) -> None:
  """Raises `ValueError` unless x is a map [B, H, W, C] of at least a pixel.

  It may be a tracer: the check costs nothing at run time. `channels` is C, or
  None for any number, and `name` the name of x in the message.
  """
  shape = tuple(x.shape)
  if len(shape) == 4 and 0 not in shape[1:] and channels in (None, shape[-1]):
    return
  hint = ''
  if len(shape) == 4 and channels in shape[1:2]:
    hint = f'; the channels are second: {name}.transpose(0, 2, 3, 1)'
  elif len(shape) == 3 and channels in (None, shape[2]):
    hint = f'; the batch axis is missing: {name}[None]'
  elif len(shape) == 3 and channels == shape[0]:
    hint = (
      '; the batch axis is missing and the channels are first:'
      f' {name}.transpose(1, 2, 0)[None]'
    )
  raise ValueError(
    f'{name} must be [B, H, W, {channels or "C"}], got {list(shape)}{hint}'
  )
