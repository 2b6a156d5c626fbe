"""Loading TensorFlow, which takes seconds, in one place and without its chatter."""

import contextlib
import os
import sys
from collections.abc import Iterator


def load() -> None:
    """Import TensorFlow and what stands on it, unless that has happened; call it before the first use in a process.

    The native libraries tell of drivers and instruction sets on the process's error stream while they are loaded, whatever the log level.
    What goes wrong is raised, so the stream is put aside for that time.
    """
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _errors_put_aside():
        import keras  # noqa: F401
        import tensorflow  # noqa: F401
        import tfx_bsl.sketches  # noqa: F401
    # A GPU's short cut to 10 bits of a product's digits, which golden scores would tell from the same model on a CPU.
    sys.modules["tensorflow"].config.experimental.enable_tensor_float_32_execution(False)


@contextlib.contextmanager
def _errors_put_aside() -> Iterator[None]:
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
