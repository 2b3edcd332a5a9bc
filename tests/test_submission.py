"""The archive of results, read back."""

import tarfile

import pytest

from deeplab_jax.submission import write_archive

RESULTS = [('2008_000006', b'one'), ('2008_000011', b'other')]


def test_archive_has_the_layout_of_the_test_server(tmp_path):
  path = tmp_path / 'results_test.tar.gz'
  write_archive(path, RESULTS)
  folder = 'results/VOC2012/Segmentation/comp6_test_cls'
  with tarfile.open(path, 'r:gz') as archive:
    contents = {e.name: archive.extractfile(e).read() for e in archive}
  assert contents == {f'{folder}/{n}.png': png for n, png in RESULTS}


def test_equal_results_make_equal_bytes(tmp_path):
  for name in ('a', 'b'):
    write_archive(tmp_path / name, RESULTS)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_archive_that_fails_leaves_the_old_one(tmp_path):
  path = tmp_path / 'results_test.tar.gz'
  path.write_bytes(b'old')

  def results():
    yield RESULTS[0]
    raise RuntimeError

  with pytest.raises(RuntimeError):
    write_archive(path, results())
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]
