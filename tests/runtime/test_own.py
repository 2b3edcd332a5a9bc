"""The folder of a user is safe from others, and what is noted in it."""

import os

import pytest

from deeplab_jax.runtime import own


def test_own_folders_are_where_xdg_says_and_only_this_user_enters(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'own'))
  monkeypatch.setenv('XDG_CACHE_HOME', 'relative')  # which XDG lets us ignore
  folders = [own.own_folder(kind, 'x') for kind in ('cache', 'state')]
  assert folders == [
    tmp_path / '.cache' / 'deeplab_jax' / 'x',
    tmp_path / 'own' / 'deeplab_jax' / 'x',
  ]
  assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def _of_another(folder, monkeypatch):
  folder.mkdir()
  monkeypatch.setattr(os, 'getuid', lambda: folder.stat().st_uid + 1)


@pytest.mark.parametrize(
  ('spoil', 'reason'),
  [
    (_of_another, 'others may write'),
    (lambda folder, _: (folder.mkdir(), folder.chmod(0o770)), 'others may'),
    (lambda folder, _: folder.touch(), 'File exists'),
    (lambda folder, _: folder.symlink_to(folder), 'File exists'),
  ],
)
def test_an_own_folder_of_others_is_not_used_which_is_said_once(
  tmp_path, monkeypatch, caplog, spoil, reason
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  folder = tmp_path / 'deeplab_jax' / 'x'
  folder.parent.mkdir()
  spoil(folder, monkeypatch)
  assert [own.own_folder('cache', 'x') for _ in range(2)] == [None, None]
  (line,) = caplog.messages
  assert line.startswith(f'{folder} is not used') and reason in line


def test_values_are_known_once_they_were_noted(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path))
  values = {'data': {'dir': '/d', 'scale': [0.5, 2.0]}, 'seed': 1}
  assert not own.wrote(values)
  own.remember(values)
  own.remember(values)
  assert own.wrote(dict(reversed(values.items())))
  assert not own.wrote({**values, 'seed': 2})
  assert not own.wrote({**values, 'seed': True})
