"""The report of workdirs that hold everything, something, or nothing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import report
from deeplab_jax.config import get_config, to_json
from deeplab_jax.runtime.errors import UserError

OLD = Path(__file__).parent / 'old_workdir'


def data_in(path):
  """The values that the page draws."""
  text = path.read_text(encoding='utf-8')
  return json.loads(re.search(r'id="data">(.*?)</script>', text)[1])


@pytest.fixture
def workdir(tmp_path):
  """What a run leaves that was killed after step 40."""
  workdir = tmp_path / 'my <run>'
  (workdir / 'eval').mkdir(parents=True)
  config = get_config()
  config.train.steps = 60
  (workdir / 'config.json').write_text(json.dumps(to_json(config)))
  lines = [
    {'step': 20, 'loss': 1.5, 'learning_rate': 0.1, 'images_per_second': 8.0},
    {'step': 40, 'loss': None, 'learning_rate': 0.05, 'images_per_second': 9.0},
    {'step': 40, 'eval_miou': 0.456},
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (workdir / 'metrics.jsonl').write_text(text + '{"step": 41, "lo')
  (workdir / 'sessions.json').write_text('[{"first_step": 1}]')
  shares = {'a, "b"': 0.75, 'absent': None}
  result = {'miou': 0.4, 'per_class_iou': shares, 'step': 40}
  (workdir / 'eval' / 'val_whole.json').write_text(json.dumps(result))
  (workdir / 'eval' / 'val_whole_confusion.csv').write_text(
    'true class,color,"a, ""b""",absent\n'
    '"a, ""b""",#102030,1500,500\n'
    'absent,#ff0000,0,0\n'
  )
  for kind in ('worst', 'best'):
    path = workdir / 'eval' / f'val_whole_{kind}.png'
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
  return workdir


def test_a_report_holds_what_the_workdir_holds(workdir, capsys):
  path = report.report(workdir)
  assert path == workdir / 'report.html'
  assert capsys.readouterr().out == f'report: {path}\n'
  assert '<title>my &lt;run&gt;</title>' in path.read_text()
  data = data_in(path)
  assert data['settings']['train.steps'] == 60
  assert data['defaults']['train.steps'] == 300
  assert data['sessions'] == [{'first_step': 1}]
  assert data['curves'] == {
    'eval_miou': [[40, 0.456]],
    'loss': [[20, 1.5]],
    'learning_rate': [[20, 0.1], [40, 0.05]],
    'images_per_second': [[20, 8.0], [40, 9.0]],
  }
  (evaluation,) = data['evaluations']
  assert evaluation['name'] == 'val_whole' and evaluation['miou'] == 0.4
  assert evaluation['confusion'] == [[1500, 500], [0, 0]]
  assert evaluation['colors'] == ['#102030', '#ff0000']
  assert evaluation['worst'] == evaluation['best']
  assert evaluation['best'].startswith('data:image/jpeg;base64,')


@pytest.mark.parametrize(
  'gone, keys',
  [
    ('config.json', ['settings']),
    ('metrics.jsonl', ['curves']),
    ('sessions.json', ['sessions']),
    ('eval/val_whole.json', ['evaluations']),
    ('eval/val_whole_confusion.csv', ['evaluations', 0, 'confusion']),
    ('eval/val_whole_worst.png', ['evaluations', 0, 'worst']),
  ],
)
def test_what_is_missing_is_left_out_alone(workdir, gone, keys):
  whole = data_in(report.report(workdir))
  (workdir / gone).unlink()
  part = data_in(report.report(workdir))
  for key in keys[:-1]:
    whole, part = whole[key], part[key]
  left = {key for key in whole if part.get(key) != whole[key]}
  assert left - {'time', 'colors'} == {keys[-1]} and not part.get(keys[-1])


def test_the_newest_evaluation_is_first_and_has_the_pictures(workdir):
  newer = workdir / 'eval' / 'val_whole_scales0.5-1.json'
  shutil.copy(workdir / 'eval' / 'val_whole.json', newer)
  (workdir / 'eval.json').write_text('{"miou": 1}')  # of the best checkpoint
  first, second = data_in(report.report(workdir))['evaluations']
  assert (first['name'], second['name']) == (newer.stem, 'val_whole')
  assert 'worst' not in {**first, **second}  # those of val_whole are old


def test_long_curves_are_thinned_and_keep_their_end(workdir):
  lines = [json.dumps({'step': s, 'loss': s / 7}) for s in range(1, 20_001)]
  (workdir / 'metrics.jsonl').write_text('\n'.join(lines))
  (points,) = data_in(report.report(workdir))['curves'].values()
  assert 400 <= len(points) <= 501
  assert points[0] == [1, 1 / 7] and points[-1] == [20_000, 20_000 / 7]


def test_a_damaged_file_is_named_and_left_out(workdir, caplog):
  (workdir / 'sessions.json').write_text('{')
  (workdir / 'eval' / 'val_whole.json').write_text('[')
  data = data_in(report.report(workdir))
  assert data['sessions'] == data['evaluations'] == []
  named = [message.partition(': ')[0] for message in caplog.messages]
  assert named == [
    str(workdir / 'sessions.json'),
    str(workdir / 'eval' / 'val_whole.json'),
  ]


def test_an_old_workdir_has_a_report(tmp_path):
  workdir = shutil.copytree(OLD, tmp_path / 'old')
  data = data_in(report.report(workdir))
  assert data['curves']['eval_miou'][-1] == [8, 0.044160127497476186]
  (evaluation,) = data['evaluations']
  assert evaluation['name'] == 'eval' and 'confusion' not in evaluation
  assert data['settings']['model.width'] == 0.0625 and not data['sessions']


def test_nothing_to_report_is_refused(tmp_path):
  with pytest.raises(UserError, match='nothing to report in'):
    report.report(tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.compiles
def test_training_ends_with_the_report_of_its_best_checkpoint(trained):
  data = data_in(trained.workdir / 'report.html')
  result, folder = dict(trained.result), trained.workdir / 'eval'
  assert json.loads((folder / 'val_whole.json').read_text()) == result
  (evaluation,) = data['evaluations']
  assert evaluation.items() >= {'name': 'val_whole', **result}.items()
  counts = np.array(evaluation['confusion'])
  hits, truth = counts.diagonal(), counts.sum(1)
  assert hits.sum() / truth.sum() == pytest.approx(result['pixel_accuracy'])
  assert list(result['per_class_iou']) == ['ground', 'left', 'right', 'absent']
  assert evaluation['worst'] and evaluation['best']
  (session,) = data['sessions']
  assert (session['first_step'], session['last_step']) == (1, 6)
  assert set(data['curves']) == {
    *('eval_miou', 'loss', 'learning_rate', 'images_per_second')
  }
