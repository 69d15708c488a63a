"""One question at every quality level: python examples/quality_levels.py HOST:PORT FILE QUESTION

Prints what each level means on this node, what it read of the text's KV, how fast it was, and what
it said. Only texts longer than the default window have anything to choose.
"""

import sys
from pathlib import Path
from typing import cast

from fluxion_core.client import ChatMessage, Client, GenerationOptions, Quality

address, file, question = sys.argv[1:]
document = Path(file).read_text(encoding="utf-8").rstrip()
prompt = [ChatMessage("user", f"{document}\n\n{question}")]

with Client(address) as client:
    info = client.model_info()
    print(f"{info.name} on {info.device}, {info.predictor_mode}")
    for level, policy in info.levels.items():
        options = GenerationOptions(max_new_tokens=64, quality=cast(Quality, level))
        answer = client.generate(prompt, options)
        reads = answer.usage.kv_reads
        step = f"{answer.seconds_per_token * 1000:.1f} ms" if answer.seconds_per_token else "no"
        print(f"\n{level} = {policy}: {reads.share_of_exact:.1%} of exact, {step} a token")
        print(f"  {answer.text.strip()}")
