"""Many questions on one text: python examples/batch_questions.py HOST:PORT FILE QUESTION...

The first question brings the text's KV into the node's store; all others share it, and run beside
each other.
"""

import asyncio
import sys
from pathlib import Path

from fluxion_core.client import AsyncClient, ChatMessage, FluxionError, GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=64, quality="balanced")


async def main(address: str, document: str, questions: list[str]) -> None:
    """Ask all questions and print the answers in their order."""
    async with AsyncClient(address) as client:

        async def ask(question: str) -> str:
            try:
                prompt = [ChatMessage("user", f"{document}\n\n{question}")]
                answer = await client.generate(prompt, OPTIONS)
            except FluxionError as error:
                return f"{question}\n  failed: {error}"
            stored = f"{answer.usage.cached_tokens} of {answer.usage.prompt_tokens} tokens stored"
            return f"{question} [{stored}]\n  {answer.text}"

        print(await ask(questions[0]))
        for answer in await asyncio.gather(*map(ask, questions[1:])):
            print(answer)


address, file, *questions = sys.argv[1:]
asyncio.run(main(address, Path(file).read_text(encoding="utf-8").rstrip(), questions))
