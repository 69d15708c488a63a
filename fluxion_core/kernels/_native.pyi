"""The native module. Arguments are addresses and sizes; cpu.py of each operation checks them."""

class SlabLayout:
    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, slab_tokens: int
    ) -> None: ...
    @property
    def slab_bytes(self) -> int: ...

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def ingest_blocks(
    layout: SlabLayout,
    slab: int,
    layer: int,
    first_token: int,
    num_tokens: int,
    payload: int,
    payload_head_bytes: int,
    /,
) -> None: ...
def append_tokens(
    layout: SlabLayout,
    slabs: int,
    tokens_in_slab: int,
    batch: int,
    layer: int,
    key: int,
    value: int,
    /,
) -> None: ...
def attend_block_runs(
    layout: SlabLayout,
    layer: int,
    query: int,
    batch: int,
    heads: int,
    tables: int,
    output: int,
    lse: int,
    /,
) -> None: ...
def merge_into(
    output_a: int, lse_a: int, output_b: int, lse_b: int, rows: int, head_dim: int, /
) -> None: ...
