"""Puts the native kernels, compiled, into the wheel; CUTAWAY_BUILD_NATIVE=0 makes one for any machine, without them."""

import os
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the library beside the wheel's other files; an editable install compiles it at the first start."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform in the wheel's tag."""
        if version == "editable" or os.environ.get("CUTAWAY_BUILD_NATIVE") == "0":
            return
        sys.path.insert(0, str(Path(self.root, "server")))
        from cutaway_server.kernels import build_native

        compiler = build_native.find_compiler()
        if compiler is None:
            raise RuntimeError("no C compiler (cc, gcc or clang); CUTAWAY_BUILD_NATIVE=0 makes a wheel without kernels")
        self.scratch = TemporaryDirectory()
        library = build_native.compile_library(compiler, Path(self.scratch.name))
        target = f"cutaway_server/kernels/native/{build_native.prebuilt_name()}"
        build_data["force_include"][str(library)] = target
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove what was made on the way."""
        if hasattr(self, "scratch"):
            self.scratch.cleanup()
