"""Prepares a data set, and shows what it holds before anyone trains on it."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from deeplab_jax import build
from deeplab_jax.data import voc
from deeplab_jax.data.datasets import DatasetInfo, Tally
from deeplab_jax.data.load import Dataset
from deeplab_jax.data.survey import Finding, label_findings, survey_folder
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import replacing
from deeplab_jax.training.losses import median_frequency_weights
from deeplab_jax.training.writers import write_json
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.visualize import samples

log = logging.getLogger(__name__)


def prepare(
  config: ml_collections.ConfigDict, workdir: Path | None
) -> dict[str, Any]:
  """Prepares the splits of `config.data`; prints and draws what they hold.

  A folder is surveyed first, and what is wrong with it is printed. Into the
  folder `prepare` go `prepare.txt` (what is printed), `prepare.json` and a
  page of samples of each split, `SPLIT.png`.

  Args:
    config: of the run.
    workdir: where the folder `prepare` is made; None for beside the records.

  Returns:
    What `prepare.json` holds.

  Raises:
    UserError: if the data cannot be prepared, or a file not be written.
  """
  if workdir is not None:
    _make_folder(workdir)  # fails before the work does
  splits = (config.data.train_split, config.data.eval_split)
  splits = tuple(dict.fromkeys(filter(None, splits)))
  surveyed = config.data.name == 'folder' and config.data.dir
  text, findings = _survey(config, splits) if surveyed else ('', ())
  dataset = build.open_dataset(config, *splits)
  name = dataset.info.name if surveyed else config.data.name
  tallies = {split: dataset.tally(split) for split in dataset.builders}
  published = _published(dataset)
  if not surveyed:
    findings = _compare(
      dataset.info, tallies, published, config.data.train_split
    )
    text = _show(*findings, *[''] * bool(findings))
    _refuse_fatal(name, findings)
  weights = _class_weights(tallies[config.data.train_split])
  text += _show_tables(name, dataset.info, tallies, published)
  text += _show(
    f'class weights by median frequency in {config.data.train_split}:',
    f'--config.loss.class_weights={",".join(weights)}\n',
  )
  result = {
    'dataset': dataset.info.to_json(),
    'splits': {split: tally.to_json() for split, tally in tallies.items()},
    'published': published,
    'class_weights': [float(weight) for weight in weights],
    'findings': [dataclasses.asdict(finding) for finding in findings],
  }
  if workdir is None:
    builder = dataset.builders[config.data.train_split]
    workdir = Path(builder.data_path).parent
  output = _make_folder(workdir / 'prepare')
  write_json(output / 'prepare.json', result)
  with replacing(output / 'prepare.txt') as temporary:
    Path(temporary).write_text(text, encoding='utf-8')
  for split, tally in _labelled(tallies).items():
    title = f'{name}, {split}: {tally.num_images:,} images'
    source = dataset.source(split)
    page = samples.sample_page(source, dataset.info, tally, title)
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
  config: ml_collections.ConfigDict, splits: Sequence[str]
) -> tuple[str, tuple[Finding, ...]]:
  """Surveys and prints; returns what was printed, and the findings.

  Raises:
    UserError: if one of them is fatal.
  """
  data = config.data
  log.info('reading all files of %s', data.dir)
  survey = survey_folder(
    data.dir,
    splits,
    ignore_label=data.ignore_label,
    label_map=data.label_map,
    on_bad_image=data.on_bad_image,
  )
  text = _show(str(survey), *survey.findings, '')
  _refuse_fatal(survey.root, survey.findings)
  return text, survey.findings


def _refuse_fatal(name: object, findings: Sequence[Finding]) -> None:
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
      count = voc.PUBLISHED[config.variant].get(split)
      if count is not None:
        counts[split] = count
  return counts


def _compare(
  info: DatasetInfo,
  tallies: Mapping[str, Tally],
  published: Mapping[str, int],
  trained: str,
) -> tuple[Finding, ...]:
  """Finds absent classes, and splits of more or fewer images than published."""
  pixels = {
    split: (tally.class_pixels, tally.void_pixels)
    for split, tally in tallies.items()
    if split == trained or tally.class_pixels.any()
  }
  found = label_findings(
    pixels, info.classes, info.values, info.void_value, trained
  )
  other = tuple(
    f'{split}: {tallies[split].num_images:,}, and {count:,} published'
    for split, count in published.items()
    if tallies[split].num_images != count
  )
  if other:
    title = 'splits of another number of images than published'
    found += (Finding(title, len(other), other, fatal=False),)
  return found


def _labelled(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
  """Those of the splits that are not all void, as VOC's test is."""
  return {
    split: tally for split, tally in tallies.items() if tally.class_pixels.any()
  }


def _show_tables(
  name: str,
  info: DatasetInfo,
  tallies: Mapping[str, Tally],
  published: Mapping[str, int],
) -> str:
  """Prints the counts by class and the sizes; returns what is printed."""
  text = _show(
    f'{name}: {info.num_classes} classes, ignore label {info.ignore_label}', ''
  )
  splits = list(_labelled(tallies).items())
  for start in range(0, len(splits), 2):  # which fit side by side on a screen
    rows = _class_rows(info, dict(splits[start : start + 2]))
    text += _show(_table(rows), '')
  return text + _show(_table(_size_rows(tallies, published)), '')


def _show(*parts: object) -> str:
  """Prints each part on lines of its own; returns what is printed."""
  text = ''.join(f'{part}\n' for part in parts)
  print(text, end='', flush=True)
  return text


def _class_weights(tally: Tally) -> list[str]:
  """Writes the weight of each class by its median frequency, shortly."""
  weights = median_frequency_weights(
    tally.class_pixels, tally.class_image_pixels
  )
  return [f'{weight:.4g}' for weight in weights]


def _class_rows(
  info: DatasetInfo, tallies: Mapping[str, Tally]
) -> list[list[str]]:
  """Images, pixels and share of each class, beside one another by split."""
  rows = [['class'], *([name] for name in info.classes), ['all classes']]
  rows.append(['void, of all pixels'])
  for split, tally in tallies.items():
    pixels = int(tally.class_pixels.sum())
    rows[0] += [f'{split}: images', 'pixels', '%']
    for row, images, own in zip(
      rows[1:-2], tally.class_images, tally.class_pixels, strict=True
    ):
      row += [f'{images:,}', f'{own:,}', _percent(own, pixels)]
    rows[-2] += [
      f'{tally.num_images:,}',
      f'{pixels:,}',
      _percent(pixels, pixels),
    ]
    void = tally.void_pixels
    rows[-1] += ['', f'{void:,}', _percent(void, pixels + void)]
  return rows


def _size_rows(
  tallies: Mapping[str, Tally], published: Mapping[str, int]
) -> list[list[str]]:
  """Number of images of each split, and their sizes."""
  rows = [['split'], ['images'], ['smallest'], ['largest']]
  rows += [['most common size'], ['images of that size'], ['sizes']]
  for split, tally in tallies.items():
    by_area = sorted(tally.sizes, key=lambda size: (size[0] * size[1], size))
    common, count = tally.sizes.most_common(1)[0]
    values = [
      split,
      f'{tally.num_images:,}',
      *(f'{width}x{height}' for height, width in (by_area[0], by_area[-1])),
      f'{common[1]}x{common[0]}',
      f'{count:,}',
      f'{len(tally.sizes):,}',
    ]
    for row, value in zip(rows, values, strict=True):
      row.append(value)
  if published:
    counts = [published.get(split) for split in tallies]
    row = ['published images', *(f'{n:,}' if n else '-' for n in counts)]
    rows.insert(2, row)
  return rows


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
