"""Choose the implementation of an operation, launch its kernel, and report what went wrong."""
