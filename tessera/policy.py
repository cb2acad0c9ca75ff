"""Who may do what: the one table, read from top to bottom. It is what is enforced, and it is complete.

A row stands for one RPC, or for one route of the gateway that is no RPC. A service does not start with an RPC or route
that has no row here, with a row for one that it does not have, or with one that contradicts how its RPC is exposed.

| Row | Who may |
|---|---|
| `OPEN` | anybody, without a credential |
| `AUTHENTICATED` | whoever has a good token: what everybody may know, or what concerns the caller alone |
| `OWN` | the one to whom the object belongs |
| `ADMIN` | members of the group `admins` |
| `READ` < `WRITE` < `MANAGE` | who has that permission on the scope, through itself or a group, and admins |
| `CAN_VIEW` < `CAN_QUERY` < `CAN_MANAGE` | who has that permission on the endpoint, likewise |
| `INFERENCE` | `CAN_QUERY`, also with a token that is good for that endpoint alone, and while Secrets is away |
| `internal(peer)` | that one of our own processes, over its socket; `operator` is who runs this machine |
| `on_behalf(peer)` | as `internal`, but with proof of a caller on whose behalf it asks |

Every call is recorded in the audit log but for what is open, for inference, which is counted, and for what our own
processes tell each other about the platform (`is_audited=False`).

A public RPC is called over REST or gRPC with a token, and by a peer with proof of its caller; the row is the same.
"""

from __future__ import annotations

from servicekit.policy import AUTHENTICATED, OPEN, Table, internal, on_behalf, permission

ADMINS, OWNER, SCOPE, ENDPOINT = "admins", "owner", "scope", "endpoint"
"""What the use cases decide about."""

ADMIN = permission(ADMINS)
OWN = permission(OWNER)
READ, WRITE, MANAGE = (permission(SCOPE, level) for level in ("READ", "WRITE", "MANAGE"))
CAN_VIEW, CAN_MANAGE = (permission(ENDPOINT, level) for level in ("CAN_VIEW", "CAN_MANAGE"))
INFERENCE = permission(ENDPOINT, "CAN_QUERY", is_inference=True)

POLICY: Table = {
    # Secrets: scopes and what is in them. The names of scopes are public (contract 4.1).
    "tessera.secrets.v1.Secrets/CreateScope": AUTHENTICATED,
    "tessera.secrets.v1.Secrets/ListScopes": AUTHENTICATED,
    "tessera.secrets.v1.Secrets/DeleteScope": MANAGE,
    "tessera.secrets.v1.Secrets/PutSecret": WRITE,
    "tessera.secrets.v1.Secrets/DeleteSecret": WRITE,
    "tessera.secrets.v1.Secrets/ListSecrets": READ,
    "tessera.secrets.v1.Secrets/GetSecret": READ,
    "tessera.secrets.v1.Secrets/PutAcl": MANAGE,
    "tessera.secrets.v1.Secrets/GetAcl": MANAGE,
    "tessera.secrets.v1.Secrets/ListAcls": MANAGE,
    "tessera.secrets.v1.Secrets/DeleteAcl": MANAGE,
    "tessera.secrets.v1.Secrets/ListSecretVersions": READ,
    "tessera.secrets.v1.Secrets/RestoreSecret": WRITE,
    "tessera.secrets.v1.Secrets/PurgeSecret": WRITE,
    # Values for launches. A grant takes CAN_MANAGE of its author, and READ of author and creator; a launch takes the
    # grant, and READ of the creator.
    "tessera.secrets.v1.SecretResolver/GrantLaunches": on_behalf("serving"),
    "tessera.secrets.v1.SecretResolver/Resolve": internal("serving"),
    "tessera.secrets.v1.SecretResolver/Settle": internal("serving"),
    "tessera.secrets.v1.SecretResolver/Reconcile": internal("serving"),
    # The directory: everybody may look, admins may change.
    "tessera.identity.v1.Scim/GetMe": AUTHENTICATED,
    "tessera.identity.v1.Scim/ListUsers": AUTHENTICATED,
    "tessera.identity.v1.Scim/GetUser": AUTHENTICATED,
    "tessera.identity.v1.Scim/CreateUser": ADMIN,
    "tessera.identity.v1.Scim/PatchUser": ADMIN,
    "tessera.identity.v1.Scim/ReplaceUser": ADMIN,
    "tessera.identity.v1.Scim/DeleteUser": ADMIN,
    "tessera.identity.v1.Scim/ListGroups": AUTHENTICATED,
    "tessera.identity.v1.Scim/GetGroup": AUTHENTICATED,
    "tessera.identity.v1.Scim/CreateGroup": ADMIN,
    "tessera.identity.v1.Scim/PatchGroup": ADMIN,
    "tessera.identity.v1.Scim/ReplaceGroup": ADMIN,
    "tessera.identity.v1.Scim/DeleteGroup": ADMIN,
    "tessera.identity.v1.Scim/ListServicePrincipals": AUTHENTICATED,
    "tessera.identity.v1.Scim/GetServicePrincipal": AUTHENTICATED,
    "tessera.identity.v1.Scim/CreateServicePrincipal": ADMIN,
    "tessera.identity.v1.Scim/PatchServicePrincipal": ADMIN,
    "tessera.identity.v1.Scim/ReplaceServicePrincipal": ADMIN,
    "tessera.identity.v1.Scim/DeleteServicePrincipal": ADMIN,
    # Tokens: one's own, and those of others.
    "tessera.identity.v1.Tokens/CreateToken": AUTHENTICATED,
    "tessera.identity.v1.Tokens/ListTokens": AUTHENTICATED,
    "tessera.identity.v1.Tokens/UpdateToken": OWN,
    "tessera.identity.v1.Tokens/DeleteToken": OWN,
    "tessera.identity.v1.Tokens/CreateOboToken": ADMIN,
    "tessera.identity.v1.Tokens/ListManagedTokens": ADMIN,
    "tessera.identity.v1.Tokens/GetManagedToken": ADMIN,
    "tessera.identity.v1.Tokens/UpdateManagedToken": ADMIN,
    "tessera.identity.v1.Tokens/DeleteManagedToken": ADMIN,
    # Client secrets of service principals.
    "tessera.identity.v1.ServicePrincipalSecrets/CreateServicePrincipalSecret": ADMIN,
    "tessera.identity.v1.ServicePrincipalSecrets/ListServicePrincipalSecrets": ADMIN,
    "tessera.identity.v1.ServicePrincipalSecrets/DeleteServicePrincipalSecret": ADMIN,
    # Who is calling.
    "tessera.identity.v1.Authority/ExchangeToken": internal("gateway", "serving"),
    "tessera.identity.v1.Authority/IssueToken": internal("gateway"),
    "tessera.identity.v1.Authority/GetPlatform": internal("gateway", "serving", is_audited=False),
    "tessera.identity.v1.Authority/RenewAdminToken": internal("operator"),
    # The keys that everything is sealed under.
    "tessera.secrets.v1.Keys/GetKeyStatus": internal("operator"),
    "tessera.secrets.v1.Keys/RotateRootKey": internal("operator"),
    "tessera.secrets.v1.Keys/RotateStoreKey": internal("operator"),
    "tessera.secrets.v1.Keys/RotateScopeKeys": internal("operator"),
    # The audit logs, and their keys: Serving's for Serving, all of them for who verifies the logs.
    "tessera.identity.v1.AuditLog/ListAuditRecords": ADMIN,
    "tessera.serving.v1.ServingAuditLog/ListServingAuditRecords": ADMIN,
    "tessera.identity.v1.AuditKeys/GetKey": internal("serving"),
    "tessera.identity.v1.AuditKeys/ListKeys": internal("operator"),
    "tessera.secrets.v1.Keys/AuthenticateBackup": internal("operator"),
    # Copies of what each service keeps.
    "tessera.backups.v1.Backups/Copy": internal("operator"),
    # Permissions on endpoints (contract 3.4), and the feed that tells them to those who enforce them.
    "tessera.identity.v1.Permissions/GetPermissions": CAN_MANAGE,
    "tessera.identity.v1.Permissions/SetPermissions": CAN_MANAGE,
    "tessera.identity.v1.Permissions/UpdatePermissions": CAN_MANAGE,
    "tessera.identity.v1.Permissions/GetPermissionLevels": CAN_VIEW,
    "tessera.identity.v1.AccessFeed/Watch": internal("gateway", "serving", is_audited=False),
    # Endpoints (contract 3.4). A list shows those that the caller may view; logs may hold what models were sent.
    "tessera.serving.v1.ServingEndpoints/CreateServingEndpoint": AUTHENTICATED,
    "tessera.serving.v1.ServingEndpoints/GetServingEndpoint": CAN_VIEW,
    "tessera.serving.v1.ServingEndpoints/ListServingEndpoints": CAN_VIEW,
    "tessera.serving.v1.ServingEndpoints/DeleteServingEndpoint": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/UpdateServingEndpointConfig": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/StopServingEndpoint": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/StartServingEndpoint": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/CancelServingEndpointUpdate": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/PatchServingEndpointTags": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/PutServingEndpointRateLimits": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/PutServingEndpointAiGateway": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/UpdateServingEndpointNotifications": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/PatchServingEndpointTelemetryConfig": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/ListServingEndpointEvents": CAN_VIEW,
    "tessera.serving.v1.ServingEndpoints/ExportServingEndpointMetrics": CAN_VIEW,
    "tessera.serving.v1.ServingEndpoints/ListServingEndpointMetricsHistory": CAN_VIEW,
    "tessera.serving.v1.ServingEndpoints/ListServingEndpointUsage": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/GetServedModelLogs": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/GetServedModelBuildLogs": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/FollowServedModelLogs": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/FollowServedModelBuildLogs": CAN_MANAGE,
    "tessera.serving.v1.ServingEndpoints/GetServingEndpointOpenApi": CAN_VIEW,
    "tessera.serving.v1.ServingEndpoints/Query": INFERENCE,
    "tessera.serving.v1.Routes/Watch": internal("gateway", is_audited=False),
    "tessera.serving.v1.Metering/Report": internal("gateway", is_audited=False),
    # Inference over REST, which the gateway answers by itself.
    "POST /serving-endpoints/{name}/invocations": INFERENCE,
    "POST /serving-endpoints/{name}/served-models/{served_model_name}/invocations": INFERENCE,
    "POST /serving-endpoints/chat/completions": INFERENCE,
    "POST /serving-endpoints/completions": INFERENCE,
    "POST /serving-endpoints/embeddings": INFERENCE,
    "POST /serving-endpoints/responses": INFERENCE,
    # About the gateway. Clients ask the first before they know where to log in; the second is for supervisors.
    "GET /.well-known/databricks-config": OPEN,
    "GET /health": OPEN,
    # OAuth: who has no token yet brings a client secret, or another token, in a form of its own.
    "GET /oidc/.well-known/oauth-authorization-server": OPEN,
    "GET /oidc/accounts/{account_id}/.well-known/oauth-authorization-server": OPEN,
    "GET /oidc/v1/authorize": OPEN,
    "POST /oidc/v1/token": OPEN,
    "GET /api/openapi.json": AUTHENTICATED,
    "POST /telemetry-ext": AUTHENTICATED,
    # gRPC's own services, at every listener; what is not named is not there. Reflection, where it is switched on, shows
    # public services only.
    "grpc.health.v1.Health/Check": OPEN,
    "grpc.health.v1.Health/Watch": OPEN,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": AUTHENTICATED,
}
