"""Vocabularies of GGUF files: against transformers' conversion, by hand, and damaged."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxion_core.errors import (
    InvalidRequestError,
    ModelError,
    ModelFileError,
    UnsupportedModelError,
)
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer
from tests.fluxion_core.generation.conftest import byte_vocabulary

TEXTS = [
    "",
    " ",
    "hello world",
    "  lead and trail  ",
    "def f(x: int) -> dict[str, int]:\n    return {'k': x ** 2}  # y\n\n\n\tif x != 0:\n",
    "1234567 3.14 12a 0xFF 1,000,000",
    "Ünïcode — naïve 日本語 مرحبا हिन्दी",
    "🙂👩‍👩‍👧‍👦🇫🇷 x",
    "tabs\t\tand\r\nlines\n \n   \n",
    "don't I'll WE'RE they'd",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a\u0301 é \u200b\ufeff",
]


def is_foreign_number(character: str) -> bool:
    return unicodedata.category(character).startswith("N") and not character.isascii()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_path)


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> transformers.PreTrainedTokenizerFast:
    """transformers' own conversion of the GGUF file.

    It does not cut numbers into digits as the model's authors do. That shows only in numbers that
    are not ASCII, which are kept out of what is compared.
    """
    return transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )


@pytest.fixture(scope="module")
def known_bytes(smollm2: Tokenizer) -> set[int]:
    """Bytes that the vocabulary has: some control characters and rare beginnings are lacking."""
    tokens = map(smollm2.token_bytes, range(smollm2.vocab_size))
    known = {token[0] for token in tokens if len(token) == 1}
    assert len(known) > 230
    return known


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_the_embedded_models_tokens_are_those_of_transformers(smollm2, oracle, text):
    token_ids = smollm2.encode(text)
    assert token_ids == oracle.encode(text, add_special_tokens=False)
    for skip in (True, False):
        expected = oracle.decode(token_ids, skip_special_tokens=skip)
        assert smollm2.decode(token_ids, skip_special_tokens=skip) == expected


@pytest.mark.model
@settings(deadline=None, derandomize=True, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_has_the_tokens_of_transformers_and_comes_back(smollm2, oracle, known_bytes, text):
    token_ids = smollm2.encode(text)
    if not any(map(is_foreign_number, text)):
        assert token_ids == oracle.encode(text, add_special_tokens=False)
    if known_bytes.issuperset(text.encode()):
        assert smollm2.decode(token_ids, skip_special_tokens=False) == text
        assert b"".join(map(smollm2.token_bytes, token_ids)) == text.encode()


@pytest.mark.model
def test_every_digit_is_a_token_of_its_own(smollm2):
    # The model's authors cut numbers into digits: by hand, "12" never is one token.
    assert [smollm2.decode([token]) for token in smollm2.encode("a 120Ⅷ")][:5] == [
        *("a", " ", "1", "2", "0"),
    ]


@pytest.mark.model
def test_the_embedded_models_chat_is_that_of_transformers(smollm2, oracle):
    for messages in (
        [("user", "What is 2 + 2?")],
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", " <b>{{x}} ")],
    ):
        for add_generation_prompt in (True, False):
            expected = oracle.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            ours = smollm2.render_chat(
                [ChatMessage(role, content) for role, content in messages],
                add_generation_prompt=add_generation_prompt,
            )
            assert ours == expected


@pytest.mark.model
def test_the_embedded_model_ends_turns_and_texts(smollm2):
    assert smollm2.vocab_size == 49152
    ends = {smollm2.decode([token], skip_special_tokens=False) for token in smollm2.eos_token_ids}
    # The last as in llama.cpp: whoever fills in the middle is done where another file begins.
    assert ends == {"<|im_end|>", "<|endoftext|>", "<reponame>"}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        # By hand, from merges 12, 123, 1234: what is cut apart cannot merge.
        ("gpt-2", ["1234"]),
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
    ],
)
def test_numbers_are_cut_as_the_file_says(write_gguf, pre, pieces):
    tokenizer = Tokenizer.load(write_gguf(pre=pre))
    token_ids = tokenizer.encode("1234", add_special_tokens=False)
    assert [tokenizer.decode([token_id]) for token_id in token_ids] == pieces


def test_llama3_takes_a_known_word_whole_and_begins_with_bos(write_gguf):
    tokenizer = Tokenizer.load(write_gguf(pre="llama-bpe"))
    assert len(tokenizer.encode("whole", add_special_tokens=False)) == 1
    assert tokenizer.encode("whole")[0] == tokenizer.bos_token_id == 0
    assert len(Tokenizer.load(write_gguf(pre="gpt-2")).encode("whole")) == 5


def test_qwen2_composes_characters(write_gguf):
    tokenizer = Tokenizer.load(write_gguf(pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    plain = Tokenizer.load(write_gguf(pre="gpt-2"))
    assert plain.encode("e\u0301") != plain.encode("é")


def test_special_tokens_of_a_gguf_file_are_recognised_and_left_out(write_gguf):
    tokenizer = Tokenizer.load(write_gguf(add_bos_token=False))
    token_ids = tokenizer.encode("h<|im_end|><|user defined ☃|>")
    assert token_ids[1:] == [1, 2]
    assert tokenizer.decode(token_ids) == "h<|user defined ☃|>"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "h<|im_end|><|user defined ☃|>"


END_TEXTS = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"]


def typed(texts: list[str], kind: int | None) -> dict[str, object]:
    """Changes: a vocabulary that begins with these texts, of this type; None writes no types."""
    tokens = [*texts, *(token for token in byte_vocabulary() if token not in texts)]
    types = [kind] * len(texts) + [1] * (len(tokens) - len(texts))
    return {
        "tokens": tokens,
        "token_type": None if kind is None else types,
        "bos_token_id": None,
        "eos_token_id": None,
    }


@pytest.mark.parametrize("kind", [3, 4, 1, 5, 6, None])
@pytest.mark.parametrize("text", END_TEXTS)
def test_an_end_of_text_is_one_whatever_its_type(write_gguf, caplog, text, kind):
    tokenizer = Tokenizer.load(write_gguf(**typed(["<|other|>", text], kind)))
    assert 1 in tokenizer.eos_token_ids
    # It is a control token: recognised in a text, and left out of it.
    assert tokenizer.encode(f"h{text}", add_special_tokens=False)[1:] == [1]
    assert tokenizer.decode([1]) == ""
    assert (text in caplog.text) == (kind != 3)


@pytest.mark.parametrize("text", ["</s>", "<eos>", "[e~["])
def test_an_end_of_few_models_is_one_where_it_is_a_control_token(write_gguf, text):
    assert 0 in Tokenizer.load(write_gguf(**typed([text], 3))).eos_token_ids
    plain = Tokenizer.load(write_gguf(**typed([text], 1)))
    assert 0 not in plain.eos_token_ids
    assert plain.decode([0]) == text


def test_channels_do_not_end_an_answer(write_gguf):
    one = Tokenizer.load(write_gguf(**typed(["<|end|>", "<|return|>"], 3)))
    assert one.eos_token_ids == {0, 1, 3}
    both = Tokenizer.load(write_gguf(**typed(["<|end|>", "<|return|>", "<|call|>"], 3)))
    assert both.eos_token_ids == {1, 2, 4}


def test_filling_in_the_middle_ends_where_another_file_begins(write_gguf):
    texts = ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"]
    tokenizer = Tokenizer.load(write_gguf(**typed(texts, 1)))
    assert tokenizer.eos_token_ids >= {0, 1, 2}
    assert 3 not in tokenizer.eos_token_ids
    assert tokenizer.encode("<|fim_prefix|>h", add_special_tokens=False)[0] == 3
    named = write_gguf(**typed(texts, 1), fim_rep_token_id=5)
    assert Tokenizer.load(named).eos_token_ids >= {0, 2, 5}
    assert 1 not in Tokenizer.load(named).eos_token_ids


def test_a_word_like_a_mark_is_none_beside_the_mark_itself(write_gguf):
    changes = typed(["<|fim_pad|>", "<PAD>"], 3)
    kinds = changes["token_type"]
    assert isinstance(kinds, list)
    kinds[1] = 1
    tokenizer = Tokenizer.load(write_gguf(**changes))
    assert 0 in tokenizer.eos_token_ids
    assert 1 not in tokenizer.eos_token_ids
    assert tokenizer.decode([1]) == "<PAD>"


def test_ends_that_the_file_names_count_beside_those_known_by_text(write_gguf):
    changes = {"eos_token_id": 9, "eot_token_id": 10, "eom_token_id": 11}
    # 1 is <|im_end|>.
    assert Tokenizer.load(write_gguf(**changes)).eos_token_ids == {1, 9, 10, 11}


def test_a_token_of_unknown_type_is_special(write_gguf):
    tokenizer = Tokenizer.load(write_gguf(**typed(["<unk>"], 2)))
    assert tokenizer.encode("h<unk>", add_special_tokens=False)[1:] == [0]
    assert tokenizer.decode([0]) == ""


@pytest.mark.parametrize(
    ("changes", "prefix", "suffix"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [0], []),
        ({"add_eos_token": True}, [], [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"pre": "llama-bpe"}, [0], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"pre": "tekken"}, [0], []),
        ({"add_bos_token": False, "bos_token_id": None}, [], []),
    ],
    ids=str,
)
def test_texts_begin_and_end_as_the_file_says(write_gguf, changes, prefix, suffix):
    tokenizer = Tokenizer.load(write_gguf(**changes))
    bare = tokenizer.encode("h", add_special_tokens=False)
    assert tokenizer.encode("h") == [*prefix, *bare, *suffix]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        # By hand: what llama.cpp's default patterns leave together merges; threes of digits and
        # punctuation stand alone.
        ("default", ["123", "4", "!!", "x"]),
        (None, ["123", "4", "!!", "x"]),
        ("", ["123", "4", "!!", "x"]),
        ("gpt-2", ["1234", "!!", "x"]),
        ("phi-2", ["1234", "!!", "x"]),
        ("llama3", ["123", "4", "!!", "x"]),
        ("smaug-bpe", ["123", "4", "!!", "x"]),
        ("deepseek-r1-qwen", ["1", "2", "3", "4", "!!", "x"]),
        ("refact", ["1", "2", "3", "4", "!!", "x"]),
        ("tekken", ["1", "2", "3", "4", "!!", "x"]),
    ],
)
def test_names_of_pre_tokenizers_are_llama_cpps(write_gguf, caplog, pre, pieces):
    tokenizer = Tokenizer.load(write_gguf(pre=pre))
    token_ids = tokenizer.encode("1234!!x", add_special_tokens=False)
    assert [tokenizer.decode([token_id]) for token_id in token_ids] == pieces
    assert ("convert the model again" in caplog.text) == (not pre)


def test_the_default_cuts_punctuation_off_where_gpt2_does_not(write_gguf):
    changes = {"merges": ["Ġ !", "! !"], "tokens": [*byte_vocabulary(), "Ġ!"]}
    changes["token_type"] = [3, 3, 4] + [1] * (len(changes["tokens"]) - 3)
    default, gpt2 = (Tokenizer.load(write_gguf(pre=pre, **changes)) for pre in (None, "gpt-2"))
    assert [default.decode([token]) for token in default.encode(" !")] == [" ", "!"]
    assert [gpt2.decode([token]) for token in gpt2.encode(" !")] == [" !"]


def test_a_template_of_a_name_alone_is_no_default(write_gguf):
    path = write_gguf(chat_template=None, **{"chat_template.tool_use": "x"})
    with pytest.raises(InvalidRequestError, match="chat templates for tool_use alone"):
        Tokenizer.load(path).render_chat([ChatMessage("user", "hi")])


def test_special_tokens_of_a_gguf_file_reach_its_template(write_gguf):
    path = write_gguf(
        chat_template="{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}",
        unknown_token_id=3,
        padding_token_id=1,
    )
    tokenizer = Tokenizer.load(path)
    unknown = tokenizer.decode([3])
    assert tokenizer.render_chat([ChatMessage("user", "hi")]) == (
        f"<|bos|>|<|im_end|>|{unknown}|<|im_end|>"
    )


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_a_conversation_begins_once_with_what_every_text_begins_with(write_gguf, written, added):
    template = "{{ bos_token }}hi" if written else "hi"
    tokenizer = Tokenizer.load(write_gguf(chat_template=template, add_bos_token=added))
    prompt = tokenizer.render_chat([ChatMessage("user", "x")])
    assert prompt == ("<|bos|>hi" if written or added else "hi")


def test_a_conversations_first_token_is_recognised_whatever_its_type(write_gguf):
    path = write_gguf(chat_template="{{ bos_token }}h", add_bos_token=True, token_type=None)
    tokenizer = Tokenizer.load(path)
    prompt = tokenizer.render_chat([ChatMessage("user", "x")])
    assert tokenizer.encode(prompt, add_special_tokens=False) == tokenizer.encode("h")


def test_tokens_without_a_text_have_one_of_their_own(write_gguf):
    tokens = [*byte_vocabulary(), "", ""]
    path = write_gguf(tokens=tokens, token_type=[3, 3, 4] + [1] * (len(tokens) - 3))
    assert Tokenizer.load(path).vocab_size == len(tokens)


def test_an_unknown_entry_of_a_tokenizer_is_said(write_gguf, caplog):
    Tokenizer.load(write_gguf(cuts_backwards=True, scores=[0.0], remove_extra_whitespaces=True))
    assert "entries=tokenizer.ggml.cuts_backwards" in caplog.text


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"add_space_prefix": True}, UnsupportedModelError, "add_space_prefix is True"),
        ({"suppress_tokens": [3]}, UnsupportedModelError, "suppress_tokens is"),
        ({"normalizer.lowercase": True}, UnsupportedModelError, "normalizer.lowercase is True"),
        ({"add_bos_token": "false"}, ModelFileError, "must be true or false"),
        ({"add_bos_token": 1}, ModelFileError, "must be true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, ModelFileError, "bos_token_id is missing"),
        ({"add_eos_token": True, "eos_token_id": None}, ModelFileError, "eos_token_id is missing"),
        ({"eot_token_id": 100_000}, ModelFileError, "eot_token_id: special token 100000 of"),
        ({"padding_token_id": 100_000}, ModelFileError, "padding_token_id: special token 100000"),
        ({"token_type": [3, 3]}, ModelFileError, "token_type must have an integer for each of"),
        ({"token_type": "none"}, ModelFileError, "token_type must have"),
        (
            {"tokens": [*byte_vocabulary(), "whole"], "token_type": None},
            ModelFileError,
            "'whole' comes twice",
        ),
        ({"chat_template.rag": 7}, ModelFileError, "must be a string"),
        ({"model": "llama"}, UnsupportedModelError, "kind 'llama'; supported: gpt2"),
        ({"pre": "unheard-of"}, UnsupportedModelError, "pre-tokenizer 'unheard-of'"),
        ({"model": None}, ModelFileError, r"tokenizer\.ggml\.model is missing"),
        ({"tokens": None}, ModelFileError, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokens": [1, 2]}, ModelFileError, "must be a list of strings"),
        ({"merges": ["pair", "a b"]}, ModelFileError, "no pair"),
        ({"merges": ["not there"]}, ModelFileError, "do not fit"),
        ({"eos_token_id": 100_000}, ModelFileError, "special token 100000 of"),
        ({"bos_token_id": "one"}, ModelFileError, "must be an integer"),
        ({"chat_template": "{% if"}, ModelFileError, "does not compile"),
        ({"chat_template": 7}, ModelFileError, "must be a string"),
    ],
)
def test_a_damaged_vocabulary_is_refused(write_gguf, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        Tokenizer.load(write_gguf(**changes))


@settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_vocabulary_cut_anywhere_is_refused(write_gguf, data):
    path = write_gguf()
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ModelError):
        Tokenizer.load(path)


def test_equal_vocabularies_have_equal_fingerprints(write_gguf):
    one, same = Tokenizer.load(write_gguf()), Tokenizer.load(write_gguf(chat_template="other"))
    assert one.fingerprint == same.fingerprint
    tokens = [token if token != "whole" else "part" for token in one._backend.get_vocab()]
    ordered = sorted(tokens, key=lambda token: one._backend.token_to_id(token) or 1 << 30)
    changed = Tokenizer.load(write_gguf(tokens=ordered))
    assert changed.fingerprint != one.fingerprint
