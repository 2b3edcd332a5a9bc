"""The report of a run, WORKDIR/report.html: one file that needs no other."""

import csv
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

from deeplab_jax.config import flat, get_config, to_json
from deeplab_jax.runtime.errors import UserError, first_line
from deeplab_jax.runtime.files import as_path, write
from deeplab_jax.visualize.report import page, picture_url

log = logging.getLogger(__name__)

_CURVES = 'eval_miou', 'loss', 'learning_rate', 'images_per_second'
_POINTS = 500  # at most, of a curve


def report(workdir: Path) -> Path:
  """Writes `workdir/report.html` from what the workdir holds; returns its path.

  It shows the newest evaluation in full and lists the others. A part without
  data says what is missing. Raises `UserError` if there is nothing to show.
  """
  data = {
    'settings': flat(_read(workdir / 'config.json') or {}),
    'sessions': _read(workdir / 'sessions.json') or [],
    'curves': _curves(workdir / 'metrics.jsonl'),
    'evaluations': evaluations(workdir),
  }
  if not any(data.values()):
    raise UserError(f'nothing to report in {workdir}; train there first')
  data['defaults'] = flat(to_json(get_config()))
  data['time'] = time.time()
  path = workdir / 'report.html'
  write(path, page(workdir.resolve().name, data))
  print(f'report: {path}')
  return path


def _read(path: Path) -> Any:
  """Returns a JSON value, or None if the file is missing or damaged."""
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except (OSError, ValueError) as error:
    log.warning('%s: %s; left out of the report', path, first_line(error))
    return None


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
  """Values by step in metrics.jsonl, thinned; without those not finite."""
  text = path.read_bytes().decode('utf-8', 'replace') if path.exists() else ''
  # A killed run may leave its last line half done.
  lines = [json.loads(x) for x in text.splitlines() if x.endswith('}')]
  curves = {}
  for key in _CURVES:
    points = [(x['step'], x[key]) for x in lines if x.get(key) is not None]
    if points:
      curves[key] = points[:: -(-len(points) // _POINTS)]
      curves[key] += points[-1:] if curves[key][-1] != points[-1] else []
  return curves


def evaluations(workdir: Path) -> list[dict[str, Any]]:
  """All evaluations, the newest first and with all that was written of it."""

  def changed(path: Any) -> float:
    return getattr(state := path.stat(), 'mtime', 0) or state.st_mtime_ns

  paths = sorted((workdir / 'eval').glob('*.json'), key=changed, reverse=True)
  paths = paths or [workdir / 'eval.json']
  read = ((p.stem, _read(p)) for p in paths)  # names are those of files
  found = [{**r, 'name': name} for name, r in read if r and type(r) is dict]
  for newest in found[:1]:
    start = paths[0].with_name(newest['name'])
    file = as_path(f'{start}_confusion.csv')
    if file.exists():
      text = file.read_bytes().decode()
      _, *rows = csv.reader(io.StringIO(text, newline=''))
      newest['colors'] = [row[1] for row in rows]
      newest['confusion'] = [list(map(int, row[2:])) for row in rows]
    for kind in 'worst', 'best':
      if (picture := as_path(f'{start}_{kind}.png')).exists():
        newest[kind] = picture_url(picture)
  return found
