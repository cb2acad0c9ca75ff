"""The OAuth endpoints that clients expect below `/oidc` (RFC 6749, 7523, 8414, 9396): forms and documents, no messages.

Two grants are offered: a service principal's client secret for an access token, and any token for one that is good for
the queries of a single endpoint. What is asked is read here; who may have it, Secrets decides. Addresses are those of
the setting, whatever host a request names.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qsl, unquote_plus

import grpc
import orjson

from gateway.errors import OAuthError
from gateway.http import MOST_AWAITED, Answer, Request, read_body
from servicekit import channels, context
from servicekit.arrivals import Arrivals
from servicekit.errors import ServiceError
from servicekit.identity import authorization_details
from servicekit.shedding import Room
from servicekit.source import owner
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc

CLIENT_CREDENTIALS = "client_credentials"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
SCOPE = "all-apis"

FORM_LIMIT = 64 * 1024
"""Bytes of a form."""

MOST_FIELDS = 20

MOST_FORM_BYTES = 32 * 1024 * 1024
"""Of forms that are on their way, in all: whoever sends them is not known yet."""

ISSUE_SECONDS = 10.0
"""Seconds that Secrets has for issuing a token: an external issuer may have to be asked for its keys."""

_FORM = "application/x-www-form-urlencoded"
_JSON = (b"content-type", b"application/json")
_NO_STORE = (b"cache-control", b"no-store")
_OBJECT_PATH = re.compile(r"/serving-endpoints/([0-9a-f]{32})")
_SILENCES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_VERDICTS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


class CredentialRefused(OAuthError):
    """The client, or the token that it brought, is not who it says or not good any more."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"

    def too_many(self, refusal: ServiceError) -> OAuthError:
        """The same error, when there were too many of them before: with the text and the time of `refusal`."""
        return OAuthError(self.error, refusal.message, status=429, retry_after=refusal.retry_after)


class OAuth:
    """Discovery and tokens. `secrets` is the channel to Secrets; an exchange takes a place in `room`."""

    def __init__(self, secrets: grpc.aio.Channel, public_url: str, room: Room) -> None:
        self._channel = secrets
        self._room = room
        self._forms = Arrivals(MOST_AWAITED, most_bytes=MOST_FORM_BYTES)
        self._authority = rpc.AuthorityStub(secrets)
        root = f"{public_url}/oidc"
        self._metadata = orjson.dumps(
            {
                "issuer": root,
                "authorization_endpoint": f"{root}/v1/authorize",
                "token_endpoint": f"{root}/v1/token",
                "scopes_supported": [SCOPE],
                "response_types_supported": [],
                "grant_types_supported": [CLIENT_CREDENTIALS, JWT_BEARER],
                "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
                "authorization_details_types_supported": ["workspace_permission"],
            }
        )

    async def metadata(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        """Where tokens are to be had, and how."""
        answer.whole(200, [_JSON], self._metadata)

    async def authorize(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        """Refuses a login through a browser, which clients try when they have no credential."""
        raise OAuthError(
            "unsupported_response_type",
            "There is no login through a browser here. Use a personal access token, or a service principal's client id"
            f" and secret with the grant {CLIENT_CREDENTIALS}.",
        )

    async def token(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        """Answers with a token; raises OAuthError."""
        answer.headers.append(_NO_STORE)  # on every answer, whoever gives it
        self._room.check()
        with self._forms.of(owner(context.source())) as arriving:
            body = await read_body(request, FORM_LIMIT, arriving, _invalid_request)
        form = _parsed(request, body)
        grant = _required(form, "grant_type")
        if grant not in (CLIENT_CREDENTIALS, JWT_BEARER):
            raise OAuthError(
                "unsupported_grant_type", f"grant_type: {CLIENT_CREDENTIALS} and {JWT_BEARER} are offered."
            )
        if "assume_group" in form:
            raise OAuthError("invalid_request", "assume_group: not offered. The token has the rights of its owner.")
        if form.get("scope", SCOPE) != SCOPE:
            raise OAuthError("invalid_scope", f"scope: only {SCOPE}.")
        is_bound = grant == JWT_BEARER or "authorization_details" in form
        endpoint_id = _endpoint_id(_required(form, "authorization_details")) if is_bound else ""
        if grant == CLIENT_CREDENTIALS:
            message = pb.IssueTokenRequest(client=_client(request, form), endpoint_id=endpoint_id)
        else:
            message = pb.IssueTokenRequest(assertion=_required(form, "assertion"), endpoint_id=endpoint_id)
        context.enter(context.RequestContext(request.id))
        with self._room:
            issued = await self._issued(message, grant)
        document = {"access_token": issued.access_token, "token_type": "Bearer", "expires_in": issued.expires_in}
        if is_bound:
            document["authorization_details"] = [authorization_details(endpoint_id)]
        else:
            document["scope"] = SCOPE
        answer.whole(200, [_JSON], orjson.dumps(document))

    async def _issued(self, message: pb.IssueTokenRequest, grant: str) -> pb.IssueTokenResponse:
        try:
            return await channels.call(
                self._authority.IssueToken,
                message,
                peer="Secrets",
                timeout=ISSUE_SECONDS,
                waiting_for=self._channel,
            )
        except ServiceError as error:
            if error.code in _SILENCES:
                raise OAuthError("temporarily_unavailable", error.message, status=503, retry_after=1) from None
            if error.code not in _VERDICTS:
                raise
        if grant == CLIENT_CREDENTIALS:
            raise _invalid_client("The client id or the client secret is wrong, expired or deleted.")
        raise CredentialRefused("invalid_grant", "assertion: not a token that is good here, or bound to an endpoint.")


def _invalid_request(description: str) -> OAuthError:
    return OAuthError("invalid_request", description)


def _invalid_client(description: str) -> CredentialRefused:
    return CredentialRefused("invalid_client", description, status=401)


def _parsed(request: Request, body: bytes) -> dict[str, str]:
    """The fields of a form. One without a value counts as not given (RFC 6749, 3.2)."""
    kind = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
    if kind != _FORM:
        raise _invalid_request(f"The body must be a form: Content-Type {_FORM}.")
    try:
        # Without the limit on fields, 64 KiB make thirty thousand of them.
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=MOST_FIELDS
        )
    except ValueError:
        raise _invalid_request(f"The body is no form in UTF-8 with at most {MOST_FIELDS} fields.") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise _invalid_request("A field is given twice.")
    return {name: value for name, value in form.items() if value}


def _required(form: dict[str, str], name: str) -> str:
    if name not in form:
        raise _invalid_request(f"{name}: required.")
    return form[name]


def _client(request: Request, form: dict[str, str]) -> pb.ClientCredential:
    """The client's id and secret, from the Authorization header or from the form, but not from both (RFC 6749, 2.3)."""
    authorization = request.header(b"authorization")
    if authorization is None:
        if "client_id" not in form or "client_secret" not in form:
            raise _invalid_client("Send the client id and secret, in an Authorization header (Basic) or in the form.")
        return pb.ClientCredential(client_id=form["client_id"], client_secret=form["client_secret"])
    if "client_secret" in form:
        raise _invalid_request("client_secret: the Authorization header holds a credential already.")
    client = _basic(authorization)
    if form.get("client_id", client.client_id) != client.client_id:
        raise _invalid_request("client_id: not the one of the Authorization header.")
    return client


def _basic(authorization: str) -> pb.ClientCredential:
    kind, _, credential = authorization.strip().partition(" ")
    try:
        client_id, colon, client_secret = base64.b64decode(credential.strip(), validate=True).decode().partition(":")
    except ValueError:  # no base64, or no text
        colon = ""
    if kind.lower() != "basic" or not colon:
        raise _invalid_client("The Authorization header must be Basic, with the client id and the client secret.")
    return pb.ClientCredential(client_id=unquote_plus(client_id), client_secret=unquote_plus(client_secret))


def _endpoint_id(text: str) -> str:
    """The endpoint that `authorization_details` names; they have one form only (contract 6.9)."""
    try:
        details = orjson.loads(text)
        match = _OBJECT_PATH.fullmatch(details[0]["object_path"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        match = None
    if match is None or details != [authorization_details(match[1])]:
        shown = orjson.dumps([authorization_details("<id>")]).decode()
        raise OAuthError("invalid_authorization_details", f"authorization_details: expected {shown}.")
    return match[1]
