"""What only this user writes: folders, and notes of settings in them."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def own_folder(kind: str, name: str) -> Path | None:
  """Returns a folder, made, where only this user writes.

  That is `deeplab_jax/NAME` in XDG_CACHE_HOME or ~/.cache for the kind 'cache',
  in XDG_STATE_HOME or ~/.local/state for 'state'. Returns None, and warns once,
  if it cannot be made, or is of another user, or others may write there.
  """
  home = {'cache': '~/.cache', 'state': '~/.local/state'}[kind]
  base = os.environ.get(f'XDG_{kind.upper()}_HOME', '')
  base = base if os.path.isabs(base) else os.path.expanduser(home)
  folder = Path(base, 'deeplab_jax', name)
  try:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    states = folder.lstat(), folder.stat()
    owned = {state.st_uid for state in states} == {os.getuid()}
    if not owned or states[1].st_mode & (stat.S_IWGRP | stat.S_IWOTH):
      raise PermissionError(errno.EPERM, 'others may write there')
  except OSError as error:
    warn_once(f'{folder} is not used, nothing is kept: {error.strerror}')
    return None
  return folder


@functools.cache
def warn_once(line: str) -> None:
  """Logs a warning, unless this process has done so before."""
  log.warning('%s', line)


def remember(values: Any) -> None:
  """Notes that this user wrote JSON values, in a file named by their digest."""
  with contextlib.suppress(OSError):  # then they count as another user's
    if note := _note(values):
      note.touch()


def wrote(values: Any) -> bool:
  """Whether `remember` noted these JSON values."""
  note = _note(values)
  return note is not None and note.exists()


def _note(values: Any) -> Path | None:
  text = json.dumps(values, sort_keys=True)
  folder = own_folder('state', 'settings')
  return folder and folder / hashlib.sha256(text.encode()).hexdigest()
