"""Which text stands for an image: as often as the weights say, and keyed by the sample."""

from collections import Counter
from typing import Any

import pytest
from numpy.random import Generator, Philox

from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.data.captions import CaptionConfig, choose_caption, choose_text

META: dict[str, Any] = {"names": ["n1", "n2"], "tags": ["a", "b", "c", "d", "e"], "alt": "the alt"}


def rng(number: int) -> Generator:
    return Generator(Philox(key=[1, 0], counter=[0, number, 1, 0]))


def drawn(config: CaptionConfig, meta: dict[str, Any] = META, n: int = 4000) -> Counter[str]:
    return Counter(choose_caption(config, "cap", meta, rng(i)) for i in range(n))


def test_by_default_the_caption_itself_is_taken() -> None:
    assert drawn(CaptionConfig(), n=50) == {"cap": 50}


def test_texts_come_as_often_as_their_weights_say() -> None:
    config = CaptionConfig(txt=1.0, names=0.5, tags=0.25, fields={"alt": 0.25}, max_tags=1)
    seen = drawn(config)
    shares = {text: count / 4000 for text, count in seen.items()}
    expected = {"cap": 0.5, "n1": 0.125, "n2": 0.125, "the alt": 0.125}
    expected |= {tag: 0.025 for tag in "abcde"}
    assert shares.keys() == expected.keys()
    assert all(shares[text] == pytest.approx(expected[text], abs=0.025) for text in expected)


def test_tags_are_distinct_in_drawn_order_and_one_to_the_most() -> None:
    seen = drawn(CaptionConfig(txt=0.0, tags=1.0, max_tags=3))
    parts = [text.split(", ") for text in seen]
    counts = Counter(len(text.split(", ")) for text in seen.elements())
    assert all(len(set(part)) == len(part) for part in parts)
    assert all(counts[k] / 4000 == pytest.approx(1 / 3, abs=0.04) for k in (1, 2, 3))
    assert {"a, b", "b, a"} <= seen.keys()
    few = drawn(CaptionConfig(txt=0.0, tags=1.0, max_tags=9), {"tags": ["x", "y"]}, n=300)
    assert few.keys() == {"x", "y", "x, y", "y, x"}


def test_a_missing_text_leaves_its_weight_to_the_others() -> None:
    config = CaptionConfig(txt=1.0, names=1.0, tags=8.0)
    seen = drawn(config, {"names": ["n"], "tags": ["", "  ", 3]})
    assert seen["cap"] / 4000 == pytest.approx(0.5, abs=0.04)
    assert seen.keys() == {"cap", "n"}


@pytest.mark.parametrize("meta", [{}, {"names": []}, {"names": None}, {"names": 3}, {"names": {"a": "b"}}])
def test_a_sample_without_any_of_them_keeps_its_caption(meta: dict[str, Any]) -> None:
    assert drawn(CaptionConfig(txt=0.0, names=1.0), meta, n=20) == {"cap": 20}


def test_the_choice_follows_from_the_numbers() -> None:
    config = CaptionConfig(txt=1.0, names=1.0, tags=1.0)
    first = [choose_caption(config, "cap", META, rng(i)) for i in range(100)]
    assert first == [choose_caption(config, "cap", META, rng(i)) for i in range(100)]
    assert len(set(first)) > 10


def test_templates_come_equally_often_whatever_the_text() -> None:
    config = CaptionConfig(templates=("a photo of {}.", "{}, drawn", "one {} {"), names=1.0)
    seen = drawn(config)
    assert seen.keys() == {
        template.replace("{}", text, 1) for template in config.templates for text in ("cap", "n1", "n2")
    }
    for template in config.templates:
        assert seen[template.replace("{}", "cap")] / 4000 == pytest.approx(1 / 6, abs=0.03)
    assert {choose_caption(config, " ", {}, rng(i)) for i in range(9)} == {" "}


def test_templates_do_not_shift_the_choice_of_the_text() -> None:
    config = CaptionConfig(txt=1.0, names=1.0, tags=1.0)
    worded = config.model_copy(update={"templates": ("<{}>",), "lower": True})
    for i in range(200):
        text = choose_text(worded, "Cap", META, rng(i))
        assert text == choose_caption(config, "Cap", META, rng(i))
        assert choose_caption(worded, "Cap", META, rng(i)) == f"<{text.lower()}>"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("txt=0.0", "all weights are 0"),
        ("names=-1.0", "names"),
        ("fields={alt: -0.5}", "weight of alt"),
        ("fields={alt: .nan}", "alt"),
        ("max_tags=0", "max_tags"),
        ("text=0.5", "did you mean 'txt'"),
        ("templates=[a photo]", "templates: 'a photo' must have {} once"),
        ("templates=['{} and {}']", "templates: '{} and {}' must have {} once"),
        ("truncate=middle", "truncate"),
    ],
)
def test_mistakes_are_told_with_their_key(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(CaptionConfig, None, [override])
