"""Words as numba's values, and bundles as a type of numba's; imported when something is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import imputils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr_generic, models, register_model
from numba.np import arrayobj

from xdp.bundle import WORDS

_WORD = ir.IntType(64)


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


def type_of(name: str, members: Mapping[str, Any]) -> BundleType:
    """Return the type of a bundle of class `name` with these fields."""
    return BundleType(name, tuple((field, numba.typeof(value)) for field, value in members.items()))


def bundle_from(builder: Any, address: Any) -> Any:
    """Return the bundle at an address (u64)."""
    return builder.inttoptr(address, _WORD.as_pointer())


def count_words(kind: Any) -> int:
    """Return how many words a value of a type is: see xdp.words."""
    return 1 + 2 * kind.ndim if isinstance(kind, types.Array) else 1


def value_from(context: Any, builder: Any, kind: Any, word: Callable[[int], Any]) -> Any:
    """Return the value of a type that is written in words, of which `word` loads one by its number."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder)
        item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        data = builder.inttoptr(word(0), context.get_data_type(kind.dtype).as_pointer())
        shape = [word(1 + axis) for axis in range(kind.ndim)]
        strides = [word(1 + kind.ndim + axis) for axis in range(kind.ndim)]
        if kind.layout == "C":
            strides[-1] = _WORD(item)
        arrayobj.populate_array(array, data=data, shape=shape, strides=strides, itemsize=item, meminfo=None)
        return array._getvalue()
    if isinstance(kind, BundleType | types.Record):
        return builder.inttoptr(word(0), context.get_value_type(kind))
    if isinstance(kind, types.Float):
        return context.cast(builder, builder.bitcast(word(0), ir.DoubleType()), types.float64, kind)
    if isinstance(kind, types.Boolean):
        return builder.icmp_unsigned("!=", word(0), _WORD(0))
    return context.cast(builder, word(0), types.uint64, kind)


@register_model(BundleType)
class _BundleModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _WORD.as_pointer())  # type: ignore[no-untyped-call]


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
        return builder.load(builder.gep(pointer, [ir.IntType(32)(position * WORDS + offset)]))

    value = value_from(context, builder, field, word)
    return imputils.impl_ret_borrowed(context, builder, field, value) if isinstance(field, types.Array) else value
