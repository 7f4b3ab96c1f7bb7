"""How long things may get: a file, a function, a class, the whole."""

from __future__ import annotations

import ast

from measures import FACES, SOURCES, Function, code_lines, functions, nodes

FILE_LINES = 600
FACE_LINES = 900  # trainer.py and module.py: what users call
FUNCTION_LINES = 60
METHODS = 25
CODE_LINES = 30_600  # neither blank, nor comment, nor documentation

# Faces that users see: as many methods as the contract names.
FACADES = {
    "Trainer",
    "LightningModule",
    "LightningDataModule",
    "LightningCLI",
    "ModelCheckpoint",
    "Fabric",
    "_FabricModule",
    "Collective",
    "TorchCollective",
    "Precision",
    "Strategy",
    "ParallelStrategy",
    "Callback",
    "LambdaCallback",
    "ModelHooks",
    "DataHooks",
    "CheckpointHooks",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def length(function: Function) -> int:
    """Lines from `def` to the end without the docstring."""
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        total -= docstring.end_lineno - docstring.lineno + 1
    return total


def test_no_file_is_too_long() -> None:
    sizes = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    long = {path: size for path, size in sizes.items() if size > (FACE_LINES if path in FACES else FILE_LINES)}
    assert not long, f"Split by topic: {long}"


def test_no_function_is_too_long() -> None:
    # A constructor that spells out a signature users know is as long as that signature.
    long = {
        f"{path}:{node.lineno} {node.name}": length(node)
        for path, node in functions()
        if length(node) - signature_lines(node) > FUNCTION_LINES
    }
    assert not long, long


def signature_lines(function: Function) -> int:
    return function.body[0].lineno - function.lineno


def test_no_class_has_too_many_methods() -> None:
    wide = {}
    for path, node in nodes(ast.ClassDef):
        methods = {child.name for child in node.body if isinstance(child, FUNCTIONS)}
        if node.name not in FACADES and len(methods) > METHODS:
            wide[f"{path} {node.name}"] = len(methods)
    assert not wide, wide


def test_the_whole_stays_small() -> None:
    assert code_lines() <= CODE_LINES
