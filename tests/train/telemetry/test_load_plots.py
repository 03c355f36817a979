"""Pictures of the load show what they are of, at a size that can be seen."""

import io

import numpy as np
import pytest

from moejax.train.telemetry.load_plots import load_bars, load_image, png


def test_picture_is_blue_below_white_at_and_red_above_the_mean() -> None:
  history = np.array([[0, 1, 1, 2], [3, 3, 3, 3], [0, 0, 0, 9], [0, 0, 0, 0]], float)
  picture = load_image(history)
  high, wide = picture.shape[0] // 4, picture.shape[1] // 4
  cells = picture[::high, ::wide].astype(int)  # [E, steps, 3]
  assert picture.dtype == np.uint8 and high >= 3 and wide >= 1
  assert (cells[1, 0] == 255).all() and (cells[:, 1] == 255).all()
  red_over_blue = cells[..., 0] - cells[..., 2]
  assert (red_over_blue[:, 2] < 0).tolist() == [True, True, True, False] and red_over_blue[3, 2] > 0
  assert red_over_blue[3, 0] > 0 and (red_over_blue[:, 3] < 0).all()
  assert (load_image(history * 7) == picture).all()  # relative to the mean


@pytest.mark.parametrize(
  ('steps', 'experts'), [(1, 1), (1, 8), (7, 8), (2500, 4), (30, 256), (3, 600)]
)
def test_picture_shows_every_expert_at_a_size_that_can_be_seen(steps: int, experts: int) -> None:
  history = np.ones((steps, experts))
  history[:, experts // 2] += 5
  height, width, _ = load_image(history).shape
  assert height % experts == 0 and height // experts >= 3 and 24 <= width <= 900
  rows = load_image(history)[:: height // experts, 0].astype(int)
  assert experts == 1 or np.argmax(rows[:, 0] - rows[:, 2]) == experts // 2


def test_png_is_the_picture() -> None:
  from PIL import Image

  picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
  assert (np.asarray(Image.open(io.BytesIO(png(picture)))) == picture).all()


def test_bars() -> None:
  assert load_bars(np.full(4, 3.0)) == '▄▄▄▄' and load_bars(np.zeros(3)) == '   '
  assert (
    load_bars(np.array([0.0, 1, 1, 2])) == ' ▄▄█' and load_bars(np.array([1.0, 11, 24])) == ' ▄█'
  )
