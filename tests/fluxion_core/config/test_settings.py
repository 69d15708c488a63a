"""Settings: where they come from, what they take, and that what is wrong is told in our words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_origin

import pytest

from fluxion_core.config import settings
from fluxion_core.config.carriers import Carrier
from fluxion_core.config.setting_sources import _plain_type, settings_of
from fluxion_core.config.settings import HandoffSettings, load_settings
from fluxion_core.errors import ConfigError
from services.decode.config import DecodeSettings
from services.prefill.config import PrefillNodeSettings

FOREIGN_WORDS = re.compile(
    r"Input should|pydantic|validation error|pattern|Traceback|codec|NoneType|errno", re.IGNORECASE
)
EVERY_SETTING = [
    pytest.param(kind, name, field.annotation, id=f"{kind.__name__}-{name}")
    for kind in (DecodeSettings, PrefillNodeSettings)
    for name, field in settings_of(kind).items()
]


def load(*flags: str, kind=DecodeSettings, toml: str | bytes | None = None, tmp_path=None, **env):
    if toml is not None:
        path = tmp_path / "node.toml"
        path.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
        flags = ("--config", str(path), *flags)
    return load_settings(kind, flags, program="node", environment=env)


def refusal(*flags: str, **given) -> str:
    with pytest.raises(ConfigError) as failure:
        load(*flags, **given)
    text = str(failure.value)
    assert not FOREIGN_WORDS.search(text), text
    return text


def test_a_flag_wins_over_a_variable_and_that_over_the_file(tmp_path: Path):
    toml = '[store]\nhost_kv_bytes = "1GiB"\nslab_tokens = 128\n[server]\nlisten = "127.0.0.1:1"\n'
    variables = {"FLUXION_STORE__HOST_KV_BYTES": "2GiB", "FLUXION_STORE__SLAB_TOKENS": "256"}
    flags = ("--store.host-kv-bytes=3GiB",)
    settings = load(*flags, toml=toml, tmp_path=tmp_path, **variables)
    assert settings.store.host_kv_bytes == 3 << 30
    assert settings.store.slab_tokens == 256
    assert settings.server.listen == "127.0.0.1:1"
    assert settings.store.sink_tokens == DecodeSettings().store.sink_tokens


def test_a_file_may_be_named_by_a_variable(tmp_path: Path):
    path = tmp_path / "node.toml"
    path.write_text('[model]\nmodel = "other"')
    assert load(FLUXION_CONFIG=str(path)).model.model == "other"
    assert "no such file" in refusal(FLUXION_CONFIG=str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    "given",
    [
        {"flags": ("--prefill-addresses", "a:1,[::1]:2")},
        {"flags": ("--prefill-addresses", "a:1", "--prefill-addresses", "[::1]:2")},
        {"flags": ("--prefill-addresses", "a:1", "[::1]:2")},
        {"FLUXION_PREFILL__ADDRESSES": "a:1, [::1]:2"},
        {"toml": '[prefill]\naddresses = ["a:1", "[::1]:2"]'},
        {"toml": '[prefill]\naddresses = "a:1,[::1]:2"'},
    ],
)
def test_lists_and_ipv6_addresses_come_from_every_source(given: dict, tmp_path: Path):
    settings = load(*given.pop("flags", ()), tmp_path=tmp_path, **given)
    assert settings.prefill.addresses == ("a:1", "[::1]:2")


@pytest.mark.parametrize(
    "given",
    [
        {"flags": ("--handoff.ways", "sockets", "grpc")},
        {"FLUXION_HANDOFF__WAYS": "sockets,grpc"},
        {"toml": '[handoff]\nways = ["sockets", "grpc"]'},
    ],
)
def test_ways_of_kv_come_from_every_source(given: dict, tmp_path: Path):
    settings = load(*given.pop("flags", ()), tmp_path=tmp_path, **given)
    assert settings.handoff.ways == (Carrier.SOCKETS, Carrier.GRPC)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("grpc", "pigeon"), "'pigeon' is no way; use one or more of shared_memory, sockets, grpc"),
        (("grpc", "sockets", "grpc"), "names a way twice"),
        ((" , ",), "names no way"),
    ],
)
def test_ways_that_there_cannot_be_are_refused(given: tuple[str, ...], words: str):
    assert words in refusal("--handoff.ways", *given)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("FLUXION_STOER__HOST_KV_BYTES", "FLUXION_STORE__HOST_KV_BYTES"),
        ("FLUXION_MODEL", "FLUXION_MODEL__MODEL"),
        ("FLUXION_HOST_KV_BYTES", "FLUXION_STORE__HOST_KV_BYTES"),
        ("FLUXION_STORE_HOST_KV_BYTES", "FLUXION_STORE__HOST_KV_BYTES"),
        ("fluxion_server__listn", "FLUXION_SERVER__LISTEN"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest(variable: str, nearest: str):
    text = refusal(**{variable: "1"})
    assert text.startswith(f"environment: there is no setting {variable.upper()}; ")
    assert f"the nearest is {nearest} " in text


def test_variables_that_are_no_settings_are_left_alone():
    links = {
        "FLUXION_DECODE_SERVICE_HOST": "10.0.0.1",
        "FLUXION_DECODE_SERVICE_PORT_GRPC": "7070",
        "FLUXION_DECODE_PORT": "tcp://10.0.0.1:7070",
        "FLUXION_DECODE_PORT_7070_TCP_ADDR": "10.0.0.1",
    }
    assert load(FLUXION_NATIVE="x.so", HOME="/", **links) == DecodeSettings()
    # Not from Kubernetes: it would be a URL.
    assert "FLUXION_PORT" in refusal(FLUXION_PORT="7421")


def test_unknown_flags_and_names_in_a_file_are_refused_with_the_nearest(tmp_path: Path):
    assert "nearest is --server.listen " in refusal("--server.listn", "a:1")
    assert "'stray' follows no flag" in refusal("stray")
    assert "expected" in refusal("--server.listen")
    text = refusal(toml="[store]\nhost_kv_byts = 1", tmp_path=tmp_path)
    assert "no setting store.host_kv_byts; the nearest is store.host_kv_bytes " in text
    assert "model is a section" in refusal(toml='model = "x"', tmp_path=tmp_path)


def test_a_file_that_is_no_toml_is_one_sentence(tmp_path: Path):
    assert "is not UTF-8 text (byte 3)" in refusal(toml=b"a =\xe9", tmp_path=tmp_path)
    assert "is no TOML" in refusal(toml="a = ", tmp_path=tmp_path)
    assert "no such file" in refusal("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("infGiB", "'infGiB' is not a size"),
        ("nan", "'nan' is not a size"),
        ("-1", "'-1' is not a size"),
        ("1e400", "'1e400' is not a size"),
        ("8 GiBs", "has an unknown unit"),
        ("8_0", "'8_0' is not a size"),
        ("8Gibit", "has an unknown unit"),
        (".5GiB", "'.5GiB' is not a size"),
        ("\N{ARABIC-INDIC DIGIT THREE}GiB", "is not a size"),
        ("9" * 20 + "TiB", "must be at most"),
        ("2048TiB", "must be at most"),
        ("", "'' is not a size"),
    ],
)
def test_a_size_is_a_number_of_bytes_that_a_machine_can_have(size: str, words: str):
    text = refusal(FLUXION_STORE__HOST_KV_BYTES=size)
    assert text.startswith("store.host_kv_bytes (from FLUXION_STORE__HOST_KV_BYTES): ")
    assert words in text


@pytest.mark.parametrize(
    ("size", "expected"), [("1.5KiB", 1536), ("12345678901234", 12345678901234), ("1 TB", 10**12)]
)
def test_sizes_are_exact(size: str, expected: int):
    assert load("--store.host-kv-bytes", size).store.host_kv_bytes == expected


def test_a_size_that_the_node_may_choose_is_auto_or_left_out_or_a_size(tmp_path: Path):
    assert load().store.device_kv_bytes is None
    assert load("--store.device-kv-bytes", " auto ").store.device_kv_bytes is None
    assert load(FLUXION_STORE__DEVICE_KV_BYTES="0").store.device_kv_bytes == 0
    toml = '[store]\ndevice_kv_bytes = "20GiB"'
    assert load(toml=toml, tmp_path=tmp_path).store.device_kv_bytes == 20 << 30
    assert "'some' is not a size; write for example 8GiB, or auto" in refusal(
        "--store.device-kv-bytes", "some"
    )


NUMBERS_IN_TOML = ("inf", "-inf", "nan", "true", "1e300", "1" + "0" * 18, "-1", '""', "[]", "{}")


@pytest.mark.parametrize(("kind", "name", "annotation"), EVERY_SETTING)
def test_no_setting_takes_nonsense_or_refuses_it_in_foreign_words(
    kind, name: str, annotation, tmp_path: Path
):
    section, _, key = name.rpartition(".")
    plain = _plain_type(annotation)
    for value in NUMBERS_IN_TOML:
        # Text for a text, and a list for a list, may be right.
        if (plain is str and value == '""') or (
            get_origin(plain) is tuple and value in ('""', "[]")
        ):
            continue
        if plain is bool and value == "true":
            continue
        toml = f"[{section}]\n{key} = {value}"
        assert name in refusal(kind=kind, toml=toml, tmp_path=tmp_path), value
    if plain in (int, float):
        for value in ("inf", "nan", "-inf", "1e999", "9" * 30, "-1", "", "x"):
            assert name in refusal(
                kind=kind, **{f"FLUXION_{name.replace('.', '__').upper()}": value}
            )
    elif get_args(plain) or plain is bool:
        for value in ("\udce9", "maybe"):
            if get_args(plain) != (str, ...):
                variable = f"FLUXION_{name.replace('.', '__').upper()}"
                assert name in refusal(kind=kind, **{variable: value})


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--listen", "127.0.0.1:99999", "port 99999 is beyond 65535"),
        ("--listen", "", "it is empty"),
        ("--metrics-listen", "9464", "it has no port"),
        ("--server.health-listen", "unix:/x", "unix sockets are not supported"),
        ("--prefill-addresses", "http://a:1", "it is a URL"),
        ("--prefill-addresses", "a:1,host", "'host' is not HOST:PORT: it has no port"),
        ("--prefill-addresses", "a:0", "only a listener"),
        ("--device", "tpu", "'tpu' is no device; use auto, cpu, cuda or cuda:N"),
        ("--model.dtype", "int8", "must be 'auto', 'float32' or 'bfloat16'"),
        ("--server.tls.key", "", "is empty; name a file"),
        ("--server.grace-seconds", "inf", "must be at most 604800|must be a finite number"),
        ("--engine.attention-threads", "0", "must be above 0"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_is_right(flag: str, value: str, words: str):
    assert re.search(words, refusal(flag, value))


def test_every_wrong_value_is_named_at_once():
    text = refusal("--listen", "x", "--store.slab-tokens", "0", "--model.threads", "x")
    for name in ("server.listen", "store.slab_tokens", "model.threads"):
        assert name in text


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert not ended.value.code
    printed = capsys.readouterr().out
    for name in settings_of(DecodeSettings):
        assert "--" + name.replace("_", "-") in printed
    assert "(default: 16777216)" in printed
    assert "BUDGET %)" in printed


@pytest.mark.parametrize(
    ("cpus", "threads"), [(1, 1), (2, 2), (4, 2), (11, 2), (12, 3), (16, 4), (64, 4)]
)
def test_threads_that_move_kv_are_a_quarter_of_the_cpus_within_bounds(
    cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(settings, "num_usable_cpus", lambda: cpus)
    assert HandoffSettings().num_threads == threads
    assert HandoffSettings(threads=7).num_threads == 7
