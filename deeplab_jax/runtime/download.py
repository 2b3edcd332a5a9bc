"""Downloads that resume, try mirrors and check the digest.

`pooch` and TFDS start a broken download again, and know one address.
"""

import hashlib
import logging
import os
import shutil
import ssl
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from urllib.error import HTTPError, URLError

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import locked

log = logging.getLogger(__name__)

_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3  # in a row that bring no byte
# A broken connection. `URLError` is an address that does not give the file; any
# other `OSError` comes from the disk.
_BROKEN = (HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


def cache_dir() -> Path:
  """The folder of downloads: deeplab_jax in `$XDG_CACHE_HOME` or ~/.cache."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return Path(home).expanduser() / 'deeplab_jax'


def download(
  urls: Sequence[str],
  *,
  digest: str,
  size: int | None = None,
  directory: str | Path | None = None,
  advice: str,
) -> Path:
  """Returns the path of a file from the web; downloads it if needed.

  The addresses are tried in order; the first gives the file its name, but only
  when its digest is right ('md5:' or 'sha256:' and its first digits, or all). A
  broken connection leaves `NAME.part`, from which the next address or the next
  run goes on. The environment names the proxies (`https_proxy`, `no_proxy`).

  `size` is in bytes, if known. `directory` is `cache_dir()` by default. Raises
  `UserError`, with `advice`, if no address gives the file, or if the disk
  fails.
  """
  folder = Path(directory or cache_dir())
  path = folder / urls[0].rpartition('/')[2]
  part, reasons = _part(path), []
  try:
    with locked(folder / f'.{path.name}.lock'):
      if path.exists() and _digest(path, digest).startswith(digest):
        return path
      if size is not None:
        needed = missing_bytes(path, size)
        require_space(folder, needed, f'the download of {path.name}')
      for url in urls:
        log.info('downloading %s', url)
        try:
          _complete(url, part, digest, size)
        except (URLError, *_BROKEN) as error:
          reason = getattr(error, 'reason', None) or error
          reason = ' '.join(str(reason).split()) or type(error).__name__
          log.warning('%s: %s', url, reason)
          place = url if len(urls) == 1 else urllib.parse.urlsplit(url).netloc
          reasons.append(f'{place}: {reason}')
        else:
          os.replace(part, path)
          return path
      kept = _size(part)
  except OSError as error:
    raise UserError(f'{error.filename or folder}: {error.strerror}') from error
  there = f' after {kept / 1e6:,.1f} MB, which are kept' if kept else ''
  raise UserError(
    f'{path.name} cannot be downloaded{there}: {"; ".join(reasons)}; {advice}'
  )


def missing_bytes(path: Path, size: int) -> int:
  """Returns how many of `size` bytes `download` has still to write."""
  return 0 if _size(path) == size else max(size - _size(_part(path)), 0)


def require_space(
  folder: Path, needed: int, what: str, advice: str = 'make room there'
) -> None:
  """Raises `UserError` unless `needed` bytes are free for `what`."""
  there = next(path for path in (folder, *folder.parents) if path.exists())
  free = shutil.disk_usage(there).free
  if free < needed:
    raise UserError(
      f'{folder}: {what} needs {needed / 1e6:,.1f} MB of disk, but'
      f' {free / 1e6:,.1f} MB are free; {advice}'
    )


def _complete(url: str, part: Path, digest: str, size: int | None) -> None:
  """Completes `part` from one address, and checks it."""
  if size is not None and _size(part) > size:
    part.unlink()
  resumed, failures = part.exists(), 0
  while size is None or _size(part) < size:
    before = _size(part)
    try:
      _receive(url, part, size)
      break
    except _BROKEN:
      failures = 0 if _size(part) > before else failures + 1
      if failures == _ATTEMPTS:
        raise
  found = _digest(part, digest)
  if found.startswith(digest):
    return
  part.unlink()
  if resumed:  # The older part may be wrong.
    return _complete(url, part, digest, size)
  kind, _, value = found.partition(':')
  raise URLError(
    f'has the {kind.upper()} {value}, expected {digest.partition(":")[2]}; it'
    ' was not kept, a proxy may have sent another page'
  )


def _receive(url: str, part: Path, size: int | None) -> None:
  """Adds to `part` what it lacks, unless the length shows another file."""
  from tqdm import tqdm  # late: `import deeplab_jax` would take 0.2 s more

  start = _size(part)
  headers = {'Range': f'bytes={start}-'} if start else {}
  request = urllib.request.Request(url, headers=headers)
  try:
    # `urlopen` would keep the proxies of its first call.
    opener = urllib.request.build_opener()
    response = opener.open(request, timeout=_TIMEOUT)
  except HTTPError as error:
    error.close()
    if error.code == 416 and start and size is None:
      return  # There is nothing beyond `start`: the digest tells.
    raise
  with response:
    if response.status != 206:
      start = 0  # The server does not know ranges and sends all again.
    length = int(response.headers.get('Content-Length') or 0)
    total = start + length if length else size
    if size is not None and total != size:
      raise URLError(f'has {total} bytes, expected {size}')
    part.touch()
    bar = tqdm.wrapattr(  # disable=None: none without a screen
      response, 'read', total, desc=part.stem, initial=start, disable=None
    )
    with part.open('r+b') as file, bar as stream:
      file.seek(start)
      shutil.copyfileobj(stream, file, 1 << 20)
      if total and file.tell() < total:
        raise IncompleteRead(b'', total - file.tell())


def _part(path: Path) -> Path:
  return path.with_name(f'{path.name}.part')


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _digest(path: Path, like: str) -> str:
  """Returns the digest of a file in the form of `like`."""
  kind = like.partition(':')[0]
  digest = hashlib.new(kind, usedforsecurity=False)  # or FIPS forbids MD5
  with path.open('rb') as file:
    hashlib.file_digest(file, lambda: digest)
  return f'{kind}:{digest.hexdigest()}'
