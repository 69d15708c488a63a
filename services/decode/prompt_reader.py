"""Reading what a client sends: to a checked request, or to a prompt's tokens.

At once where the prompt is short, else in the queue of those that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.models.config import ModelConfig
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_proto.v1 import generate_pb2
from services.decode.planning import Planning
from services.decode.prompt_queue import PromptQueue, Steps, finish
from services.decode.prompt_text import PromptRoom, prompt_bytes, prompt_token_ids
from services.decode.request import GenerationRequest, read_request

SHORT_PROMPT_BYTES = 2 << 10
"""A prompt below this is read on the event loop, within a millisecond or two."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ClientRequest:
    """A request as its client sent it."""

    read_message: Callable[[], generate_pb2.GenerateRequest]
    """Makes one of our own messages of it; what it raises is the request's end."""
    prompt_bytes: int
    """About the size of its prompt."""

    @classmethod
    def from_message(cls, message: generate_pb2.GenerateRequest) -> ClientRequest:
        """Wrap a message of our own API."""
        return cls(lambda: message, prompt_bytes(message))


class PromptReader:
    """Reads requests and prompts.

    Args:
        tokenizer: cuts prompts.
        config: of the model.
        queue: where prompts that are not short are read.
        limits: what waits there counts as its client's waiting tokens, as few as they can be.
        default_max_new_tokens: for requests that do not say.
        planning: policies.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        queue: PromptQueue,
        limits: ClientLimits,
        *,
        default_max_new_tokens: int,
        planning: Planning,
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._queue = queue
        self._limits = limits
        self._default_max_new_tokens = default_max_new_tokens
        self._planning = planning

    async def request(self, client: str, client_request: ClientRequest) -> GenerationRequest:
        """A checked request.

        Raises:
            InvalidRequestError: whatever is wrong with it.
            CapacityError: too much waits to be read already.
        """
        return await self._read(
            client, client_request.prompt_bytes, self._request_steps(client_request)
        )

    async def token_ids(self, client: str, message: generate_pb2.TokenizeRequest) -> list[int]:
        """A prompt's tokens, as a request's would be.

        Raises:
            InvalidRequestError: there is no prompt, or it does not fit the model's context.
            CapacityError: too much waits to be read already.
        """
        room = PromptRoom(self._config.context_tokens, max_new_tokens=0)
        steps = prompt_token_ids(message, self._tokenizer, room)
        return await self._read(client, prompt_bytes(message), steps)

    def _request_steps(self, client_request: ClientRequest) -> Steps[GenerationRequest]:
        message = client_request.read_message()
        return (
            yield from read_request(
                message,
                self._tokenizer,
                self._config,
                default_max_new_tokens=self._default_max_new_tokens,
                planning=self._planning,
            )
        )

    async def _read(self, client: str, num_bytes: int, steps: Steps[ResultT]) -> ResultT:
        if num_bytes < SHORT_PROMPT_BYTES:
            return finish(steps)
        with self._limits.waiting(client, self._tokenizer.pieces.fewest_tokens(num_bytes)):
            return await self._queue.run(client, num_bytes, steps)
