"""What README and the pages in docs say is so."""

import ast
import contextlib
import functools
import importlib.util
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import miniature_voc
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from miniature import as_options, global_batch, make
from PIL import Image

from deeplab_jax import BACKBONES, PRESETS, Predictor, deeplab_v3
from deeplab_jax.build import make_transforms
from deeplab_jax.config import get_config, to_json, validate
from deeplab_jax.configure import from_recipe, override
from deeplab_jax.data.datasets import DATASETS
from deeplab_jax.data.images import decode_label
from deeplab_jax.data.load import LOADERS
from deeplab_jax.data.transforms import OfRecipe
from deeplab_jax.evaluation.protocols import PROTOCOLS
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.files import write_json
from deeplab_jax.training import writers
from deeplab_jax.training.losses import LOSSES
from deeplab_jax.training.optimizers import (
  OPTIMIZERS,
  SCHEDULES,
  make_optimizer,
  make_schedule,
)
from deeplab_jax.training.steps import (
  TrainState,
  create_state,
  pmap_train_step,
)
from deeplab_jax.weights.checkpoints import Checkpoints
from deeplab_jax.weights.networks import describe

ROOT = Path(__file__).parents[1]
MANY = '## Many devices and hosts'
README = (ROOT / 'README.md').read_text()
PREDICTION = (ROOT / 'docs/prediction.md').read_text()
PAGES = sorted([
  *ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('experiments/*.md')
])  # fmt: skip


def section(text, title):
  """What follows a heading, up to the next one of its level."""
  level = title.split()[0]
  return text.split(f'\n{title}\n')[1].split(f'\n{level} ')[0]


def blocks(text, language):
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def test_readme_has_at_most_900_words():
  assert len(README.split()) <= 900


def test_readme_names_the_folders_that_exist():
  named = set(re.findall(r'^\| `(.*?)/` \|', README, re.MULTILINE))
  folders = {
    path.parent for path in (ROOT / 'deeplab_jax').rglob('__init__.py')
  } | {ROOT / name for name in ('docs', 'experiments', 'tests')}
  assert named == {str(path.relative_to(ROOT)) for path in folders}


def test_ci_runs_the_test_command_of_the_readme():
  command = "pip install -e '.[test]' && pytest"
  assert f'\n{command}\n' in README
  assert (
    command.replace('.[', r'.\[').replace(']', r'\]')
    in (ROOT / '.ci' / 'run').read_text()
  )


def anchors(text):
  """The names that GitHub gives to the headings of a page."""
  text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  titles = re.findall(r'^#+ (.*)', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', t.lower()).replace(' ', '-') for t in titles}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  for link in re.findall(r'\]\((.*?)\)', text):
    if link.startswith('https://'):
      continue
    place, _, anchor = link.partition('#')
    target = (page.parent / place).resolve() if place else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target.read_text()), link


def commands(page):
  """The commands of a page that start the main program, as words."""
  for block in blocks(page.read_text(), 'bash'):
    for line in block.replace('\\\n', ' ').splitlines():
      _, found, arguments = line.partition('-m deeplab_jax.main ')
      if found:
        yield shlex.split(arguments)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_have_recipes_modes_and_settings_that_exist(page):
  for words in commands(page):
    options = dict(word.partition('=')[::2] for word in words if '--' in word)
    needs_none = options.get('--mode') in ('prepare', 'compare')
    assert '--workdir' in options or needs_none
    modes = ['prepare', 'train', 'import', 'eval', 'predict']
    modes += ['report', 'compare', 'export', 'publish']
    assert options.get('--mode', 'train') in modes
    recipe = options.get('--config', 'RECIPE')
    config = get_config()
    if recipe not in ('RECIPE', 'recipe.py'):
      config = from_recipe(recipe)
    settings = [word for word in words if word.startswith('--config.')]
    assert not override(config, ['main', *settings])
    validate(config)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page):
  if page.name in ('CHANGELOG.md', 'settings.md'):
    return  # one names old settings, the other is made from config.py
  keys = flatten_dict(get_config().to_dict(), sep='.')
  sections = 'model|data|train|loss|optimizer|eval|log|predict|export|publish'
  pattern = rf'`(?:--config\.|config\.)?((?:{sections})\.[a-z_.]+)(?:=(.*?))?`'
  for key, value in re.findall(pattern, page.read_text()):
    if re.fullmatch(
      r'model\.(apply|init)|.*\.(py|json|txt|png|safetensors)', key
    ):
      continue
    assert key in keys
    if value and not value.isupper():
      config = get_config()
      override(config, ['main', f'--config.{key}={value}'])
      validate(config)


def test_presets_are_those_of_the_page_on_weights():
  table = section((ROOT / 'docs/weights.md').read_text(), '## Presets')
  head, _, *rows = re.findall(r'^\|(.*)\|$', table, re.MULTILINE)
  shown = {name: {} for name in re.findall(r'`(\w+)`', head)}
  for row in rows:
    what, *cells = (cell.strip() for cell in row.split('|'))
    keys = re.findall(r'`(\w+)`', what)
    for preset, cell in zip(shown.values(), cells, strict=True):
      preset |= dict(zip(keys, cell_values(cell, len(keys)), strict=True))
  paper, varied = PRESETS['paper'], shown['paper'].keys()
  assert list(shown) == list(PRESETS)
  for name, preset in PRESETS.items():
    assert preset == {**paper, **shown[name]}
    assert shown[name].keys() == varied


def cell_values(cell, count):
  """Reads 'yes', 'last', '1e-5', or 'mean, std' where one number is of all."""
  with contextlib.suppress(ValueError, SyntaxError):
    cell = ast.literal_eval(cell)
  if count == 1:
    return [{'yes': True, 'no': False}.get(cell, cell)]
  return [x if isinstance(x, tuple) else (float(x),) * 3 for x in cell]


def run_in_miniature(command, places, settings):
  """Runs a command of the pages from the project's folder."""
  for placeholder, place in places.items():
    command = command.replace(placeholder, str(place))
  program, *arguments = shlex.split(command)
  assert program == 'python'
  done = subprocess.run(
    [sys.executable, *arguments, *as_options(settings)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done


@pytest.mark.compiles
def test_two_commands_train_on_voc_in_two_stages(tmp_path):
  page = (ROOT / 'docs/pascal_voc.md').read_text()
  both = blocks(section(page, '## Train in two stages'), 'bash')
  first, second = (block.replace('\\\n', ' ') for block in both)
  data = tmp_path / 'data'
  miniature_voc.write_voc_devkit(data)
  miniature_voc.write_sbd(data)
  places = {
    'STAGE1_WORKDIR': tmp_path / 'stage1',
    'STAGE2_WORKDIR': tmp_path / 'stage2',
  }
  settings = {
    'data.dir': data,
    'data.prepared_dir': tmp_path / 'prepared',
    'data.crop_size': (65, 65),
    'data.threads': 2,
    'model.backbone': 'resnet18',
    'model.width': 0.125,
    'model.aspp_features': 8,
    'train.steps': 2,
    'train.batch_size': 4,
    'eval.batch_size': 4,
  }
  # The weights of ImageNet would be downloaded, for another network.
  run = run_in_miniature(first, places, {**settings, 'init_from': ''})
  assert f'{len(miniature_voc.TRAINAUG)} images' in run.stderr
  assert f'{len(miniature_voc.VOC_VAL)} images' in run.stdout
  run = run_in_miniature(second, places, settings)
  assert f'weights of {places["STAGE1_WORKDIR"]}' in run.stderr
  trainval = miniature_voc.VOC_TRAIN + miniature_voc.VOC_VAL
  assert f'{len(trainval)} images' in run.stderr
  assert 'not evaluated' in run.stdout
  one, two = (read_variables(place) for place in places.values())
  jax.tree.map(
    np.testing.assert_array_equal, two['batch_stats'], one['batch_stats']
  )
  moved = jax.tree.map(np.array_equal, two['params'], one['params'])
  assert not any(jax.tree.leaves(moved))


def read_variables(workdir):
  with Checkpoints(workdir) as saved:
    return saved.open('best').variables


@pytest.mark.compiles
def test_three_lines_segment_with_the_network_of_the_first_command(
  tmp_path, random_variables
):
  """With weights that favor class 4 everywhere, every pixel is class 4."""
  (code,) = blocks(section(README, '## Segment images'), 'python')
  assert len(list(filter(None, code.strip().splitlines()))) == 3
  config = get_config()
  settings = to_json(config)['model']
  sizes = 'backbone', 'width', 'output_stride', 'aspp_features'
  model = deeplab_v3(num_classes=6, **{key: settings[key] for key in sizes})
  variables = random_variables(model)
  variables['params']['logits'] = {
    'kernel': np.zeros((1, 1, 64, 6), np.float32),
    'bias': np.eye(6, dtype=np.float32)[4],
  }
  state = TrainState(step=1, opt_state=(), **variables)
  described = describe(settings, DATASETS['shapes'].to_json())
  workdir, photo = tmp_path / 'workdir', tmp_path / 'photo.jpg'
  with Checkpoints(workdir) as saved:
    saved.save(state, described)
  write_json(workdir / 'config.json', to_json(config))
  pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
  Image.fromarray(pixels).save(photo)
  for page in (code, *blocks(section(PREDICTION, '## From Python'), 'python')):
    names = {'paths': [photo], 'workdir': str(workdir)}
    names['Predictor'] = Predictor
    page = page.replace('/tmp/deeplab', str(workdir))
    names['predictor'] = Predictor.from_workdir(workdir)
    exec(page.replace('photo.jpg', str(photo)), names)
    if 'classes' in names:
      assert np.array_equal(names['classes'], np.full((45, 70), 4))


@pytest.fixture
def step_of_docs():
  """The functions that the page on performance defines, and a small step."""
  page = section((ROOT / 'docs/performance.md').read_text(), MANY)
  names = {}
  for code in blocks(page, 'python'):
    exec(code, names)
  model, optimizer = make(), make_optimizer('sgd', 0.1)
  return names, create_state(model, optimizer, 0), optimizer


@pytest.mark.compiles
def test_steps_of_performance_are_the_one_under_pmap(step_of_docs):
  names, state, optimizer = step_of_docs
  batch, place = global_batch(), names['place_step']
  settings = {'optimizer': optimizer, 'class_weights': (1, 0.5, 2, 1)}
  expected = pmap_train_step(model=make(), **settings)(
    distributed.replicate(jax.device_get(state)), distributed.shard(batch)
  )
  mapped, _ = place(jax.devices(), model=make(), **settings)
  _, whole = place(jax.devices(), model=make(sync_bn=False), **settings)
  for step in (mapped, whole):
    after, metrics = step(state, batch)
    np.testing.assert_allclose(
      metrics['loss'], expected[1]['loss'][0], rtol=1e-5
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      *(jax.device_get(s.variables) for s in (after, expected[0])),
    )


@pytest.mark.compiles
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
def test_memory_on_a_tpu_is_told_without_one(step_of_docs):
  names, state, optimizer = step_of_docs
  shapes = jax.eval_shape(lambda: (state, global_batch()))
  memory = names['tpu_memory'](
    'v5e:2x2', *shapes, model=make(), optimizer=optimizer
  )
  assert sum(x.nbytes for x in jax.tree.leaves(state)) < memory < 10**9


@pytest.mark.compiles
def test_examples_of_extending_run(tmp_path):
  page = (ROOT / 'docs/extending.md').read_text()
  names = {'__name__': 'extending'}
  for code in blocks(page, 'python'):
    exec(code.replace("'PREPARED'", repr(str(tmp_path))), names)
  backbone = BACKBONES.pop('strided')
  loss, optimizer = LOSSES.pop('poly'), OPTIMIZERS.pop('lion')
  region = LOSSES.pop('tversky')
  protocol, loader = PROTOCOLS.pop('half_size'), LOADERS.pop('halves')
  table, layout = writers.BACKENDS.pop('table'), LOADERS.pop('side_by_side')

  (tmp_path / 'train').mkdir()
  (tmp_path / 'train' / '7.jpg').touch()
  mask = layout(tmp_path, 'train', ending='.tif').found['7'].label
  assert mask == tmp_path / 'train' / '7.tif'
  # At equal logits a pixel has the probability 1 / C.
  each = loss(jnp.zeros((2, 4)), jnp.array([1, 255]))
  np.testing.assert_allclose(each, [math.log(4) + 0.75, 0], rtol=1e-6)
  # Of 2 pixels, 2 classes share the probability: 0.5 / (0.3 + 0.7).
  halves = region(jnp.zeros((3, 2)), jnp.array([0, 1, 255]))
  np.testing.assert_allclose(halves, 0.5, rtol=1e-6)
  config = names['get_config']()
  assert config.loss.terms == ((loss, 1.0), ('dice', 0.5))
  assert config.optimizer.name is optimizer
  validate(config)

  # Lion moves each parameter by the learning rate, by sign of the gradient.
  chain = make_optimizer(optimizer, 0.1)
  params = {'backbone': {'bias': jnp.zeros(3)}}
  gradients = {'backbone': {'bias': jnp.array([2.0, -0.3, 0.0])}}
  moves, _ = chain.update(gradients, chain.init(params), params)
  np.testing.assert_allclose(moves['backbone']['bias'], [-0.1, 0.1, 0])

  # A whole chain has no second decay and no second rate around it.
  rate = make_schedule(SCHEDULES.pop('one_cycle'), 0.4, 10)
  np.testing.assert_allclose(rate(3), 0.4, rtol=1e-6)  # its peak
  chain = make_optimizer(OPTIMIZERS.pop('careful'), rate, weight_decay=0.5)
  params = {'backbone': {'kernel': jnp.ones((2, 2))}}
  moves, _ = chain.update(params, chain.init(params), params)
  np.testing.assert_allclose(
    moves['backbone']['kernel'], -rate(0) * (1 + 0.5), rtol=1e-4
  )

  model = deeplab_v3(backbone, num_classes=3, output_stride=8, aspp_features=4)
  assert model.backbone == names['model'].backbone
  with pytest.raises(ValueError, match='output_stride must be 8, got 16'):
    deeplab_v3(backbone, output_stride=16)

  # Half of 33 pixels are 17: the map that the network itself would give.
  images = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (1, 33, 33, 3)))
  init = functools.partial(model.init, train=False)
  variables = jax.jit(init)(jax.random.key(0), images)
  look = protocol().scores(model)
  seen = jax.jit(look)(variables, images, jnp.array([[33, 33]]))
  half = model.apply(variables, images[:, ::2, ::2], train=False)
  np.testing.assert_allclose(seen.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    seen[:, ::2, ::2], jax.nn.softmax(half), rtol=1e-4, atol=1e-5
  )

  with writers.Writer(tmp_path / 'w', to=(table,)) as writer:
    writer.scalars(3, {'loss': 0.5})
    writer.text(3, 'note', 'what a table cannot hold')
  assert (tmp_path / 'w' / 'losses.txt').read_text() == '3 0.5\n'

  dataset = names['dataset']
  assert inspect.signature(loader).parameters.keys() == {'prepared_dir'}
  assert dataset.info.classes == ('left', 'right')
  assert len(dataset.source('val')) == 2
  label = decode_label(dataset.source('train')[1]['label'])
  np.testing.assert_array_equal(
    label, np.broadcast_to(np.arange(64) >= 23, (48, 64))
  )


AUGMENTATION = (ROOT / 'docs/augmentation.md').read_text()


def own_transform(number):
  """Names that an example of the page defines, and a pair to try it on."""
  names, rng = {'__name__': 'own'}, np.random.default_rng(0)
  exec(blocks(AUGMENTATION, 'python')[number], names)
  image = rng.integers(0, 256, (64, 80, 3), np.uint8)
  return names, image, rng.integers(0, 3, (64, 80), np.uint8)


def test_a_transform_of_the_page_inverts_what_is_bright():
  names, image, label = own_transform(0)
  config = names['get_config']()
  validate(config)
  _, transform = make_transforms(config, 3, 255)
  found, same = transform(image, label, np.random.default_rng(1))
  bright = image >= np.random.default_rng(1).integers(128, 256)
  np.testing.assert_array_equal(found[bright], 255 - image[bright])
  np.testing.assert_array_equal(found[~bright], image[~bright])
  assert same is label


def test_a_transform_by_albumentations_is_a_function_of_the_generator():
  pytest.importorskip('albumentations')
  names, image, label = own_transform(1)
  transform = OfRecipe(names['elastic'], 3, 255)
  results = [
    transform(image, label, np.random.default_rng(seed))
    for seed in [*range(8), *range(8)]
  ]
  for one, other in zip(results[:8], results[8:], strict=True):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
  assert any((pair[1] != label).any() for pair in results)


def test_the_page_of_augmentation_tells_the_defaults():
  defaults = flatten_dict(get_config().to_dict(), sep='.')
  told = re.findall(
    r'^\| `(data\.\w+)` \| `(.*?)` \|', AUGMENTATION, re.MULTILINE
  )
  assert len(told) == 11
  for key, value in told:
    assert defaults[key] == ast.literal_eval(value), key


def test_cells_of_the_tutorial_are_python_with_imports_that_exist():
  """CI runs the notebook; this names what a renamed module breaks at once."""
  notebook = json.loads((ROOT / 'docs/tutorial.ipynb').read_text())
  cells = [c for c in notebook['cells'] if c['cell_type'] == 'code']
  assert cells
  for cell in cells:
    tree = ast.parse(''.join(cell['source']))
    imports = [
      node
      for node in tree.body
      if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    exec(compile(ast.Module(imports, []), 'tutorial', 'exec'), {})
