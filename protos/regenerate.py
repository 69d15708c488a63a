"""Make the committed stubs from the .proto files; with --check, say whether they are fresh."""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
PROTOS = sorted(path.relative_to(HERE) for path in HERE.glob("fluxion_proto/v1/*.proto"))


def generate(target: Path) -> list[Path]:
    """Write stubs of every .proto below `target`; returns their relative paths."""
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{HERE}",
            f"-I{well_known}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            f"--grpc_python_out={target}",
            *(str(path) for path in PROTOS),
        ]
    )
    if status:
        raise SystemExit(f"protoc failed with status {status}")
    return sorted(path.relative_to(target) for path in target.glob("fluxion_proto/v1/*_pb2*.py*"))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    if not parser.parse_args().check:
        generate(HERE)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        made = generate(Path(scratch))
        stale = [
            path
            for path in made
            if not (HERE / path).exists()
            or not filecmp.cmp(HERE / path, Path(scratch) / path, shallow=False)
        ]
    for path in stale:
        print(f"{path} is stale; run `make protos`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
