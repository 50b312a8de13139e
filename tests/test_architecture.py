"""The layout holds: layers import downwards only, no cycles, no oversized file or function, a light start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "chulengo"
# bottom first; packages on one line may not import each other
LAYERS = [
    {"errors"},
    {"config"},
    {"data", "nano"},
    {"kernels"},
    {"model"},
    {"train", "generate", "export"},
    {"evaluate", "serve"},
    {"cli"},
]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
TAKES_CONFIG = {"cli", "config", "train/finetune.py", "serve/app.py"}
BANNED_NAMES = {"utils", "helpers", "common", "misc", "manager"}


def level(package: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if package in names)


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imports(file: Path) -> set[str]:
    """Every `chulengo.x.y` that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("chulengo.")}


def test_imports_point_downwards() -> None:
    wrong = []
    for file in source_files():
        own = relative(file).split("/")[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for name in imports(file):
            other = name.split(".")[1]
            if other.startswith("__"):
                continue
            if other != own and level(other) >= level(own):
                wrong.append(f"{relative(file)} imports {name}")
    assert not wrong, wrong


def test_no_import_cycles_between_modules() -> None:
    modules = {"chulengo." + relative(f).removesuffix(".py").replace("/", "."): f for f in source_files()}
    edges = {m: {n for n in imports(f) if n in modules and n != m} for m, f in modules.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        for other in edges[module]:
            visit(other, (*path, module))
        done.add(module)

    for module in modules:
        visit(module, ())


def test_sizes() -> None:
    wrong = []
    for file in source_files():
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            wrong.append(f"{relative(file)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{relative(file)}:{node.name}: {length} lines")
    assert not wrong, wrong


def test_config_stops_at_the_door() -> None:
    wrong = [
        relative(file)
        for file in source_files()
        if any(name.startswith("chulengo.config") for name in imports(file))
        and relative(file) not in TAKES_CONFIG
        and relative(file).split("/")[0] not in TAKES_CONFIG
    ]
    assert not wrong, wrong


def test_names_say_what_they_are() -> None:
    stems = {part for f in source_files() for part in relative(f).removesuffix(".py").split("/")}
    assert not stems & BANNED_NAMES


def test_no_blanket_silence_and_no_remote_code() -> None:
    for file in source_files():
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
            ):
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), relative(file)
        assert "trust_remote_code=True" not in text, relative(file)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["inspect", "--help"], ["chat", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys, contextlib\n"
        "from chulengo.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    main({words!r})\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
