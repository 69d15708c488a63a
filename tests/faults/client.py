"""A client to be killed: `python -m tests.faults.client HOST:PORT NEW_TOKENS PROMPT_TOKEN …`.

Prints how many tokens it has, at each.
"""

from __future__ import annotations

import sys

import grpc

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc


def main() -> None:
    """Ask, and print."""
    address, new_tokens, *prompt = sys.argv[1:]
    request = generate_pb2.GenerateRequest(max_new_tokens=int(new_tokens), ignore_eos=True)
    request.token_ids.ids.extend(map(int, prompt))
    with grpc.insecure_channel(address) as channel:
        count = 0
        for response in generate_pb2_grpc.GenerationStub(channel).Generate(request):
            count += len(response.token_ids)
            print(count, flush=True)


if __name__ == "__main__":
    main()
