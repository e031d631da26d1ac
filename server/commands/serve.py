"""`expertsteer serve MODEL [--steering-bundle FILE ...] [any flag of vllm serve]`."""

import argparse
import sys

HELP = "Serve a model over an OpenAI-compatible API with steering profiles."


def make_parser(prog: str) -> argparse.ArgumentParser:
    """All flags of `vllm serve` and the steering flags."""
    from server import app

    return app.make_parser(prog)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    from artifacts.errors import BundleError
    from server import app
    from server.engine.client import SteeringEngineError
    from server.engine.compat import IncompatibleVllmError
    from server.reconciler import StagingError
    from server.registry.errors import RegistryError
    from server.sources.errors import SourceError

    known = (BundleError, IncompatibleVllmError, RegistryError, SourceError, StagingError, SteeringEngineError)
    try:
        return app.run(args)
    except (*known, ValueError, FileNotFoundError) as error:
        print(f"expertsteer serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
