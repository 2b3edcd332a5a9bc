"""Downloads from a small server on this machine that may break off."""

import hashlib
import shutil
import types

import numpy as np
import pytest
from web_server import serving, without_proxies

from deeplab_jax.runtime import download as module
from deeplab_jax.runtime.download import download
from deeplab_jax.runtime.errors import UserError

pytestmark = pytest.mark.xdist_group('alone')

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
  """Serves CONTENT at two addresses, `url` and `mirror`."""
  without_proxies(monkeypatch)
  with serving({'weights.h5': CONTENT, 'mirror/other.h5': CONTENT}) as state:
    state.url = f'{state.address}/weights.h5'
    state.mirror = f'{state.address}/mirror/other.h5'
    yield state


def asked(server):
  """The ranges that were asked for."""
  return [wanted for _, wanted in server.requests]


def fetch(server, folder, *urls, **options):
  options = {'digest': f'md5:{MD5}', 'advice': 'do it by hand', **options}
  return download(urls or [server.url], directory=folder, **options)


def fails(server, folder, *words):
  """Checks the one line, and that no broken file bears the name."""
  with pytest.raises(UserError) as error:
    fetch(server, folder)
  message = str(error.value)
  assert '\n' not in message
  for word in (server.url, 'do it by hand', *words):
    assert word in message, message
  assert not (folder / 'weights.h5').exists()


def test_file_is_downloaded_once_and_then_cached(server, tmp_path):
  path = fetch(server, tmp_path)
  assert path == tmp_path / 'weights.h5' and path.read_bytes() == CONTENT
  assert fetch(server, tmp_path) == path
  assert asked(server) == [None]
  assert not list(tmp_path.glob('*.part'))


def test_connection_that_breaks_is_taken_up_where_it_was(server, tmp_path):
  server.limits = [100_000, 50_000]
  path = fetch(server, tmp_path)
  assert path.read_bytes() == CONTENT
  assert asked(server) == [None, 'bytes=100000-', 'bytes=150000-']


def test_part_of_an_earlier_try_is_completed(server, tmp_path):
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT[:1000])
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert asked(server) == ['bytes=1000-']


@pytest.mark.parametrize('more', [b'', b'more'])
def test_part_beyond_the_end_is_kept_if_it_is_whole(server, tmp_path, more):
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT + more)
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  expected = [f'bytes={len(CONTENT + more)}-', None]
  assert asked(server) == expected[: 1 + bool(more)]


def test_restart_without_ranges_loses_nothing_when_it_breaks(server, tmp_path):
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT[:100_000])
  server.ranges, server.limits = False, [50_000] * 3
  fails(server, tmp_path, 'after 0.1 MB, which are kept')
  part = tmp_path / 'weights.h5.part'
  assert part.read_bytes() == CONTENT[:100_000]


def test_server_without_ranges_starts_from_the_first_byte(server, tmp_path):
  server.ranges, server.limits = False, [100_000]
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert asked(server) == [None, 'bytes=100000-']


def test_broken_part_is_thrown_away_and_all_is_fetched(server, tmp_path):
  (tmp_path / 'weights.h5.part').write_bytes(b'x' * 1000)
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert asked(server) == ['bytes=1000-', None]


@pytest.mark.parametrize('broken', [b'', CONTENT[:1000], b'x' + CONTENT[1:]])
def test_broken_cache_is_never_trusted(server, tmp_path, broken):
  (tmp_path / 'weights.h5').write_bytes(broken)
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_wrong_hash_is_named_and_nothing_is_kept(server, tmp_path):
  server.files['weights.h5'] = b'<html>log in first</html>'
  fails(server, tmp_path, 'MD5', f'expected {MD5}')
  assert not list(tmp_path.glob('*.part'))
  server.files['weights.h5'] = CONTENT
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_network_gone_halfway_is_one_line_and_the_next_try_goes_on(
  server, tmp_path
):
  server.limits = [100_000, 0, 0, 0]
  fails(server, tmp_path, 'after 0.1 MB, which are kept')
  server.requests.clear()
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert asked(server) == ['bytes=100000-']


def test_missing_page_is_one_line(server, tmp_path):
  server.statuses['weights.h5'] = 404
  fails(server, tmp_path, 'Not Found')
  assert asked(server) == [None]


def test_no_server_is_one_line(server, tmp_path):
  server.url = 'http://127.0.0.1:9/weights.h5'
  fails(server, tmp_path, 'refused')


def test_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
  monkeypatch.setenv('http_proxy', server.address)
  path = fetch(server, tmp_path, 'http://elsewhere.invalid/weights.h5')
  assert path.read_bytes() == CONTENT


def both(server):
  return server.url, server.mirror


@pytest.mark.parametrize('status', [403, 404, 503])
def test_mirror_is_asked_where_the_first_address_refuses(
  server, tmp_path, status
):
  server.statuses['weights.h5'] = status
  path = fetch(server, tmp_path, *both(server))
  assert path == tmp_path / 'weights.h5' and path.read_bytes() == CONTENT
  assert [name for name, _ in server.requests] == [
    'weights.h5', 'mirror/other.h5',
  ]  # fmt: skip


def test_mirror_is_asked_where_nobody_listens(server, tmp_path):
  path = fetch(server, tmp_path, 'http://127.0.0.1:9/weights.h5', server.mirror)
  assert path.read_bytes() == CONTENT


@pytest.mark.parametrize('size', [None, len(CONTENT)])
@pytest.mark.parametrize('rubbish', [b'<html>', b'x' + CONTENT[1:]])
def test_mirror_is_asked_where_the_first_gives_another_file(
  server, tmp_path, size, rubbish
):
  server.files['weights.h5'] = rubbish
  path = fetch(server, tmp_path, *both(server), size=size)
  assert path.read_bytes() == CONTENT
  assert [name for name, _ in server.requests][-1] == 'mirror/other.h5'


def test_mirror_goes_on_where_the_first_address_died(server, tmp_path):
  server.limits = [100_000, 0, 0, 0]
  path = fetch(server, tmp_path, *both(server), size=len(CONTENT))
  assert path.read_bytes() == CONTENT
  assert server.requests[-1] == ('mirror/other.h5', 'bytes=100000-')


def test_page_in_place_of_the_file_costs_no_part_of_known_size(
  server, tmp_path
):
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT[:100_000])
  server.files['weights.h5'] = b'<html>log in first</html>' * 9999
  server.ranges = False
  with pytest.raises(UserError, match='bytes, expected 300000'):
    fetch(server, tmp_path, size=len(CONTENT))
  server.ranges = True
  fetch(server, tmp_path, server.mirror, size=len(CONTENT))
  path = fetch(server, tmp_path, *both(server), size=len(CONTENT))
  assert path.read_bytes() == CONTENT
  assert server.requests[-1] == ('mirror/other.h5', 'bytes=100000-')


@pytest.mark.parametrize('extra', [0, 5])
def test_part_as_large_as_the_file_or_larger_is_checked(
  server, tmp_path, extra
):
  (tmp_path / 'weights.h5.part').write_bytes(b'x' * (len(CONTENT) + extra))
  path = fetch(server, tmp_path, size=len(CONTENT))
  assert path.read_bytes() == CONTENT and asked(server) == [None]


def test_all_addresses_failing_is_one_line_with_each_reason(server, tmp_path):
  server.statuses['weights.h5'] = 403
  server.files['mirror/other.h5'] = b'x'
  with pytest.raises(UserError) as error:
    fetch(server, tmp_path, *both(server), size=len(CONTENT))
  host = server.address.removeprefix('http://')
  assert str(error.value) == (
    f'weights.h5 cannot be downloaded: {host}: Forbidden; {host}: has 1 bytes,'
    ' expected 300000; do it by hand'
  )
  assert not list(tmp_path.glob('weights*'))


def test_sha256_is_checked_as_well(server, tmp_path):
  right = hashlib.sha256(CONTENT).hexdigest()
  path = fetch(server, tmp_path, digest=f'sha256:{right}')
  assert path.read_bytes() == CONTENT
  with pytest.raises(UserError, match=f'SHA256 {right}, expected abc'):
    fetch(server, tmp_path / 'other', digest='sha256:abc')


def test_full_disk_is_reported_before_the_first_byte(
  server, tmp_path, monkeypatch
):
  usage = types.SimpleNamespace(free=250_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(UserError) as error:
    fetch(server, tmp_path, *both(server), size=len(CONTENT))
  assert str(error.value) == (
    f'{tmp_path}: the download of weights.h5 needs 0.3 MB of disk, but 0.2 MB'
    ' are free; make room there'
  )
  assert not server.requests
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT[:100_000])
  path = fetch(server, tmp_path, size=len(CONTENT))  # the rest has room
  assert path.read_bytes() == CONTENT


def test_disk_that_fills_up_is_not_blamed_on_the_mirrors(server, tmp_path):
  (tmp_path / 'weights.h5.part').symlink_to('/dev/full')
  with pytest.raises(UserError, match=f'^{tmp_path}: No space left'):
    fetch(server, tmp_path, *both(server))
  assert len(server.requests) == 1


def test_folder_that_cannot_be_made_is_named(server, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file'):
    fetch(server, tmp_path / 'file' / 'cache')


def test_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert module.cache_dir() == tmp_path / 'deeplab_jax'
