"""Files that appear whole or not at all, and locks between processes."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
  """Gives a temporary name; what is written there then takes `path`'s place.

  If the body raises, `path` stays as it was, and it is what errors name.
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
  """Holds an exclusive lock between processes, freed even by a kill.

  Args:
    path: of the lock file, `.NAME.lock`; made with its folder, and kept.

  Raises:
    OSError: if the file cannot be made.
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
