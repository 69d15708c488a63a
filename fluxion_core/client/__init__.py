"""The Python client of a decode node, for threads and for asyncio.

    from fluxion_core.client import Client

    with Client("127.0.0.1:7420") as client:
        for text in client.stream("Once upon a time").texts():
            print(text, end="", flush=True)

Loads neither torch nor the engine. What it sends is specified in protos/README.md.

Not here: choosing among nodes (a gateway's work), and the OpenAI API (likewise).
"""

from fluxion_core.client.answers import (
    Delta,
    Event,
    Finish,
    FinishReason,
    Generation,
    KvReads,
    ModelInfo,
    NodeLoad,
    Progress,
    Usage,
)
from fluxion_core.client.asynchronous import AsyncClient
from fluxion_core.client.blocking import Client
from fluxion_core.client.conversation import AsyncConversation, Conversation
from fluxion_core.client.options import ChatMessage, GenerationOptions, Priority, Prompt, Quality
from fluxion_core.client.retry import NO_RETRIES, RetryPolicy
from fluxion_core.client.streams import AsyncGenerationStream, GenerationStream
from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS
from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_core.errors import FluxionError

__all__ = [
    "DEFAULT_DECODE_ADDRESS",
    "NO_RETRIES",
    "AsyncClient",
    "AsyncConversation",
    "AsyncGenerationStream",
    "ChatMessage",
    "Client",
    "ClientSettings",
    "ClientTlsSettings",
    "Conversation",
    "Delta",
    "Event",
    "Finish",
    "FinishReason",
    "FluxionError",
    "Generation",
    "GenerationOptions",
    "GenerationStream",
    "KvReads",
    "ModelInfo",
    "NodeLoad",
    "Priority",
    "Progress",
    "Prompt",
    "Quality",
    "RetryPolicy",
    "Usage",
]
