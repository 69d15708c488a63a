"""Stream an answer: python examples/stream.py HOST:PORT "A question"

Says how far the prompt is until there is text, and what the answer cost once it is whole.
"""

import sys

from fluxion_core.client import (
    ChatMessage,
    Client,
    Delta,
    Finish,
    GenerationOptions,
    Progress,
)

address, question = sys.argv[1:]
options = GenerationOptions(max_new_tokens=128, report_progress=True)

with Client(address) as client:
    for event in client.stream([ChatMessage("user", question)], options):
        match event:
            case Progress():
                print(event, file=sys.stderr)
            case Delta():
                print(event.text, end="", flush=True)
            case Finish():
                usage = event.usage
                print(f"\n{usage.generated_tokens} tokens, {event.finish_reason}", file=sys.stderr)
                print(f"first after {usage.time_to_first_token_seconds:.2f} s", file=sys.stderr)
