"""Files that appear whole or not at all, locks, and hints at near names."""

import contextlib
import difflib
import fcntl
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
  """Gives a temporary name, and moves the file written there to `path`.

  If the body raises, `path` stays as it was. Errors name `path`.
  """
  folder, name = os.path.split(os.fspath(path))
  temporary = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  except BaseException as error:
    if os.path.exists(temporary):
      os.remove(temporary)
    if isinstance(error, OSError) and error.filename == temporary:
      error.filename = os.fspath(path)
    raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds an exclusive lock between processes; a killed one frees it too.

  The lock file at `path`, `.NAME.lock`, and its folder are created and kept.
  Raises `OSError` if that fails.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      name = path.name.removeprefix('.').removesuffix('.lock')
      log.info('waiting for another process that prepares %s', name)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def near(name: str, others: Iterable[str]) -> str:
  """Returns '; there is X' for the names the user may have meant, or ''.

  They differ in case, suffix, punctuation or added letters. If there are none,
  names with few other letters are taken.
  """
  others = sorted(others)
  bare = _bare(name)
  found = [other for other in others if _bare(other) == bare]
  if not found and bare:
    longer = re.compile(re.escape(bare) + '[a-z]')
    found = [other for other in others if longer.match(_bare(other))]
  found = found or difflib.get_close_matches(name, others, 3, 0.75)
  return f'; there is {", ".join(found[:3])}' if found else ''


def near_file(path: Path) -> str:
  """Applies `near` to the names in the folder of `path`."""
  with contextlib.suppress(OSError):  # the folder is missing or unreadable
    return near(path.name, (other.name for other in path.parent.iterdir()))
  return ''


def _bare(name: str) -> str:
  """Reduces a name to what all its spellings share."""
  name = unicodedata.normalize('NFKC', name).casefold()
  name = re.sub(r'(\.[a-z][a-z0-9]{1,4})+$', '', name)
  return re.sub(r'\W|_|\b0+(?=\d)', '', name)
