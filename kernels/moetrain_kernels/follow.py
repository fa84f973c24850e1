"""Kernels that are launched before the one in front of them has ended (programmatic dependent launch, from sm_90 on).

`Launcher(kernel, early=True)` lets the device place a kernel's programs as soon as the last programs of the kernel in
front of it have begun and leave room, so that its launch and set-up fall into the other's last round. Such a kernel
calls `follow` before it touches memory: from there on everything in front of it is done and visible. Without the
attribute, and on older devices, it does nothing. PTX ISA, griddepcontrol.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.language import target_info
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import interpreting

COMPILED = tl.constexpr(not interpreting())


def _follow():
    if COMPILED:  # noqa: SIM102 (the interpreter must not come to the second question)
        if target_info.cuda_capability_geq(9, 0):
            gdc_wait()
            gdc_launch_dependents()


follow = triton.jit(_follow)
follow_ring = gluon.jit(_follow)  # the same for kernels in Gluon
