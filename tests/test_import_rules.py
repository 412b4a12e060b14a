"""The house's import rules: read from every module's source and, where only running tells, from a fresh process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "perception"
MODULES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "manager", "handler"}
REACH_FOR_NETWORKS = ("predictor.py", "weights.py", "bench.py", "bench_sparsefusion.py", "training/", "networks/")
LAZY = ("open3d", "nuscenes", "spconv", "rosbags", "mcap", "mcap_ros2", "rerun", "onnx", "onnxruntime", "mmdet3d")
# Calls and settings that change the process, the machine or the network; patterns of fnmatch.
SIDE_EFFECTS = (
    *("torch.compile", "torch.hub.*", "torch.set_*", "torch.manual_seed", "torch.use_deterministic_algorithms"),
    *("torch.jit.script", "torch.cuda.*", "torch.ops.load_library", "torch.utils.cpp_extension.*", "torch.backends.*"),
    *("np.seterr", "np.set_*", "np.random.*", "numpy.seterr", "numpy.random.*", "random.seed", "cv2.set*"),
    *("matplotlib.use", "urllib.*", "requests.*", "socket.*", "subprocess.*", "os.system", "os.environ*", "os.putenv"),
    *("os.makedirs", "sys.path*", "warnings.filterwarnings", "warnings.simplefilter", "logging.basicConfig"),
    *("print", "open"),
)


def imports(tree: ast.Module, module: PurePosixPath) -> Iterator[tuple[str, bool]]:
    """Each imported name in full ("perception.types.Pose"), and whether it is imported at module level."""
    package = ["perception", *module.parent.parts]
    at_import = set(map(id, running_at_import(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in at_import) for name in names)


def running_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported: no function bodies, no main guard, nothing for type checkers."""
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            queue += node.orelse
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        elif not isinstance(node, ast.Lambda):
            queue += ast.iter_child_nodes(node)


def system(module: str) -> str | None:
    """The system of "perception.networks.occrwkv.blocks": occrwkv; None for shared layers and outside networks."""
    parts = module.split(".")
    inside = parts[:2] == ["perception", "networks"] and len(parts) > 2 and parts[2] != "layers"
    return parts[2] if inside else None


def violations(module: PurePosixPath, source: str) -> list[str]:
    """What a module (its path within the package) does against the rules."""
    tree, found = ast.parse(source), []
    own_name = ".".join(["perception", *module.with_suffix("").parts])
    if FORBIDDEN_NAMES & set(module.stem.split("_")):
        found.append(f"is named {module.stem}: name the idea")
    for name, at_import in imports(tree, module):
        top = name.partition(".")[0]
        if top == "rclpy" or top.endswith("_msgs"):
            found.append(f"imports {name}: ROS stays outside")
        if str(module) == "types.py" and top == "perception":
            found.append(f"imports {name}: types import nothing of ours")
        if module.parts[0] == "networks" and (top == "typer" or name.startswith("perception.datasets")):
            found.append(f"imports {name}: networks know neither the command line nor data sets")
        if system(own_name) and system(name) and system(own_name) != system(name):
            found.append(f"imports {name}: of another system")
        if name.startswith("perception.networks") and not str(module).startswith(REACH_FOR_NETWORKS):
            found.append(f"imports {name}: only {', '.join(REACH_FOR_NETWORKS)} reach for networks")
        if top in LAZY and at_import:
            found.append(f"imports {name} at module level: it is optional, import it where it is used")
    for node in running_at_import(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if called is not None and has_side_effect(ast.unparse(called)):
            found.append(f"line {node.lineno}: {ast.unparse(called)}() runs at import")  # type: ignore[attr-defined]
        for decorator in getattr(node, "decorator_list", []):
            if has_side_effect(ast.unparse(decorator)):
                found.append(f"line {decorator.lineno}: @{ast.unparse(decorator)} runs at import")
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(has_side_effect(ast.unparse(target)) for target in targets):
            found.append(f"line {node.lineno}: {ast.unparse(node)} runs at import")  # type: ignore[attr-defined]
    return found


def has_side_effect(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in SIDE_EFFECTS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_rules_hold(path: Path):
    module = PurePosixPath(path.relative_to(PACKAGE).as_posix())
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("decode.py", "import rclpy.node", "ROS stays outside"),
        ("decode.py", "def f():\n    from sensor_msgs.msg import Image", "ROS stays outside"),
        ("types.py", "from perception.errors import DataError", "types import nothing of ours"),
        ("types.py", "from .errors import DataError", "types import nothing of ours"),
        ("networks/occrwkv/model.py", "import typer", "networks know neither"),
        ("networks/occrwkv/model.py", "from perception import datasets", "networks know neither"),
        ("networks/occrwkv/model.py", "from ...datasets.nuscenes import NuScenes", "networks know neither"),
        ("networks/occrwkv/model.py", "from perception.networks import msocc", "of another system"),
        ("networks/occrwkv.py", "from perception.networks.msocc.model import Fuser", "of another system"),
        ("networks/occrwkv/model.py", "from ..msocc import Fuser", "of another system"),
        ("sweeps.py", "from perception.networks.layers import sparse", "reach for networks"),
        ("evaluation/run.py", "def f():\n    import perception.networks", "reach for networks"),
        ("view3d.py", "import open3d as o3d", "optional"),
        ("cli.py", "try:\n    from nuscenes.nuscenes import NuScenes\nexcept ImportError:\n    pass", "optional"),
        ("image_utils.py", "", "name the idea"),
        ("datasets/base.py", "", "name the idea"),
        ("predictor.py", "import torch\ntorch.set_float32_matmul_precision('high')", "runs at import"),
        ("predictor.py", "import torch\ntorch.backends.cudnn.benchmark = True", "runs at import"),
        ("predictor.py", "import torch\nif torch.cuda.is_available():\n    X = 1", "runs at import"),
        ("predictor.py", "import torch\n@torch.compile\ndef f(): pass", "runs at import"),
        ("predictor.py", "import torch\n@torch.compile(dynamic=True)\ndef f(): pass", "runs at import"),
        ("predictor.py", "import torch\nf = torch.hub.load('a', 'b')", "runs at import"),
        ("predictor.py", "import os\nos.environ['A'] = '1'", "runs at import"),
        ("predictor.py", "class A:\n    import urllib.request\n    x = urllib.request.urlopen('a')", "runs at import"),
        ("predictor.py", "import cv2\ncv2.setNumThreads(0)", "runs at import"),
    ],
)  # fmt: skip
def test_each_rule_sees_its_breach(module: str, source: str, complaint: str):
    assert any(complaint in found for found in violations(PurePosixPath(module), source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("view3d.py", "def show():\n    import open3d"),
        ("view3d.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import open3d"),
        ("networks/occrwkv/model.py", "from perception.networks.layers import sparse\nfrom . import blocks"),
        ("predictor.py", "def load():\n    from perception.networks import NETWORKS"),
        ("training/loop.py", "from perception.networks import NETWORKS"),
        ("predictor.py", "def f():\n    import torch\n    torch.set_num_threads(1)"),
        ("cli.py", "def main(): pass\nif __name__ == '__main__':\n    print(main())"),
        ("database.py", ""),
    ],
)
def test_what_is_allowed_is_not_complained_of(module: str, source: str):
    assert violations(PurePosixPath(module), source) == []


def in_a_fresh_process(code: str) -> dict:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_core_needs_no_torch():
    core = ["types", "errors", "config", "geometry", "frames", "sync", "sweeps", "rectify", "decode"]
    loaded = in_a_fresh_process(
        f"import json, sys\nfor name in {core}: __import__('perception.' + name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not {"torch", "open3d", "nuscenes", "spconv", "typer", "matplotlib"} & set(loaded)


def test_importing_everything_changes_nothing():
    """Neither a connection, nor an optional package, nor a global setting of torch, numpy or OpenCV."""
    # Modules of Triton kernels need Triton to define them; what calls them imports them where it is installed.
    kernels = [] if find_spec("triton") else [path for path in MODULES if "import triton" in path.read_text()]
    modules = [path for path in MODULES if path not in kernels]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in modules]
    state = in_a_fresh_process(
        "import json, os, socket, sys, cv2, numpy, torch\n"
        "def forbidden(*a, **k): raise AssertionError('a connection at import')\n"
        "socket.socket.connect = forbidden\n"
        "def settings(): return [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),\n"
        "    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,\n"
        "    torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),\n"
        "    torch.initial_seed(), torch.cuda.is_initialized(), numpy.geterr(), cv2.getNumThreads(),\n"
        "    numpy.get_printoptions()['precision'], dict(os.environ)]\n"
        "before = settings()\n"
        f"for name in {names}: __import__(name.removesuffix('.__init__'))\n"
        "print(json.dumps({'same': before == settings(), 'loaded': [n.partition('.')[0] for n in sys.modules]}))"
    )
    assert state["same"]
    assert not set(LAZY) & set(state["loaded"])
