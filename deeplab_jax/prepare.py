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
from deeplab_jax.visualize import samples

log = logging.getLogger(__name__)

_Show = Callable[..., None]
_Tallies = Mapping[str, Any]  # by split, what `Dataset.tally` returns


def prepare(config: ConfigDict, workdir: Path | None) -> dict[str, Any]:
  """Prepares the splits of `config.data`; prints and draws what they hold.

  A folder is surveyed first, and what is wrong with it is printed. The folder
  `prepare` receives `prepare.txt` (what is printed), `prepare.json` and a page
  of samples of each split, `SPLIT.png`. It lies in the workdir, else beside the
  prepared records.

  Returns:
    What `prepare.json` holds.

  Raises:
    UserError: if the data cannot be prepared, or a file not be written.
  """
  if workdir is not None:
    _make_folder(workdir)  # fails before the work is done
  data, lines = config.data, []

  def show(*parts: object) -> None:
    lines.extend(f'{part}\n' for part in parts)
    print(*parts, sep='\n', flush=True)

  splits = tuple(
    filter(None, dict.fromkeys((data.train_split, data.eval_split)))
  )
  surveyed = data.name == 'folder' and data.dir
  findings = _survey(config, splits, show) if surveyed else ()
  dataset = build.open_dataset(config, *splits)
  info = dataset.info
  name = info.name if surveyed else data.name
  tallies = {split: dataset.tally(split) for split in dataset.builders}
  labeled = {
    s: tally for s, tally in tallies.items() if tally.class_pixels.any()
  }
  published = _published(dataset)
  if not surveyed:
    used = labeled | {data.train_split: tallies[data.train_split]}
    findings = (
      *label_findings(
        {s: (t.class_pixels, t.void_pixels) for s, t in used.items()},
        info.classes,
        info.values,
        info.void_value,
        data.train_split,
      ),
      *_other_counts(tallies, published),
    )
    if findings:
      _show_findings(name, findings, show)
  show(f'{name}: {info.num_classes} classes, ignore label {info.ignore_label}')
  pairs = list(labeled.items())
  for start in range(0, len(pairs), 2):  # that fit side by side on a screen
    show('', _table(_class_rows(info, dict(pairs[start : start + 2]))))
  show('', _table(_size_rows(tallies, published)))
  trained = tallies[data.train_split]
  weights = [
    f'{weight:.4g}'
    for weight in median_frequency_weights(
      trained.class_pixels, trained.class_image_pixels
    )
  ]
  show(f'class weights by median frequency in {data.train_split}:')
  show(f'--config.loss.class_weights={",".join(weights)}', '')
  result = {
    'dataset': info.to_json(),
    'splits': {split: tally.to_json() for split, tally in tallies.items()},
    'published': published,
    'class_weights': [float(weight) for weight in weights],
    'findings': [dataclasses.asdict(finding) for finding in findings],
  }
  if workdir is None:
    workdir = Path(dataset.builders[data.train_split].data_path).parent
  output = _make_folder(workdir / 'prepare')
  write_json(output / 'prepare.json', result)
  with replacing(output / 'prepare.txt') as temporary:
    Path(temporary).write_text(''.join(lines), encoding='utf-8')
  for split, tally in labeled.items():
    title = f'{name}, {split}: {tally.num_images:,} images'
    page = samples.sample_page(dataset.source(split), info, tally, title)
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
  show(survey)
  _show_findings(survey.root, survey.findings, show)
  return survey.findings


def _show_findings(
  name: object, findings: Sequence[Finding], show: _Show
) -> None:
  """Shows them; raises `UserError` if one is fatal."""
  show(*findings, '')
  fatal = sum(finding.count for finding in findings if finding.fatal)
  if fatal:
    errors = '1 error' if fatal == 1 else f'{fatal:,} errors'
    raise UserError(
      f'{name}: cannot be used; correct the {errors} listed above'
    )


def _published(dataset: Dataset) -> dict[str, int]:
  """The number of images that each split is known to have elsewhere."""
  counts = {}
  for split, builder in dataset.builders.items():
    config = builder.builder_config
    if isinstance(config, voc.VocConfig):
      counts[split] = voc.PUBLISHED[config.variant].get(split)
  return {split: count for split, count in counts.items() if count}


def _other_counts(
  tallies: _Tallies, published: Mapping[str, int]
) -> tuple[Finding, ...]:
  """Finds splits of more or fewer images than published."""
  other = tuple(
    f'{split}: {tallies[split].num_images:,}, and {count:,} published'
    for split, count in published.items()
    if tallies[split].num_images != count
  )
  title = 'splits of another number of images than published'
  return (Finding(title, len(other), other, fatal=False),) if other else ()


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
  rows = [
    ['split'],
    ['images'],
    ['published images'],
    ['smallest'],
    ['largest'],
  ]
  rows += [['most common size'], ['images of that size'], ['sizes']]
  for split, tally in tallies.items():
    by_area = sorted(tally.sizes, key=lambda size: (size[0] * size[1], size))
    common, count = tally.sizes.most_common(1)[0]
    sizes = by_area[0], by_area[-1], common
    values = [
      split,
      f'{tally.num_images:,}',
      f'{published[split]:,}' if split in published else '-',
      *(f'{width}x{height}' for height, width in sizes),
      f'{count:,}',
      f'{len(tally.sizes):,}',
    ]
    for row, value in zip(rows, values, strict=True):
      row.append(value)
  return rows if published else rows[:2] + rows[3:]


def _percent(part: int, whole: int) -> str:
  return f'{100 * part / whole:.2f}' if whole else '-'


def _table(rows: Sequence[Sequence[str]]) -> str:
  """Aligns the columns, the first at its left, with a line below the head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      cell.rjust(width) if index else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  lines.insert(1, '-' * len(lines[0]))
  return '\n'.join(lines)
