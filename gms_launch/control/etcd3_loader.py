"""Import `etcd3` 0.12.0 under a current protobuf.

The generated modules in that release predate protobuf 4 and refuse to import ("Descriptors cannot be created
directly"). Their serialized descriptors are sound, so the three modules are rebuilt from these in a descriptor pool
of our own: nothing is registered in the process-wide pool, where another library may carry its own copy of etcd's
messages, and no environment variable is needed, which engines would inherit.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

#: How much gRPC says on stderr.
VERBOSITY = "GRPC_VERBOSITY"
_MODULES = ("kv_pb2", "auth_pb2", "rpc_pb2")
_LITERAL = re.compile(r"serialized_pb=(?:_b\()?(b?'(?:[^'\\]|\\.)*')")


def load() -> Any:
    """The `etcd3` package, ready to use. Raises `ImportError` when it is missing or is not the release we know."""
    if "etcd3" not in sys.modules:
        _rebuild_messages()
    # What fails is an error here, and said once: gRPC's own lines go to the terminal, of ports that others have taken
    # meanwhile too. It reads the variable as it is loaded, and engines shall not inherit that.
    said = os.environ.get(VERBOSITY)
    os.environ[VERBOSITY] = said or "NONE"
    try:
        return importlib.import_module("etcd3")
    finally:
        if said is None:
            del os.environ[VERBOSITY]


def _rebuild_messages() -> None:
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.internal import enum_type_wrapper

    spec = importlib.util.find_spec("etcd3")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("the package etcd3 is not installed; install gms-launch with its dependencies")
    root = Path(next(iter(spec.submodule_search_locations))) / "etcdrpc"
    pool = descriptor_pool.DescriptorPool()
    for name in _MODULES:
        pool.AddSerializedFile(_serialized_descriptor(root / f"{name}.py"))
    for name in _MODULES:
        descriptor = pool.FindFileByName(name.removesuffix("_pb2") + ".proto")
        module: Any = types.ModuleType(f"etcd3.etcdrpc.{name}")
        module.DESCRIPTOR = descriptor
        for message_name, message in descriptor.message_types_by_name.items():
            setattr(module, message_name, message_factory.GetMessageClass(message))
        for enum_name, enum in descriptor.enum_types_by_name.items():
            setattr(module, enum_name, enum_type_wrapper.EnumTypeWrapper(enum))
            for value_name, value in enum.values_by_name.items():
                setattr(module, value_name, value.number)
        sys.modules[module.__name__] = module


def _serialized_descriptor(path: Path) -> bytes:
    """The literal passed as `serialized_pb=` in a generated module, read without running or parsing the rest of it.

    A syntax tree of the whole module would cost the agent 6 MiB for good.
    """
    found = _LITERAL.search(path.read_text())
    if found is None:
        raise ImportError(f"{path} holds no serialized descriptor; gms-launch needs etcd3 0.12.0")
    value = ast.literal_eval(found[1])
    return value.encode("latin1") if isinstance(value, str) else bytes(value)
