"""ROS message packages without cmake: the wheels' own rosidl generators, then the C compiler.

    <package>/msg/X.msg -> .idl -> type hash (.json) -> C structs, two type supports, Python -> three binaries

| binary | holds |
|---|---|
| `lib<package>__rosidl_typesupport_fastrtps_c.so` | structs, both type supports and the dispatch between them |
| `lib<package>__rosidl_typesupport_introspection_c.so` | nothing; its symbols are found in the first, which it needs |
| `<package>_s__rosidl_typesupport_c.<abi>.so` | what the Python classes load; it needs the other two |

The dispatch opens the first two by these names, which the loader takes for those that the third brought in; so no
search path has to know the folder. (colcon links seven libraries.) Run as a process of its own:
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

LIBRARY_KINDS = (
    "rosidl_generator_c",
    "rosidl_typesupport_fastrtps_c",
    "rosidl_typesupport_introspection_c",
    "rosidl_typesupport_c",
    "rosidl_generator_py",
)
"""The libraries that an installed message package brings, and ours link to."""

RUNTIME_LIBRARIES = (
    "rosidl_runtime_c",
    "rosidl_typesupport_c",
    "rosidl_typesupport_introspection_c",
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
        binaries = _compile(package, generated, prefix)
        shutil.copytree(generated / "py" / package, folder / package, dirs_exist_ok=True, ignore=_sources)
        for binary in binaries:
            shutil.copy(binary, folder / package)
        (folder / package / "__init__.py").touch()


def _sources(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".c", ".o"))]


def _generate(package: str, definitions: list[str], include: list[str], generated: Path) -> None:
    """rosidl's stages in order, each kind to `generated/<kind>/<package>`: some give files of the same name."""
    from rosidl_cli.command.translate.api import translate
    from rosidl_generator_c.cli import GenerateC
    from rosidl_generator_py.cli import GeneratePython
    from rosidl_typesupport_c.cli import GenerateCTypesupport
    from rosidl_typesupport_fastrtps_c.cli import GenerateFastRTPSCTypesupport
    from rosidl_typesupport_introspection_c.cli import GenerateIntrospectionCTypesupport

    c, introspection, python = (generated / kind / package for kind in ("c", "introspection", "py"))
    idl = translate(
        package_name=package, interface_files=definitions, include_paths=include, output_format="idl", output_path=c
    )
    GenerateC("c").generate(package, idl, include, c)
    GenerateFastRTPSCTypesupport("fastrtps_c").generate(package, idl, include, c)
    GenerateIntrospectionCTypesupport("introspection_c").generate(package, idl, include, introspection)
    both = ["rosidl_typesupport_fastrtps_c", "rosidl_typesupport_introspection_c"]
    GenerateCTypesupport("c", typesupport_implementations=both).generate(package, idl, include, c)
    GeneratePython("py", typesupport_implementations=["rosidl_typesupport_c"]).generate(package, idl, include, python)


def _compile(package: str, generated: Path, prefix: Path) -> list[Path]:
    """The three binaries."""
    import numpy as np

    headers = [path for path in (prefix / "include").iterdir() if path.is_dir()]
    include = [generated / "c", generated / "introspection", *headers, prefix / "include"]
    include += [Path(sysconfig.get_path("include")), Path(np.get_include())]
    flags = ["-O1", "-fPIC", "-w", *(f"-I{path}" for path in include)]

    def compiled(source: Path) -> Path:
        target = source.with_name(source.name + ".o")
        compiler = ["g++", "-std=c++17"] if source.suffix == ".cpp" else ["gcc", "-std=gnu11"]
        _run(*compiler, *flags, "-c", source, "-o", target)
        return target

    # One source for all of a kind whose names do not collide: the headers are most of the work.
    joint = {"types.cpp": list(generated.glob("c/**/*.cpp")), "python.c": list(generated.glob("py/**/*.c"))}
    for name, parts in joint.items():
        (generated / name).write_text("".join(f'#include "{part}"\n' for part in sorted(parts)))
    sources = [*generated.glob("*.c*"), *generated.glob("c/**/*.c"), *generated.glob("introspection/**/*.c")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    python = [path for path in objects if path.name == "python.c.o"]
    types = [path for path in objects if path not in python]

    lib = prefix / "lib"
    packages = sorted({path.parts[-3] for path in prefix.glob("share/*/msg/*.msg")})
    names = [*(f"{name}__{kind}" for name in packages for kind in LIBRARY_KINDS), *RUNTIME_LIBRARIES]
    installed = ["-Wl,--as-needed", *(f"-l{name}" for name in names if (lib / f"lib{name}.so").exists())]
    first, second = (
        generated / f"lib{package}__rosidl_typesupport_{kind}.so" for kind in ("fastrtps_c", "introspection_c")
    )
    third = generated / f"{package}_s__rosidl_typesupport_c{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = ["g++", "-shared", f"-L{lib}", f"-Wl,-rpath,$ORIGIN:{lib}", "-Wl,--no-as-needed", "-o"]
    _run(*link, first, f"-Wl,-soname,{first.name}", *types, *installed)
    _run(*link, second, f"-Wl,-soname,{second.name}", first)
    _run(*link, third, *python, first, second, *installed)
    return [first, second, third]


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603


if __name__ == "__main__":
    try:
        build(sys.argv[1], Path(sys.argv[2]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr.decode(errors='replace')}")
