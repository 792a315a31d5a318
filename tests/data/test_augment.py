"""Augmentation: the distributions that it names, and pixels that follow from the sample's numbers alone."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.data.augment import AugmentConfig, train_image
from diptych.data.decode import decode_image

from .images import icon, photo, planes, stored

EVERYTHING = AugmentConfig(
    scale=(0.3, 1.0),
    margin=0.3,
    hflip=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
)


def rng(number: int) -> Generator:
    return Generator(Philox(key=[1, 0], counter=[0, number, 0, 0]))


def whole(**settings: Any) -> AugmentConfig:
    """Nothing is cut: the crop falls back to the whole image, which has the only ratio allowed."""
    return AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), **settings)


def test_equal_numbers_give_equal_pixels_on_any_number_of_threads() -> None:
    image = planes(photo(90, 70))
    threads = torch.get_num_threads()
    try:
        made: list[list[Tensor]] = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append([train_image(image, 48, EVERYTHING, rng(i)) for i in range(40)])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*made, strict=True):
        assert all(torch.equal(first, other) for other in others)
    assert all(x.shape == (3, 48, 48) and x.dtype == torch.uint8 for x in made[0])
    assert len({x.numpy().tobytes() for x in made[0]}) == 40


DEMO = AugmentConfig(
    scale=(0.6, 1.0),
    margin=0.15,
    hflip=0.25,
    color_jitter=(0.3, 0.3, 0.3, 0.05),
    color_jitter_prob=0.5,
    grayscale_prob=0.1,
)


@pytest.mark.parametrize(("size", "digest"), [(32, "014b58f3724d4082"), (64, "44fdd7206907f5c9")])
def test_icons_give_the_pixels_that_they_always_gave(size: int, digest: str) -> None:
    seen = hashlib.sha256()
    for i in range(200):
        image = decode_image(stored(icon(i)), max_pixels=10**6)
        seen.update(train_image(image, size, DEMO, rng(i)).numpy().tobytes())
    assert seen.hexdigest()[:16] == digest


def test_the_source_is_not_written_to() -> None:
    image = planes(photo(32, 32))
    before = image.clone()
    for i in range(20):
        train_image(image, 32, whole(hflip=0.5, color_jitter=(1, 1, 1, 0.5), color_jitter_prob=1.0), rng(i))
    assert torch.equal(image, before)


def boxes_seen(augment: AugmentConfig, width: int, height: int, n: int) -> np.ndarray:
    """Left, top, right, bottom of the crops of a picture of its own coordinates."""
    x = torch.arange(width).repeat(height, 1) * 255 / (width - 1)
    y = torch.arange(height)[:, None].repeat(1, width) * 255 / (height - 1)
    image = torch.stack([x, y, x]).round().to(torch.uint8)
    crops = [train_image(image, 96, augment, rng(i)) for i in range(n)]
    return np.array([[c[0].min(), c[1].min(), c[0].max(), c[1].max()] for c in crops]) / 255


@pytest.mark.parametrize("size", [(100, 100), (160, 100)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    augment = AugmentConfig(scale=(0.3, 0.8))
    ours = boxes_seen(augment, *size, 1500)
    blank = torch.zeros(3, size[1], size[0])
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.3, 0.8], [3 / 4, 4 / 3]) for _ in range(1500)], dtype=float
    )
    width, height = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    for mine, other, side in [(width, theirs[:, 3], size[0]), (height, theirs[:, 2], size[1])]:
        assert mine.mean() == pytest.approx(other.mean() / side, abs=0.03)
        assert mine.std() == pytest.approx(other.std() / side, abs=0.02)
    assert ours[:, 0].mean() == pytest.approx(theirs[:, 1].mean() / size[0], abs=0.02)
    assert ours[:, 1].mean() == pytest.approx(theirs[:, 0].mean() / size[1], abs=0.02)


@pytest.mark.parametrize(("size", "part"), [((400, 100), (4 / 3, 1)), ((100, 400), (1, 4 / 3))])
def test_where_no_box_fits_the_centre_is_cut(size: tuple[int, int], part: tuple[float, float]) -> None:
    seen = boxes_seen(AugmentConfig(scale=(1.0, 1.0)), *size, 3)
    width, height = seen[:, 2] - seen[:, 0], seen[:, 3] - seen[:, 1]
    assert width == pytest.approx(part[0] * 100 / size[0], abs=0.03)
    assert height == pytest.approx(part[1] * 100 / size[1], abs=0.03)
    assert (seen[:, 0] + seen[:, 2]) / 2 == pytest.approx(0.5, abs=0.03)


def test_margins_shrink_the_picture_and_move_it_on_white() -> None:
    black = torch.zeros(3, 60, 60, dtype=torch.uint8)
    shares: list[float] = []
    lefts: list[int] = []
    for i in range(300):
        image = train_image(black, 60, whole(margin=0.5), rng(i))
        dark = (image[0] < 128).nonzero()
        height, width = (dark.max(0).values - dark.min(0).values + 1).tolist()
        assert abs(height - width) <= 1
        assert image.max() == 255 or height == 60
        shares.append(60 / width - 1)
        lefts.append(int(dark.min(0).values[1]))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.03)
    assert 0.45 < max(shares) < 0.53
    assert min(lefts) == 0
    assert max(lefts) > 15


def test_mirrors_come_as_often_as_told() -> None:
    image = planes(photo(32, 32))
    made = [train_image(image, 32, whole(hflip=0.25), rng(i)) for i in range(400)]
    mirrored = sum(torch.equal(x, image.flip(2)) for x in made)
    assert mirrored + sum(torch.equal(x, image) for x in made) == 400
    assert mirrored / 400 == pytest.approx(0.25, abs=0.07)
    assert torch.equal(train_image(image, 32, whole(), rng(0)), image)


def test_one_setting_does_not_shift_the_draws_of_another() -> None:
    image = planes(photo(64, 64))
    plain = AugmentConfig(scale=(0.4, 0.9))
    more = plain.model_copy(update={"hflip": 1.0, "color_jitter": (0.5, 0, 0, 0)})
    for i in range(5):
        assert torch.equal(
            train_image(image, 32, more, rng(i)), train_image(image, 32, plain, rng(i)).flip(2)
        )


GREY = torch.full((3, 8, 8), 120, dtype=torch.uint8)


def mild(seed: int) -> Tensor:
    """Colours far from black and white, where nothing is clipped."""
    return torch.randint(90, 150, (3, 12, 12), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize(("which", "change"), [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_each_change_of_colour_is_torchvisions(which: int, change: str) -> None:
    strength = [0.0] * 4
    strength[which] = 0.3
    augment = whole(color_jitter=tuple(strength), color_jitter_prob=1.0)
    adjust = getattr(transforms, f"adjust_{change}")
    factors: list[float] = []
    for i in range(60):
        image = mild(i)
        got = train_image(image, 12, augment, rng(i)).float()
        candidates = np.linspace(0.7, 1.3, 241)
        misses = [float((adjust(image.float() / 255, f) * 255 - got).abs().max()) for f in candidates]
        best = int(np.argmin(misses))
        assert misses[best] < 1.3
        factors.append(candidates[best])
    assert np.mean(factors) == pytest.approx(1, abs=0.07)
    assert (min(factors), max(factors)) == (pytest.approx(0.7, abs=0.04), pytest.approx(1.3, abs=0.05))


def test_hue_turns_colours_keeps_grey_and_luminance() -> None:
    augment = whole(color_jitter=(0, 0, 0, 0.5), color_jitter_prob=1.0)
    for i in range(30):
        assert torch.equal(train_image(GREY, 8, augment, rng(i)), GREY)
        image = mild(i)
        got = train_image(image, 12, augment, rng(i))
        weights = torch.tensor([0.213, 0.715, 0.072])
        luminance = [(weights[:, None, None] * x.float()).sum(0) for x in (image, got)]
        assert (luminance[0] - luminance[1]).abs().max() < 1.5
    red = torch.tensor([160, 90, 90], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    turned = torch.stack([train_image(red, 8, augment, rng(i))[:, 0, 0] for i in range(200)])
    assert set(turned.argmax(1).tolist()) == {0, 1, 2}  # of half a turn each way, all colours come


def test_a_whole_jitter_is_its_changes_one_after_another() -> None:
    augment = whole(color_jitter=(0.2, 0.2, 0.2, 0.0), color_jitter_prob=1.0)
    for i in range(20):
        image = mild(i)
        draws = rng(i).random(36)[28:]
        expected = image.double() / 255
        for which in np.argsort(draws[4:8], kind="stable"):
            if which < 3:
                change = ("brightness", "contrast", "saturation")[which]
                expected = getattr(transforms, f"adjust_{change}")(expected, 0.8 + 0.4 * draws[which])
        got = train_image(image, 12, augment, rng(i))
        assert (got - 255 * expected).abs().max() < 0.6  # rounding, and torchvision's three digits of luma


def test_grey_images_come_as_often_as_told_and_are_grey() -> None:
    image = mild(0)
    made = [train_image(image, 12, whole(grayscale_prob=0.3), rng(i)) for i in range(300)]
    grey = [x for x in made if not torch.equal(x, image)]
    assert len(grey) / 300 == pytest.approx(0.3, abs=0.08)
    truth = transforms.rgb_to_grayscale(image.float(), num_output_channels=3)
    assert all((x - truth).abs().max() <= 0.6 for x in grey)
    assert all(torch.equal(x[0], x[1]) and torch.equal(x[1], x[2]) for x in grey)
    both = whole(color_jitter=(0.5, 0.5, 0.5, 0.5), color_jitter_prob=1.0, grayscale_prob=1.0)
    made = [train_image(image, 12, both, rng(i)) for i in range(9)]
    assert all(torch.equal(x[0], x[1]) and torch.equal(x[1], x[2]) for x in made)


@pytest.mark.parametrize(
    "augment", [AugmentConfig(), EVERYTHING, AugmentConfig(scale=(0.1, 1), ratio=(0.5, 2))]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3)])
def test_tiny_and_narrow_images_pass(augment: AugmentConfig, size: tuple[int, int]) -> None:
    image = torch.full((3, size[1], size[0]), 7, dtype=torch.uint8)
    assert all(train_image(image, 16, augment, rng(i)).shape == (3, 16, 16) for i in range(20))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scale=[0.9, 0.1]", "scale: .* must be two rising numbers"),
        ("scale=[0.0, 1.0]", "scale"),
        ("scale=[0.5, 1.1]", "scale"),
        ("ratio=[2.0, 1.0]", "ratio"),
        ("hflip=1.5", "hflip"),
        ("margin=-0.1", "margin"),
        ("color_jitter=[0.1, 0.1, 0.1, 0.6]", "hue at most 0.5"),
        ("color_jitter=[-0.1, 0.1, 0.1, 0.1]", "color_jitter"),
        ("color_jitter_prob=0.5", "color_jitter changes nothing"),
        ("colour_jitter=[0.1, 0.1, 0.1, 0.1]", "did you mean 'color_jitter'"),
    ],
)
def test_mistakes_are_told_with_their_key(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(AugmentConfig, None, [override])
