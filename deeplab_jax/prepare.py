"""Prepares a data set, and shows what it holds before anyone trains on it."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deeplab_jax import build
from deeplab_jax.data import voc
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.load import Dataset
from deeplab_jax.data.survey import Finding, label_findings, survey_folder
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import replacing
from deeplab_jax.training.losses import median_frequency_weights
from deeplab_jax.training.writers import write_json
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.visualize.figures import sample_page

log = logging.getLogger(__name__)

_Show = Callable[..., None]
_Tallies = Mapping[str, Any]  # by split, what `Dataset.tally` returns


def prepare(config: ConfigDict, workdir: Path | None) -> dict[str, Any]:
  """Prepares the splits of `config.data`; prints and draws what they hold.

  A folder is surveyed first, and what is wrong with it is printed. The folder
  `prepare`, in the workdir or else beside the prepared records, receives
  `prepare.txt` (what is printed), `prepare.json` (what is returned) and a page
  of samples of each split, `SPLIT.png`. Raises `UserError` if the data cannot
  be prepared, or a file not be written.
  """
  if workdir is not None:
    _make_folder(workdir)  # fails before the work is done
  data = config.data
  text: list[str] = []

  def show(*parts: object) -> None:
    text.extend(f'{part}\n' for part in parts)
    print(*parts, sep='\n', flush=True)

  splits = list(
    dict.fromkeys(filter(None, (data.train_split, data.eval_split)))
  )
  surveyed = data.name == 'folder' and data.dir
  findings = _survey(config, splits, show) if surveyed else ()
  dataset = build.open_dataset(config, *splits)
  info, published = dataset.info, _published(dataset)
  name = info.name if surveyed else data.name
  tallies = {split: dataset.tally(split) for split in dataset.builders}
  if not surveyed:
    findings = _compare(info, tallies, published, data.train_split)
    _show_findings(name, findings, show)
  trained = tallies[data.train_split]
  counts = trained.class_pixels, trained.class_image_pixels
  weights = [f'{weight:.4g}' for weight in median_frequency_weights(*counts)]
  show(f'{name}: {info.num_classes} classes, ignore label {info.ignore_label}')
  labeled = [(s, t) for s, t in tallies.items() if t.class_pixels.any()]
  for start in range(0, len(labeled), 2):  # that fit side by side on a screen
    show('', _table(_class_rows(info, dict(labeled[start : start + 2]))))
  show('', _table(_size_rows(tallies, published)), '')
  show(f'class weights by median frequency in {data.train_split}:')
  show(f'--config.loss.class_weights={",".join(weights)}', '')
  result = {
    'dataset': info.to_json(),
    'splits': {split: tally.to_json() for split, tally in tallies.items()},
    'published': published,
    'class_weights': [float(weight) for weight in weights],
    'findings': [dataclasses.asdict(finding) for finding in findings],
  }
  records = Path(dataset.builders[data.train_split].data_path)
  output = _make_folder((workdir or records.parent) / 'prepare')
  write_json(output / 'prepare.json', result)
  with replacing(output / 'prepare.txt') as temporary:
    Path(temporary).write_text(''.join(text), encoding='utf-8')
  for split, tally in labeled:
    title = f'{name}, {split}: {tally.num_images:,} images'
    page = sample_page(dataset.source(split), info, tally, title)
    visualize.save_png(output / f'{split}.png', page)
    print(output / f'{split}.png', flush=True)
  return result


def _make_folder(path: Path) -> Path:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'{path}: cannot be written ({error.strerror}); give another --workdir'
    ) from error
  return path


def _survey(
  config: ConfigDict, splits: Sequence[str], show: _Show
) -> tuple[Finding, ...]:
  data = config.data
  log.info('reading all files of %s', data.dir)
  survey = survey_folder(
    data.dir,
    splits,
    ignore_label=data.ignore_label,
    label_map=data.label_map,
    on_bad_image=data.on_bad_image,
  )
  show(survey, *() if survey.findings else ('',))
  _show_findings(survey.root, survey.findings, show)
  return survey.findings


def _show_findings(
  name: object, findings: Sequence[Finding], show: _Show
) -> None:
  """Shows what was found, if anything; raises `UserError` if it is fatal."""
  if findings:
    show(*findings, '')
  if fatal := sum(finding.count for finding in findings if finding.fatal):
    errors = 'error' if fatal == 1 else 'errors'
    raise UserError(
      f'{name}: cannot be used; correct the {fatal:,} {errors} listed above'
    )


def _published(dataset: Dataset) -> dict[str, int]:
  """The number of images that each split is known to have elsewhere."""
  config = dataset.builders[next(iter(dataset.builders))].builder_config
  if not isinstance(config, voc.VocConfig):
    return {}
  known = voc.PUBLISHED[config.variant]
  return {split: known[split] for split in dataset.builders if split in known}


def _compare(
  info: DatasetInfo,
  tallies: _Tallies,
  published: Mapping[str, int],
  trained: str,
) -> tuple[Finding, ...]:
  """Finds absent classes, and splits of more or fewer images than published."""
  pixels = {
    split: (tally.class_pixels, tally.void_pixels)
    for split, tally in tallies.items()
    if split == trained or tally.class_pixels.any()
  }
  values, void = info.values, info.void_value
  found = label_findings(pixels, info.classes, values, void, trained)
  other = tuple(
    f'{split}: {tallies[split].num_images:,}, and {count:,} published'
    for split, count in published.items()
    if tallies[split].num_images != count
  )
  title = 'splits of another number of images than published'
  differing = Finding(title, len(other), other, fatal=False)
  return (*found, differing) if other else found


def _class_rows(info: DatasetInfo, tallies: _Tallies) -> list[list[str]]:
  """Images, pixels and share of each class, the splits side by side."""
  rows = [['class'], *([name] for name in info.classes), ['all classes']]
  rows.append(['void, of all pixels'])
  for split, tally in tallies.items():
    pixels, void = int(tally.class_pixels.sum()), tally.void_pixels
    counts = zip(tally.class_images, tally.class_pixels, strict=True)
    cells = [
      (f'{split}: images', 'pixels', '%'),
      *((f'{n:,}', f'{own:,}', _percent(own, pixels)) for n, own in counts),
      (f'{tally.num_images:,}', f'{pixels:,}', _percent(pixels, pixels)),
      ('', f'{void:,}', _percent(void, pixels + void)),
    ]
    for row, three in zip(rows, cells, strict=True):
      row.extend(three)
  return rows


def _size_rows(
  tallies: _Tallies, published: Mapping[str, int]
) -> list[list[str]]:
  """The number of images of each split, and their sizes."""
  of_sizes = 'smallest', 'largest', 'most common size', 'images of that size'
  heads = 'split', 'images', 'published images', *of_sizes, 'sizes'
  rows = [[head] for head in heads]
  for split, tally in tallies.items():
    by_area = sorted(tally.sizes, key=lambda size: (size[0] * size[1], size))
    common, count = tally.sizes.most_common(1)[0]
    sizes = by_area[0], by_area[-1], common
    values = [split, f'{tally.num_images:,}']
    values.append(f'{published[split]:,}' if split in published else '-')
    values += [f'{width}x{height}' for height, width in sizes]
    values += [f'{count:,}', f'{len(tally.sizes):,}']
    for row, value in zip(rows, values, strict=True):
      row.append(value)
  return rows if published else rows[:2] + rows[3:]


def _percent(part: int, whole: int) -> str:
  return f'{100 * part / whole:.2f}' if whole else '-'


def _table(rows: Sequence[Sequence[str]]) -> str:
  """Aligns the columns, the first at its left, with a line below the head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *others in rows:
    cells = map(str.rjust, others, widths[1:])
    lines.append('  '.join([first.ljust(widths[0]), *cells]).rstrip())
  lines.insert(1, '-' * len(lines[0]))
  return '\n'.join(lines)
