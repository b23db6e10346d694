import signal
import sys
from pathlib import Path

from metta_fastagent import _triton

# pytest's importlib mode puts no test folder on the path, and pickle needs the shared agents' module by name.
sys.path.insert(0, str(Path(__file__).parent))

# A shell starts background jobs with SIGINT ignored; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _accept_one_element_loop_bounds():
    """Triton's interpreter before 3.7 converts loop bounds, arrays of one element, in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, *scope):
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index


if _triton.INTERPRETED and tuple(map(int, _triton.triton.__version__.split(".")[:2])) < (3, 7):
    _accept_one_element_loop_bounds()
