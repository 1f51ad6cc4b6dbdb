"""Machine code is made for roots alone: the compiled functions that Python calls.

numba makes machine code of every compiled function, and takes all that it calls into it, optimized once more. In a
packet path of a hundred functions, some levels deep, nearly all of that is thrown away. Here a function has two sides:

* To compiled code it is a `_Callee`: lowered, simplified, and linked into its callers as it is.
* To Python it is a `Root`: it and all that it calls are linked, optimized, made machine code, and kept in the cache.

numba has no interface for this, so it leans on its classes; tests/xdp/test_jit.py holds it to what is expected of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from llvmlite.binding.newpassmanagers import create_new_module_pass_manager
from numba.core.codegen import JITCodeLibrary
from numba.core.dispatcher import _FunctionCompiler  # type: ignore[attr-defined]
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.types import Dispatcher

from xdp import cache


class _Library(JITCodeLibrary):
    """Code that is optimized and made machine code when an address in it is asked for."""

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

    def get_pointer_to_function(self, name: str) -> int:
        """Return the address of a function, 0 if it is not here."""
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


class _CalleeCompiler(_FunctionCompiler):  # type: ignore[misc]
    def _customize_flags(self, flags: Any) -> Any:
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        return flags


class _Callee(CPUDispatcher):
    """A function as compiled code calls it."""

    _compiler: Any

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, targetoptions=options)
        pipeline = self._compiler.pipeline_class
        self._compiler = _CalleeCompiler(function, self.targetdescr, options, self.locals, pipeline)

    def add_overload(self, result: Any) -> None:
        """Let callers find it. They know code by its entry point; this has none, and anything of its own does."""
        result = result._replace(entry_point=object())
        self.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
        self.overloads[tuple(result.signature.args)] = result


class Root(CPUDispatcher):
    """A function as Python calls it. `is_inlined`: whether it is put into each of its compiled callers."""

    _cache: Any

    def __init__(
        self, function: Callable[..., Any], options: dict[str, Any], *, is_cached: bool, is_inlined: bool
    ) -> None:
        super().__init__(function, targetoptions=options)
        self._is_inlined = is_inlined
        self._lock: Path | None = None
        if is_cached:
            self.enable_caching()
            self._lock = Path(self._cache.cache_path) / f"{function.__qualname__}.lock"

    def compile(self, sig: Any) -> Any:
        """Return the entry point for a signature; of processes that want it at a time, one makes it for all."""
        with cache.alone(self._lock) if self._lock else contextlib.nullcontext():
            return super().compile(sig)

    @cached_property
    def _callee(self) -> _Callee:
        """The other side, made when compiled code asks for it: what comes from the cache never does."""
        return _Callee(self.py_func, {**self.targetoptions, "forceinline": self._is_inlined})

    @property
    def _numba_type_(self) -> Any:
        """Return what compiled code takes this for."""
        return Dispatcher(self._callee)


cpu_target.target_context.codegen()._library_class = _Library
