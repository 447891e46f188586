"""Who may do what in the run's own etcd. It knows everybody by the name in their certificate."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import gms_launch.control.client as door
from gms_launch.control.client import Etcd
from gms_launch.errors import RefusedError

etcd3 = door.etcd3
#: Etcd's own name for the user who may do everything.
ROOT = "root"
_READWRITE = 2


def establish(etcd: Etcd, users: Mapping[str, Sequence[str]], again: bool = False) -> None:
    """Make root, and `users` who may read and write their prefixes, and have etcd ask from now on who somebody is.

    For a store that knows nobody. `again`: one that knows exactly these already is left as it is. Raises
    `RefusedError` when it knows anybody else, and `NoContactError`.
    """
    rpc = etcd3.etcdrpc
    ours = {ROOT, *users}
    begun = False

    def request(client: Any) -> None:
        nonlocal begun
        auth = rpc.AuthStub(client.channel)

        def ask(method: Any, message: Any) -> Any:
            return method(message, timeout=etcd.timeout)

        def make(method: Any, message: Any) -> None:
            try:
                ask(method, message)
            except door.RpcError as exc:
                # Of an attempt of ours whose answer was lost.
                if "already" not in (exc.details() or ""):
                    raise

        if not begun:
            known = set(ask(auth.UserList, rpc.AuthUserListRequest()).users)
            known |= set(ask(auth.RoleList, rpc.AuthRoleListRequest()).roles)
            if again and known == ours:
                return
            if known:
                raise RefusedError(
                    f"the run's etcd is new and knows {', '.join(sorted(known))} already, whom this run did not make: "
                    "somebody else has been at it"
                )
            begun = True
        make(auth.RoleAdd, rpc.AuthRoleAddRequest(name=ROOT))
        for name, prefixes in {ROOT: (), **users}.items():
            if name != ROOT:
                make(auth.RoleAdd, rpc.AuthRoleAddRequest(name=name))
            for prefix in prefixes:
                permission = {
                    "permType": _READWRITE,
                    "key": prefix.encode(),
                    "range_end": etcd3.utils.increment_last_byte(prefix.encode()),
                }
                ask(auth.RoleGrantPermission, rpc.AuthRoleGrantPermissionRequest(name=name, perm=permission))
            # Etcd wants a password. Nobody ever knows this one.
            make(auth.UserAdd, rpc.AuthUserAddRequest(name=name, password=secrets.token_hex(32)))
            ask(auth.UserGrantRole, rpc.AuthUserGrantRoleRequest(user=name, role=name))
        ask(auth.AuthEnable, rpc.AuthEnableRequest())

    etcd.call(request)
