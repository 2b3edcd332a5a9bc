"""Prepares a data set, and shows what it holds before anyone trains on it."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deeplab_jax import build
from deeplab_jax.data import folder, voc
from deeplab_jax.data.datasets import DatasetInfo, Tally, voc_palette
from deeplab_jax.data.images import decode_label, encode_label
from deeplab_jax.data.labels import Meaning
from deeplab_jax.data.load import find_layout
from deeplab_jax.data.proposals import Proposal
from deeplab_jax.data.records import Item, Layout, readable
from deeplab_jax.data.survey import (
  Finding,
  Survey,
  label_findings,
  survey_folder,
)
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import write, write_json
from deeplab_jax.training.losses import median_frequency_weights
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.visualize.figures import sample_page

log = logging.getLogger(__name__)

_HOW = 'ignore_label', 'label_map', 'on_bad_image', 'as_stored'
_SAMPLES = 200  # images that a proposal is drawn from

_Show = Callable[..., None]
_Tallies = Mapping[str, Tally]  # by split
_Counts = Mapping[str, int]


def prepare(config: ConfigDict, workdir: Path | None) -> dict[str, Any]:
  """Prepares the splits of `config.data`; prints and draws what they hold.

  A folder is surveyed first, and what is wrong with it is printed. The folder
  `prepare`, in the workdir or else beside the prepared records, receives
  `prepare.txt` (what is printed), `prepare.json` (what is returned), a page of
  samples of each split, `SPLIT.png`, and the first images of training as it
  sees them, `SPLIT_trained.png`. Raises `UserError` if the data cannot be
  prepared, or a file not be written.
  """
  if workdir is not None:
    _make_folder(workdir)  # fails before the work is done
  data = config.data
  text: list[str] = []

  def show(*parts: object) -> None:
    text.extend(f'{part}\n' for part in parts)
    print(*parts, sep='\n', flush=True)

  named = filter(None, (data.train_split, data.eval_split))
  splits = list(dict.fromkeys(named))
  surveyed = data.dir and find_layout(data.name, build.set_values(data.options))
  build.check_links(config)
  findings: tuple[Finding, ...] = ()
  if surveyed:
    findings = _survey(data, surveyed, splits, workdir, show)
  dataset = build.open_dataset(config, *splits)
  info, (builder, *_) = dataset.info, dataset.builders.values()
  name = info.name if surveyed else data.name
  tallies = {split: dataset.tally(split) for split in dataset.builders}
  known = voc.PUBLISHED.get(getattr(builder.builder_config, 'variant', ''), {})
  published = {split: known[split] for split in tallies if split in known}
  trained = tallies[data.train_split]
  labeled = {
    s: t for s, t in tallies.items() if t is trained or t.class_pixels.any()
  }
  if not surveyed:
    findings = label_findings(info, labeled, data.train_split)
    findings += _compare(tallies, published)
    _show_findings(name, findings, show)
  counts = trained.class_pixels, trained.class_image_pixels
  weights = [f'{weight:.4g}' for weight in median_frequency_weights(*counts)]
  show(f'{name}: {info.num_classes} classes, ignore label {info.ignore_label}')
  if info.mean:
    each = zip(info.mean, info.std, strict=True)
    shown = ', '.join(f'{mean:.6g} +- {std:.6g}' for mean, std in each)
    show(f'images of {trained.kind}, mean and standard deviation: {shown}')
  pairs = list(labeled.items())
  for start in range(0, len(pairs), 2):  # that fit side by side on a screen
    show('', _table(_class_columns(info, pairs[start : start + 2])))
  show('', _table(_size_columns(tallies, published)), '')
  show(f'class weights by median frequency in {data.train_split}:')
  show(f'--config.loss.class_weights={",".join(weights)}', '')
  result = {
    'dataset': info.to_json(),
    'splits': {split: tally.to_json() for split, tally in tallies.items()},
    'published': published,
    'class_weights': [float(weight) for weight in weights],
    'findings': [dataclasses.asdict(finding) for finding in findings],
  }
  home = Path(dataset.builders[data.train_split].data_path).parent
  output = _make_folder((workdir or home) / 'prepare')
  write_json(output / 'prepare.json', result)
  write(output / 'prepare.txt', ''.join(text))
  for split, tally in pairs:
    title = f'{name}, {split}: {tally.num_images:,} images'
    page = sample_page(dataset.source(split), info, tally, title)
    visualize.save_png(output / f'{split}.png', page)
    print(output / f'{split}.png', flush=True)
  with contextlib.closing(build.make_iterator(config, dataset, count=8)) as it:
    seen = next(it)
  images, maps = list(seen['image']), list(seen['label'])
  page = visualize.panel(
    images, None, maps, info.palette, info.ignore_label, classes=info.classes
  )
  visualize.save_png(output / f'{data.train_split}_trained.png', page)
  print(output / f'{data.train_split}_trained.png', flush=True)
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
  data: ConfigDict,
  layout: Layout,
  splits: Sequence[str],
  workdir: Path | None,
  show: _Show,
) -> tuple[Finding, ...]:
  log.info('reading all files of %s', data.dir)
  survey = survey_folder(
    data.dir,
    splits,
    tile=data.tile or 0,
    **{key: data[key] for key in _HOW},
    layout=layout,
  )
  show(survey.text, *() if survey.findings else ('',))
  proposed: Iterable[str] = ()
  if survey.proposal:
    proposed = _proposed(survey, survey.proposal, data, workdir)
  _show_findings(survey.root, survey.findings, show, proposed)
  return survey.findings


def _proposed(
  survey: Survey, proposal: Proposal, data: ConfigDict, workdir: Path | None
) -> Iterator[str]:
  """Draws samples read as proposed; yields lines that say all that."""
  yield 'proposed, but not used until you give it:'
  yield str(proposal)
  yield from (f'  {row}' for row in proposal.table)
  if proposal.new:
    path = shlex.quote(str(survey.classes))
    yield f"printf '%s\\n' {shlex.join(proposal.new)} >> {path}"
  lines = (*survey.lines, *proposal.new)
  meaning = Meaning(lines, data.ignore_label, proposal.label_map)
  home = workdir or Path(data.prepared_dir or '~/tensorflow_datasets')
  output = _make_folder(home.expanduser() / 'prepare')
  how = {'as_stored': data.as_stored, 'tile': data.tile or 0}
  for split, items in survey.items.items():
    info, source, tally = _samples(items, meaning, **how)
    title = f'{split}, {tally.num_images:,} images as proposed'
    if tally.num_images:
      page = sample_page(source, info, tally, title)
      visualize.save_png(output / f'{split}_proposed.png', page)
      yield f'drawn so: {output}/{split}_proposed.png'


def _samples(
  items: Sequence[Item], meaning: Meaning, *, tile: int, as_stored: bool
) -> tuple[DatasetInfo, list[dict[str, bytes]], Tally]:
  """Reads some of the items that can be read, as they would be stored."""
  count, void = len(meaning.classes), meaning.stored_ignore_label
  tally = Tally(count, void)

  def read(item: Item) -> list[dict[str, bytes]]:
    with contextlib.suppress(UserError):
      image, values, _ = folder.read_pair(item, meaning, tile, as_stored)
      return [
        {
          'image': each.image,
          'label': encode_label(each.label),
          'name': each.name.encode(),
        }
        for each in folder.cut(item, image, values, meaning, tile)
      ]
    return []

  order = np.random.default_rng(0).permutation(len(items))[:_SAMPLES].tolist()
  alone = functools.partial(folder.is_large, tile=tile, as_stored=as_stored)
  found = readable([items[i] for i in order], read, alone=alone)
  every = (record for _, cut in found for record in cut)
  source = list(itertools.islice(every, _SAMPLES))
  for record in source:
    tally.add(decode_label(record['label']))
  palette = voc_palette(count) if meaning.colors is None else meaning.colors
  return DatasetInfo('', meaning.classes, palette, void), source, tally


def _show_findings(
  name: object,
  findings: Sequence[Finding],
  show: _Show,
  proposed: Iterable[str] = (),
) -> None:
  """Shows what was found, if anything; raises `UserError` if it is fatal."""
  if findings:
    show(*findings, '')
  if proposed:
    show(*proposed, '')
  if fatal := sum(finding.count for finding in findings if finding.fatal):
    errors = 'error' if fatal == 1 else 'errors'
    hint = ', or try what is proposed' if proposed else ''
    raise UserError(
      f'{name}: cannot be used; correct the {fatal:,} {errors} listed above'
      f'{hint}'
    )


def _compare(tallies: _Tallies, published: _Counts) -> tuple[Finding, ...]:
  """Finds splits of more or fewer images than published."""
  other = tuple(
    f'{split}: {tallies[split].num_images:,}, and {count:,} published'
    for split, count in published.items()
    if tallies[split].num_images != count
  )
  title = 'splits of another number of images than published'
  return (Finding(title, len(other), other, fatal=False),) if other else ()


def _class_columns(
  info: DatasetInfo, tallies: Sequence[tuple[str, Tally]]
) -> list[list[str]]:
  """Images, pixels and share of each class, the splits side by side."""
  columns = [['class', *info.classes, 'all classes', 'void, of all pixels']]
  for split, tally in tallies:
    total, void = tally.class_pixels.sum(), tally.void_pixels
    images = [*tally.class_images, tally.num_images]
    pixels = [*tally.class_pixels, total]
    shares = [_percent(own, total) for own in pixels]
    columns += [
      [f'{split}: images', *map('{:,}'.format, images), ''],
      ['pixels', *map('{:,}'.format, [*pixels, void])],
      ['%', *shares, _percent(void, total + void)],
    ]
  return columns


def _size_columns(tallies: _Tallies, published: _Counts) -> list[list[str]]:
  """The number of images of each split, and their sizes."""
  of_sizes = 'smallest', 'largest', 'most common size', 'images of that size'
  columns = [['split', 'images', 'published images', *of_sizes, 'sizes']]
  for split, tally in tallies.items():
    by_area = sorted(tally.sizes, key=lambda size: (size[0] * size[1], size))
    common, count = tally.sizes.most_common(1)[0]
    sizes = by_area[0], by_area[-1], common
    columns.append([split, f'{tally.num_images:,}'])
    columns[-1].append(f'{published[split]:,}' if split in published else '-')
    columns[-1] += [f'{width}x{height}' for height, width in sizes]
    columns[-1] += [f'{count:,}', f'{len(tally.sizes):,}']
  return columns if published else [[*c[:2], *c[3:]] for c in columns]


def _percent(part: int, whole: int) -> str:
  return f'{100 * part / whole:.2f}' if whole else '-'


def _table(columns: Sequence[Sequence[str]]) -> str:
  """Aligns the columns, the first at its left, with a line below the head."""
  widths = [max(map(len, column)) for column in columns]
  lines = []
  for first, *others in zip(*columns, strict=True):
    cells = map(str.rjust, others, widths[1:])
    lines.append('  '.join([first.ljust(widths[0]), *cells]).rstrip())
  lines.insert(1, '-' * len(lines[0]))
  return '\n'.join(lines)
