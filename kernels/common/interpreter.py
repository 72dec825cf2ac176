"""Makes Triton's CPU interpreter right in bfloat16; on import, under ``TRITON_INTERPRET=1``.

The interpreter keeps a bfloat16 as its 16 bits in a numpy ``uint16``. Products, sums, comparisons
and reductions then work on the bit patterns as if they were integers, and a cast truncates (seen in
Triton 3.6 to 3.9). Here every operation on bfloat16 widens its operands to float32, which is exact,
and rounds the result once, to nearest even, as the hardware does.
"""

import functools

import triton
import triton.language as tl
from triton.runtime import interpreter

np = interpreter.np  # the numpy that the interpreter computes in

INTERPRETED: bool = triton.knobs.runtime.interpret


def device_function(function):
    """``triton.jit`` for a function that a kernel gets as a constant.

    Interpreted, such a function must be plain Python.
    """
    return function if INTERPRETED else triton.jit(function)


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "bfloat16_is_right"):
        return
    builder.bfloat16_is_right = True
    handle = interpreter.TensorHandle

    def is_bfloat16(x) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widen(x):
        if not is_bfloat16(x):
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(x):
        return handle(_round_to_bfloat16(x.data), tl.bfloat16)

    def in_float32(operation):
        """The operation on widened operands; a float32 result is rounded back."""

        @functools.wraps(operation)
        def widened(self, *operands):
            if not any(map(is_bfloat16, operands)):
                return operation(self, *operands)
            result = operation(self, *map(widen, operands))
            return narrow(result) if result.dtype.scalar == tl.float32 else result

        return widened

    for name in dir(builder):
        if name.startswith("create_fcmp") or name in _ARITHMETIC:
            setattr(builder, name, in_float32(getattr(builder, name)))

    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def dot(self, a, b, accumulator, *options):
        return plain_dot(self, widen(a), widen(b), accumulator, *options)

    def cast(self, source, dtype):
        if dtype.scalar == tl.bfloat16 and not is_bfloat16(source):
            return narrow(plain_cast(self, source, tl.float32))
        if is_bfloat16(source) and dtype.scalar != tl.bfloat16:
            source = widen(source)
            return source if dtype.scalar == tl.float32 else plain_cast(self, source, dtype)
        return plain_cast(self, source, dtype)

    builder.create_dot, builder.cast_impl = dot, cast
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(builder, f"create_{name}", lambda self, x, dtype: self.cast_impl(x, dtype))
    builder.get_bf16 = lambda self, value: narrow(handle(np.array([value]), tl.float32))
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        _widen_reduction(reduction, is_bfloat16, widen)


_ARITHMETIC = {
    f"create_{name}"
    for name in (
        "fadd", "fsub", "fmul", "fdiv", "frem", "fma", "fneg", "clampf", "minimumf", "maximumf",
        "minnumf", "maxnumf", "exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "precise_sqrt",
        "rsqrt", "floor", "ceil", "precise_divf", "erf",
    )
}  # fmt: skip


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 of float32 numbers, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _widen_reduction(reduction, is_bfloat16, widen) -> None:
    """Reductions and scans read the numpy data directly: hand them float32, round the result."""
    plain = reduction.apply_impl

    def apply(self, inputs):
        several = isinstance(inputs, tuple)
        tensors = inputs if several else (inputs,)
        narrow = [is_bfloat16(x.handle) for x in tensors]
        if not any(narrow):
            return plain(self, inputs)
        wide = tuple(
            tl.core.tensor(widen(x.handle), tl.core.block_type(tl.float32, x.shape)) if n else x
            for x, n in zip(tensors, narrow, strict=True)
        )
        results = plain(self, wide if several else wide[0])
        results = results if isinstance(results, tuple) else (results,)
        cast = interpreter.interpreter_semantic.cast
        rounded = tuple(
            cast(x, tl.bfloat16) if n else x for x, n in zip(results, narrow, strict=False)
        )
        return rounded if several else rounded[0]

    reduction.apply_impl = apply


if INTERPRETED:
    install()
