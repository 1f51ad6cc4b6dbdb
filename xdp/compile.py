"""The short-lived child that compiles programs with bcc, loads them, pins them and exits.

    python -m xdp.compile --source xdp/bpf/lb.c --maps FOLDER [--type xdp|tc|cgroup] [-D ...]
        --function xdp_lb --pin PATH --keep FILE [--function ...]

The only importer of bcc, in a process of its own: bcc changes directory, prints to stdout, keeps about 100 MB of LLVM
and has no interface for links and pins. It needs no kernel headers: xdp/shim has what an XDP program needs of them.

What a program sees beside its -D options: `TABLES_FOLDER`, the folder of the pinned maps as a string, and for every map
pinned there `NAME_ROWS` in upper case, its number of entries. So a table is declared

    BPF_TABLE_PINNED("array", u32, struct flow, flows, FLOWS_ROWS, TABLES_FOLDER "/flows", BPF_F_MMAPABLE);

Headers are looked for beside the source and in xdp/bpf. Exit codes: 0; 1 with the compiler's or the verifier's words on
stderr; 77 without bcc.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from xdp import cache, kernel
from xdp.errors import Error, MissingFeatureError, UsageError

_HERE = Path(__file__).resolve().parent
_SHIM = _HERE / "shim"

# What a program may be attached as. One for cgroups is called after its hook.
PROGRAM_TYPES = {"xdp": kernel.XDP_PROGRAM, "tc": kernel.TC_PROGRAM, "cgroup": kernel.CGROUP_PROGRAM}


def macros(maps: Mapping[str, kernel.MapInfo], defines: Iterable[str]) -> list[str]:
    """Return the options on which it depends what a program becomes: the sizes of the pinned maps, and -D's."""
    return [*(f"-D{name.upper()}_ROWS={info.max_entries}" for name, info in maps.items()), *(f"-D{d}" for d in defines)]


def headers_of(source: Path) -> list[Path]:
    """Return the folders in which headers are looked for, those of bcc and the compiler left out."""
    return [source.parent, _HERE / "bpf", _SHIM]


def _options(source: Path, folder: Path, defines: Iterable[str]) -> list[str]:
    return [
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{source.parent}",
        f"-I{_HERE / 'bpf'}",
        f'-DTABLES_FOLDER="{folder}"',
        *macros(kernel.pinned_maps(folder), defines),
    ]


def text_of(source: Path) -> bytes:
    """Return a C file with the .c files that it includes in their places: bcc rewrites map calls in one file only."""

    def included(match: re.Match[bytes]) -> bytes:
        return (source.parent / match[1].decode()).read_bytes()

    try:
        return re.sub(rb'^#include "(\w+\.c)"$', included, source.read_bytes(), flags=re.MULTILINE)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None


class Function(NamedTuple):
    """A function that becomes a program: where it is pinned, in place of another, and kept for the next time."""

    name: str
    pin: Path
    place: Path


def compile_and_pin(source: Path, functions: Iterable[Function], kind: str, folder: Path, defines: list[str]) -> None:
    """Compile functions of `source` over the maps of `folder`."""
    os.environ["BCC_KERNEL_SOURCE"] = str(_SHIM)
    try:
        import bcc
    except (ImportError, OSError) as error:
        raise MissingFeatureError(f"bcc is missing ({error}); apt install python3-bpfcc") from None
    module = bcc.BPF(text=text_of(source), cflags=_options(source, folder, defines))
    names = {info.id: name for name, info in kernel.pinned_maps(folder).items()}
    for function in functions:
        name = function.name.encode()
        attach_type = kernel.CGROUP_HOOKS[function.name] if kind == "cgroup" else -1
        program = module.load_func(name, PROGRAM_TYPES[kind], attach_type=attach_type).fd
        kernel.replace_pin(program, function.pin)
        cache.keep(cache.Program.of(module.dump_func(name), names), function.place)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m xdp.compile", description="compile, load and pin programs")
    parser.add_argument("--source", type=Path, required=True, help="the C file")
    parser.add_argument(
        "--function", action="append", required=True, help="the program's function; several may be given"
    )
    parser.add_argument("--type", choices=PROGRAM_TYPES, default="xdp", help="what it is to be attached as")
    parser.add_argument("--pin", type=Path, action="append", required=True, help="where its program is pinned")
    parser.add_argument("--maps", type=Path, required=True, help="folder of the pinned maps")
    parser.add_argument(
        "--keep", type=Path, action="append", required=True, help="where it is kept when compiled (xdp/cache.py)"
    )
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE", help="a macro")
    arguments = parser.parse_args()
    try:
        functions = [Function(*of) for of in zip(arguments.function, arguments.pin, arguments.keep, strict=True)]
        compile_and_pin(arguments.source.resolve(), functions, arguments.type, arguments.maps, arguments.defines)
    except Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  bcc raises nothing more precise; the compiler has spoken on stderr
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # LLVM's destructors take 50 ms and have nothing to save
