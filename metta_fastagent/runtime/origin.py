"""Where in the user's own code an error comes from."""

import itertools
import os
import sys
import traceback

PACKAGE = os.path.dirname(os.path.dirname(__file__))
# Files of these packages are not named as the place of an error.
LIBRARIES = ("metta_fastagent", "torch", "tensordict", "numpy", "gymnasium", "mettagrid")


def origin_of(error: BaseException) -> tuple[BaseException, str]:
    """`error` or its cause, and the line of the user's code that raised it; empty if only library code is involved."""
    cause = error.__cause__ or error.__context__
    if cause is not None and (origin := origin_of(cause))[1]:
        return origin
    stack = traceback.extract_tb(error.__traceback__)
    called = itertools.dropwhile(lambda frame: not frame.filename.startswith(PACKAGE), stack)
    own = [frame for frame in called if _is_own(frame.filename)]
    return error, f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}" if own else ""


def _is_own(filename: str) -> bool:
    """Whether the file belongs neither to Python nor to a package that this one builds on."""
    if filename.startswith(("<", os.path.dirname(os.__file__))) and "site-packages" not in filename:
        return False
    folders = [folder for name in LIBRARIES for folder in getattr(sys.modules.get(name), "__path__", ())]
    return not any(filename.startswith(folder + os.sep) for folder in folders)
