"""Shared words from compiled code: atomic loads, stores, compare-and-swap, fences, prefetch.

Ring cursors, tags, turn counters and heartbeats are read and written through these only: a plain `array[i]` in a loop
is hoisted by the compiler and never seen again. Each takes a one-dimensional array of unsigned integers (any stride,
so a field of a structured array will do) and an index that is not checked.
"""

from __future__ import annotations

from typing import Any

from xdp.intrinsics import cgutils, intrinsic, ir, types


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index_type: Any, index: Any) -> Any:
    index = context.cast(builder, index, index_type, types.intp)
    array = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, array, [index], wraparound=False, boundscheck=False)


@intrinsic
def load_acquire(typing_context, array, index):
    """Return `array[index]`; no later access moves before it."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
        return builder.load_atomic(pointer, "acquire", array.dtype.bitwidth // 8)

    return array.dtype(array, index), generate


@intrinsic
def store_release(typing_context, array, index, value):
    """Store `value` in `array[index]`; no earlier access moves behind it."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
        word = context.cast(builder, args[2], signature.args[2], array.dtype)
        builder.store_atomic(word, pointer, "release", array.dtype.bitwidth // 8)

    return types.void(array, index, value), generate


@intrinsic
def compare_and_swap(typing_context, array, index, expected, value):
    """Store `value` in `array[index]` if that holds `expected`; return whether it did. A full barrier."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
        old = context.cast(builder, args[2], signature.args[2], array.dtype)
        new = context.cast(builder, args[3], signature.args[3], array.dtype)
        result = builder.cmpxchg(pointer, old, new, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(array, index, expected, value), generate


@intrinsic
def fetch_add(typing_context, array, index, value):
    """Add `value` to `array[index]` and return what was there before. A full barrier."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
        addend = context.cast(builder, args[2], signature.args[2], array.dtype)
        return builder.atomic_rmw("add", pointer, addend, "seq_cst")

    return array.dtype(array, index, value), generate


@intrinsic
def fence(typing_context):
    """Let no access move across this point, and finish the stores before it."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")

    return types.void(), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]` (any element type), to be read soon."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
        byte_pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [byte_pointer, i32(0), i32(3), i32(1)])

    return types.void(array, index), generate
