"""Packed tokens against open_clip's own tokenizers, and caption hashes against their definition."""

import json
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.configs.errors import UserError
from diptych.data import text
from diptych.data.text import Tokenizer, build_tokenizer, caption_hash, tokenizer_for

CAPTIONS = [
    "a photo of a cat",
    "",
    "A  Cat\non\ta MAT!",
    "it's 5 o'clock, they're 1234 &amp; &lt;b&gt; caf\u00e9",
    "\U0001f408 \u732b na\u00efve \u00ab\u00e0\u00bb \ufb01n",
    "<start_of_text> x <END_OF_TEXT>",
    "don&#39;t \u201cquote\u201d \x1b[31mred\x1b[0m",
    "l\u2019\u00e9t\u00e9 \u00c3\u00a9",  # mojibake, which ftfy mends
    "! !! !!! 0",
    "half \ud83d a pair",
    "word " * 200,
    "unpronounceablyqxzlongword" * 9,
]


def unpack(tokenizer: Tokenizer, captions: list[str]) -> list[list[int]]:
    token_ids, seq_lens = tokenizer.pack(captions)
    assert (token_ids.dtype, seq_lens.dtype) == (torch.int32, torch.int32)
    assert len(seq_lens) == len(captions)
    return [part.tolist() for part in token_ids.split(seq_lens.tolist())]


def assert_equal_without_padding(rows: list[list[int]], padded: torch.Tensor, pad_id: int) -> None:
    for row, truth in zip(rows, padded.tolist(), strict=True):
        assert row == truth[: len(row)]
        assert set(truth[len(row) :]) <= {pad_id}


@pytest.mark.parametrize("context_length", [1, 2, 5, 77])
def test_clips_tokens_are_open_clips_cut_with_the_end_kept(context_length: int) -> None:
    tokenizer = build_tokenizer(None, context_length)
    truth = open_clip.SimpleTokenizer(context_length=context_length)
    rows = unpack(tokenizer, CAPTIONS)
    assert_equal_without_padding(rows, truth(CAPTIONS), 0)
    assert all(row[-1] == truth.eot_token_id for row in rows)
    assert rows[1][-2:] == [truth.sot_token_id, truth.eot_token_id][-min(2, context_length) :]
    assert (tokenizer.name, tokenizer.context_length, tokenizer.pad_id) == (None, context_length, 0)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_clips_tokenizer_cleans_as_told(clean: str) -> None:
    rows = unpack(build_tokenizer(None, 40, {"clean": clean}), CAPTIONS)
    assert_equal_without_padding(rows, open_clip.SimpleTokenizer(context_length=40, clean=clean)(CAPTIONS), 0)


TRUTH = open_clip.SimpleTokenizer(context_length=16)
OURS = build_tokenizer(None, 16)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60) | st.text(st.characters(max_codepoint=127), max_size=60))
def test_any_text_gives_open_clips_tokens(caption: str) -> None:
    assert_equal_without_padding(unpack(OURS, [caption]), TRUTH([caption]), 0)


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "dog",
    "red",
    "##s",
    "photo",
    "[BOS]",
    "[EOS]",
]


@pytest.fixture
def bert(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(
        vocab=str(tmp_path / "vocab.txt"), bos_token="[BOS]", eos_token="[EOS]"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


HF_CAPTIONS = ["a red cat", "", "dogs  &amp; Cats", "a [SEP] dog", "a photo of a red red red cat cat dog dog"]


@pytest.mark.parametrize(
    "more", [{}, {"clean": "canonicalize"}, {"strip_sep_token": True}, {"tokenizer_mode": "clips"}]
)
@pytest.mark.parametrize("context_length", [5, 24])
def test_hugging_face_tokens_are_open_clips(bert: str, more: dict[str, Any], context_length: int) -> None:
    tokenizer = build_tokenizer(bert, context_length, more)
    truth = open_clip.tokenizer.HFTokenizer(bert, context_length=context_length, **more)
    rows = unpack(tokenizer, HF_CAPTIONS)
    assert_equal_without_padding(rows, truth(HF_CAPTIONS), WORDS.index("[PAD]"))
    assert (tokenizer.name, tokenizer.pad_id) == (bert, 0)
    if not more:
        assert rows[1] == [WORDS.index("[CLS]"), WORDS.index("[SEP]")]
        assert max(map(len, rows)) == min(context_length, 13)


def test_captions_are_kept_within_bounds_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "KEPT_CAPTIONS", 4)
    monkeypatch.setattr(text, "KEPT_WORDS", 3)
    tokenizer = build_tokenizer(None, 9)
    truth = open_clip.SimpleTokenizer(context_length=9)
    for start in range(0, 60, 3):
        captions = [f"number {n % 7} of {n}" for n in range(start, start + 5)] * 2
        assert_equal_without_padding(unpack(tokenizer, captions), truth(captions), 0)
        assert len(tokenizer._kept) <= 10  # type: ignore[reportPrivateUsage]  its inside is what is tested
    assert unpack(tokenizer, []) == []


MORE = [{}, {"strip_sep_token": True}, {"tokenizer_mode": "clips"}]


@pytest.mark.parametrize("settings", [None, *MORE])
def test_captions_longer_than_the_context_are_counted(bert: str, settings: dict[str, Any] | None) -> None:
    """Against the length that they have in a context that all of them fit in."""
    name = None if settings is None else bert
    clips = bool(settings and "tokenizer_mode" in settings)  # three of its ids are its own
    captions = [" ".join(["cat", "red", "dogs", "photo", "a"][:n]) for n in range(6)]
    whole = unpack(build_tokenizer(name, 40, None if clips else settings), captions)
    lengths = [len(row) + clips for row in whole]
    for context_length in range(4, 12):
        tokenizer = build_tokenizer(name, context_length, settings)
        for caption, length in zip(captions, lengths, strict=True):
            tokenizer.pack([caption, "", caption])
            assert tokenizer.cut == 2 * (length > context_length)
        tokenizer.pack(captions)
        assert tokenizer.cut == sum(length > context_length for length in lengths)


STORY = 'A cat sat. "Two dogs!" ran 3.5 miles\nThen what? \u732b\u3002\u72ac\u3002 The end of it all'


@pytest.mark.parametrize("name", [None, "bert"])
def test_as_many_whole_sentences_are_kept_as_fit(name: str | None, bert: str) -> None:
    ends = ["A cat sat.", ' "Two dogs!"', " ran 3.5 miles\n", "Then what?", " \u732b\u3002", "\u72ac\u3002"]
    name = bert if name else None
    whole = build_tokenizer(name, 200)
    for context_length in range(2, 48):
        tokenizer = build_tokenizer(name, context_length)
        got = tokenizer.pack([STORY], "sentence")[0].tolist()
        assert got == tokenizer.pack([STORY], "sentence")[0].tolist()  # from what is kept
        assert tokenizer.cut == (len(unpack(whole, [STORY])[0]) > context_length)
        fitting = [
            text
            for text in ["".join(ends[: n + 1]) for n in range(len(ends))] + [STORY]
            if len(unpack(whole, [text])[0]) <= context_length
        ]
        assert got == (unpack(whole, fitting[-1:]) if fitting else unpack(tokenizer, [STORY]))[0]


@pytest.mark.parametrize("name", [None, "bert"])
def test_drawn_windows_reach_every_word_and_are_full(name: str | None, bert: str) -> None:
    words = ["a", "cat", "dog", "red", "photo"] * 4
    tokenizer = build_tokenizer(bert if name else None, 7)
    caption = "  ".join(words)
    windows: list[list[int]] = []
    for draw in [k / 64 for k in range(64)]:
        token_ids, seq_lens = tokenizer.pack(["cat", caption], "random", [draw, draw])
        assert tokenizer.cut == 1
        windows.append(token_ids[seq_lens[0] :].tolist())
    possible = [unpack(tokenizer, [" ".join(words[k : k + 5])])[0] for k in range(16)]
    assert {tuple(window) for window in windows} == {tuple(window) for window in possible}
    assert windows[0] == possible[0]
    assert windows[-1] == possible[-1]
    assert tokenizer.pack(["cat"], "random", [0.5])[0].tolist() == unpack(tokenizer, ["cat"])[0]


def test_windows_of_an_endless_word_begin_anywhere() -> None:
    tokenizer = build_tokenizer(None, 5)
    endless = "\u732b\u72ac" * 30
    windows = {
        tuple(tokenizer.pack([endless], "random", [k / 40])[0].tolist()) for k in range(40)
    }  # of the two characters' bytes
    assert max(map(len, windows)) == 5
    assert len(windows) > 1


@given(st.text(max_size=80), st.floats(0, 1, exclude_max=True), st.sampled_from(["sentence", "random"]))
def test_whatever_is_left_fits_and_what_fits_is_untouched(caption: str, draw: float, truncate: Any) -> None:
    token_ids, seq_lens = OURS.pack([caption], truncate, [draw])
    assert len(token_ids) == int(seq_lens[0]) <= 16
    cut = OURS.cut
    end = unpack(OURS, [caption])[0]
    assert OURS.cut == cut
    assert cut or token_ids.tolist() == end


@pytest.mark.parametrize(
    "text_cfg",
    [
        {},
        {"context_length": 9},
        {"context_length": None, "tokenizer_kwargs": None},
        {"context_length": 9, "tokenizer_kwargs": {"clean": "canonicalize"}, "tokenizer_mode": "clips"},
        {"hf_tokenizer_name": "", "context_length": 20},
        {"hf_tokenizer_name": "some/where", "context_length": 9},
        {"hf_tokenizer_name": "some/where", "tokenizer_kwargs": {"clean": "canonicalize"}},
        {
            "hf_tokenizer_name": "some/where",
            "context_length": 9,
            "tokenizer_kwargs": {"strip_sep_token": True},
        },
        {"hf_tokenizer_name": "some/where", "context_length": 12, "tokenizer_mode": "clips"},
        {"hf_tokenizer_name": "some/where", "context_length": 9, "tokenizer_mode": None},
    ],
)
def test_a_models_tokenizer_is_open_clips(text_cfg: dict[str, Any], bert: str) -> None:
    config = {"model_cfg": {"embed_dim": 8, "text_cfg": text_cfg}}
    (Path(bert) / "open_clip_config.json").write_text(json.dumps(config))
    kept = json.dumps(text_cfg)
    tokenizer = tokenizer_for(text_cfg, bert)
    assert json.dumps(text_cfg) == kept
    if text_cfg.get("tokenizer_kwargs", {}) is None:  # open_clip takes no null
        text_cfg, config["model_cfg"]["text_cfg"] = {}, {}
        (Path(bert) / "open_clip_config.json").write_text(json.dumps(config))
    truth = open_clip.get_tokenizer(f"local-dir:{bert}")
    assert tokenizer.context_length == truth.context_length == (text_cfg.get("context_length") or 77)
    captions = [*HF_CAPTIONS, *CAPTIONS]
    rows = unpack(tokenizer, captions)
    assert_equal_without_padding(rows, truth(captions), tokenizer.pad_id)
    assert tokenizer.name == (bert if text_cfg.get("hf_tokenizer_name") else None)


def test_a_models_tokenizer_by_its_name(bert: str) -> None:
    text_cfg = {"hf_tokenizer_name": bert, "context_length": 9, "tokenizer_kwargs": {"clean": "canonicalize"}}
    assert unpack(tokenizer_for(text_cfg), ["a RED, cat!"]) == unpack(
        build_tokenizer(bert, 9, {"clean": "canonicalize"}), ["a RED, cat!"]
    )
    for name in ("ViT-B-32", "RN50", "coca_ViT-B-32"):
        truth = open_clip.get_tokenizer(name)
        config: Any = open_clip.get_model_config(name)
        ours = tokenizer_for(config["text_cfg"])
        assert_equal_without_padding(unpack(ours, CAPTIONS), truth(CAPTIONS), 0)
        assert ours.context_length == truth.context_length


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_pickled_tokenizer_is_built_again(kind: str, bert: str) -> None:
    tokenizer = build_tokenizer(bert if kind == "bert" else None, 11, {"clean": "canonicalize"})
    data = pickle.dumps(tokenizer)
    assert len(data) < 500
    twin: Tokenizer = pickle.loads(data)
    assert unpack(twin, HF_CAPTIONS) == unpack(tokenizer, HF_CAPTIONS)


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # as HF_HUB_OFFLINE=1 would, had it been set before the import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"folder {tmp_path}/none gives no tokenizer"):
        build_tokenizer(str(tmp_path / "none"), 8)
    with pytest.raises(UserError, match="Hugging Face tokenizer no-such/name-at-all gives no tokenizer"):
        build_tokenizer("no-such/name-at-all", 8)
    with pytest.raises(UserError, match="context_length: 0"):
        build_tokenizer(None, 0)
    with pytest.raises(UserError, match="clean: 'upper' must be lower, whitespace or canonicalize"):
        build_tokenizer(None, 8, {"clean": "upper"})
    with pytest.raises(UserError, match="upper"):
        build_tokenizer(bert, 8, {"clean": "upper"})
    with pytest.raises(UserError, match="reduction_mask"):
        build_tokenizer(None, 8, {"reduction_mask": "simple"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    with pytest.raises(UserError, match="has no padding token"):
        build_tokenizer(str(tmp_path / "padless"), 8)


def test_equal_captions_have_equal_hashes() -> None:
    same = ["A caf\u00e9  on\nMain Street", "a cafe\u0301 on main street ", "\tA CAF\u00c9 ON MAIN STREET"]
    assert len({caption_hash(caption) for caption in same}) == 1
    others = [*CAPTIONS, "a photo of a ca", "a photo of acat", "a cafe on main street"]
    assert len({caption_hash(caption) for caption in others}) == len(others)
    assert all(-(2**63) <= caption_hash(caption) < 2**63 for caption in others)
    assert {caption_hash(caption) < 0 for caption in others} == {True, False}
    assert caption_hash("") == 0x2D06800538D394C2  # XXH3's published value of nothing
