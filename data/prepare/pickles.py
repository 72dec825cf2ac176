"""Pickles of numpy arrays, read without running code from them."""

import pickle
from typing import IO, Any

import numpy as np

_reconstruct = np.empty(0).__reduce__()[0]
MAY_CALL = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # written by numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def read_pickle(file: IO[bytes], name: str) -> Any:
    """Containers, text, numbers and numpy arrays that Python 2 or 3 has written.

    Args:
        name: what an error calls the file.

    Raises:
        ValueError: if the file is damaged, or would call anything but numpy's constructors.
    """
    try:
        return _ArraysOnly(file, encoding="latin1").load()  # how numpy reads its arrays of Python 2
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason}); get it again.") from error


class _ArraysOnly(pickle.Unpickler):
    """Refuses what a plain `pickle.load` would run, whoever wrote it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in MAY_CALL:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which is refused")
        return MAY_CALL[module, name]
