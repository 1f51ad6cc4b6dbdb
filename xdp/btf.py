"""The kernel's description of its own types (BTF): where a field lies, and which number a type has.

A program that follows pointers of the kernel must not bring offsets along: they change with the version and the
configuration. /sys/kernel/btf/vmlinux has those of the kernel that runs. Reading it takes 0.1 to 0.2 s for 130,000
types. The format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from pathlib import Path

from xdp.errors import MissingFeatureError

_VMLINUX = Path("/sys/kernel/btf/vmlinux")
_MAGIC = 0xEB9F

# enum BTF_KIND_*
_POINTER, _STRUCT, _UNION, _TYPEDEF, _FUNCTION_TYPE = 2, 4, 5, 8, 13
_TRANSPARENT = (_TYPEDEF, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag
# Length of a type by kind: bytes once, and bytes for each of its members.
_ONCE = [12 + {1: 4, 3: 12, 14: 4, 17: 4}.get(kind, 0) for kind in range(20)]
_PER_MEMBER = [{4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}.get(kind, 0) for kind in range(20)]

# Of a type: name, info, size or type; of a member: name, type, offset.
_three_words = struct.Struct("=III").unpack_from


class Btf:
    """Types by name and number. MissingFeatureError: it is not there, or not what was expected."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path = path or _VMLINUX
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise MissingFeatureError(
                f"{path}: {error.strerror}; the kernel must be built with CONFIG_DEBUG_INFO_BTF"
            ) from None
        try:
            magic, _version, _flags, header, types, types_size, strings, strings_size = struct.unpack_from(
                "=HBBIIIII", self._data
            )
            if magic != _MAGIC:
                raise MissingFeatureError(f"{path}: no BTF of this machine's byte order")
            self._strings = self._data[header + strings : header + strings + strings_size]
            self._read(header + types, header + types + types_size)
        except (struct.error, IndexError):  # it ends in the middle; it has a kind of type from after Linux 6.18
            raise MissingFeatureError(f"{path}: the BTF is damaged, or newer than this program") from None

    def _read(self, at: int, end: int) -> None:
        """Note where each type lies, and the number of each struct and typedef by the place of its name."""
        self._places = [0]  # number 0 is void
        self._numbers: dict[tuple[int, int], int] = {}
        data, places = self._data, self._places
        while at < end:
            name, info, _ = _three_words(data, at)
            kind = info >> 24 & 31
            if kind in (_STRUCT, _TYPEDEF):
                self._numbers[kind, name] = len(places)
            places.append(at)
            at += _ONCE[kind] + _PER_MEMBER[kind] * (info & 0xFFFF)

    def typedef(self, name: str) -> int:
        """Return the number of a typedef."""
        return self._number(_TYPEDEF, name)

    def parameters(self, typedef: int) -> int:
        """Return the number of parameters of the function that typedef number `typedef` is a pointer to."""
        info, _ = self._resolve(typedef, (*_TRANSPARENT, _POINTER))
        if info >> 24 & 31 != _FUNCTION_TYPE:
            raise MissingFeatureError(f"{self._path}: type {typedef} is no function")
        return info & 0xFFFF

    def offset(self, structure: str, field: str) -> int:
        """Return where `field` lies in a struct, in bytes; a dot leads into a struct that it contains.

        Structs and unions without a name are looked through, as in C.
        """
        number, bits = self._number(_STRUCT, structure), 0
        for name in field.split("."):
            found = self._member(number, name)
            if found is None:
                raise MissingFeatureError(f"{self._path}: struct {structure} has no {field} in this kernel")
            bits, number = bits + found[0], found[1]
        return bits // 8

    def _member(self, number: int, wanted: str) -> tuple[int, int] | None:
        """Return (offset in bits, number of the type) of a member of struct or union `number`."""
        info, place = self._resolve(number)
        if info >> 24 & 31 not in (_STRUCT, _UNION):
            return None
        has_bit_fields = info >> 31  # then the upper byte of an offset is a width
        for at in range(place + 12, place + 12 + 12 * (info & 0xFFFF), 12):
            name, kind, offset = _three_words(self._data, at)
            bits = offset & 0xFFFFFF if has_bit_fields else offset
            if self._name(name) == wanted:
                return bits, kind
            if not name and (inner := self._member(kind, wanted)):
                return bits + inner[0], inner[1]
        return None

    def _resolve(self, number: int, through: tuple[int, ...] = _TRANSPARENT) -> tuple[int, int]:
        """Return (info word, place) of type `number`, typedefs and qualifiers looked through."""
        while number:
            _, info, following = _three_words(self._data, self._places[number])
            if info >> 24 & 31 not in through:
                return info, self._places[number]
            number = following
        return 0, 0  # void

    def _number(self, kind: int, name: str) -> int:
        """Return the number of the struct or typedef `name`."""
        wanted = b"\0" + name.encode() + b"\0"
        at = self._strings.find(wanted)
        number = self._numbers.get((kind, at + 1)) if at >= 0 else None
        if number is None:
            raise MissingFeatureError(f"{self._path}: this kernel has no {name}")
        return number

    def _name(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()
