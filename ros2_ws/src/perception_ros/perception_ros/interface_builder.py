"""ROS message packages without cmake: the wheels' own rosidl generators, then the C compiler.

    <package>/msg/X.msg -> .idl -> type hash (.json) -> C structs, Fast DDS type support, Python -> one extension

colcon links five libraries per package; here all objects go into `<package>_s__rosidl_typesupport_c.<abi>.so`, the one
that the Python classes load, and rclpy finds the type support through the handle in it. Fast DDS is the only
middleware, so the type support is bound to it and dispatches to no other. Run as a process of its own:
`python -m perception_ros.interface_builder <package> <folder>` with AMENT_PREFIX_PATH set to the wheels' prefix.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY_KINDS = ("rosidl_generator_c", "rosidl_typesupport_fastrtps_c", "rosidl_typesupport_c", "rosidl_generator_py")
"""The libraries that an installed message package brings, and ours link to."""

RUNTIME_LIBRARIES = (
    "rosidl_runtime_c",
    "rosidl_typesupport_c",
    "rosidl_typesupport_fastrtps_c",
    "rosidl_typesupport_fastrtps_cpp",
    "rcutils",
    "rmw",
    "fastcdr",
)


def build(package: str, folder: Path) -> None:
    """Turn `folder/<package>/msg/*.msg` into an importable package in the same place.

    Raises:
        subprocess.CalledProcessError: the compiler refused; its message is in `stderr`.
    """
    prefix = Path(sys.prefix)
    definitions = [f"{folder / package}:msg/{path.name}" for path in sorted((folder / package / "msg").glob("*.msg"))]
    include = [str(path) for path in prefix.glob("share/*/msg")]
    with tempfile.TemporaryDirectory() as scratch:
        generated = Path(scratch)
        _generate(package, definitions, include, generated)
        binary = _compile(package, generated, prefix)
        shutil.copytree(generated / "py" / package, folder / package, dirs_exist_ok=True, ignore=_sources)
        shutil.copy(binary, folder / package)
        (folder / package / "__init__.py").touch()


def _sources(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".c", ".o"))]


def _generate(package: str, definitions: list[str], include: list[str], generated: Path) -> None:
    """rosidl's stages in order; C and C++ go to `generated/c/<package>`, Python to `generated/py/<package>`."""
    from rosidl_cli.command.translate.api import translate
    from rosidl_generator_c.cli import GenerateC
    from rosidl_generator_py.cli import GeneratePython
    from rosidl_typesupport_c.cli import GenerateCTypesupport
    from rosidl_typesupport_fastrtps_c.cli import GenerateFastRTPSCTypesupport

    c, python = generated / "c" / package, generated / "py" / package
    idl = translate(
        package_name=package, interface_files=definitions, include_paths=include, output_format="idl", output_path=c
    )
    GenerateC("c").generate(package, idl, include, c)
    GenerateFastRTPSCTypesupport("fastrtps_c").generate(package, idl, include, c)
    bound = ["rosidl_typesupport_fastrtps_c"]
    GenerateCTypesupport("c", typesupport_implementations=bound).generate(package, idl, include, c)
    GeneratePython("py", typesupport_implementations=["rosidl_typesupport_c"]).generate(package, idl, include, python)


def _compile(package: str, generated: Path, prefix: Path) -> Path:
    import numpy as np

    headers = [path for path in (prefix / "include").iterdir() if path.is_dir()]
    include = [generated / "c", sysconfig.get_path("include"), np.get_include(), *headers, prefix / "include"]
    flags = ["-O1", "-fPIC", "-w", *(f"-I{path}" for path in include)]

    def compiled(source: Path) -> str:
        target = source.with_name(source.name + ".o")
        compiler = ["g++", "-std=c++17"] if source.suffix == ".cpp" else ["gcc", "-std=gnu11"]
        command = [*compiler, *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
        return str(target)

    # One source for all of a kind whose names do not collide: the headers are most of the work.
    joint = {"types.cpp": "*.cpp", "python.c": "*_s.c"}
    sources = set(generated.rglob("*.c"))
    for name, pattern in joint.items():
        parts = set(generated.rglob(pattern))
        sources = sources - parts | {generated / name}
        (generated / name).write_text("".join(f'#include "{part}"\n' for part in sorted(parts)))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(sources)))
    lib = prefix / "lib"
    packages = sorted({path.parts[-3] for path in prefix.glob("share/*/msg/*.msg")})
    names = [*(f"{name}__{kind}" for name in packages for kind in LIBRARY_KINDS), *RUNTIME_LIBRARIES]
    libraries = [f"-l{name}" for name in names if (lib / f"lib{name}.so").exists()]
    binary = generated / f"{package}_s__rosidl_typesupport_c{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = ["g++", "-shared", "-o", str(binary), *objects, f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--as-needed"]
    subprocess.run([*link, *libraries], check=True, capture_output=True)  # noqa: S603
    return binary


if __name__ == "__main__":
    try:
        build(sys.argv[1], Path(sys.argv[2]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr.decode(errors='replace')}")
