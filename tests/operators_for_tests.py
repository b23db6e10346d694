"""Records PyTorch's operators, of which those that are not free launch something on CUDA."""

from torch.utils._python_dispatch import TorchDispatchMode

# Views and allocations.
FREE = {
    *("_record_function_enter_new", "_record_function_exit", "detach"),
    *("empty", "empty_like", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "alias", "as_strided", "expand", "permute", "select", "slice", "split", "squeeze", "t"),
    *("transpose", "unbind", "unsqueeze", "view"),
}


class Operators(TorchDispatchMode):
    """Records the names of the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))
