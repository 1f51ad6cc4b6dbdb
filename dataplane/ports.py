"""Every AF_XDP socket of the node as one row of addresses, so that compiled code takes any number of them.

A tuple of queues would be another type, and another compilation, for every number of interfaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from dataplane.afxdp import Socket
from dataplane.rings import DESCRIPTOR, Queue, Ring
from xdp.jit import compiled, inlined

_RINGS = ("rx", "tx", "fill", "completion")
_WORDS = ("producer", "consumer", "flags", "slots")

# A row: the interface, the socket's descriptor, the slots of each ring, and where everything lies in memory.
PORT = np.dtype(
    [
        ("ifindex", "u4"),
        ("fd", "i4"),
        ("lock", "u8"),
        ("counts", "u8"),
        ("count_words", "u8"),
        *((f"{ring}_{word}", "u8") for ring in _RINGS for word in (*_WORDS, "entries")),
    ]
)


def port_rows(sockets: Sequence[tuple[int, Socket]]) -> npt.NDArray[np.void]:
    """Return a PORT row for each (ifindex, socket). The sockets must outlive the rows."""
    rows = np.zeros(len(sockets), PORT)
    for row, (ifindex, sock) in zip(rows, sockets, strict=True):
        queue = sock.queue
        row["ifindex"], row["fd"] = ifindex, sock.fd
        row["lock"], row["counts"] = queue.lock.ctypes.data, queue.counts.ctypes.data
        row["count_words"] = len(queue.counts)
        for name in _RINGS:
            ring = getattr(queue, name)
            for word in _WORDS:
                row[f"{name}_{word}"] = getattr(ring, word).ctypes.data
            row[f"{name}_entries"] = len(ring.slots)
    return rows


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(typing_context, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            word = context.cast(builder, args[0], signature.args[0], types.uintp)
            data = context.get_data_type(kind)
            return builder.inttoptr(word, data.as_pointer() if isinstance(data, ir.Type) else ir.IntType(8).as_pointer())

        return types.CPointer(kind)(address), generate

    return pointer


_u32_at = _pointer_to(types.uint32)
_u64_at = _pointer_to(types.uint64)
_descriptor_at = _pointer_to(from_dtype(DESCRIPTOR))


@inlined
def _word(address):  # type: ignore[no-untyped-def]
    return carray(_u32_at(address), 1)


@compiled
def queue_at(ports, index, frames):  # type: ignore[no-untyped-def]
    """Return port `index` as the Queue that dataplane/rings.py works with. `frames` is the UMEM."""
    row = ports[index]
    rx = Ring(
        _word(row.rx_producer), _word(row.rx_consumer), _word(row.rx_flags),
        carray(_descriptor_at(row.rx_slots), np.int64(row.rx_entries)),
    )  # fmt: skip
    tx = Ring(
        _word(row.tx_producer), _word(row.tx_consumer), _word(row.tx_flags),
        carray(_descriptor_at(row.tx_slots), np.int64(row.tx_entries)),
    )  # fmt: skip
    fill = Ring(
        _word(row.fill_producer), _word(row.fill_consumer), _word(row.fill_flags),
        carray(_u64_at(row.fill_slots), np.int64(row.fill_entries)),
    )  # fmt: skip
    completion = Ring(
        _word(row.completion_producer), _word(row.completion_consumer), _word(row.completion_flags),
        carray(_u64_at(row.completion_slots), np.int64(row.completion_entries)),
    )  # fmt: skip
    counts = carray(_u64_at(row.counts), np.int64(row.count_words))
    return Queue(rx, tx, fill, completion, carray(_u64_at(row.lock), 1), counts, frames, np.int64(row.fd))
