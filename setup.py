"""Compiles the native kernels where there is a compiler; all else is in setup.cfg."""

from setuptools import Extension, setup

FOLDER = "tf_gpt2/runtime/native"
QUIET = ["-g0", "-Wno-psabi", "-Wno-maybe-uninitialized"]
"""No debug symbols, and no warnings of the compiler's own headers."""

setup(
    ext_modules=[
        # no module, but a library that Python loads by its path; without a compiler the rest is installed
        Extension(
            "tf_gpt2.runtime._kernels",
            sources=[f"{FOLDER}/kernels.cc"],
            depends=[f"{FOLDER}/{name}" for name in ("product.inc", "float_product.inc", "attention.inc", "xla_ffi.h")],
            # sums must not depend on whether a processor multiplies and adds in one operation
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", *QUIET],
            optional=True,
        )
    ]
)
