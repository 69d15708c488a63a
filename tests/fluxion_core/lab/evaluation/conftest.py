"""A tokenizer of bytes and a small random model that reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.lab.evaluation.case import PromptEncoder
from fluxion_core.lab.evaluation.session import EvaluationModel
from fluxion_core.lab.evaluation.work import Answer
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights

END_OF_TEXT = 256

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=257,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    rope=RopeConfig(1e4),
    context_tokens=2048,
    tie_word_embeddings=False,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(END_OF_TEXT,),
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", normalized=False)])
    return Tokenizer(backend, None, bos_token_id=None, eos_token_ids=[END_OF_TEXT], add_bos=False)


@pytest.fixture(scope="session")
def encoder(tokenizer: Tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, is_chat=False)


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return decoder


@pytest.fixture
def model(decoder: Decoder, tokenizer: Tokenizer) -> EvaluationModel:
    config = decoder.config
    weights = PlannerWeights.training_free(config.num_layers, config.num_heads)
    planner = Planner(
        weights,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
    )
    return EvaluationModel(
        "toy",
        "0" * 64,
        config,
        lambda: copy.deepcopy(decoder),
        decoder,
        tokenizer,
        PromptEncoder(tokenizer, is_chat=False),
        weights,
        planner,
    )


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """Makes up answers."""

    def make(
        task: str,
        number: int,
        way: str,
        score: float | None,
        *,
        token_ids: tuple[int, ...] = (1, 2, 3),
        read: tuple[int, int] = (0, 1000),
        region: int = 1000,
        steps: int = 2,
        length: int = 1024,
    ) -> Answer:
        return Answer(
            case_name=f"{task}/{length}/{number}",
            task=task,
            length=length,
            way=way,
            token_ids=token_ids,
            text="",
            score=score,
            steps=steps,
            scanned_bytes=read[0],
            attended_bytes=read[1],
            region_bytes=region,
            streaming_share=0.25,
        )

    return make
