"""A prefill and a decode node as two processes with mutual TLS and tokens: who may do what.

Whoever is refused is told why, moves no KV and leaves nothing behind; and no output of any process
holds a token, a key or a prompt.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_core.wire.channel import open_channel
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.decode.config import PrefillSettings
from tests.certificates import Authority, write_secret
from tests.services.cli.command_line import invoke
from tests.services.conftest import (
    decode_node,
    decode_settings,
    free_address,
    generation_stub,
    running_node,
)

ROOT = Path(__file__).parents[2]
READY_SECONDS = 120
CLIENT_TOKEN = "client-secret-5d41402abc4b2a76"
HANDOFF_TOKEN = "hand-off-secret-7d793037a0760186"
WRONG_TOKEN = "wrong-secret-99914b932bd37a50"
PROMPT = "a prompt that is nobody's business"


@dataclass
class Process:
    """A node as a child process, whose health is asked on a plain listener of its own."""

    kind: str
    flags: list[str]
    log_path: Path
    address: str = field(default_factory=free_address)
    health_address: str = field(default_factory=free_address)

    def start(self) -> Process:
        command = [sys.executable, "-m", f"services.{self.kind}", "--listen", self.address]
        command += ["--server.health-listen", self.health_address, "--log.level", "DEBUG"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command + self.flags, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        return self

    def wait_ready(self) -> Process:
        service = "fluxion.v1.Handoff" if self.kind == "prefill" else "fluxion.v1.Generation"
        request = health_pb2.HealthCheckRequest(service=service)
        deadline = time.monotonic() + READY_SECONDS
        with grpc.insecure_channel(self.health_address) as channel:
            while time.monotonic() < deadline:
                assert self.process.poll() is None, self.log()
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return self
                except grpc.RpcError:
                    pass
                time.sleep(0.1)
        raise AssertionError(f"{self.kind} was not ready in {READY_SECONDS} s:\n{self.log()}")

    def wait_for(self, words: str) -> None:
        """Return once the log has a line with these words."""
        deadline = time.monotonic() + READY_SECONDS
        while words not in self.log():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


class Site:
    """Certificates, tokens and the two nodes that use them."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.authority = Authority(directory)
        self.other_authority = Authority(directory, "other")
        self.decode_pair = self.authority.issue("decode-1")
        self.client_token = write_secret(directory / "client.token", CLIENT_TOKEN)
        self.handoff_token = write_secret(directory / "handoff.token", HANDOFF_TOKEN)
        self.wrong_token = write_secret(directory / "wrong.token", WRONG_TOKEN)
        handoff_tokens = write_secret(directory / "handoff.tokens", f"decode-1 {HANDOFF_TOKEN}\n")
        client_tokens = write_secret(directory / "client.tokens", f"web {CLIENT_TOKEN}\n")
        ca = str(self.authority.path)
        self.prefill = Process(
            "prefill",
            [
                *("--model", str(model), "--model.threads", "1"),
                *self._tls_flags("server.tls", self.authority.issue("prefill-1")),
                *("--server.tls.client-authority", ca),
                *("--server.auth.certificate-names", "decode-1"),
                *("--server.auth.token-file", str(handoff_tokens)),
            ],
            directory / "prefill.log",
        ).start()
        self.decode = Process(
            "decode",
            [
                *("--model", str(model), "--model.threads", "1"),
                *("--store.host-kv-bytes", "8MiB", "--store.slab-tokens", "128"),
                # Every prompt comes from the prefill node, however short.
                *("--engine.local-prefill-tokens", "0"),
                *self._tls_flags("server.tls", self.authority.issue("decode-public")),
                *("--server.auth.token-file", str(client_tokens)),
                *("--prefill-addresses", self.prefill.address),
                *self._tls_flags("prefill.client.tls", self.decode_pair),
                *("--prefill.client.tls.authority", ca),
                *("--prefill.client.token-file", str(self.handoff_token)),
            ],
            directory / "decode.log",
        ).start()

    def handoff_client(self, **changes) -> ClientSettings:
        """How the decode node calls the prefill node, with something else than it should."""
        certificate, key = changes.pop("pair", self.decode_pair)
        tls = ClientTlsSettings(
            **{
                "authority": self.authority.path,
                "certificate": certificate,
                "key": key,
                **changes.pop("tls", {}),
            }
        )
        return ClientSettings(**{"token_file": self.handoff_token, "tls": tls, **changes})

    @staticmethod
    def _tls_flags(section: str, pair: tuple[Path, Path]) -> list[str]:
        return [f"--{section}.certificate", str(pair[0]), f"--{section}.key", str(pair[1])]


@pytest.fixture(scope="module")
def site(toy_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), toy_model_path)
    try:
        site.prefill.wait_ready()
        site.decode.wait_ready()
        yield site
    finally:
        statuses = [site.decode.stop(), site.prefill.stop()]
    assert statuses == [0, 0], site.decode.log() + site.prefill.log()


def run_command(*arguments: str):
    return invoke(list(arguments))


def generate(site: Site, *flags: object):
    return run_command(
        *("generate", "--raw", "-n", "4", "--ignore-eos", "--address", site.decode.address),
        *(str(flag) for flag in flags),
        PROMPT,
    )


def test_the_whole_path_works_over_mutual_tls_with_tokens(site: Site):
    result = generate(site, "--tls-ca", site.authority.path, "--token-file", site.client_token)
    assert result.exit_code == 0, result.stderr
    assert "as prefill made it" in result.stderr
    site.decode.wait_for("client=web outcome=finished")
    site.prefill.wait_for("client=decode-1 outcome=finished")


def test_the_command_says_what_is_wrong_with_its_credentials(site: Site):
    ca, token = site.authority.path, site.client_token
    cases = {
        ("--tls-ca", ca): "no bearer token",
        ("--tls-ca", ca, "--token-file", site.wrong_token): "wrong bearer token",
        ("--tls-ca", site.other_authority.path, "--token-file", token): (
            "the node's certificate is not accepted by tls.authority (--tls-ca)"
        ),
        ("--connect-seconds", "2"): "TLS is wanted by both sides or by neither",
    }
    for flags, words in cases.items():
        result = generate(site, *flags)
        assert result.exit_code == 1
        assert words in result.stderr, result.stderr
        assert result.stdout == ""
    # The prefill node wants a certificate besides.
    certificate, key = site.other_authority.issue("stranger")
    for flags, words in (
        ((), "give tls.certificate and tls.key (--tls-cert and --tls-key)"),
        (("--tls-cert", certificate, "--tls-key", key), "does not accept the certificate of"),
    ):
        result = run_command("health", site.prefill.address, "--tls-ca", str(ca), *map(str, flags))
        assert result.exit_code == 1
        assert words in result.stderr, result.stderr
    certificate, key = site.decode_pair
    flags = ("--tls-ca", ca, "--tls-cert", certificate, "--tls-key", key)
    result = run_command("health", site.prefill.health_address, "--tls-ca", str(ca))
    assert "does not speak TLS; leave out tls.authority (--tls-ca)" in result.stderr
    # Health needs no token, and is answered on a plain listener too.
    assert run_command("health", site.prefill.address, *map(str, flags)).exit_code == 0
    assert run_command("health", site.prefill.health_address).exit_code == 0


HANDOFF_FAULTS = {
    "another authority of the prefill node": "CERTIFICATE_VERIFY_FAILED",
    "no certificate": "is not available",
    "a certificate of another authority": "is not available",
    "an expired certificate": "is not available",
    "a name that may not call": "refuses this node's credentials (none of the names",
    "a wrong token": "refuses this node's credentials (wrong bearer token)",
    "no token": "refuses this node's credentials (no bearer token",
    "no TLS": "is not available",
}


def faulty_client(site: Site, fault: str) -> ClientSettings:
    match fault:
        case "another authority of the prefill node":
            return site.handoff_client(tls={"authority": site.other_authority.path})
        case "no certificate":
            return site.handoff_client(pair=(None, None))
        case "a certificate of another authority":
            return site.handoff_client(pair=site.other_authority.issue("decode-1-forged"))
        case "an expired certificate":
            return site.handoff_client(pair=site.authority.issue("decode-old"))
        case "a name that may not call":
            return site.handoff_client(pair=site.authority.issue("web"))
        case "a wrong token":
            return site.handoff_client(token_file=site.wrong_token)
        case "no token":
            return site.handoff_client(token_file=None)
        case _:
            return site.handoff_client(tls={"authority": None, "certificate": None, "key": None})


@pytest.mark.parametrize("fault", HANDOFF_FAULTS)
async def test_no_kv_moves_to_a_node_that_cannot_show_who_it_is(
    site: Site, fault: str, monkeypatch: pytest.MonkeyPatch
):
    check_client = decode_node.check_client

    def check_before_it_expires(*client) -> None:
        # It is good when the node starts, and has expired before the node first shows it.
        check_client(*client)
        site.authority.issue("decode-old", valid_for=timedelta(minutes=-1))

    if fault == "an expired certificate":
        monkeypatch.setattr(decode_node, "check_client", check_before_it_expires)
    settings = decode_settings(site.model)
    prefill = PrefillSettings(addresses=(site.prefill.address,), client=faulty_client(site, fault))
    prompts = site.prefill.log().count(" prompt ")
    async with running_node(
        decode_node.serve, settings.model_copy(update={"prefill": prefill})
    ) as node:
        async with generation_stub(node.address) as stub:
            request = generate_pb2.GenerateRequest(text=PROMPT)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                [_ async for _ in stub.Generate(request, timeout=60)]
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
            assert HANDOFF_FAULTS[fault] in failure.value.details()
            load = await stub.GetLoad(generate_pb2.GetLoadRequest())
            assert load.host_kv_reserved_bytes == load.host_kv_used_bytes == 0
            assert load.host_kv_cached_bytes == 0
    # A prompt that the prefill node took would be in its log, refused or not.
    assert site.prefill.log().count(" prompt ") == prompts


async def test_a_clients_certificate_or_hand_off_token_does_not_open_generate(site: Site):
    certificate, key = site.decode_pair
    tls = ClientTlsSettings(authority=site.authority.path, certificate=certificate, key=key)
    for token in (None, site.handoff_token):
        client = ClientSettings(tls=tls, token_file=token)
        async with open_channel(site.decode.address, client) as channel:
            stub = generate_pb2_grpc.GenerationStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.GetModelInfo(generate_pb2.GetModelInfoRequest(), timeout=60)
            assert failure.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_node_with_an_expired_certificate_does_not_start(site: Site, tmp_path: Path):
    certificate, key = Authority(tmp_path).issue("node", valid_for=timedelta(minutes=-1))
    node = Process(
        "prefill",
        [
            *("--server.tls.certificate", str(certificate), "--server.tls.key", str(key)),
            *("--model", str(site.model)),
        ],
        site.directory / "unusable.log",
    ).start()
    assert node.process.wait(timeout=READY_SECONDS) == 1
    assert "cannot run" in node.log()
    assert "the certificate expired on" in node.log()


def test_no_output_holds_a_token_a_key_or_a_prompt(site: Site):
    # After the tests above: what refused and what served them is in these files.
    result = generate(site, "--tls-ca", site.authority.path, "--token-file", site.client_token)
    outputs = {path.name: path.read_text(errors="replace") for path in site.directory.glob("*.log")}
    outputs["command"] = result.stderr
    assert {"prefill.log", "decode.log"} <= outputs.keys()
    keys = [path.read_text().splitlines()[1] for path in site.directory.glob("*.key")]
    assert keys
    for name, output in outputs.items():
        for secret in (CLIENT_TOKEN, HANDOFF_TOKEN, WRONG_TOKEN, PROMPT, "PRIVATE KEY", *keys):
            assert secret not in output, name
