"""The kernel's own types, read from a file made here and from the kernel that runs."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from xdp.btf import Btf
from xdp.errors import MissingFeatureError

INT, POINTER, STRUCT, UNION, TYPEDEF, FUNCTION_TYPE = 1, 2, 4, 5, 8, 13
RUNNING = Path("/sys/kernel/btf/vmlinux")


class Blob:
    """BTF in the making: types are numbered from 1 in the order in which they are added."""

    def __init__(self) -> None:
        self.types, self.strings = b"", b"\0"

    def string(self, text: str) -> int:
        """Return where `text` lies among the strings."""
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(self, kind: int, name: str, size_or_type: int, tail: bytes = b"", members: int = 0, flag: int = 0) -> None:
        """Add a type; `tail` is what follows its 12 bytes."""
        info = flag << 31 | kind << 24 | members
        self.types += struct.pack("=III", self.string(name), info, size_or_type) + tail

    def struct(self, kind: int, name: str, members: list[tuple[str, int, int]], flag: int = 0) -> None:
        """Add a struct or union of (name, type, offset)."""
        tail = b"".join(struct.pack("=III", self.string(member), *rest) for member, *rest in members)
        self.add(kind, name, 8, tail, len(members), flag)

    def write(self, path: Path, magic: int = 0xEB9F) -> Path:
        """Write a file as the kernel would."""
        header = struct.pack("=HBBIIIII", magic, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        path.write_bytes(header + self.types + self.strings)
        return path


@pytest.fixture
def blob() -> Blob:
    """Struct device { u32 number; union { u32 width:4 at bit 40; typedef namespace at bit 64 } }, and a function."""
    blob = Blob()
    blob.add(INT, "u32", 4, struct.pack("=I", 32))  # 1
    blob.struct(STRUCT, "space", [("inode", 1, 96)])  # 2
    blob.add(TYPEDEF, "space_t", 2)  # 3
    blob.struct(UNION, "", [("width", 1, 4 << 24 | 8), ("space", 3, 32)], flag=1)  # 4
    blob.struct(STRUCT, "device", [("number", 1, 0), ("", 4, 32)])  # 5
    blob.add(FUNCTION_TYPE, "", 0, struct.pack("=IIII", 0, 1, 0, 1), members=2)  # 6
    blob.add(POINTER, "", 6)  # 7
    blob.add(TYPEDEF, "handler", 7)  # 8
    return blob


@pytest.mark.parametrize(
    ("structure", "field", "offset"),
    [
        pytest.param("device", "number", 0, id="first"),
        pytest.param("device", "width", 5, id="bit-field-in-a-nameless-union"),
        pytest.param("device", "space", 8, id="in-a-nameless-union"),
        pytest.param("device", "space.inode", 20, id="through-a-typedef"),
    ],
)
def test_a_field_is_found_where_it_lies(blob: Blob, tmp_path: Path, structure: str, field: str, offset: int):
    assert Btf(blob.write(tmp_path / "btf")).offset(structure, field) == offset


def test_a_typedef_has_a_number_and_parameters(blob: Blob, tmp_path: Path):
    btf = Btf(blob.write(tmp_path / "btf"))
    assert (btf.typedef("handler"), btf.parameters(8)) == (8, 2)


def test_what_is_not_there_is_named(blob: Blob, tmp_path: Path):
    btf = Btf(blob.write(tmp_path / "btf"))
    with pytest.raises(MissingFeatureError, match="this kernel has no stranger"):
        btf.typedef("stranger")
    with pytest.raises(MissingFeatureError, match="struct device has no colour"):
        btf.offset("device", "colour")
    with pytest.raises(MissingFeatureError, match=r"struct device has no number\.more"):
        btf.offset("device", "number.more")
    with pytest.raises(MissingFeatureError, match="type 3 is no function"):
        btf.parameters(3)


def test_a_kernel_without_btf_says_which_option_it_needs(tmp_path: Path):
    with pytest.raises(MissingFeatureError, match="CONFIG_DEBUG_INFO_BTF"):
        Btf(tmp_path / "vmlinux")


def test_a_file_that_is_no_btf_is_refused(blob: Blob, tmp_path: Path):
    with pytest.raises(MissingFeatureError, match="no BTF"):
        Btf(blob.write(tmp_path / "swapped", magic=0x9FEB))
    whole = blob.write(tmp_path / "btf").read_bytes()
    (tmp_path / "half").write_bytes(whole[:50])
    with pytest.raises(MissingFeatureError, match="damaged"):
        Btf(tmp_path / "half")


def test_a_kind_of_type_from_the_future_is_refused(blob: Blob, tmp_path: Path):
    blob.add(25, "later", 0)
    with pytest.raises(MissingFeatureError, match="newer than this program"):
        Btf(blob.write(tmp_path / "btf"))


@pytest.mark.skipif(not RUNNING.exists(), reason="this kernel has no BTF")
def test_the_running_kernel_can_be_read():
    btf = Btf()
    assert btf.offset("net_device", "ifindex") % 4 == 0
    assert btf.offset("net_device", "nd_net.net") % 8 == 0
    assert btf.parameters(btf.typedef("btf_trace_xdp_redirect_err")) == 8
