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


@contextlib.contextmanager
def naming(culprit: str) -> Iterator[None]:
  """Turns a `ValueError` into a `UserError` about `culprit`."""
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{culprit}: {error}') from error
