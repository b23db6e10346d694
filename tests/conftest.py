import os
import signal
import sys
from pathlib import Path

import pytest
import torch._functorch.config as functorch_config

from metta_fastagent.runtime import triton as _triton

# pytest's importlib mode puts no test folder on the path, and pickle needs the shared agents' module by name.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "emulator")]

# A shell starts background jobs with SIGINT ignored; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Without CI in the environment, PyTorch only warns of an operator whose outputs share memory.
if hasattr(functorch_config, "error_on_custom_op_aliasing"):
    functorch_config.error_on_custom_op_aliasing = True


def _accept_one_element_loop_bounds():
    """Triton's interpreter before 3.7 converts loop bounds, arrays of one element, in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, *scope):
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index


EMULATED = "EMULATE" in os.environ
if EMULATED:
    import emulator

    emulator.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """A fault that a test has swallowed is an error, too."""
    if EMULATED:
        emulator.faults()
    result = yield
    if EMULATED and (found := emulator.faults()):
        pytest.fail("\n".join(found), pytrace=False)
    return result


if _triton.INTERPRETED and not EMULATED and tuple(map(int, _triton.triton.__version__.split(".")[:2])) < (3, 7):
    _accept_one_element_loop_bounds()
