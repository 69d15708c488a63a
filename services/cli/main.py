"""The `fluxion` command: its subcommands, their flags and how it fails.

Each subcommand's work lives in a module of its own, imported when it runs, so that `--help` loads
neither torch nor grpc. A FluxionError becomes one sentence on stderr and exit status 1; wrong
usage is status 2; Ctrl-C is 130.
"""

from __future__ import annotations

import asyncio
import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS
from fluxion_core.errors import ConfigError, FluxionError
from services.cli.addresses import DEFAULT_GATEWAY_ADDRESS
from services.cli.arguments import CheckedCommand


class _OneSentenceGroup(TyperGroup):
    """Turns errors raised on purpose into one sentence; anything else stays a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FluxionError as error:
            typer.secho(f"fluxion: {error}", err=True, fg="red")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            # The reader of our output has gone (`| head`); nothing is left to say to it.
            sys.stdout = None
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except OSError as error:
            # A file or directory that was named, or a place of the user's; anything else is a bug.
            if error.filename is None:
                raise
            typer.secho(f"fluxion: {error.filename}: {error.strerror}", err=True, fg="red")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_OneSentenceGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context generation with the KV cache in host memory.",
)
bench_app = typer.Typer(
    no_args_is_help=True, help="Measure this machine; every figure beside its limit."
)
app.add_typer(bench_app, name="bench")


class Benchmark(StrEnum):
    """What `eval` can run."""

    RULER = "ruler"
    LONGBENCH = "longbench"
    LEVAL = "leval"
    AGREEMENT = "agreement"


class Quality(StrEnum):
    """Quality levels of a request, best first."""

    EXACT = "exact"
    ACCURATE = "accurate"
    BALANCED = "balanced"
    FAST = "fast"


class Priority(StrEnum):
    """Priorities of a request."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


ModelOption = Annotated[
    str, typer.Option("--model", help="A pulled model's name, a GGUF file or a model directory.")
]
ModelsDirOption = Annotated[
    Path | None,
    typer.Option("--models-dir", help="Where pulled models are; the user's data directory if not."),
]
AddressOption = Annotated[str, typer.Option("--address", help="HOST:PORT of the decode node.")]
TlsAuthorityOption = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="PEM authority of the node's certificate; turns TLS on."),
]
TlsCertificateOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="PEM chain shown to the node (mutual TLS).")
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", help="PEM key of --tls-cert; mode 600.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", help="File of the token to send; mode 600. Only over TLS."),
]
ConnectSecondsOption = Annotated[
    float, typer.Option(min=0.1, help="Time to reach the node before giving up, s.")
]

JsonOption = Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw the figures into this PNG or SVG file.")
]


@app.command(cls=CheckedCommand)
def demo(
    *,
    models_dir: ModelsDirOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Longest answer.")] = 64,
    logs: Annotated[bool, typer.Option("--logs", help="Show the nodes' logs as well.")] = False,
) -> None:
    """Ask a question about a 7,000-token document, through two processes on this machine."""
    from rich.console import Console

    from services.cli.waiting import Waiting

    with Waiting(Console(stderr=True), "A long document, a question, two processes: loading"):
        from services.cli.demo import DemoOptions, run_demo

    options = DemoOptions(models_dir=models_dir, max_new_tokens=max_new_tokens, show_logs=logs)
    raise typer.Exit(asyncio.run(run_demo(options)))


@app.command(cls=CheckedCommand)
def up(
    *,
    model: ModelOption = "smollm2-135m",
    models_dir: ModelsDirOption = None,
    decode_listen: Annotated[
        str | None,
        typer.Option(
            help=f"HOST:PORT of the decode node; port 0 takes a free one. Without it, "
            f"{DEFAULT_DECODE_ADDRESS} if that is free.",
        ),
    ] = None,
    prefill_listen: Annotated[
        str, typer.Option(help="HOST:PORT of the prefill node; port 0 takes a free one.")
    ] = "127.0.0.1:0",
    decode_config: Annotated[
        Path | None, typer.Option(help="TOML file with more of the decode node's settings.")
    ] = None,
    prefill_config: Annotated[
        Path | None, typer.Option(help="TOML file with more of the prefill node's settings.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Of both nodes: auto, cpu, cuda or cuda:N. auto takes a GPU if it can."),
    ] = None,
    lanes: Annotated[
        str | None, typer.Option(help="Who attends to host KV: auto, cpu, gpu or both.")
    ] = None,
    gateway: Annotated[
        bool, typer.Option("--gateway", help="Start the gateway smg too: the OpenAI API.")
    ] = False,
    gateway_listen: Annotated[
        str | None,
        typer.Option(
            help=f"HOST:PORT of the gateway, which it turns on; port 0 takes a free one. Without "
            f"it, {DEFAULT_GATEWAY_ADDRESS} if that is free.",
        ),
    ] = None,
    ready_seconds: Annotated[
        float, typer.Option(min=1, help="Time for both nodes to get ready, s.")
    ] = 300.0,
) -> None:
    """Run a prefill node and a decode node on this machine until Ctrl-C."""
    from services.cli.node_plans import UpOptions
    from services.cli.up import run_up

    options = UpOptions(
        model=model,
        models_dir=models_dir,
        decode_listen=decode_listen,
        prefill_listen=prefill_listen,
        decode_config=decode_config,
        prefill_config=prefill_config,
        device=device,
        lanes=lanes,
        gateway=gateway or gateway_listen is not None,
        gateway_listen=gateway_listen,
        ready_seconds=ready_seconds,
    )
    asyncio.run(run_up(options))


@app.command(cls=CheckedCommand)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Without it and --file, standard input.")
    ] = None,
    *,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read a text from FILE; PROMPT then follows it."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Through the model's chat template, or as it stands."),
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, max=2**31)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=0, max=2**31, help="Keep the K likeliest tokens.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest's.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="0 is none.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="0 is none.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")
    ] = False,
    quality: Annotated[
        Quality | None, typer.Option(help="How much of the KV is read; the node's default if not.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="In its place: exact, fixed(16, 5 %), threshold(0.1) or marginal(0.001)."
        ),
    ] = None,
    priority: Annotated[
        Priority | None, typer.Option(help="Among your own requests that wait for room.")
    ] = None,
    deadline_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Fail if it takes longer, s.")
    ] = None,
    timings: Annotated[
        bool, typer.Option("--timings/--no-timings", help="Print timings on stderr.")
    ] = True,
    address: AddressOption = DEFAULT_DECODE_ADDRESS,
    connect_seconds: ConnectSecondsOption = 5.0,
    tls_ca: TlsAuthorityOption = None,
    tls_cert: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Stream a completion to stdout, token by token; timings go to stderr."""
    from fluxion_core import client as library
    from services.cli.connection import client_settings
    from services.cli.generate import as_prompt, read_prompt, run_generate

    asked = as_prompt(read_prompt(prompt, file, sys.stdin), chat=chat, system=system)
    options = library.GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop_strings=tuple(stop or ()),
        ignore_eos=ignore_eos,
        quality=cast(library.Quality | None, quality),
        policy=policy,
        priority=cast(library.Priority | None, priority),
        deadline_seconds=deadline_seconds,
    )
    client = client_settings(connect_seconds, tls_ca, tls_cert, tls_key, token_file)
    asyncio.run(run_generate(asked, options, address, client, show_timings=timings))


@app.command(cls=CheckedCommand)
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or ORG/NAME of the Hugging Face Hub.")],
    models_dir: ModelsDirOption = None,
) -> None:
    """Fetch a model, check it, and keep it for the nodes."""
    from rich.console import Console

    from fluxion_core.models.locate import default_models_dir
    from services.cli.pull import pull_model

    pull_model(name, models_dir or default_models_dir(), Console(stderr=True))


@app.command(cls=CheckedCommand)
def health(
    address: Annotated[str, typer.Argument(help="HOST:PORT of a prefill or decode node.")],
    *,
    connect_seconds: ConnectSecondsOption = 5.0,
    tls_ca: TlsAuthorityOption = None,
    tls_cert: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Say whether a node is alive and ready; exit status 0 only if it is both."""
    from services.cli.connection import client_settings
    from services.cli.health import run_health

    client = client_settings(connect_seconds, tls_ca, tls_cert, tls_key, token_file)
    raise typer.Exit(asyncio.run(run_health(address, client)))


@app.command(cls=CheckedCommand)
def top(
    addresses: Annotated[
        list[str], typer.Argument(help="HOST:PORT of nodes' server.metrics_listen.")
    ],
    *,
    interval_seconds: Annotated[float, typer.Option(min=0.1, help="Between looks, s.")] = 2.0,
    updates: Annotated[int, typer.Option(min=0, help="Stop after so many; 0 for Ctrl-C.")] = 0,
) -> None:
    """Show what nodes do now, live: requests, tokens, bytes, GPU."""
    from rich.console import Console

    from services.cli.top import run_top

    run_top(addresses, Console(), interval_seconds=interval_seconds, updates=updates)


@app.command(cls=CheckedCommand)
def trace(
    *,
    address: Annotated[str, typer.Option(help="HOST:PORT of a decode node's metrics_listen.")],
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to record.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.1, max=60, help="At most for so long, s.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Takes the trace, as JSON.")] = Path("trace.json"),
    png: Annotated[
        Path | None, typer.Option(help="Draw it into this PNG or SVG file as well.")
    ] = None,
) -> None:
    """Record a decode node's next steps, for ui.perfetto.dev: CPU workers, GPU, PCIe, hand-offs."""
    from rich.console import Console

    from services.cli.trace import run_trace

    run_trace(address, steps, seconds, out, png, Console())


@bench_app.command("handoff", cls=CheckedCommand)
def bench_handoff(
    *,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Runs of each way.")] = 5,
    json_path: JsonOption = None,
) -> None:
    """KV hand-off beside a bare gRPC stream and a raw socket, on this machine."""
    from rich.console import Console

    from fluxion_core.lab.benchmark.handoff import run_handoff_bench
    from fluxion_core.lab.benchmark.report import write_json
    from services.cli.handoff_bench import sending

    report = run_handoff_bench(Console(), sending, repeats=repeats)
    if json_path is not None:
        write_json(report, json_path)


@bench_app.command("kernels", cls=CheckedCommand)
def bench_kernels(
    *,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Runs of each operation.")] = 7,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """CPU kernels beside this machine's read limits."""
    from rich.console import Console

    from fluxion_core.lab.benchmark.kernels import plot, run_kernel_bench
    from fluxion_core.lab.benchmark.report import write_json

    report = run_kernel_bench(Console(), repeats=repeats)
    if json_path is not None:
        write_json(report, json_path)
    if plot_path is not None:
        plot(report, plot_path)


@bench_app.command("serve", cls=CheckedCommand)
def bench_serve(
    *,
    address: AddressOption = DEFAULT_DECODE_ADDRESS,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="Open loop: requests a second; may be repeated."),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Closed loop: clients with a request each; may be repeated."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Length of prompts, TOKENS or TOKENS=WEIGHT; may be repeated."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Made by every request.")] = 32,
    shared_tokens: Annotated[
        int, typer.Option(min=0, help="First tokens that are the same in all prompts.")
    ] = 0,
    policy: Annotated[
        str | None, typer.Option(help="What is read; the node's default if not given.")
    ] = None,
    deadline_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Deadline of every request, s.")
    ] = None,
    good_first_token_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Goodput: first token at the latest, s.")
    ] = None,
    good_token_seconds: Annotated[
        float | None, typer.Option(min=0.0001, help="Goodput: mean time between tokens, s.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Makes the workload.")] = 2026,
    connect_seconds: ConnectSecondsOption = 5.0,
    tls_ca: TlsAuthorityOption = None,
    tls_cert: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    token_file: TokenFileOption = None,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Load a decode node: latencies by percentile, throughput, goodput."""
    from rich.console import Console

    from fluxion_core.lab.benchmark.report import write_json
    from fluxion_core.lab.benchmark.serve import Length, Load, Objectives, plot
    from services.cli.connection import client_settings
    from services.cli.serve_bench import ServeOptions, bench_serve

    options = ServeOptions(
        lengths=tuple(Length.parse(text) for text in prompt or ["200=2", "2000=1"]),
        loads=(
            *(Load(rate=one) for one in rate or ()),
            *(Load(concurrency=one) for one in concurrency or ()),
        )
        or (Load(concurrency=4),),
        requests=requests,
        new_tokens=new_tokens,
        shared_tokens=shared_tokens,
        policy=policy,
        deadline_seconds=deadline_seconds,
        objectives=Objectives(good_first_token_seconds, good_token_seconds),
        seed=seed,
    )
    client = client_settings(connect_seconds, tls_ca, tls_cert, tls_key, token_file)
    report, figures = asyncio.run(bench_serve(Console(), options, address, client))
    if json_path is not None:
        write_json(report, json_path)
    if plot_path is not None:
        plot(plot_path, figures)


@bench_app.command("prefill", cls=CheckedCommand)
def bench_prefill(
    *,
    shape: Annotated[str, typer.Option(help="Model shape with random weights.")] = "llama-3.1-8b",
    tokens: Annotated[
        list[int], typer.Option(min=16, help="Length of a prompt; may be repeated.")
    ] = [8192, 32768],  # noqa: B006 - typer reads it once
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens computed at a time.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Prompts of each kind.")] = 5,
    json_path: JsonOption = None,
) -> None:
    """Prefill on a GPU: what it costs that KV leaves while the prompt is computed."""
    from rich.console import Console

    from fluxion_core.lab.benchmark.report import write_json
    from services.cli.prefill_bench import bench_prefill

    report = bench_prefill(Console(), shape, tokens, chunk_tokens=chunk_tokens, repeats=repeats)
    if json_path is not None:
        write_json(report, json_path)


@bench_app.command("decode-step", cls=CheckedCommand)
def bench_decode_step(
    *,
    model: ModelOption = "smollm2-135m",
    models_dir: ModelsDirOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 7500,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that count.")] = 20,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="exact, fixed(BLOCK_SIZE, BUDGET %), threshold(ERROR) or marginal(PRICE); "
            "may be repeated."
        ),
    ] = None,
    transformers: Annotated[
        bool, typer.Option(help="Beside transformers with its ordinary cache.")
    ] = True,
    digest_bits: Annotated[int, typer.Option(help="16 or 8.")] = 16,
    weights: Annotated[
        Path | None,
        typer.Option(help="Predictor weights; without, the package's, or none (training-free)."),
    ] = None,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Time per output token on the CPU, policies and transformers side by side."""
    from rich.console import Console

    from fluxion_core.lab.benchmark.decode_step import plot
    from fluxion_core.lab.benchmark.report import write_json
    from services.cli.decode_step_bench import bench_decode_step

    report = bench_decode_step(
        Console(),
        model,
        models_dir,
        tokens=tokens,
        steps=steps,
        policies=policy or ("exact", "fixed(16, 5 %)"),
        with_transformers=transformers,
        digest_bits=digest_bits,
        weights=weights,
    )
    if json_path is not None:
        write_json(report, json_path)
    if plot_path is not None:
        plot(report, plot_path)


@bench_app.command("telemetry", cls=CheckedCommand)
def bench_telemetry(
    *,
    model: ModelOption = "smollm2-135m",
    models_dir: ModelsDirOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 1500,
    turns: Annotated[int, typer.Option(min=1, help="Each scrapes once and traces once.")] = 50,
    steps: Annotated[int, typer.Option(min=1, help="Of a trace, and between two looks.")] = 8,
    policy: Annotated[str, typer.Option(help="What the stream reads.")] = "exact",
    json_path: JsonOption = None,
) -> None:
    """What scrapes and traces cost a node's decode steps, against steps that nobody watches."""
    from rich.console import Console

    from fluxion_core.lab.benchmark.report import write_json
    from services.cli import telemetry_bench

    options = telemetry_bench.TelemetryBenchOptions(
        model, models_dir, tokens=tokens, turns=turns, steps=steps, policy=policy
    )
    report = asyncio.run(telemetry_bench.bench_telemetry(options, Console()))
    if json_path is not None:
        write_json(report, json_path)


@app.command("eval", cls=CheckedCommand)
def evaluate(
    benchmark: Annotated[Benchmark, typer.Argument(help="What the model is asked.")],
    *,
    model: ModelOption = "smollm2-135m",
    models_dir: ModelsDirOption = None,
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens of prompt and answer together, comma-separated (ruler, agreement)."
        ),
    ] = "4096,8192",
    cases: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 50,
    tasks: Annotated[str, typer.Option(help="By name, comma-separated; all if not given.")] = "",
    policies: Annotated[
        str,
        typer.Option(
            help="Levels (accurate, balanced, fast) or policies by name, comma-separated."
        ),
    ] = "exact,accurate,balanced,fast,fixed(16, 5 %)",
    weights: Annotated[
        Path | None,
        typer.Option(help="Predictor weights; without, the package's, or none (training-free)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same cases.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Through the model's chat template, or not.")
    ] = True,
    data: Annotated[
        Path | None,
        typer.Option(help="Directory: files of longbench or leval, documents of agreement."),
    ] = None,
    prose: Annotated[
        Path | None, typer.Option(help="Directory of texts for ruler's prose; generated if not.")
    ] = None,
    squad: Annotated[Path | None, typer.Option(help="SQuAD-like file, for ruler's qa_1.")] = None,
    hotpot: Annotated[
        Path | None, typer.Option(help="HotpotQA-like file, for ruler's qa_2.")
    ] = None,
    pilot_cases: Annotated[
        int, typer.Option(min=0, help="Of exact, before a ruler task is given up; 0 gives none up.")
    ] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Per document, for agreement.")] = 128,
    minimum_tokens: Annotated[
        int, typer.Option(min=0, help="Shorter prompts are left out (longbench, leval).")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 16,
    host_kv_gib: Annotated[
        float, typer.Option(min=0, help="Memory for KV, GiB; 0 for what the batch needs.")
    ] = 0.0,
    device: Annotated[
        str, typer.Option(help="Where prompts are computed: auto, cpu or cuda.")
    ] = "auto",
    stop_after_seconds: Annotated[
        float, typer.Option(min=0, help="Begin no case after this, s; 0 for no limit.")
    ] = 0.0,
    journal: Annotated[
        Path | None, typer.Option(help="Keep every answer in this file of JSON lines.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the journal.")] = False,
    json_path: JsonOption = None,
    markdown_path: Annotated[
        Path | None, typer.Option("--markdown", help="Write the report into this file.")
    ] = None,
    plot_path: PlotOption = None,
) -> None:
    """Quality of policies: scores and agreement against exact, and what they read for it."""
    from rich.console import Console

    from fluxion_core.lab.evaluation.options import EvaluationOptions
    from services.cli.eval_command import run_evaluation, split_numbers, split_policies

    options = EvaluationOptions(
        benchmark=benchmark.value,
        model=model,
        models_dir=models_dir,
        lengths=split_numbers(lengths),
        cases=cases,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        policies=split_policies(policies),
        weights=weights,
        seed=seed,
        chat=chat,
        data=data,
        prose=prose,
        squad=squad,
        hotpot=hotpot,
        pilot_cases=pilot_cases,
        new_tokens=new_tokens,
        minimum_tokens=minimum_tokens,
        batch=batch,
        host_kv_gib=host_kv_gib,
        device=device,
        stop_after_seconds=stop_after_seconds,
        journal=journal,
        resume=resume,
        json=json_path,
        markdown=markdown_path,
        plot=plot_path,
    )
    run_evaluation(options, Console(), Console(stderr=True))


@app.command(cls=CheckedCommand)
def train(
    output: Annotated[Path, typer.Argument(help="Takes samples, weights, report, card, plots.")],
    *,
    model: ModelOption = "smollm2-135m",
    models_dir: ModelsDirOption = None,
    documents: Annotated[
        Path, typer.Option(help="Long documents; gathered from packages if there are none.")
    ] = Path("documents"),
    device: Annotated[
        str, typer.Option(help="cpu or cuda; auto takes a GPU if there is.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that collect and replay; 6 use a GPU well.")
    ] = 1,
    collect_seconds: Annotated[
        float, typer.Option(min=1, help="No training text is begun after this time, s.")
    ] = 3600.0,
    epochs: Annotated[float, typer.Option(min=0.1, help="Passes over the samples.")] = 30.0,
    curve_documents: Annotated[
        int, typer.Option(min=1, help="Unseen texts that KL over bytes is measured on.")
    ] = 16,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Train without each group of features, too.")
    ] = False,
    level: Annotated[
        list[str] | None,
        typer.Option(help="NAME=POLICY of a quality level; may be repeated."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the report.")] = True,
) -> None:
    """Fit the head predictor to a model: collect, fit, report. Resumes where it was stopped."""
    import torch
    from rich.console import Console

    from fluxion_core.lab.training.pipeline import DEFAULT_LEVELS, TrainOptions
    from fluxion_core.models.locate import default_models_dir, locate_model
    from services.cli.train_command import parse_levels, run_training

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device!r} is none; use auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    options = TrainOptions(
        model=locate_model(model, models_dir or default_models_dir()),
        documents=documents,
        output=output,
        device=("cuda" if has_gpu else "cpu") if device == "auto" else device,
        workers=workers,
        collect_seconds=collect_seconds,
        epochs=epochs,
        curve_documents=curve_documents,
        ablation=ablation,
        levels=parse_levels(level) if level else DEFAULT_LEVELS,
    )
    typer.echo(run_training(options, Console(stderr=True), plots=plots))


def run() -> None:
    """Entry point of the installed command."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show is shown as what it can, not as a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="fluxion")
