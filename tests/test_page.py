"""The page in a real browser, as a visitor uses it."""

import io
import json
import shutil
import tempfile

import numpy as np
import pytest
from loopback import StrongestChannel, encoded, flag, serving
from PIL import Image

from deeplab_jax.predict import Predictor
from deeplab_jax.predict_files import predict

webdriver = pytest.importorskip('selenium.webdriver')
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
pytestmark = [
  pytest.mark.compiles,
  pytest.mark.xdist_group('alone'),
  pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason='needs Debian packages: apt-get install chromium chromium-driver',
  ),
]


@pytest.fixture
def browser(tmp_path):
  """Chromium without a window, that saves downloads in tmp_path/'saved'."""
  (tmp_path / 'saved').mkdir()
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for argument in (
    *('--headless=new', '--no-sandbox', '--disable-gpu'),
    *('--disable-dev-shm-usage', '--hide-scrollbars', '--no-proxy-server'),
    *('--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream'),
    f'--user-data-dir={tmp_path / "profile"}',
  ):
    options.add_argument(argument)
  options.add_experimental_option(
    'prefs', {'download.default_directory': str(tmp_path / 'saved')}
  )
  options.set_capability(
    'goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'}
  )
  # Chromium puts a socket there, whose path may have a hundred characters.
  with tempfile.TemporaryDirectory(dir='/tmp') as short:
    environment = {'HOME': short, 'TMPDIR': short, 'PATH': '/usr/bin:/bin'}
    driver = webdriver.Chrome(
      options, webdriver.ChromeService(DRIVER, env=environment)
    )
    try:
      driver.set_window_size(1280, 900)
      yield driver
    finally:
      driver.quit()


def find(browser, name):
  return browser.find_element(By.ID, name)


def wait(browser, holds):
  return WebDriverWait(browser, 60, 0.05).until(lambda _: holds())


def open_page(browser, port):
  browser.get(f'http://127.0.0.1:{port}/')
  wait(browser, lambda: 'step' in find(browser, 'about').text)


def upload(browser, path):
  find(browser, 'file').send_keys(str(path))


def wait_for_result(browser, name):
  """Waits until the image of that name is shown with its classes."""
  wait(
    browser,
    lambda: (
      find(browser, 'name').text == name
      and not find(browser, 'wait').is_displayed()
      and find(browser, 'side').is_displayed()
    ),
  )


def pixel(browser, x, y):
  """The color on the screen at a share of the picture's width and height."""
  with Image.open(
    io.BytesIO(find(browser, 'picture').screenshot_as_png)
  ) as shot:
    size = np.array(shot.size)
    return np.array(
      shot.convert('RGB').getpixel(tuple(size * (x, y) // 1)), int
    )


def saved(browser, path):
  wait(browser, path.exists)
  return path.read_bytes()


def complaints(browser):
  """What the browser logged, but for the refusals that a test asked for."""
  return [
    entry
    for entry in browser.get_log('browser')
    if entry['level'] in ('WARNING', 'SEVERE')
    and 'responded with a status of' not in entry['message']
  ]


def requested(browser):
  """The addresses that the browser has asked for."""
  entries = browser.get_log('performance')
  messages = [json.loads(entry['message'])['message'] for entry in entries]
  return {
    message['params']['request']['url']
    for message in messages
    if message['method'] == 'Network.requestWillBeSent'
  }


@pytest.fixture
def stripes(tmp_path):
  """A file of red, green and blue stripes, whose classes are these."""
  path = tmp_path / 'flag.png'
  path.write_bytes(encoded(flag(120, 240)[0]))
  return path


def test_a_visitor_uploads_looks_and_saves(browser, stripes, tmp_path):
  example = encoded(flag(60, 60)[0])
  with serving(StrongestChannel(), examples=[example]) as port:
    open_page(browser, port)
    assert '4 classes' in find(browser, 'about').text
    assert 'mIoU 75.0 %' in find(browser, 'about').text
    upload(browser, stripes)
    wait_for_result(browser, 'flag.png')
    assert '240 × 120 pixels' in find(browser, 'facts').text

    # The legend names the shares, and what is not there.
    rows = find(browser, 'legend').text.split('\n')
    assert sorted(rows[::2]) == ['blue', 'green', 'red']
    assert rows[1::2] == ['33.3 %'] * 3
    assert find(browser, 'others-title').text == '1 class not in this image'

    # The slider mixes image and colors.
    image, color = np.array([220, 20, 20]), np.array([200, 30, 30])
    slider = find(browser, 'opacity')
    for key, share in ((Keys.HOME, 0), (Keys.END, 1)):
      slider.send_keys(key)
      expected = (1 - share) * image + share * color
      np.testing.assert_allclose(pixel(browser, 0.1, 0.5), expected, atol=2)
    for _ in range(50):
      slider.send_keys(Keys.ARROW_LEFT)
    assert find(browser, 'opacity-value').text == '50 %'
    half = (image + color) / 2
    np.testing.assert_allclose(pixel(browser, 0.1, 0.5), half, atol=2)

    # The class under the pointer, and under the one that the keys move.
    picture = find(browser, 'picture')
    for place, name in ((-0.4, 'red'), (0, 'green'), (0.4, 'blue')):
      offset = int(place * picture.size['width'])
      ActionChains(browser).move_to_element_with_offset(
        picture, offset, 10
      ).perform()
      assert find(browser, 'tip-name').text == name
    picture.send_keys(Keys.ARROW_LEFT * 20)
    status = find(browser, 'status')
    assert status.get_attribute('textContent').startswith('green at 9')

    # One class alone.
    slider.send_keys(Keys.END)
    button = find(browser, 'legend').find_element(
      By.XPATH, ".//button[contains(., 'blue')]"
    )
    button.click()
    np.testing.assert_allclose(pixel(browser, 0.1, 0.5), image, atol=2)
    np.testing.assert_allclose(pixel(browser, 0.9, 0.5), [40, 60, 220], atol=2)
    button.click()

    find(browser, 'save-overlay').click()
    file = saved(browser, tmp_path / 'saved/flag_overlay.png')
    with Image.open(io.BytesIO(file)) as overlay:
      assert overlay.size == (240, 120)
      shown = np.asarray(overlay.convert('RGB'))
    expected = StrongestChannel.info.palette[flag(120, 240)[1]]
    differs = (shown != expected).any(-1)  # the lines between the classes
    assert np.unique(np.nonzero(differs)[1]).tolist() == [79, 159]

    browser.find_element(By.CSS_SELECTOR, '#example-list button').click()
    wait_for_result(browser, 'example_1.png')
    assert complaints(browser) == []
    # Chromium has pages of its own, chrome: and chrome-untrusted:.
    own = f'http://127.0.0.1:{port}/', 'data:', 'blob:', 'chrome'
    assert {
      url for url in requested(browser) if not url.startswith(own)
    } == set()


def test_what_is_wrong_is_said_and_the_earlier_result_stays(
  browser, stripes, tmp_path
):
  bad, large = tmp_path / 'bad.jpg', tmp_path / 'large.png'
  bad.write_text('no picture')
  large.write_bytes(bytes(2000))
  with serving(StrongestChannel(), bytes=1500) as port:
    open_page(browser, port)
    upload(browser, bad)
    wait(browser, lambda: find(browser, 'error').is_displayed())
    assert 'unreadable image' in find(browser, 'message').text
    assert find(browser, 'drop').is_displayed()
    upload(browser, stripes)
    wait_for_result(browser, 'flag.png')
    assert not find(browser, 'error').is_displayed()
    upload(browser, large)
    wait(browser, lambda: find(browser, 'error').is_displayed())
    assert 'at most 0.0015 MB' in find(browser, 'message').text
    upload(browser, bad)
    wait(browser, lambda: 'unreadable' in find(browser, 'message').text)
    wait_for_result(browser, 'flag.png')
    np.testing.assert_allclose(pixel(browser, 0.1, 0.5), [208, 26, 26], atol=2)
  upload(browser, stripes)
  wait(browser, lambda: 'cannot be reached' in find(browser, 'message').text)
  assert complaints(browser)[:-1] == []  # the last is the lost connection


def test_token_is_asked_for_until_it_is_right(browser, stripes):
  with serving(StrongestChannel(), token='secret') as port:
    browser.get(f'http://127.0.0.1:{port}/')
    for token in ('guess', 'secret'):
      wait(browser, lambda: find(browser, 'login').is_displayed())
      find(browser, 'token').send_keys(token + Keys.ENTER)
    wait(browser, lambda: 'step 70' in find(browser, 'about').text)
    upload(browser, stripes)
    wait_for_result(browser, 'flag.png')


def test_camera_and_dropped_files_are_segmented(browser):
  with serving(StrongestChannel()) as port:
    open_page(browser, port)
    browser.find_element(By.CSS_SELECTOR, '#drop [data-do=camera]').click()
    wait(browser, lambda: find(browser, 'camera').is_displayed())
    ready = "return document.getElementById('video').videoWidth > 0"
    wait(browser, lambda: browser.execute_script(ready))
    find(browser, 'snap').click()
    wait_for_result(browser, 'camera.jpg')
    browser.execute_script(
      """
      const bytes = Uint8Array.from(arguments[0]);
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
      document.body.dispatchEvent(
        new DragEvent('drop', {dataTransfer: transfer, bubbles: true}));
      """,
      list(encoded(flag()[0])),
    )
    wait_for_result(browser, 'dropped.png')
    assert complaints(browser) == []


@pytest.mark.parametrize('width', [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, stripes, width):
  browser.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride',
    {'width': width, 'height': 844, 'deviceScaleFactor': 1, 'mobile': False},
  )
  overflow = (
    'return document.documentElement.scrollWidth - '
    'document.documentElement.clientWidth'
  )
  with serving(StrongestChannel()) as port:
    open_page(browser, port)
    assert browser.execute_script(overflow) == 0
    upload(browser, stripes)
    wait_for_result(browser, 'flag.png')
    assert browser.execute_script(overflow) == 0


def test_saved_mask_is_the_file_of_predict(browser, trained, tmp_path):
  rng = np.random.default_rng(0)
  photo = tmp_path / 'photo.png'
  photo.write_bytes(encoded(rng.integers(0, 256, (70, 90, 3), np.uint8)))
  config = trained.config.copy_and_resolve_references()
  config.predict.output_dir = str(tmp_path / 'predictions')
  (path,) = predict(config, trained.workdir, [str(photo)])
  network = Predictor.from_workdir(trained.workdir)
  with serving(network) as port:
    open_page(browser, port)
    upload(browser, photo)
    wait_for_result(browser, 'photo.png')
    find(browser, 'save-mask').click()
    found = saved(browser, tmp_path / 'saved/photo_mask.png')
  assert found == path.read_bytes()
