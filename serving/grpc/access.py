"""Access control of gRPC, around the handlers of all methods: before the message of a call is received."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from serving.access.peers import is_loopback, is_proxied, read_grpc_peer
from serving.access.policy import OPEN_METHODS, AccessPolicy, scope_of_method
from serving.access.tokens import ADMIN
from serving.errors import ServingError
from serving.observer import RequestObserver
from serving.request_context import UNROUTED, RequestContext, current_request


class GuardedHandlers(grpc.GenericRpcHandler):
    """The methods of a server behind access control, unknown ones and reflection included.

    Register services here as at a server, and this at the server. `observer` reports the calls that are refused.
    """

    def __init__(self, policy: AccessPolicy, observer: RequestObserver) -> None:
        self._policy = policy
        self._observer = observer
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}  # of the known methods, by path

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add the methods of services; see `grpc.Server`."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, *_: Any) -> None:
        """Do nothing: the methods are among the generic handlers too."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method, which checks the caller before anything else."""
        path: str = details.method
        if guarded := self._guarded.get(path):
            return guarded
        found = next((found for each in self._handlers if (found := each.service(details))), None)
        is_checked = self._policy.checks_every_call or scope_of_method(path) == ADMIN
        if not is_checked or path in OPEN_METHODS:
            if found:
                self._guarded[path] = found
            return found
        guarded = self._guard(found or grpc.stream_unary_rpc_method_handler(_unimplemented), path)
        if found:
            self._guarded[path] = guarded
        return guarded

    def _guard(self, handler: Any, path: str) -> grpc.RpcMethodHandler:
        """Return a handler that calls another one for admitted callers only."""
        shape = f"{_stream(handler.request_streaming)}_{_stream(handler.response_streaming)}"
        behaviour = getattr(handler, shape)

        async def respond(request: Any, call: Any) -> Any:
            await self._check(call, path)
            return await behaviour(request, call)

        async def respond_with_stream(request: Any, call: Any) -> AsyncIterator[Any]:
            await self._check(call, path)
            async for response in behaviour(request, call):
                yield response

        make = getattr(grpc, f"{shape}_rpc_method_handler")
        chosen = respond_with_stream if handler.response_streaming else respond
        guarded: grpc.RpcMethodHandler = make(chosen, handler.request_deserializer, handler.response_serializer)
        return guarded

    async def _check(self, call: Any, path: str) -> None:
        """Note the caller in the request context, or end the call."""
        metadata: dict[str, str] = {}
        for key, value in call.invocation_metadata() or ():
            if isinstance(value, str):
                metadata[key] = f"{metadata[key]},{value}" if key in metadata else value
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        credentials = token.strip().encode() if scheme.lower() == "bearer" else b""
        peer = read_grpc_peer(call.peer())
        address = self._policy.proxies.find_client(peer, metadata.get("x-forwarded-for", ""))
        context = RequestContext(client=address or call.peer(), protocol="gRPC", route=UNROUTED)
        try:
            context.caller = self._policy.admit(
                scope_of_method(path),
                credentials=credentials,
                address=address,
                is_local=is_loopback(peer) and not is_proxied(metadata),
            )
        except ServingError as error:
            wait = () if error.retry_after_s is None else (("retry-after", str(error.retry_after_s)),)
            refusal = getattr(grpc.StatusCode, error.code), str(error)
            context.status = error.code
        else:
            current_request.set(context)
            return
        context.request_id = metadata.get("x-request-id", "")
        self._observer.report(context)
        await call.abort(*refusal, wait)


async def _unimplemented(_: Any, call: Any) -> bytes:
    await call.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")  # as gRPC itself
    return b""


def _stream(is_stream: bool) -> str:
    return "stream" if is_stream else "unary"
