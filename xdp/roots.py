"""Machine code is made for roots alone: the compiled functions that Python calls.

numba makes machine code of every compiled function, and takes all that it calls into it, optimized once more. In a
packet path of a hundred functions, some levels deep, nearly all of that is thrown away. Here a function is lowered,
simplified, and linked into its compiled callers as it is (`Callee`). For Python an entry is put before it (`code_of`),
and both, with all that is called, are optimized and made machine code.

What was lowered is kept, too: the packet paths of the engines are roots that call nearly all the same. All that a
function calls is in what is kept of it.

numba has no interface for this, so it leans on its classes; tests/xdp/test_jit.py holds it to what is expected of them.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import parse_bitcode
from llvmlite.binding.newpassmanagers import create_new_module_pass_manager
from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import compile_result
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import _FunctionCompiler  # type: ignore[attr-defined]
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.serialize import dumps

from xdp.bundling import count_words, value_from
from xdp.calls import Code
from xdp.jit import Root
from xdp.kept import alone, write

_OPTIONS: dict[str, Any] = {
    "nopython": True,
    "nogil": True,
    "error_model": "numpy",
    # Without numba's runtime nothing can be allocated, and arrays are not reference-counted: two atomic additions for
    # each array that a function is given.
    "_nrt": False,
}
_WORD, _STATUS = ir.IntType(64), ir.IntType(32)


class _Library(JITCodeLibrary):
    """Code that is optimized and made machine code when that is asked for."""

    _has_machine_code = False

    def finalize(self) -> None:
        """Link in what is called, and make it as its callers want it.

        Simplified at each level, as numba does, too: the optimizer's reach ends in functions that have grown too large.
        """
        module, codegen = self._final_module, self._codegen
        own = [function.name for function in module.functions if not function.is_declaration]
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            module.link_in(library._get_module_for_linking(), preserve=True)
        passes = create_new_module_pass_manager()
        passes.add_always_inliner_pass()
        passes.run(module, codegen._pass_builder())
        for name in own:
            simplification, builder = codegen._function_pass_manager()
            simplification.run(module.get_function(name), builder)
        self._finalized = True

    def take(self, module: Any) -> None:
        """Be what was finalized before."""
        self._final_module = self._shared_module = module
        self._finalized = True

    def object_code(self) -> bytes:
        """Return it all as a file of machine code."""
        self._optimize_final_module()
        self._final_module.verify()
        code: bytes = self._codegen._tm.emit_object(self._final_module)
        return code

    def get_pointer_to_function(self, name: str) -> int:
        """Return the address of a function, 0 if it is not here: for functions that are not ours, and call ours."""
        self._ensure_finalized()
        if not self._has_machine_code:
            self._optimize_final_module()
            self._final_module.verify()
            self._finalize_final_module()
        address: int = super().get_pointer_to_function(name)  # type: ignore[no-untyped-call]
        return address

    def _finalize_final_module(self) -> None:
        super()._finalize_final_module()  # type: ignore[no-untyped-call]
        self._has_machine_code = True


cpu_target.target_context.codegen()._library_class = _Library


class _CalleeCompiler(_FunctionCompiler):  # type: ignore[misc]
    def _customize_flags(self, flags: Any) -> Any:
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        return flags


class Callee(CPUDispatcher):
    """A function as compiled code calls it."""

    _compiler: Any

    def __init__(self, root: Root) -> None:
        options = {**_OPTIONS, "forceinline": root.is_inlined}
        super().__init__(root.py_func, targetoptions=options)
        self._root = root
        pipeline = self._compiler.pipeline_class
        self._compiler = _CalleeCompiler(root.py_func, self.targetdescr, options, self.locals, pipeline)

    def compile(self, sig: Any) -> Any:
        """Lower it for arguments of such types, unless that has been done before, for another root."""
        if sig in self.overloads:
            return None
        place = self._root.place(".lowered", *map(str, sig))
        with alone(place.with_suffix(".lock")) if place else nullcontext():
            if place is None or not self._take(place):
                super().compile(sig)
                self._keep(place, self.overloads[sig])
        return None

    def _take(self, place: Path) -> bool:
        """Take what is kept in a file; return whether there is such."""
        try:
            content = zlib.decompress(place.read_bytes())
        except (OSError, zlib.error):  # which finds what is damaged, too
            return False
        description, signature, bitcode = pickle.loads(content)  # noqa: S301 - ours, as the machine code beside it
        library = cpu_target.target_context.codegen().create_library(description.mangled_name)
        library.take(parse_bitcode(bitcode))
        found = compile_result(fndesc=description, signature=signature, library=library, objectmode=False)
        self.add_overload(found)
        return True

    def _keep(self, place: Path | None, made: Any) -> None:
        made.fndesc.typemap = made.fndesc.calltypes = None  # numba does not keep them either
        bitcode = made.library._get_module_for_linking().as_bitcode()
        with suppress(OSError):
            if place:
                write(place, zlib.compress(dumps((made.fndesc, made.signature, bitcode)), level=1))

    def add_overload(self, result: Any) -> None:
        """Let callers find it. They know code by its entry point; this has none, and anything of its own does."""
        result = result._replace(entry_point=object())
        self.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
        self.overloads[tuple(result.signature.args)] = result


def code_of(root: Root, arguments: Sequence[Any]) -> Code:
    """Compile a root for arguments like these."""
    kinds = tuple(numba.typeof(int(one) if isinstance(one, IntEnum) else one) for one in arguments)
    callee = root.callee
    with global_compiler_lock:
        callee._compilation_chain_init_hook()
        cpu_target.target_context.refresh()
        callee.compile(kinds)
        made = callee.overloads[kinds]
        entry = f"entry.{made.fndesc.mangled_name}"
        library = cpu_target.target_context.codegen().create_library(entry)
        library.add_ir_module(_module_of(entry, made.fndesc))
        library.add_linking_library(made.library)
        library.finalize()
        machine_code = library.object_code()
    parts = _parts(made.fndesc.restype)
    return Code(
        entry=entry,
        words=sum(map(count_words, kinds)),
        formats=[_in_word(part)[0] for part in parts],
        is_tuple=isinstance(made.fndesc.restype, types.BaseTuple),
        enums={
            at: (part.instance_class.__module__, part.instance_class.__qualname__)
            for at, part in enumerate(parts)
            if isinstance(part, types.IntEnumMember)
        },
        machine_code=machine_code,
    )


def _module_of(entry: str, callee: Any) -> ir.Module:
    """Return a module with a function that reads the arguments of `callee` from words, and writes its result there."""
    context = cpu_target.target_context
    module = context.create_module(entry)
    words = _WORD.as_pointer()
    function = ir.Function(module, ir.FunctionType(_STATUS, [words, words]), entry)
    builder = ir.IRBuilder(function.append_basic_block())
    given, room = function.args

    def word(first: int, offset: int) -> Any:
        return builder.load(builder.gep(given, [ir.IntType(32)(first + offset)]))

    values, at = [], 0
    for kind in callee.argtypes:
        values.append(value_from(context, builder, kind, partial(word, at)))
        at += count_words(kind)
    called = context.declare_function(module, callee)
    status, result = context.call_conv.call_function(builder, called, callee.restype, callee.argtypes, values)
    for number, part in enumerate(_parts(callee.restype)):
        value = builder.extract_value(result, number) if isinstance(callee.restype, types.BaseTuple) else result
        wide = context.cast(builder, value, part, _in_word(part)[1])
        place = builder.gep(room, [ir.IntType(32)(number)])
        builder.store(wide, builder.bitcast(place, wide.type.as_pointer()))
    builder.ret(status.code)
    return module


def _parts(result: Any) -> tuple[Any, ...]:
    if isinstance(result, types.BaseTuple):
        return tuple(result.types)  # type: ignore[attr-defined]
    return () if isinstance(result, types.NoneType) else (result,)


def _in_word(part: Any) -> tuple[str, Any]:
    """Return how a part of a result is written in its word: as `struct` calls it, and as what type."""
    if isinstance(part, types.Boolean):
        return "?7x", types.uint64
    if isinstance(part, types.Float):
        return "d", types.float64
    number: Any = part.dtype if isinstance(part, types.IntEnumMember) else part
    return ("q", types.int64) if number.signed else ("Q", types.uint64)
