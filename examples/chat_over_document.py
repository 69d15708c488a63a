"""Talk about a long text: python examples/chat_over_document.py HOST:PORT FILE

Questions are read from standard input. The text's KV is computed for the first one; the others go
on from what the node has stored. Ctrl-C leaves an answer, end of file the conversation.
"""

import sys
from pathlib import Path

from fluxion_core.client import Client, Conversation, GenerationOptions

address, file = sys.argv[1:]
# Nobody else's requests find this conversation's KV, nor it theirs.
options = GenerationOptions(max_new_tokens=128, cache_salt=f"chat over {file}")

with Client(address) as client:
    conversation = Conversation(client, Path(file).read_text(encoding="utf-8"), options=options)
    for question in map(str.strip, sys.stdin):
        with conversation.stream(question) as answer:
            try:
                for text in answer.texts():
                    print(text, end="", flush=True)
            except KeyboardInterrupt:
                # A turn that was left is forgotten.
                continue
            usage = answer.result().usage
        print(f"\n[{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were stored]")
