"""OpenAI's SDK, through the gateway: python examples/openai_sdk.py HOST:PORT "A question"

`fluxion up --gateway` starts one and says where. Quality levels and stored prefixes are the node's
defaults here: the OpenAI API has no words for them.
"""

import sys

from openai import OpenAI

address, question = sys.argv[1:]
client = OpenAI(base_url=f"http://{address}/v1", api_key="none is asked for")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=128,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.completion_tokens} tokens]", file=sys.stderr)
