"""What is published loads again, from a folder and from a hub."""

import json
import os
import re
import shutil
import subprocess
import sys

import hub_server
import numpy as np
import pytest
import yaml
from miniature import as_options, make_config

from deeplab_jax import build, import_weights
from deeplab_jax.evaluation.metrics import format_table
from deeplab_jax.predict import Predictor
from deeplab_jax.publish import publish
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.load import open_pretrained
from deeplab_jax.weights.mapping import flatten

pytestmark = pytest.mark.compiles

TOKEN = 'hf_nobodyMaySeeThis'
NAME = 'someone/miniature'
IMAGES = [
  np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
  for seed, size in enumerate([(65, 97), (40, 33)])
]


def published(trained, folder, **changes):
  changes = {f'publish__{key}': value for key, value in changes.items()}
  config = make_config(trained.settings, publish__to=str(folder), **changes)
  publish(config, trained.workdir)
  return folder


@pytest.fixture(scope='module')
def folder(trained, tmp_path_factory):
  """The trained run, published into a folder."""
  return published(
    trained, tmp_path_factory.mktemp('published') / 'mini', license='mit'
  )


def assert_same(found, expected):
  for image in IMAGES:
    for own, other in zip(
      found(image, probabilities=True),
      expected(image, probabilities=True),
      strict=True,
    ):
      np.testing.assert_array_equal(own, other)


def test_a_folder_gives_what_the_workdir_gives_bit_for_bit(trained, folder):
  found = Predictor.from_pretrained(folder)
  expected = Predictor.from_workdir(trained.workdir)
  assert_same(found, expected)
  assert found.info.to_json().keys() == expected.info.to_json().keys()
  assert found.info.list_classes() == expected.info.list_classes()
  assert found.settings['output_stride'] == expected.settings['output_stride']


def test_the_files_say_what_the_network_is_and_no_place(trained, folder):
  predictor = Predictor.from_workdir(trained.workdir)
  config = json.loads((folder / 'config.json').read_text())
  assert config['library'] == 'deeplab_jax' and config['format'] == 1
  assert config['dataset']['classes'] == ['ground', 'left', 'right', 'absent']
  assert config['dataset']['palette'][1] == [200, 0, 0]
  assert config['dataset']['ignore_label'] == 255
  assert config['normalization'] == {'mean': [127.5] * 3, 'std': [127.5] * 3}
  assert config['model']['width'] == 0.125
  card = (folder / 'README.md').read_text()
  _, head, text = card.split('---\n', 2)
  facts = yaml.safe_load(head)
  assert facts['license'] == 'mit' and facts['library_name'] == 'deeplab_jax'
  assert facts['pipeline_tag'] == 'image-segmentation'
  assert format_table(predictor.metrics) in text
  assert 'split val, images 3, protocol whole' in text
  assert f'Step {predictor.step}. deeplab_jax 0.1.0, jax' in text
  assert '--config.optimizer.learning_rate=0.05 \\' in text
  assert '--config.data.dir=mini \\' in text
  pictures = set(re.findall(r'!\[\w+\]\((.+)\)', text))
  assert pictures == {'predictions.png', 'confusion.png'}
  names = {path.name for path in folder.iterdir()}
  assert names == {'config.json', 'model.safetensors', 'README.md', *pictures}
  for path in folder.iterdir():
    assert str(trained.workdir.parent).encode() not in path.read_bytes()


def test_the_three_lines_of_the_card_work(trained, folder, monkeypatch):
  code = (folder / 'README.md').read_text().split('```python\n')[1]
  code = code.split('```')[0]
  assert len([line for line in code.splitlines() if line]) == 3
  photo = next((trained.folder / 'JPEGImages').iterdir())
  monkeypatch.chdir(folder.parent)
  values = {}
  exec(code.replace('photo.jpg', str(photo)), values)
  expected = Predictor.from_workdir(trained.workdir)(photo)
  np.testing.assert_array_equal(values['classes'], expected)


@pytest.mark.parametrize('kind', ['published', 'workdir'])
def test_another_class_count_keeps_all_but_the_class_layer(
  trained, folder, kind
):
  source = folder if kind == 'published' else trained.workdir
  found = Predictor.from_pretrained(source, num_classes=7)
  leaves = flatten(found.variables)
  for path, array in open_pretrained(str(source)).arrays.items():
    if '/logits/' not in path and '/auxiliary/' not in path:
      np.testing.assert_array_equal(leaves[path], array, path)
  layer = leaves['params/logits/kernel']
  assert layer.shape[-1] == 7 and np.unique(layer).size > 7
  assert not leaves['params/logits/bias'].any()
  assert found.info.classes[:2] == ('class 0', 'class 1')
  again = Predictor.from_pretrained(source, num_classes=7)
  np.testing.assert_array_equal(found(IMAGES[0]), again(IMAGES[0]))
  assert found(IMAGES[0]).max() < 7


def test_a_run_starts_from_what_was_published(trained, folder, tmp_path):
  config = import_weights.config_of(str(folder))
  assert config.model.output_stride == trained.config.model.output_stride
  import_weights.import_weights(config, tmp_path / 'w')
  assert_same(
    Predictor.from_workdir(tmp_path / 'w'), Predictor.from_pretrained(folder)
  )
  config.model.width = 0.25
  with pytest.raises(UserError, match=r'contradicts config\.model\.width=0.25'):
    import_weights.open_source(config)


def test_a_run_without_evaluation_says_so(trained, tmp_path):
  workdir = tmp_path / 'w'
  config = import_weights.config_of(str(trained.workdir))
  import_weights.import_weights(config, workdir)
  config.publish.to = str(tmp_path / 'out')
  publish(config, workdir)
  card = (tmp_path / 'out/README.md').read_text()
  assert 'It was not evaluated.' in card and '![' not in card
  assert '--mode=import \\' in card


def test_only_a_publication_is_replaced(trained, folder, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r'publish\.to=: name a folder'):
    published(trained, '')
  for place in ('hf://one', 's3://one/two', 'HF://one/two', 'gs://one/two'):
    with pytest.raises(UserError, match=f'publish.to={place}: name a folder'):
      published(trained, place)
  other = shutil.copytree(folder, tmp_path / 'other')
  (other / '.git').mkdir()
  with pytest.raises(UserError, match=f'{other} holds other things'):
    published(trained, other)
  (other / '.git').rmdir()
  (other / 'config.json').write_text('{"model_type": "bert"}')
  with pytest.raises(UserError, match='holds other things'):
    published(trained, other)
  (other / 'config.json').write_text('{"model_type": "x", // a comment')
  with pytest.raises(UserError, match='holds other things'):
    published(trained, other)
  own = shutil.copytree(folder, tmp_path / 'own')

  def fail(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr('deeplab_jax.publish._training', fail)
    with pytest.raises(UserError, match=f'{own}: No space left on device'):
      published(trained, own, license='cc0-1.0')
  assert 'license: "mit"' in (own / 'README.md').read_text()
  published(trained, own, license='cc0-1.0')
  assert 'license: "cc0-1.0"' in (own / 'README.md').read_text()
  assert {path.name for path in tmp_path.iterdir()} == {'other', 'own'}
  (link := tmp_path / 'link').symlink_to(own)
  published(trained, link, license='mit')
  assert (
    link.is_symlink() and 'license: "mit"' in (own / 'README.md').read_text()
  )


def test_a_workdir_of_anyone_neither_reaches_outside_nor_breaks_the_card(
  trained, tmp_path
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  (tmp_path / 'secret.png').write_bytes(b'secret')
  (path,) = (workdir / 'eval').glob('*.json')
  evaluation = json.loads(path.read_text())
  config = make_config(trained.settings, publish__to=str(tmp_path / 'out'))
  evil = 'val\n\n```\n<script>'
  changed = {**evaluation, 'name': '../../secret', 'split': evil}
  path.write_text(json.dumps(changed))
  publish(config, workdir)
  assert (tmp_path / 'out/predictions.png').read_bytes() != b'secret'
  card = (tmp_path / 'out/README.md').read_text()
  block = card.split('## Evaluation\n\n```\n')[1].split('\n```\n')[0]
  assert evil.replace('`', "'") in block
  for damaged in ({**evaluation, 'per_class_iou': {'a': 'x'}}, {'miou': 0.5}):
    path.write_text(json.dumps({**damaged, 'step': evaluation['step']}))
    with pytest.raises(UserError, match='is damaged; repeat it'):
      publish(config, workdir)
  path.write_text('[1]')  # is none
  publish(config, workdir)


def test_a_publication_may_be_called_checkpoints(folder, tmp_path):
  for place in ('checkpoints', 'checkpoints/net'):
    found = shutil.copytree(folder, tmp_path / place, dirs_exist_ok=True)
    assert Predictor.from_pretrained(found).info.num_classes == 4


def test_classes_in_another_order_are_told(trained, folder, tmp_path, caplog):
  data = shutil.copytree(trained.folder, tmp_path / 'data')
  names = (data / 'classes.txt').read_text().split('\n')
  text = '\n'.join([names[1], names[0], *names[2:]])
  (data / 'classes.txt').write_text(text)
  config = import_weights.config_of(str(folder))
  own = make_config(trained.settings, data__dir=str(data))
  config.data.update(own.data.to_dict())
  with pytest.raises(UserError, match="'ground' where 'left' is here; import"):
    import_weights.import_weights(config, tmp_path / 'w')
  info = build.open_dataset(config, 'val').info
  import_weights.open_source(config, info)
  assert 'its class layer is kept all the same' in caplog.text


@pytest.fixture
def hub(tmp_path):
  """A hub, and a function that runs Python with it: arguments, token."""
  with hub_server.serving(TOKEN) as server:

    def run(*arguments, token=TOKEN):
      environment = {
        **os.environ,
        'HF_ENDPOINT': server.address,
        'HF_HOME': str(tmp_path / 'hf'),
        'HF_TOKEN': token,
        'NO_PROXY': '127.0.0.1',
      }
      return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
      )

    server.run = run
    yield server


PULL = """
import sys, numpy as np
from deeplab_jax import Predictor
images = np.load(sys.argv[1])
predictor = Predictor.from_pretrained(sys.argv[2])
found = [predictor(images[k], probabilities=True) for k in images]
np.savez(sys.argv[1], *[x for pair in found for x in pair])
"""


def test_what_is_published_on_a_hub_and_pulled_gives_the_same(
  trained, hub, tmp_path
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'workdir')
  done = hub.run(
    *('-m', 'deeplab_jax.main', f'--workdir={workdir}', '--mode=publish'),
    f'--config.publish.to=hf://{NAME}',
    *as_options(trained.settings),
  )
  assert done.returncode == 0, done.stderr
  assert f'is published: hf://{NAME}' in done.stdout
  ((_, files),) = hub.repositories[NAME].items()  # one commit
  assert set(files) >= {'config.json', 'model.safetensors', 'README.md'}
  assert f"from_pretrained('hf://{NAME}')" in files['README.md'].decode()
  path = tmp_path / 'images.npz'
  np.savez(path, *IMAGES)
  # Reading a public repository needs no token.
  pulled = hub.run('-c', PULL, path, f'hf://{NAME}', token='')
  assert pulled.returncode == 0, pulled.stderr
  predictor = Predictor.from_workdir(workdir)
  expected = [x for i in IMAGES for x in predictor(i, probabilities=True)]
  found = np.load(path)
  assert len(found) == len(expected)
  for own, other in zip(found.values(), expected, strict=True):
    np.testing.assert_array_equal(own, other)
  said = done.stdout + done.stderr + pulled.stdout + pulled.stderr
  assert TOKEN not in said
  written = [p for p in tmp_path.rglob('*') if p.is_file()]
  assert len(written) > 10
  texts = [*files.values(), *(p.read_bytes() for p in written)]
  assert not any(TOKEN.encode() in text for text in texts)


@pytest.mark.parametrize(
  ('token', 'words'),
  [('hf_other', '401'), ('hf_with\x01control', 'cannot be written')],
  ids=['another token', 'a malformed token'],
)
def test_a_hub_that_refuses_is_one_line_without_the_token(
  trained, hub, tmp_path, token, words
):
  done = hub.run(
    *('-m', 'deeplab_jax.main', f'--workdir={trained.workdir}'),
    *('--mode=publish', f'--config.publish.to=hf://{NAME}', '--debug'),
    *as_options(trained.settings),
    token=token,
  )
  assert done.returncode == 1
  line = done.stderr.splitlines()[-1]
  assert f'hf://{NAME} cannot be written: ' in line and words in line
  assert token not in done.stderr + done.stdout
  assert 'control' not in done.stderr
  assert NAME not in hub.repositories
