"""Access to the HTTP service: key, browsers of other sites, and names under which it may be reached."""

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ascendspeed.inference.serving import chat_page, openapi
from ascendspeed.inference.serving.api_error import ApiError

FOREIGN_SITES = (b"cross-site", b"same-site")
"""Values of `Sec-Fetch-Site` with which a browser marks a request of another site's page."""
OPEN_PATHS = (*openapi.OPEN_PATHS, chat_page.PATH)
"""Paths that need no key."""


class ApiKeyMiddleware:
    """Requires `Authorization: Bearer KEY` everywhere but on /health and the static page."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._expected = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._expected):
                await error_response(ApiError(401, "the API key is missing or wrong"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BrowserMiddleware:
    """Refuses requests of other sites' pages: without a key, a visit there could use the model."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 403."""
        if scope["type"] == "http" and scope["method"] == "POST" and _is_from_other_site(scope["headers"]):
            error = ApiError(403, "a page of another site sent the request; open the service's own page")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class LoopbackHostMiddleware:
    """Refuses requests under names that are not this machine's own.

    A page of another site can let its name point to 127.0.0.1 (DNS rebinding): for the browser the service is
    then of that site, and the `Host` header alone tells.
    """

    def __init__(self, app: ASGIApp, listen_host: str) -> None:
        """`listen_host`: the name or address of --host, which is legal too."""
        self._app, self._listen_host = app, listen_host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 403."""
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host")  # only programs that speak HTTP/1.0 send none
            if host is not None and not self._is_own(host.decode("latin-1")):
                error = ApiError(
                    403,
                    "without an API key the service answers under localhost and loopback addresses only, not "
                    f"under the Host {host.decode('latin-1')!r}; use one of them, or set a key",
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        """True for loopback names and addresses, and for --host; the port does not matter."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        except ValueError:
            return False
        return name in ("localhost", self._listen_host) or name.endswith(".localhost") or is_loopback(name)


def is_loopback(address: str) -> bool:
    """True for an address, in digits, that only this machine reaches."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def guarded(app: ASGIApp, api_key: str | None, listen_host: str, address: str) -> ASGIApp:
    """Returns `app` behind the checks of a service that listens on `listen_host`, which is `address`."""
    app = BrowserMiddleware(app)
    if api_key:
        return ApiKeyMiddleware(app, api_key)
    return LoopbackHostMiddleware(app, listen_host) if is_loopback(address) else app


def error_response(error: ApiError) -> JSONResponse:
    """Returns the answer for an error."""
    return JSONResponse(error.body, error.status, error.headers)


def _is_from_other_site(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """True for a request that a browser sends for a page of another site. Programs send neither header."""
    values = dict(headers)
    if site := values.get(b"sec-fetch-site"):  # a proxy in front may change Host, but not this
        return site in FOREIGN_SITES
    origin = values.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != values.get(b"host")
