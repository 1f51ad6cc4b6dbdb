"""Multi-byte values at any offset of a byte array, from compiled code, in the order in which they lie in memory.

`bytes_` is a contiguous u8 array. What C declares __be16 or __be32 comes out as the same number that C loads.
"""

from __future__ import annotations

from typing import Any

from xdp.intrinsics import intrinsic, ir, types


def _pointer(context: Any, builder: Any, signature: Any, args: Any, kind: Any) -> Any:
    index = context.cast(builder, args[1], signature.args[1], types.intp)
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [index]), ir.IntType(kind.bitwidth).as_pointer())


def _loader(bits: int) -> Any:
    @intrinsic
    def load(typing_context, bytes_, offset):
        kind = types.Integer.from_bitwidth(bits, signed=False)

        def generate(context, builder, signature, args):
            return builder.load(_pointer(context, builder, signature, args, kind), align=1)

        return kind(bytes_, offset), generate

    return load


def _storer(bits: int) -> Any:
    @intrinsic
    def store(typing_context, bytes_, offset, value):
        kind = types.Integer.from_bitwidth(bits, signed=False)

        def generate(context, builder, signature, args):
            word = context.cast(builder, args[2], signature.args[2], kind)
            builder.store(word, _pointer(context, builder, signature, args, kind), align=1)

        return types.void(bytes_, offset, value), generate

    return store


load16, load32, load64 = _loader(16), _loader(32), _loader(64)
store16, store32, store64 = _storer(16), _storer(32), _storer(64)
