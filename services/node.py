"""The common parts of either node: its model, its layout, its event loop, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
import uvloop

from fluxion_core.config.settings import (
    ModelSettings,
    SettingsT,
    exit_on_config_error,
    load_settings,
)
from fluxion_core.errors import ConfigError, DeviceError, FluxionError, ThreadLimitError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstream.handoff import KvLayout
from fluxion_core.machine.cpus import has_bfloat16_instructions
from fluxion_core.machine.threads import check_threads, thread_limit
from fluxion_core.models.locate import default_models_dir, locate_model
from fluxion_core.models.weights import LoadedModel, load_model
from fluxion_core.observe.log import configure_logging, event
from fluxion_core.pool.cpu_pool import default_threads
from services.loading import EndedWhileLoadingError

_log = logging.getLogger(__name__)

THREADS = 32
"""A node's own and gRPC's, beside one of torch and one of the pool for each CPU."""


@dataclass(frozen=True)
class NodeModel:
    """A loaded model with its tokenizer, and the KV layout that they make."""

    loaded: LoadedModel
    tokenizer: Tokenizer
    layout: KvLayout

    def geometry(self, slab_tokens: int = 512, digest_bits: int = 16) -> KvGeometry:
        """KV geometry of this model."""
        config = self.loaded.config
        return KvGeometry(
            config.num_layers, config.num_kv_heads, config.head_dim, slab_tokens, digest_bits
        )


def load_node_model(settings: ModelSettings) -> NodeModel:
    """Find and load the model that the settings name. Takes seconds; call it off the event loop.

    Raises:
        ModelError: it is not there, damaged or not supported, or its tokenizer does not fit.
        ConfigError: there is no such device.
    """
    started = time.perf_counter()
    path = locate_model(settings.model, settings.models_dir or default_models_dir())
    device = find_device(settings.device)
    torch.set_num_threads(settings.threads or default_threads())
    tokenizer = Tokenizer.load(path)
    loaded = load_model(path, device=device, dtype=find_dtype(settings.dtype, device))
    tokenizer.check_fits(loaded.config.vocab_size)
    layout = KvLayout(
        model_name=loaded.name,
        revision_hash=loaded.revision_hash,
        num_layers=loaded.config.num_layers,
        num_kv_heads=loaded.config.num_kv_heads,
        head_dim=loaded.config.head_dim,
        rope_theta=loaded.config.rope.theta,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    seconds = time.perf_counter() - started
    _log.info(event("model loaded", model=loaded.name, device=device, seconds=seconds))
    return NodeModel(loaded, tokenizer, layout)


class DeviceFailure:
    """Ends the node when its device has failed: a new process can use it again, this one cannot."""

    def __init__(self, ending: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = ending
        self.error: DeviceError | None = None

    def tell(self, error: DeviceError) -> None:
        """Take the failure, and end the node. From any thread."""
        self.error = error
        self._loop.call_soon_threadsafe(self._ending.set)


def find_device(name: str) -> torch.device:
    """The device that the settings name; a CUDA device is made the current one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise ConfigError(
                f"model.device is {name}; torch {torch.__version__} finds {count} CUDA devices "
                f"here; use cpu, or install a CUDA build of torch and a driver that suits it"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of weights and activations that the settings ask for."""
    if name == "auto":
        is_fast = device.type == "cuda" or has_bfloat16_instructions()
        name = "bfloat16" if is_fast else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def run_node(
    kind: str,
    settings_type: type[SettingsT],
    arguments: Sequence[str],
    serve: Callable[[SettingsT, asyncio.Event], Awaitable[None]],
) -> int:
    """Run a node until SIGTERM or SIGINT; returns its exit status.

    Args:
        kind: "prefill" or "decode".
        settings_type: root of its settings.
        arguments: command line without the program's name.
        serve: runs the node; the event is set when it is to end.
    """
    program = f"python -m services.{kind}"
    try:
        settings = load_settings(settings_type, arguments, program=program)
    except ConfigError as error:
        exit_on_config_error(error, program)
    configure_logging(kind, settings.log.level)
    try:
        check_threads(THREADS + 2 * len(os.sched_getaffinity(0)))
    except ThreadLimitError as error:
        _log.error(event("cannot run", error=str(error)))
        return 1

    async def run() -> None:
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, ending.set)
        await serve(settings, ending)

    try:
        uvloop.run(run())
    except EndedWhileLoadingError:
        _log.info(event("ended while loading"))
        # Not through the interpreter's end, which would wait for the thread that still loads.
        logging.shutdown()
        os._exit(0)
    except FluxionError as error:
        _log.error(event("cannot run", error=str(error)))
        return 1
    except OSError as error:
        # A file or directory that a setting names; anything else is a bug.
        if error.filename is None:
            raise
        _log.error(event("cannot run", error=f"{error.filename}: {error.strerror}"))
        return 1
    except RuntimeError as error:
        if (limit := thread_limit(error)) is None:
            raise
        _log.error(event("cannot run", error=str(limit)))
        return 1
    return 0
