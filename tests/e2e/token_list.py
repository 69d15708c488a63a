"""What every policy says after two prompts, as the services say it; recorded in token_list.json.

    python -m tests.e2e.token_list COMMIT > tests/e2e/token_list.json

records it anew: where weights, levels or the model's arithmetic have changed on purpose, only.

Of each prompt the first request goes the whole way over a prefill node. The others, all at once,
find its KV in the store, and the decode node computes the prompt's last tokens and its profile.
Greedy text would soon repeat itself, and then hide what policies do: a frequency penalty keeps it
going. Sums of another instruction set differ in their last bits, and a near tie may go the other
way: the nodes are kept to one (node_on_isa.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from tests.e2e.conftest import LOCAL_TOKENS, Cluster, read_document, running_cluster

ISA = "avx2"
"""That every CPU in question has."""
NEW_TOKENS = 36
PROMPTS = {"2,000": (0, 2048 + LOCAL_TOKENS), "4,000": (1200, 4096 + LOCAL_TOKENS)}
"""First token and number of tokens, in the document: whole slabs, and some after them."""
FIRST = {"2,000": "exact", "4,000": "balanced"}
"""Who goes the whole way."""
LEVELS = {
    name.removeprefix("QUALITY_LEVEL_").lower(): level
    for name, level in generate_pb2.QualityLevel.items()
    if level
}
POLICIES = (
    "fixed(16, 5 %)",
    "fixed(32, 5 %)",
    "threshold(0.01)",
    "threshold(0.215)",
    "marginal(0.01)",
    "marginal(0.3)",
    "marginal(1)",
)


class Answer(NamedTuple):
    """What one request got."""

    tokens: list[int]
    usage: generate_pb2.Usage


Answers = dict[str, dict[str, Answer]]
"""By prompt, and by level or policy."""


@contextmanager
def nodes_on_isa(model: Path, logs: Path, isa: str) -> Iterator[Cluster]:
    """Both nodes, kept to an instruction set."""
    with running_cluster(
        model,
        logs,
        *("--device", "cpu", "--model.dtype", "float32", "--model.threads", "2"),
        decode_flags=("--engine.local-prefill-tokens", str(LOCAL_TOKENS)),
        prefix=(sys.executable, str(Path(__file__).with_name("node_on_isa.py")), isa),
    ) as cluster:
        yield cluster


def ask_all(stub: generate_pb2_grpc.GenerationStub, document: Sequence[int]) -> Answers:
    """What every level and policy says after every prompt."""
    return {
        name: _answers(stub, document[first : first + count], FIRST[name])
        for name, (first, count) in PROMPTS.items()
    }


def _answers(
    stub: generate_pb2_grpc.GenerationStub, prompt: Sequence[int], first: str
) -> dict[str, Answer]:
    def ask(wish: str) -> Answer:
        request = generate_pb2.GenerateRequest(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        request.token_ids.ids.extend(prompt)
        request.sampling.frequency_penalty = 1
        if wish in LEVELS:
            request.quality = LEVELS[wish]
        else:
            request.policy = wish
        responses = list(stub.Generate(request, timeout=280))
        tokens = [token for response in responses for token in response.token_ids]
        return Answer(tokens, responses[-1].usage)

    answers = {first: ask(first)}
    others = [wish for wish in (*LEVELS, *POLICIES) if wish != first]
    with ThreadPoolExecutor(len(others)) as threads:
        return answers | dict(zip(others, threads.map(ask, others), strict=True))


def record(
    answers: Answers, info: generate_pb2.GetModelInfoResponse, document: Sequence[int]
) -> dict[str, Any]:
    """A list, and what it holds for, as token_list.json has them."""
    texts = {
        name: hashlib.sha256(json.dumps(document[first : first + count]).encode()).hexdigest()
        for name, (first, count) in PROMPTS.items()
    }
    return {
        "holds for": {
            "model": info.name,
            "revision": info.revision_hash,
            "weights": info.predictor_fingerprint,
            "isa": ISA,
            "dtype": "float32",
            "prompts": texts,
        },
        "policies": {wish: a.usage.kv_reads.policy for wish, a in answers["2,000"].items()},
        "tokens": {
            name: {wish: answer.tokens for wish, answer in of_prompt.items()}
            for name, of_prompt in answers.items()
        },
    }


def main() -> None:
    """Print a list."""
    from fluxion_core.models.locate import default_models_dir, locate_model

    commit, isa = sys.argv[1], (sys.argv[2:] or [ISA])[0]
    model = locate_model("smollm2-135m", default_models_dir())
    document = read_document(model)
    with (
        tempfile.TemporaryDirectory() as logs,
        nodes_on_isa(model, Path(logs), isa) as nodes,
        grpc.insecure_channel(nodes.decode.address) as channel,
    ):
        stub = generate_pb2_grpc.GenerationStub(channel)
        info = stub.GetModelInfo(generate_pb2.GetModelInfoRequest())
        recorded = record(ask_all(stub, document), info, document)
    text = json.dumps({"commit": commit, **recorded}, indent=1)
    # The tokens of an answer on one line.
    print(re.sub(r"\[[^][]*\]", lambda row: json.dumps(json.loads(row[0])), text))


if __name__ == "__main__":
    main()
