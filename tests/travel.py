"""Finds what would break, some of it silently, when code is sent by source to a server without steerlens.

Measured on a real server: a zero-argument `super()` has no `__class__` cell there, `self.__x` is not mangled, a
decorator made with `functools.wraps` is dropped, generated methods (dataclass, NamedTuple) travel as bytecode of this
Python minor version, a global that names a package the server lacks fails to unpickle, also where it is unused, and
one that pickle does not find by its name (a C enumeration of torch) cannot be sent at all.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import pickle
import sys
import textwrap
import types

#: Packages of an NDIF server that travelling code may name.
SERVER = {"torch", "numpy", "einops", "nnsight"}
PLAIN_DECORATORS = {"property", "staticmethod", "classmethod"}


def problems(thing: type | types.FunctionType) -> list[str]:
    """What is wrong with sending a class or function, and everything of steerlens that its code names."""
    found: list[str] = []
    seen: set[int] = set()
    _visit(thing, found, seen)
    return found


def _visit(thing, found, seen):
    if id(thing) in seen:
        return
    seen.add(id(thing))
    name = f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, type):
        if hasattr(thing, "__dataclass_fields__") or hasattr(thing, "_fields"):
            found.append(f"{name} is a dataclass or NamedTuple: its generated methods travel as bytecode")
            return
        for base in thing.__bases__:
            if base.__module__.startswith(("steerlens", "tests", "test_")):
                _visit(base, found, seen)
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        _check_node(node, name, found)
    for function in _functions(thing):
        for used in function.__code__.co_names:
            _check_global(function.__globals__.get(used), used, name, found, seen)


def _functions(thing):
    members = vars(thing).values() if isinstance(thing, type) else [thing]
    for member in members:
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if isinstance(member, types.FunctionType):
            yield from _nested(member)


def _nested(function):
    yield function
    for constant in function.__code__.co_consts:
        if isinstance(constant, types.CodeType):
            yield types.SimpleNamespace(__code__=constant, __globals__=function.__globals__)


def _check_node(node, name, found):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
        found.append(f"{name} calls super() without arguments")
    if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__"):
        found.append(f"{name} uses the mangled name {node.attr}")
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        for decorator in node.decorator_list:
            word = ast.unparse(decorator)
            if word not in PLAIN_DECORATORS and not word.endswith(".setter"):
                found.append(f"{name} is decorated with {word}, which may be dropped on the way")


def _check_global(value, used, name, found, seen):
    if value is None or hasattr(builtins, used):
        return
    if isinstance(value, types.ModuleType):
        root = value.__name__.partition(".")[0]
        if root == "steerlens":
            found.append(f"{name} names the module {value.__name__}, which would travel whole")
        elif root not in SERVER and root not in sys.stdlib_module_names:
            found.append(f"{name} names {root}, which a server lacks")
        return
    module = getattr(value, "__module__", None) or ""
    root = module.partition(".")[0]
    if root in ("steerlens", "test_travel", "tests"):
        if isinstance(value, (type, types.FunctionType)):
            _visit(value, found, seen)
    elif root and root not in SERVER | {"builtins"} and root not in sys.stdlib_module_names:
        found.append(f"{name} names {module}.{used}, which a server lacks")
    elif isinstance(value, type) or callable(value):
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            found.append(f"{name} names {module}.{used}, which cannot be sent by its name: {error}")
