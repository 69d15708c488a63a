"""Words in memory that the GPU and the host share: flags, the clock, addresses.

A flag is one integer in pinned memory with one writer. It only grows, and what it announces was
written before it: the writer stores with release, the reader loads with acquire, both for the whole
system. There are no atomics across PCIe.

Under Triton's interpreter (TRITON_INTERPRET=1) the same names are plain loads and stores and the
host's clock, so that the kernels around them run on any machine.
"""

from __future__ import annotations

import time

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton runs kernels on the CPU, one program after the other."""

if INTERPRETED:

    def global_timer():
        """Nanoseconds of a clock that only goes forward, as int64."""
        return tl.cast(time.monotonic_ns(), tl.int64)

    def load_flag(flag_ptr):
        """Read a flag of 32 or 64 bits; whatever it announces can be read after this."""
        return tl.load(flag_ptr, volatile=True)

    def store_flag(flag_ptr, value):
        """Set a flag of 32 or 64 bits.

        A barrier must come before, if other threads of the program wrote what it announces.
        """
        tl.store(flag_ptr, value.to(flag_ptr.dtype.element_ty))

else:

    @triton.jit
    def global_timer():
        """Nanoseconds of a clock that all of the GPU shares, as int64."""
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )

    @triton.jit
    def load_flag(flag_ptr):
        """Read a flag of 32 or 64 bits; whatever it announces can be read after this."""
        if flag_ptr.dtype.element_ty == tl.int64:
            value = tl.inline_asm_elementwise(
                "ld.acquire.sys.global.b64 $0, [$1];",
                "=l,l",
                [flag_ptr],
                dtype=tl.int64,
                is_pure=False,
                pack=1,
            )
        else:
            value = tl.inline_asm_elementwise(
                "ld.acquire.sys.global.b32 $0, [$1];",
                "=r,l",
                [flag_ptr],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        return value

    @triton.jit
    def store_flag(flag_ptr, value):
        """Set a flag of 32 or 64 bits, by the program's first thread alone.

        A barrier must come before, if other threads of the program wrote what it announces.
        """
        if flag_ptr.dtype.element_ty == tl.int64:
            tl.inline_asm_elementwise(
                """
                {
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first st.release.sys.global.b64 [$1], $2;
                mov.u32 $0, 0;
                }
                """,
                "=r,l,l",
                [flag_ptr, value.to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                """
                {
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first st.release.sys.global.b32 [$1], $2;
                mov.u32 $0, 0;
                }
                """,
                "=r,l,r",
                [flag_ptr, value.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def typed_pointer(address, ELEMENT: tl.constexpr, ALIGNMENT: tl.constexpr = 16):
    """A pointer to `ELEMENT` from an address, a multiple of `ALIGNMENT`; so loads can be wide."""
    return (address // ALIGNMENT * ALIGNMENT).to(tl.pointer_type(ELEMENT))
