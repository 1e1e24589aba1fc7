from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

# numpy's stubs call an array a Buffer from Python 3.12 on
_Bytes: TypeAlias = Buffer | npt.NDArray[Any]
_Index = TypeVar("_Index", np.int32, np.int64)

def encode(indices: npt.NDArray[np.int32] | npt.NDArray[np.int64], *, width: str = "") -> npt.NDArray[np.uint8]: ...
@overload
def decode(
    code: _Bytes, count: int, limit: int, dtype: type[_Index] | np.dtype[_Index], granule: int = 1, *, width: str = ""
) -> npt.NDArray[_Index]: ...
@overload
def decode(
    code: _Bytes, count: int, limit: int, dtype: npt.DTypeLike, granule: int = 1, *, width: str = ""
) -> npt.NDArray[Any]: ...
def fingerprint(weight: _Bytes, begin: int = 0, end: int | None = None, *, width: str = "") -> int: ...
def differing(
    one: _Bytes, two: _Bytes, itemsize: int, begin: int, end: int, *, width: str = ""
) -> npt.NDArray[np.int32]: ...
def count_differing(one: _Bytes, two: _Bytes, itemsize: int, begin: int, end: int) -> int: ...
def widths() -> tuple[str, ...]: ...
