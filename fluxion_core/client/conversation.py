"""A conversation over one long document, whose follow-ups read the KV that the node has stored.

Every turn sends all messages so far. The node finds the KV of the document and of earlier turns by
the tokens' prefix and computes what is new alone: `usage.cached_tokens` says how much it found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import ReferenceType, ref

from fluxion_core.client.answers import Generation
from fluxion_core.client.asynchronous import AsyncClient
from fluxion_core.client.blocking import Client
from fluxion_core.client.options import ChatMessage, GenerationOptions
from fluxion_core.client.streams import AsyncGenerationStream, GenerationStream
from fluxion_core.errors import InvalidRequestError

StreamT = TypeVar("StreamT", GenerationStream, AsyncGenerationStream)


class _Turns(Generic[StreamT]):
    """Messages of the turns that have ended, and the stream of the one that has not.

    Args:
        document: comes before the first question; may be empty.
        system: the system message.
        options: of every turn; a cache_salt in them keeps the stored KV to this conversation.
    """

    def __init__(
        self,
        document: str = "",
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        self._document = document
        self._messages: tuple[ChatMessage, ...] = (
            () if system is None else (ChatMessage("system", system),)
        )
        self._options = options or GenerationOptions()
        # Weak: a stream that was dropped ends its request.
        self._turn: ReferenceType[StreamT] | None = None

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """Of all turns that have ended, oldest first."""
        return self._messages

    def _begin(
        self,
        stream: Callable[
            [tuple[ChatMessage, ...], GenerationOptions, Callable[[Generation], None]], StreamT
        ],
        question: str,
        options: GenerationOptions | None,
    ) -> StreamT:
        turn = None if self._turn is None else self._turn()
        if turn is not None and not turn.is_over:
            raise InvalidRequestError(
                "the last turn has not ended; read its stream to the end, or close it"
            )
        is_first = all(message.role == "system" for message in self._messages)
        if is_first and self._document:
            question = f"{self._document.rstrip()}\n\n{question}"
        asked: tuple[ChatMessage, ...] = (*self._messages, ChatMessage("user", question))

        def keep(answer: Generation) -> None:
            self._messages = (*asked, ChatMessage("assistant", answer.text))
            self._turn = None

        turn = stream(asked, options or self._options, keep)
        self._turn = ref(turn)
        return turn


class Conversation(_Turns[GenerationStream]):
    """Questions on one document, one after the other.

    A turn counts once its last message has come; one that failed or was left early is forgotten.

    Args:
        client: who asks.
        document: comes before the first question; may be empty.
        system: the system message.
        options: of every turn; a cache_salt in them keeps the stored KV to this conversation.
    """

    def __init__(
        self,
        client: Client,
        document: str = "",
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        super().__init__(document, system=system, options=options)
        self._client = client

    def stream(self, question: str, options: GenerationOptions | None = None) -> GenerationStream:
        """The answer as it is made; see `Client.stream`.

        Raises:
            InvalidRequestError: the last turn has not ended, or a value cannot be sent.
        """
        return self._begin(
            lambda asked, chosen, keep: self._client.stream(asked, chosen, on_finish=keep),
            question,
            options,
        )

    def ask(self, question: str, options: GenerationOptions | None = None) -> Generation:
        """The whole answer.

        Raises:
            FluxionError: see `Client`.
        """
        return self.stream(question, options).result()


class AsyncConversation(_Turns[AsyncGenerationStream]):
    """Questions on one document, for an AsyncClient; see `Conversation`."""

    def __init__(
        self,
        client: AsyncClient,
        document: str = "",
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        super().__init__(document, system=system, options=options)
        self._client = client

    def stream(
        self, question: str, options: GenerationOptions | None = None
    ) -> AsyncGenerationStream:
        """The answer as it is made; see `AsyncClient.stream`.

        Raises:
            InvalidRequestError: the last turn has not ended, or a value cannot be sent.
        """
        return self._begin(
            lambda asked, chosen, keep: self._client.stream(asked, chosen, on_finish=keep),
            question,
            options,
        )

    async def ask(self, question: str, options: GenerationOptions | None = None) -> Generation:
        """The whole answer.

        Raises:
            FluxionError: see `AsyncClient`.
        """
        return await self.stream(question, options).result()
