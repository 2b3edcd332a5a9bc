"""The exceptions that stand for bad input."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
  """Something the user gave cannot be used.

  The message is one line that names the culprit (file, key or value) and says
  what to do. `main` prints it without a traceback and exits with status 1.
  """


class UnreadableError(UserError):
  """A file that is there but is damaged."""


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, else the name of its type."""
  return (
    (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(':')
  )


@contextlib.contextmanager
def naming(culprit: str) -> Iterator[None]:
  """Turns a `ValueError` into a `UserError` about `culprit`."""
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{culprit}: {error}') from error
