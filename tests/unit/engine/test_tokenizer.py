"""Tokens to text, as it streams: whole characters only, stop strings wherever the tokens fall."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from kvengine.model.tokenizer import Detokenizer, TextTooLong, Tokenizer, TokenizerError
from kvengine.model.vocabulary import BOS_ID, EOS_ID, VOCAB_SIZE, tokenizer_files

SHIPPED = Path(__file__).parents[3] / "engine/kvengine/weights/target"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    for name, text in tokenizer_files(2048).items():
        (folder / name).write_text(text)
    return Tokenizer.load(folder)


BYTES = Tokenizer.load(SHIPPED)


def stream(tokens: list[int], stop: tuple[str, ...] = (), at_once: int = 1) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(BYTES, stop)
    pieces = [detokenizer.push(tokens[i : i + at_once]) for i in range(0, len(tokens), at_once)]
    return [*pieces, detokenizer.finish()], detokenizer.stopped


def test_every_byte_is_its_own_id(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x20, 0x7F))) + "\n\té€😀"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.backend.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.encode("<|end|>") == [EOS_ID]
    assert tokenizer.eos_ids == {EOS_ID}


def test_the_shipped_directories_hold_this_tokenizer() -> None:
    for model in ("target", "draft"):
        for name, text in tokenizer_files(2048).items():
            assert (SHIPPED.parent / model / name).read_text() == text


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([BOS_ID, *b"hi", EOS_ID]) == "hi"


@given(st.binary(max_size=60))
def test_any_bytes_stream_to_what_they_decode_to(data: bytes) -> None:
    pieces, _ = stream(list(data))
    assert "".join(pieces) == data.decode(errors="replace")


@given(st.text(max_size=30), st.integers(1, 5))
def test_valid_text_never_shows_part_of_a_character(text: str, at_once: int) -> None:
    pieces, _ = stream(list(text.encode()), at_once=at_once)
    assert "".join(pieces) == text
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)


def test_a_character_appears_with_its_last_byte() -> None:
    assert stream(list("a😀b".encode()))[0] == ["a", "", "", "", "😀", "b", ""]


def test_endless_garbage_is_shown_and_not_held_for_ever() -> None:
    pieces, _ = stream([0xFF] * 100)
    assert len("".join(pieces[:40])) > 16
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 100


@given(st.text("abX", max_size=40), st.sampled_from(["ab", "aab", "abab", "XX", "é"]), st.integers(1, 4))
def test_a_stop_string_cuts_where_find_would(text: str, stop: str, at_once: int) -> None:
    pieces, stopped = stream(list(text.encode()), (stop, "never"), at_once)
    at = text.find(stop)
    assert "".join(pieces) == (text if at < 0 else text[:at])
    assert stopped == (None if at < 0 else stop)


def test_the_earliest_of_several_stop_strings_wins() -> None:
    pieces, stopped = stream(list(b"one END two STOP"), ("STOP", "END"), at_once=16)
    assert ("".join(pieces), stopped) == ("one ", "END")


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = Detokenizer(BYTES, ("\n",))
    assert detokenizer.push(list(b"a\nb")) == "a"
    assert (detokenizer.push(list(b"c")), detokenizer.finish()) == ("", "")


def test_a_tail_that_might_begin_a_stop_string_waits() -> None:
    detokenizer = Detokenizer(BYTES, ("###",))
    assert [detokenizer.push([byte]) for byte in b"a##b#"] == ["a", "", "", "##b", ""]
    assert detokenizer.finish() == "#"


def test_a_character_outside_ascii_can_stop() -> None:
    pieces, stopped = stream(list("ab😀cd".encode()), ("😀",))
    assert ("".join(pieces), stopped) == ("ab", "😀")


def test_chat_template_renders_roles_and_asks_for_an_answer() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = bytes(BYTES.encode_chat(messages)).decode()
    assert text == "# system\nBe brief.\n\n# user\nHi\n\n# assistant\n"


def write(folder: Path, **settings: object) -> Path:
    Backend(BPE(vocab={"a": 0, "</s>": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_named_templates_and_token_objects_are_understood(tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "a{{ eos_token }}"}]
    folder = write(tmp_path, eos_token={"content": "</s>"}, chat_template=templates)
    loaded = Tokenizer.load(folder)
    assert loaded.eos_ids == {1}
    assert loaded.encode_chat([])[0] == 0


def test_a_text_that_cannot_be_few_enough_tokens_is_refused_before_it_is_encoded() -> None:
    """A token is at most the longest piece of the vocabulary: here a special one of 9 characters."""
    assert len(BYTES.encode("x" * 90, most_tokens=10)) == 90
    chat = [{"role": "user", "content": "x" * 91}]
    for encode, text in ((BYTES.encode, "x" * 91), (BYTES.encode_chat, chat)):
        with pytest.raises(TextTooLong, match=r"characters, more than 10 tokens can hold"):
            encode(text, most_tokens=10)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TokenizerError, match="chat template"):
        Tokenizer.load(write(tmp_path, chat_template=template)).encode_chat([])


def test_a_template_may_refuse(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenizerError, match="roles must alternate"):
        Tokenizer.load(write(tmp_path, chat_template=template)).encode_chat([])


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("how", ["not text", "not readable"])
def test_a_settings_file_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, name: str, how: str
) -> None:
    """Not even root reads address 0 of its own memory."""
    path = write(tmp_path) / name
    if how == "not text":
        path.write_bytes(b"\xff\xfe{{")
    else:
        path.unlink(missing_ok=True)
        path.symlink_to("/proc/self/mem")
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_errors_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json") as missing:
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a tokenizer") as broken:
        Tokenizer.load(tmp_path)
    plain = Tokenizer.load(write(tmp_path))
    with pytest.raises(TokenizerError, match="no chat template") as chatless:
        plain.encode_chat([])
    with pytest.raises(TokenizerError, match="surrogate") as surrogate:
        BYTES.encode("\ud800")
    assert all("\n" not in str(error.value) for error in (missing, broken, chatless, surrogate))
