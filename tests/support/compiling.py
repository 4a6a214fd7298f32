"""Translate Triton kernels to the machine code of a GPU on a machine without one."""

from typing import Any


def compile_for_gpu(kernel: Any, logits: str, architecture: int, constants: dict[str, Any]) -> bytes:
    """The binary of a kernel whose integers and addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: _type_of(name, logits, constants) for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] in "*i"
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": 8, "enable_fp_fusion": False},
    ).asm["cubin"]


def _type_of(name: str, logits: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("x_ptr", "y_ptr"):
        return logits
    if name.endswith("_ptr"):
        return "*fp32"
    return "i32" if name.endswith("_stride") or name == "num_columns" else "fp32"
