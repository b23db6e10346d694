"""`python -m metta_fastagent` prints what runs on this machine and why; with `build`, it builds the CPU operators."""

import argparse
import sys
import time
from collections.abc import Sequence

from metta_fastagent import explain
from metta_fastagent.runtime import native
from metta_fastagent.runtime.output import show, wrapped

# Differs from 1, so that scripts can continue without a compiler but stop on broken sources.
CANNOT_BUILD = 3


def build(options: argparse.Namespace) -> int:
    """Build the operators and load them; return the exit status."""
    started = time.perf_counter()
    try:
        library = native.build(options.force, options.sanitize)
    except native.BuildError as error:
        text = str(error).splitlines()[0] if options.quiet else str(error)
        instead = "the previous build" if native.load() else "eager PyTorch"
        print(f"metta_fastagent: native CPU operators not built, {instead} runs instead: {text}", file=sys.stderr)
        return CANNOT_BUILD if isinstance(error, native.CannotBuildError) else 1
    # A sanitizer's runtime must be in the process from the start.
    if options.sanitize is None and not native.load():
        print(f"metta_fastagent: native CPU operators not in use: {native.reason()}", file=sys.stderr)
        return 1
    if not options.quiet:
        show(f"native CPU operators ready in {time.perf_counter() - started:.1f} s:\n{library}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    more = "To train an agent: python -m metta_fastagent.train --help."
    parser = argparse.ArgumentParser(prog="python -m metta_fastagent", description=__doc__, epilog=more)
    commands = parser.add_subparsers(dest="command")
    building = commands.add_parser(
        "build",
        help="compile the CPU operators into the cache",
        epilog=f"Exit status: 0 ready, 1 failed, {CANNOT_BUILD} nothing to build with on this machine.",
    )
    building.add_argument("--force", action="store_true", help="compile again")
    building.add_argument("--sanitize", choices=list(native.SANITIZERS), help="a build with this sanitizer, for tests")
    building.add_argument("--quiet", action="store_true", help="print one line if it fails, else nothing")
    options = parser.parse_args(arguments)
    if options.command == "build":
        return build(options)
    show("\n".join(wrapped(line, indent=2) for line in explain().splitlines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
