"""Every layout is prepared, trained on, evaluated and predicted."""

import miniature_layouts
import numpy as np
import pytest
from flax import linen as nn
from miniature import SETTINGS, make_config, share_programs
from PIL import Image

from deeplab_jax import BACKBONES
from deeplab_jax.evaluate import evaluate
from deeplab_jax.models.layers import Conv
from deeplab_jax.predict_files import predict
from deeplab_jax.prepare import prepare
from deeplab_jax.train import train_and_evaluate

pytestmark = pytest.mark.compiles


class Strided(nn.Module):
  """Compiles in a moment; layouts do not depend on the network."""

  output_stride: int = 16

  @nn.compact
  def __call__(self, x, *, train):
    x = Conv(4, 3, 16, name='conv')(x)
    return {'postnorm': nn.relu(x)}


@pytest.fixture(scope='module', autouse=True)
def programs():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(BACKBONES, 'strided', lambda **_: Strided())
    share_programs(patch)
    yield


COUNTS = {'train': 4, 'val': 2}
# Written by, data.name, other settings, number of classes, values of masks.
TABLE = [
  ('folder', 'folder', {}, 3, {0, 1, 2}),
  ('images_masks', 'images_masks', {}, 3, {0, 1, 2}),
  ('coco', 'coco', {}, 3, {0, 1, 2}),
  ('mini_pet', 'tfds/mini_pet', {}, 3, {1, 2, 3}),
  ('cityscapes', 'cityscapes', {}, 19, {*range(34)}),
  ('ade20k', 'ade20k', {}, 150, {*range(1, 151)}),
]


@pytest.mark.parametrize('writer, name, changes, classes, values', TABLE)
def test_a_layout_is_prepared_trained_evaluated_and_predicted(
  writer, name, changes, classes, values, tmp_path, capsys
):
  root = getattr(miniature_layouts, writer)(tmp_path / writer, COUNTS)
  if writer == 'mini_pet':
    (root / 'mini_pet/4.0.0/classes.txt').write_text('pet\nground\nborder\n')
    changes = {'data.label_map': '1:0,2:1,3:2'}
  settings = {
    **SETTINGS,
    'model.backbone': 'strided',
    'model.aspp_rates': (1,),
    'data.name': name,
    'data.dir': str(root),
    'data.prepared_dir': str(tmp_path / 'prepared'),
    'train.steps': 2,
    'optimizer.warmup_steps': 0,
    'eval.buckets': 1,
    'log.to': ('jsonl',),
    **changes,
  }
  config, workdir = make_config(settings), tmp_path / 'w'
  made = prepare(config, workdir)
  assert len(made['dataset']['classes']) == classes
  assert not [x for x in made['findings'] if x['fatal']]
  assert sum(x['num_images'] for x in made['splits'].values()) >= 6
  assert (workdir / 'prepare' / 'val.png').is_file()
  trained = train_and_evaluate(config, workdir)
  assert 0 <= trained['miou'] == evaluate(config, workdir)['miou'] <= 1
  image = (
    next(x for x in root.rglob('*.[jp][pn]g')) if name[:4] != 'tfds' else 0
  )
  if not image:
    image = tmp_path / 'image.png'
    Image.fromarray(miniature_layouts.scene(9)[0]).save(image)
  predict(config, workdir, [str(image)])
  mask = workdir / 'predictions' / f'{image.stem}.png'
  assert set(np.unique(np.array(Image.open(mask))).tolist()) <= values
