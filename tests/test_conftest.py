"""The checks of conftest.py find what a test leaves, and what warns."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LEAVING = """
import os, pathlib, subprocess, sys, tempfile, threading, warnings

left = []

def test_process_and_thread():
  left.append(subprocess.Popen(['sleep', '9']))
  threading.Timer(9, int).start()

def test_variable():
  os.environ['LEFT'] = '1'

def test_lost_variable():
  del os.environ['LEFT']

def test_folder():
  os.chdir('/')

def test_warning():
  warnings.warn('anything')

def test_files():
  pathlib.Path('~/left').expanduser().touch()
  tempfile.mkstemp('_left')
  pathlib.Path(__file__).with_name('left.txt').touch()

def test_thread_that_ends():
  threading.Timer(0.1, int).start()

def test_clean():
  subprocess.run(['true'])
"""


def test_what_a_test_leaves_is_an_error(tmp_path):
  tests = tmp_path / 'tests'
  tests.mkdir()
  for name in ('conftest.py', 'miniature.py'):
    shutil.copy(HERE / name, tests)
  shutil.copy(HERE.parent / 'setup.cfg', tmp_path)
  (tests / 'test_leaving.py').write_text(LEAVING)
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-n0', '-rA', f'--basetemp={tmp_path}/b'],
    cwd=tmp_path,
    env={**os.environ, 'CI': 'true'},
    capture_output=True,
    text=True,
  )
  found = re.findall(r'^(\w+) \S+::(\w+)', done.stdout, re.MULTILINE)
  assert {name for kind, name in found if kind == 'FAILED'} == {'test_warning'}
  assert {name for kind, name in found if kind == 'ERROR'} == {
    'test_process_and_thread',
    'test_variable',
    'test_lost_variable',
    'test_folder',
    'test_clean',  # the last of the file, which leaves three files
  }
  assert re.search(r"left running: \['process \d+', 'thread", done.stdout)
  files = r"left by this file: .*/home/left'.*_left'.*/tests/left.txt'\]"
  assert re.search(files, done.stdout)
