"""`AccessPolicy`: who may call what. Both entry points ask it before they receive the body or the message."""

from __future__ import annotations

import re

from serving.access.model_folders import ModelFolders
from serving.access.peers import TrustedProxies, group_address
from serving.access.rate_limit import RateLimiter
from serving.access.tokens import ADMIN, PREDICT, TokenFile
from serving.errors import PermissionDenied, Unauthenticated

# What needs no token, with GET or HEAD. Everything else is closed, whether it exists or not.
OPEN_PATHS = frozenset(("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"))
METRICS_PATHS = frozenset(("/metrics", "/monitoring/prometheus/metrics"))
OPEN_METHODS = frozenset(
    (
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    )
)

# What changes the served models.
_ADMIN_PATH = re.compile("/v2/repository/.*/(load|unload)/?", re.DOTALL)
ADMIN_METHODS = frozenset(
    (
        "/tensorflow.serving.ModelService/HandleReloadConfigRequest",
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        "/inference.GRPCInferenceService/RepositoryModelUnload",
    )
)

# The same message for no token and for a wrong one.
_NO_TOKEN = "a valid token is required, in the header Authorization: Bearer TOKEN"


def scope_of_path(path: str) -> str:
    """Return the scope that a token needs for a path of the HTTP API, percent-decoded and without the prefix."""
    return ADMIN if _ADMIN_PATH.fullmatch(path) else PREDICT


def scope_of_method(path: str) -> str:
    """Return the scope that a token needs for a gRPC method such as `/grpc.health.v1.Health/Check`."""
    return ADMIN if path in ADMIN_METHODS else PREDICT


class AccessPolicy:
    """Decides whether a caller may do something, by its token, its address and its number of requests.

    Args:
        tokens: the tokens, one of which every caller needs; None: no caller needs one.
        rate_limiter: counts the requests of each token, or without one of each address; None: no limit.
        proxies: whose headers are believed.
        model_folders: what a reloaded configuration may name, whoever sends it.
        allow_remote_reload: without tokens, whether callers on other machines may change the served models.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        rate_limiter: RateLimiter | None,
        proxies: TrustedProxies,
        model_folders: ModelFolders,
        *,
        allow_remote_reload: bool,
    ) -> None:
        self._tokens = tokens
        self._rate_limiter = rate_limiter
        self.proxies = proxies
        self.model_folders = model_folders
        self._allow_remote_reload = allow_remote_reload

    @property
    def has_tokens(self) -> bool:
        """Whether callers need a token."""
        return self._tokens is not None

    @property
    def limits_rate(self) -> bool:
        """Whether the number of requests of a caller is limited."""
        return self._rate_limiter is not None

    @property
    def checks_every_call(self) -> bool:
        """Whether calls other than those that change the served models are checked, too."""
        return self._tokens is not None or self._rate_limiter is not None

    def identify(self, credentials: bytes) -> str:
        """Return the name of the caller's token, or "" without a valid one."""
        token = self._tokens.find(credentials) if self._tokens else None
        return token.name if token else ""

    def admit(self, scope: str, *, credentials: bytes, address: str, is_local: bool) -> str:
        """Admit a request, or refuse it.

        Args:
            scope: what the request needs.
            credentials: the text of the caller's token, empty without one.
            address: the IP address of the caller.
            is_local: whether it is known to be on this machine.

        Returns:
            The name of its token; "" where none is needed.

        Raises:
            Unauthenticated: it has no valid token.
            PermissionDenied: its token does not have the scope; or, without tokens, it is not on this machine.
            RateLimited: it has sent too many requests.
        """
        token = self._tokens.find(credentials) if self._tokens else None
        if self._rate_limiter:
            self._rate_limiter.admit(f"token {token.name}" if token else group_address(address))
        if self._tokens:
            if token is None:
                raise Unauthenticated(_NO_TOKEN)
            if scope not in token.scopes:
                raise PermissionDenied(f"the token {token.name} does not have the scope {scope}")
            return token.name
        if scope == ADMIN and not (is_local or self._allow_remote_reload):
            raise PermissionDenied(
                "only callers on the server's own machine may change the served models; "
                "start it with --auth-token-file or --allow-remote-reload to let others do so"
            )
        return ""
