"""Builds the C++ extension only; everything else stands in pyproject.toml.

``TAILOR_FAST_NATIVE=0 pip install .`` gives a pure Python install. OpenMP is used where the
compiler has it; without it the kernels run on one thread. ``TAILOR_FAST_SANITIZE=1`` is for
``make asan``: such a build loads only into a process that runs under the sanitizers.
"""

import os
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

OPENMP_FLAG = "-fopenmp"
# Nobody reads errno or the exception flags after a square root: it may be one vector instruction.
VECTORISABLE = ["-fno-math-errno", "-fno-trapping-math"]
# A shared bounds error or overflow must end the test, not only print a line.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OPENMP_PROBE = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"


class BuildExtension(build_ext):
    """Adds the OpenMP flag where a program that needs it compiles and links."""

    def build_extensions(self) -> None:
        if self._has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append(OPENMP_FLAG)
                extension.extra_link_args.append(OPENMP_FLAG)
        super().build_extensions()

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=[OPENMP_FLAG]
                )
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "probe.so")), extra_postargs=[OPENMP_FLAG]
                )
            except (CompileError, LinkError):
                self.announce("no OpenMP: the extension will use one thread", level=3)
                return False
        return True


extension = Pybind11Extension(
    "tailor_fast._C",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    include_dirs=["csrc"],
    cxx_std=17,
    # Contraction off: a fused multiply-add would give other bits than the reference backend.
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off", *VECTORISABLE],
)
if os.environ.get("TAILOR_FAST_SANITIZE", "0") != "0":
    extension.extra_compile_args += [*SANITIZERS, "-g", "-O1", "-fno-omit-frame-pointer"]
    extension.extra_link_args += SANITIZERS
native = os.environ.get("TAILOR_FAST_NATIVE", "1") != "0"
setup(ext_modules=[extension] if native else [], cmdclass={"build_ext": BuildExtension})
