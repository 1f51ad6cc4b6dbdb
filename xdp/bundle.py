"""Many arrays as one argument of compiled code.

numba passes a tuple of arrays by value: twenty arrays are some hundred and fifty words at every call, and every
function that hands them on is compiled with all of them. A `Bundle` is one pointer, to a table of addresses and shapes;
what a function does not touch costs it nothing. In compiled code its fields read as in Python:
`tables.flows[slot].state`.

Fields may be arrays (of one or two dimensions), other bundles, or u64 numbers. They are fixed once made, borrowed by
compiled code, and live as long as the bundle.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, imputils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    intrinsic,
    lower_getattr_generic,
    models,
    register_model,
    unbox,
)
from numba.np import arrayobj

_WORDS = 8  # per field: data, then shape and strides of up to two dimensions; or the number itself
_SHAPE, _STRIDES = 1, 3


class BundleType(types.Type):
    """The numba type of a class of bundles: which fields of which types it has, in which order."""

    def __init__(self, name: str, members: tuple[tuple[str, Any], ...]) -> None:
        self.members = members
        super().__init__(name=f"{name}({', '.join(f'{field}: {kind}' for field, kind in members)})")

    def find(self, name: str) -> tuple[int, Any]:
        """Return (position, type) of a field."""
        for position, (field, kind) in enumerate(self.members):
            if field == name:
                return position, kind
        raise AttributeError(f"{self.name.partition('(')[0]} has no field {name}")


class Bundle:
    """Base of a frozen dataclass whose instances are one argument for compiled code."""

    def __post_init__(self) -> None:
        """Write down where the fields are."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        words = np.zeros((len(names), _WORDS), np.uint64)
        members = []
        for row, name in zip(words, names, strict=True):
            value = getattr(self, name)
            if isinstance(value, Bundle):
                row[0] = value.address
            elif isinstance(value, np.ndarray):
                row[0] = value.ctypes.data
                row[_SHAPE : _SHAPE + value.ndim] = value.shape
                row[_STRIDES : _STRIDES + value.ndim] = value.strides
            else:
                row[0] = value & 0xFFFF_FFFF_FFFF_FFFF  # a descriptor may be -1
            members.append((name, numba.typeof(value)))
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "address", words.ctypes.data)
        object.__setattr__(self, "_numba_type_", BundleType(type(self).__name__, tuple(members)))

    address: int


@register_model(BundleType)
class _BundleModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.IntType(64).as_pointer())  # type: ignore[no-untyped-call]


@unbox(BundleType)  # type: ignore[untyped-decorator]
def _unbox(kind: Any, value: Any, c: Any) -> Any:
    address = c.pyapi.object_getattr_string(value, "address")
    word = c.pyapi.long_as_ulonglong(address)
    c.pyapi.decref(address)
    pointer = c.builder.inttoptr(word, ir.IntType(64).as_pointer())
    return NativeValue(pointer, is_error=cgutils.is_not_null(c.builder, c.pyapi.err_occurred()))


@infer_getattr
class _BundleAttributes(AttributeTemplate):
    key = BundleType

    def generic_resolve(self, kind: BundleType, name: str) -> Any:  # type: ignore[override]
        """Return the type of a field, None if there is no such."""
        return dict(kind.members).get(name)


@lower_getattr_generic(BundleType)  # type: ignore[untyped-decorator]
def _get_field(context: Any, builder: Any, kind: BundleType, pointer: Any, name: str) -> Any:
    position, field = kind.find(name)

    def word(offset: int) -> Any:
        place = builder.gep(pointer, [ir.IntType(32)(position * _WORDS + offset)])
        return builder.load(place)

    if isinstance(field, types.Array):
        array = context.make_array(field)(context, builder)
        item = context.get_abi_sizeof(context.get_data_type(field.dtype))
        data = builder.inttoptr(word(0), context.get_data_type(field.dtype).as_pointer())
        shape = [word(_SHAPE + axis) for axis in range(field.ndim)]
        strides = [word(_STRIDES + axis) for axis in range(field.ndim)]
        if field.layout == "C":
            strides[-1] = ir.IntType(64)(item)
        arrayobj.populate_array(array, data=data, shape=shape, strides=strides, itemsize=item, meminfo=None)
        return imputils.impl_ret_borrowed(context, builder, field, array._getvalue())
    if isinstance(field, BundleType):
        return builder.inttoptr(word(0), ir.IntType(64).as_pointer())
    return context.cast(builder, word(0), types.uint64, field)


@intrinsic
def bundle_at(typing_context, like, address):
    """Return the bundle at `address` (u64), one of the same class and types as `like`: for arrays of bundles."""

    def generate(context, builder, signature, args):
        word = context.cast(builder, args[1], signature.args[1], types.uint64)
        return builder.inttoptr(word, ir.IntType(64).as_pointer())

    return like(like, address), generate
