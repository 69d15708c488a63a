"""`python -m services.cli`: the command `fluxion`, from a source tree that is not installed."""

from services.cli.main import run

if __name__ == "__main__":
    run()
