"""A workdir of the first version still evaluates, predicts and resumes.

`old_workdir` was made at commit 4260d2b by

  python -m deeplab_jax.main --workdir=old_workdir \
    --config.model.backbone=resnet18 --config.model.width=0.0625 \
    --config.model.output_stride=16 --config.model.aspp_features=8 \
    --config.data.crop_size='(65,65)' --config.train.steps=8 \
    --config.train.batch_size=4 --config.train.eval_every=4 \
    --config.train.log_every=2 --config.optimizer.learning_rate=0.05 \
    --config.loss.class_weights=1,1,1,1,1,2 --config.optimizer.clip_norm=1.0

and LOSSES are what that version logged when it went on to step 10. The data
set, the embedded one, is drawn anew.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.compiles

OLD = Path(__file__).parent / 'old_workdir'
LOSSES = {9: 1.9053019285202026, 10: 1.4167211055755615}


@pytest.fixture(scope='module')
def prepared_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('prepared')


@pytest.fixture
def workdir(tmp_path):
  return shutil.copytree(OLD, tmp_path / 'workdir')


@pytest.fixture
def run(workdir, prepared_dir):
  def run(*options):
    command = [sys.executable, '-m', 'deeplab_jax.main', *options]
    command[3:3] = [f'--workdir={workdir}']
    command.insert(4, f'--config.data.prepared_dir={prepared_dir}')
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done

  return run


def test_an_old_workdir_evaluates_to_its_own_numbers(run, workdir):
  run('--mode=eval')
  then = json.loads((workdir / 'eval.json').read_text())
  now = json.loads((workdir / 'eval' / 'val_whole.json').read_text())
  assert now['step'] == then['step'] == 8
  assert now['per_class_iou'] == pytest.approx(then['per_class_iou'], abs=1e-3)
  for name in ('miou', 'pixel_accuracy', 'per_image_miou'):
    assert now[name] == pytest.approx(then[name], abs=1e-3)


def test_an_old_workdir_resumes_with_the_same_losses(run, workdir):
  run('--config.train.steps=10', '--config.train.log_every=1')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  losses = {
    line['step']: line['loss']
    for line in map(json.loads, lines)
    if 'loss' in line
  }
  assert losses[9] == pytest.approx(LOSSES[9], rel=1e-4)
  # Rounding has grown by one update.
  assert losses[10] == pytest.approx(LOSSES[10], rel=1e-2)


def test_an_old_workdir_predicts(run, workdir, tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / 'photo.png')
  run('--mode=predict', str(tmp_path / 'photo.png'))
  label = np.asarray(Image.open(workdir / 'predictions' / 'photo.png'))
  assert label.shape == (50, 70)
  assert label.max() < 6
