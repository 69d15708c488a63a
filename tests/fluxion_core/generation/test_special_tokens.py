"""What a directory's files say of special tokens, in all the places where they say it.

transformers is the oracle: the same token ids, the same texts, the same variables of templates.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fluxion_core.errors import InvalidRequestError, ModelFileError, UnsupportedModelError
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer

BOS, EOT, PAD, TURN = "<|bos|>", "<|eot|>", "<|pad|>", "<|turn|>"
TEXTS = [
    "",
    "he said 'no' .",
    f"{BOS}he  {EOT} x{TURN}  y{PAD}he",
    "<|new|>a<|x|>  <|unk|>",
]
VARIABLES = (
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ cls_token }}|"
    "{{ turn_token }}|{{ bos_token is defined }}"
)
Files = dict[str, dict[str, object]]


def backend_of(post_processor: object = None) -> tokenizers.Tokenizer:
    vocabulary = [BOS, EOT, PAD, TURN, "he", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[("h", "e")])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOT)])
    if post_processor is not None:
        backend.post_processor = post_processor
    return backend


def write(directory: Path, backend: tokenizers.Tokenizer, files: Files) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    given: Files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": VARIABLES,
        }
    }
    for name, entries in files.items():
        (directory / name).write_text(json.dumps(given.get(name, {}) | entries))
    return directory


def assert_same_as_transformers(directory: Path) -> Tokenizer:
    ours = Tokenizer.load(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for around in (True, False):
            expected = theirs.encode(text, add_special_tokens=around)
            assert ours.encode(text, add_special_tokens=around) == expected
            for skip in (True, False):
                decoded = theirs.decode(expected, skip_special_tokens=skip)
                assert ours.decode(expected, skip_special_tokens=skip) == decoded
    if ours.has_chat_template:
        prompt = theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert ours.render_chat([ChatMessage("user", "x")]) == prompt
    return ours


def template(single: str) -> processors.PostProcessor:
    ids = {BOS: 0, EOT: 1, PAD: 2}
    return processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))


POST_PROCESSORS = {
    "none": None,
    "begin": template(f"{BOS} $A"),
    "end": template(f"$A {EOT}"),
    "two before and one after": template(f"{BOS} {PAD} $A {EOT}"),
    "sequence": processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template(f"{BOS} $A")]
    ),
    "empty sequence": processors.Sequence([]),
    "roberta": processors.RobertaProcessing((EOT, 1), (BOS, 0)),
    "bert": processors.BertProcessing((EOT, 1), (BOS, 0)),
    "byte level": processors.ByteLevel(),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
@pytest.mark.parametrize("kind", sorted(POST_PROCESSORS))
def test_what_the_post_processor_puts_around_a_text_is_there(tmp_path, kind, named):
    names = {"bos_token": BOS, "eos_token": EOT} if named else {}
    backend = backend_of(POST_PROCESSORS[kind])
    assert_same_as_transformers(write(tmp_path, backend, {"tokenizer_config.json": names}))


def added(text: str, **flags: bool) -> dict[str, object]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, **plain, "special": True, **flags}


def typed(text: str, **flags: bool) -> dict[str, object]:
    return {"__type": "AddedToken", **added(text, **flags)}


CONFIGS: dict[str, Files] = {
    "texts": {"tokenizer_config.json": {"bos_token": BOS, "eos_token": EOT}},
    "objects": {"tokenizer_config.json": {"bos_token": typed(BOS), "eos_token": typed(EOT)}},
    "no null": {"tokenizer_config.json": {"bos_token": None, "eos_token": EOT}},
    "named, not marked": {"tokenizer_config.json": {"pad_token": PAD}},
    "named, not there": {"tokenizer_config.json": {"eos_token": "<|new|>"}},
    "of a class": {"tokenizer_config.json": {"unk_token": "<|unk|>", "cls_token": "he"}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": [TURN]}},
    "additional objects": {
        "tokenizer_config.json": {"additional_special_tokens": [typed(TURN, lstrip=True)]}
    },
    "extra": {"tokenizer_config.json": {"extra_special_tokens": [TURN]}},
    "extra by name": {"tokenizer_config.json": {"extra_special_tokens": {"turn_token": TURN}}},
    "of the model": {"tokenizer_config.json": {"turn_token": TURN}},
    "add_bos_token": {
        "tokenizer_config.json": {"bos_token": BOS, "eos_token": EOT, "add_bos_token": True}
    },
    "no add_bos_token": {"tokenizer_config.json": {"bos_token": BOS, "add_bos_token": False}},
    "split": {"tokenizer_config.json": {"bos_token": BOS, "split_special_tokens": True}},
    "clean up": {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}},
    "ignored": {"tokenizer_config.json": {"add_prefix_space": True, "model_max_length": 4}},
    "by id": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"0": added(BOS), "1": added(EOT), "3": added(TURN)}
        }
    },
    "by id, not special": {
        "tokenizer_config.json": {"added_tokens_decoder": {"3": added(TURN, special=False)}}
    },
    "by id, other flags": {
        "tokenizer_config.json": {"added_tokens_decoder": {"1": added(EOT, lstrip=True)}}
    },
    "by id, special no more": {
        "tokenizer_config.json": {"added_tokens_decoder": {"1": added(EOT, special=False)}}
    },
    "by id, and an old map": {
        "tokenizer_config.json": {"bos_token": BOS, "added_tokens_decoder": {"0": added(BOS)}},
        "special_tokens_map.json": {"bos_token": TURN, "pad_token": PAD},
    },
    "an old map": {
        "tokenizer_config.json": {},
        "special_tokens_map.json": {"bos_token": BOS, "pad_token": added(PAD, lstrip=True)},
    },
    "an old map over the config": {
        "tokenizer_config.json": {"bos_token": TURN},
        "special_tokens_map.json": {"bos_token": BOS},
    },
    "an old map's additional": {
        "tokenizer_config.json": {},
        "special_tokens_map.json": {"additional_special_tokens": [TURN, PAD]},
    },
    "additional in both": {
        "tokenizer_config.json": {"additional_special_tokens": [PAD]},
        "special_tokens_map.json": {"additional_special_tokens": [TURN]},
    },
    "an old list": {
        "tokenizer_config.json": {"eos_token": TURN},
        "added_tokens.json": {TURN: 3, PAD: 2, "<|x|>": 261},
    },
    "nothing but config.json": {"config.json": {"model_type": "llama", "bos_token_id": 0}},
}


@pytest.mark.parametrize("begins", [True, False], ids=["begins with a token", "begins bare"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_special_tokens_are_those_of_transformers(tmp_path, name, begins):
    backend = backend_of(template(f"{BOS} $A") if begins else None)
    assert_same_as_transformers(write(tmp_path, backend, CONFIGS[name]))


def odd_added_tokens(backend: tokenizers.Tokenizer) -> None:
    backend.add_tokens(
        [
            AddedToken(TURN, lstrip=True, rstrip=True, single_word=True),
            AddedToken("a said", normalized=True),
        ]
    )


def pads_and_truncates(backend: tokenizers.Tokenizer) -> None:
    backend.enable_truncation(3)
    backend.enable_padding(length=9, pad_id=2, pad_token=PAD)


STATES: dict[str, Callable[[tokenizers.Tokenizer], object]] = {
    "truncation": lambda backend: backend.enable_truncation(3),
    "padding": lambda backend: backend.enable_padding(length=9, pad_id=2, pad_token=PAD),
    "both": pads_and_truncates,
    "added tokens of all kinds": odd_added_tokens,
    "a normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "no decoder": lambda backend: setattr(backend, "decoder", None),
    "no pre-tokenizer": lambda backend: setattr(backend, "pre_tokenizer", None),
}


@pytest.mark.parametrize("name", sorted(STATES))
def test_what_tokenizer_json_holds_is_used_as_transformers_uses_it(tmp_path, name):
    backend = backend_of()
    STATES[name](backend)
    assert_same_as_transformers(
        write(tmp_path, backend, {"tokenizer_config.json": {"bos_token": BOS}})
    )


def test_a_text_longer_than_a_files_truncation_is_whole(tmp_path):
    backend = backend_of()
    pads_and_truncates(backend)
    tokenizer = Tokenizer.load(write(tmp_path, backend, {}))
    assert len(tokenizer.encode("twelve bytes")) == 12


def test_add_bos_token_against_the_post_processor_is_said(tmp_path, caplog):
    files: Files = {"tokenizer_config.json": {"bos_token": BOS, "add_bos_token": True}}
    with caplog.at_level(logging.WARNING):
        Tokenizer.load(write(tmp_path, backend_of(), files))
    assert "add_bos_token True" in caplog.text


def test_a_token_that_only_a_config_names_is_said_and_does_no_harm(tmp_path, caplog):
    backend = backend_of()
    size = backend.get_vocab_size()
    files: Files = {"tokenizer_config.json": {"pad_token": "<|new|>"}}
    tokenizer = Tokenizer.load(write(tmp_path, backend, files))
    assert "tokens=<|new|>" in caplog.text
    assert tokenizer.encode("<|new|>") == [size]
    # The embedding may well have no row for it, as transformers' need not.
    tokenizer.check_fits(size)
    with pytest.raises(ModelFileError, match="wrong tokenizer"):
        tokenizer.check_fits(size - 1)


def test_an_unknown_entry_is_said(tmp_path, caplog):
    files: Files = {"tokenizer_config.json": {"cuts_words_backwards": True, "legacy": False}}
    with caplog.at_level(logging.WARNING):
        Tokenizer.load(write(tmp_path, backend_of(), files))
    assert "entries=cuts_words_backwards" in caplog.text


@pytest.mark.parametrize(
    ("files", "error", "sentence"),
    [
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": added(TURN)}}},
            ModelFileError,
            "token '<|turn|>' is 7, but 3 in tokenizer.json",
        ),
        ({"added_tokens.json": {TURN: 9}}, ModelFileError, "'<|turn|>' is 9, but 3"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": [1]}},
            ModelFileError,
            "must be by token id",
        ),
        ({"tokenizer_config.json": {"bos_token": 7}}, ModelFileError, "bos_token holds 7"),
        (
            {"tokenizer_config.json": {"pad_token": {"content": PAD, "lstrip": "yes"}}},
            ModelFileError,
            "must be a token",
        ),
        (
            {"tokenizer_config.json": {"additional_special_tokens": "one"}},
            ModelFileError,
            "must be a list",
        ),
        (
            {"tokenizer_config.json": {"split_special_tokens": "no"}},
            ModelFileError,
            "must be true or false",
        ),
        (
            {
                "tokenizer_config.json": {
                    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True
                }
            },
            UnsupportedModelError,
            "taking spaces out",
        ),
        (
            {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}},
            UnsupportedModelError,
            "code that comes with the model",
        ),
        (
            {"tokenizer_config.json": {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}},
            UnsupportedModelError,
            "depends on a program's version",
        ),
    ],
)
def test_a_contradiction_or_an_unsupported_entry_is_refused(tmp_path, files, error, sentence):
    with pytest.raises(error) as refusal:
        Tokenizer.load(write(tmp_path, backend_of(), files))
    assert sentence in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_spaces_of_word_pieces_are_not_taken_out_in_silence(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    files: Files = {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}}
    with pytest.raises(UnsupportedModelError, match="clean_up_tokenization_spaces"):
        Tokenizer.load(write(tmp_path, backend, files))


def test_cutting_by_chance_is_refused(tmp_path):
    backend = backend_of()
    backend.model.dropout = 0.1
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: dropout is 0\.1"):
        Tokenizer.load(write(tmp_path, backend, {}))


@pytest.mark.parametrize("single", ["$A $A", f"{BOS} $A $A"])
def test_a_post_processor_that_does_more_is_refused(tmp_path, single):
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: post-processor"):
        Tokenizer.load(write(tmp_path, backend_of(template(single)), {}))


def test_a_post_processor_that_adds_what_is_no_token_is_refused(tmp_path):
    odd = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 900)])
    with pytest.raises(ModelFileError, match="adds \\[900\\], which are no tokens"):
        Tokenizer.load(write(tmp_path, backend_of(odd), {}))


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"tokenizer_config.json": {"eos_token": EOT}}, {1}),
        ({"tokenizer_config.json": {"eos_token": EOT}, "config.json": {"eos_token_id": 3}}, {3}),
        ({"config.json": {"eos_token_id": [3, 1]}}, {1, 3}),
        (
            {"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": 2}},
            {2, 3},
        ),
    ],
)
def test_ends_of_text_are_what_the_configs_name_or_else_the_tokenizer(tmp_path, files, ends):
    assert Tokenizer.load(write(tmp_path, backend_of(), files)).eos_token_ids == ends


def test_a_bos_that_only_the_post_processor_knows_has_an_id(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, backend_of(template(f"{BOS} $A")), {}))
    assert tokenizer.bos_token_id == 0


def test_named_templates_without_a_default_are_named_to_who_asks(tmp_path):
    named = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    files: Files = {"tokenizer_config.json": {"chat_template": named}}
    tokenizer = Tokenizer.load(write(tmp_path, backend_of(), files))
    with pytest.raises(InvalidRequestError, match="chat templates for rag, tool_use alone"):
        tokenizer.render_chat([ChatMessage("user", "hi")])


@pytest.mark.parametrize("main", [True, False], ids=["beside a main file", "alone"])
def test_template_files_come_before_the_config(tmp_path, main):
    write(tmp_path, backend_of(), {"tokenizer_config.json": {"chat_template": "config"}})
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("rag")
    if main:
        (tmp_path / "chat_template.jinja").write_text("main")
    else:
        (more / "default.jinja").write_text("additional")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [ChatMessage("user", "hi")]
    expected = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert Tokenizer.load(tmp_path).render_chat(messages) == expected


@pytest.mark.parametrize(
    "value", [7, {"default": 7}, [{"name": "a"}], ["text"], [{"name": "a", "template": "x"}] * 2]
)
def test_a_template_that_is_no_text_is_refused(tmp_path, value):
    files: Files = {"tokenizer_config.json": {"chat_template": value}}
    with pytest.raises(ModelFileError, match="chat_template is"):
        Tokenizer.load(write(tmp_path, backend_of(), files))
