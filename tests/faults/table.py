"""The planted faults: bugs that somebody could make, each with the tests that must notice it.

To add one, append a `Fault`: its old text must stand exactly once in the file, and a unit test says when it no longer
does. Name the tests that are *about* the promise, the fewest that should go red. Then bring the table in
tests/README.md up to date with `python -m tests.faults --list`, and see it caught: `make faults F=name`.
"""

from __future__ import annotations

from tests.faults.fault import Fault

_SECRETS = "tests/service/test_secrets.py"
_ACLS = "tests/service/test_acls.py"
_GRANTS = "tests/service/test_grants.py"
_PERMISSIONS = "tests/service/test_permissions.py"
_ENDPOINTS = "tests/service/test_endpoint_permissions.py"
_REVOCATION = "tests/service/test_revocation.py::test_right_that_is_taken_away_is_gone_at_every_gateway"
_OAUTH = "tests/service/test_oauth.py"
_OIDC = "tests/service/test_oidc.py"
_ONCE = "tests/service/test_once.py"
_IDENTITY = "tests/service/test_identity.py"
_DIRECTORY = "tests/service/test_directory.py"
_PEERS = "tests/service/test_peers.py"
_VERSIONS = "tests/service/test_versions.py"
_BUILDS = "tests/service/test_model_environments.py"
_GPUS = "tests/service/test_gpus.py"
_MODEL = "tests/service/test_secrets_model.py::test_every_sequence_is_answered_as_the_model_answers_it"
_INTEGRITY = "tests/unit/secrets_service/test_integrity.py"
_ROTATION = "tests/service/test_key_rotation.py"
_SOURCES = "tests/service/test_key_sources.py"
_BACKUP = "tests/service/test_backup.py"
_REGISTRY = "tests/unit/serving_service/test_registry.py"
_SETTLEMENT = "tests/unit/serving_service/test_settlement.py"
_KILLED = "tests/service/test_kill_points.py::test_a_kill_at_any_point_of_a_change_comes_to_the_same_end"
_HISTORIES = "tests/service/test_linearizability.py::test_eight_clients_see_one_service_whatever_is_killed_or_given_up"
_FORKED_GOLDEN = "tests/e2e/test_warm.py::test_a_forked_model_is_started_with_exactly_what_one_that_is_executed_is"

_LISTENERS = "tests/service/test_grpc_server.py"
_POWER = "tests/service/test_power_loss.py"
_STORAGE = "tests/service/test_storage_faults.py"
_CONTRACT = "tests/service/test_storage_contract.py"
_FOLLOW = "tests/service/test_follow.py"
_CAUSES = "tests/service/test_causes.py::test_cause_is_the_same_wherever_one_looks"

FAULTS = (
    # --- peers on other machines ---
    Fault(
        name="any-service-of-the-authority",
        property="S14",
        file="servicekit/relay.py",
        old="                if name != self._callee:\n",
        new="                if not name:\n",
        tests=(f"{_PEERS}::test_a_caller_says_nothing_to_who_is_not_the_service_that_it_means",),
    ),
    Fault(
        name="trust-domain-not-looked-at",
        property="S14",
        file="servicekit/peers.py",
        old='        name = uri.removeprefix(spiffe_id(self._trust_domain, ""))\n        if uri != spiffe_id(',
        new='        name = uri.rpartition("/")[2]\n        if not uri or not name or name == spiffe_id(',
        tests=(f"{_PEERS}::test_a_stranger_is_turned_away_and_the_log_says_who_and_why",),
    ),
    # --- who may do what ---
    Fault(
        name="read-without-permission",
        property="S7",
        file="secrets_service/scopes.py",
        old="        _require(standing, found, caller)\n        if sealed",
        new="        current_decision(policy.SCOPE).allow()\n        if sealed",
        tests=(f"{_ACLS}::test_each_operation_needs_its_permission", _MODEL),
    ),
    Fault(
        name="write-changes-acls",
        property="S7",
        file="tessera/policy.py",
        old='Secrets/PutAcl": MANAGE,',
        new='Secrets/PutAcl": WRITE,',
        tests=(f"{_ACLS}::test_each_operation_needs_its_permission", _MODEL),
    ),
    Fault(
        name="restore-by-readers",
        property="S7",
        file="tessera/policy.py",
        old='Secrets/RestoreSecret": WRITE,',
        new='Secrets/RestoreSecret": READ,',
        tests=(f"{_VERSIONS}::test_versions_are_listed_by_readers_and_changed_by_writers", _MODEL),
    ),
    Fault(
        name="launch-without-permission",
        property="S15",
        file="secrets_service/resolver.py",
        old="denied = [reader for reader in readers if not _may_read(connection, scope, reader)]",
        new="denied: list[User | None] = []",
        tests=(
            f"{_GRANTS}::test_a_author_without_read_cannot_add_a_reference",
            f"{_GRANTS}::test_c_creator_without_read_is_refused_at_the_grant_and_at_the_launch",
            f"{_GRANTS}::test_h_creator_who_loses_read_is_named_with_scope_and_key_and_holds_what_runs",
        ),
    ),
    Fault(
        name="key-told-before-permission",
        property="S8",
        file="secrets_service/scopes.py",
        old="""        _require(standing, found, caller)
        if sealed is None:
            raise SecretNotFound(found.name, key)
""",
        new="""        if sealed is None:
            raise SecretNotFound(found.name, key)
        _require(standing, found, caller)
""",
        tests=(
            f"{_ACLS}::test_without_permission_nobody_learns_which_keys_exist",
            "tests/service/test_secrecy.py::test_without_permission_keys_that_exist_and_others_are_refused_alike",
        ),
    ),
    Fault(
        name="key-looked-for-before-permission",
        property="S8",
        file="secrets_service/scopes.py",
        old="may_read = access.allows(standing, Permission.READ)",
        new="may_read = True",
        tests=(f"{_ACLS}::test_key_is_not_even_looked_for_where_one_may_not_read",),
    ),
    Fault(
        name="endpoints-seen-by-everybody",
        property="S8",
        file="servicekit/access.py",
        old="""        if endpoint_id is None or level is None:
            return None
        if level < needed:""",
        new="""        if endpoint_id is None:
            return None
        if level is None or level < needed:""",
        tests=("tests/service/test_secrecy.py::test_endpoint_without_permission_is_one_that_does_not_exist",),
    ),
    Fault(
        name="endpoint-read-before-permission",
        property="S8",
        file="serving_service/endpoints.py",
        old="        endpoint_id = await self._database.read(store.id_of, name)\n",
        new="""        seen = await self._database.read(store.endpoint_named, name)
        endpoint_id = seen.id if seen else None
""",
        tests=("tests/service/test_secrecy.py::test_endpoint_is_not_read_for_somebody_who_may_not_see_it",),
    ),
    # --- the directory ---
    Fault(
        name="ids-given-again",
        property="S12",
        file="secrets_service/directory_store.py",
        old='"INSERT INTO principals (kind, name, folded) VALUES (?, ?, ?) RETURNING id"',
        new="""\
        "INSERT INTO principals (id, kind, name, folded) VALUES"
        " ((SELECT coalesce(max(id), 1000000000000000) + 1 FROM principals), ?, ?, ?) RETURNING id\"""",
        tests=(f"{_DIRECTORY}::test_user_made_anew_under_an_old_name_inherits_nothing",),
    ),
    Fault(
        name="deactivated-owner-accepted",
        property="S12",
        file="secrets_service/authority.py",
        old="return stored.owner.profile.is_active and self._now() * 1000 < stored.info.expires_ms",
        new="return self._now() * 1000 < stored.info.expires_ms",
        tests=(f"{_IDENTITY}::test_token_of_an_inactive_user_is_refused", _MODEL),
    ),
    Fault(
        name="assertion-outlives-its-token",
        property="S12",
        file="secrets_service/authority.py",
        old="            await authority.confirm(found.principal)\n",
        new="            pass\n",
        tests=(f"{_DIRECTORY}::test_who_is_deactivated_or_deleted_is_refused_at_once_also_with_an_assertion",),
    ),
    Fault(
        name="last-admin-may-go",
        property="S7",
        file="secrets_service/directory.py",
        old="            if not directory_store.has_active_admin(connection):\n                raise LastAdmin\n",
        new="",
        tests=(f"{_DIRECTORY}::test_last_active_admin_stays",),
    ),
    Fault(
        name="directory-changed-by-anybody",
        property="S7",
        file="secrets_service/callers.py",
        old="    if not require_active(connection, caller).is_admin:",
        new="    if not require_active(connection, caller):",
        tests=(f"{_DIRECTORY}::test_only_admins_change_the_directory", _MODEL),
    ),
    Fault(
        name="groups-from-the-assertion",
        property="S12",
        file="secrets_service/callers.py",
        old="    if not require_active(connection, caller).is_admin:",
        new="    if not (require_active(connection, caller) and caller.is_admin):",
        tests=(
            "tests/unit/secrets_service/test_callers.py::test_what_an_assertion_says_about_groups_makes_nobody_an_admin",
        ),
    ),
    Fault(
        name="patch-half-done",
        property="R2",
        file="servicekit/database.py",
        old="""        if connection.in_transaction:
            connection.execute("ROLLBACK")
""",
        new="""        if connection.in_transaction:
            connection.execute("COMMIT")
""",
        tests=(
            f"{_CONTRACT}::test_function_that_raises_leaves_nothing_and_the_next_one_works",
            f"{_DIRECTORY}::test_last_active_admin_stays",
        ),
    ),
    Fault(
        name="two-instances-of-one-database",
        property="R4",
        file="servicekit/database.py",
        old="fcntl.LOCK_EX | fcntl.LOCK_NB",
        new="fcntl.LOCK_SH | fcntl.LOCK_NB",
        tests=(
            f"{_CONTRACT}::test_second_instance_is_refused_until_the_first_is_gone",
            "tests/service/test_secrets.py::test_second_service_on_the_same_data_is_refused",
        ),
    ),
    Fault(
        name="error-of-the-driver",
        property="R2",
        file="servicekit/database.py",
        old="        raise _ours(error) from error\n",
        new="        raise\n",
        tests=(
            f"{_CONTRACT}::test_broken_constraint_is_told_apart_and_nothing_is_stored",
            f"{_CONTRACT}::test_reads_cannot_write",
        ),
    ),
    # --- what was acknowledged ---
    Fault(
        name="commits-not-synced",
        property="R1",
        file="servicekit/database.py",
        old='        "synchronous=FULL",\n',
        new='        "synchronous=NORMAL",\n',
        tests=(f"{_POWER}::test_nothing_acknowledged_is_lost_by_a_power_loss_at_any_moment",),
    ),
    Fault(
        name="failed-sync-survived",
        property="R20",
        file="servicekit/database.py",
        old="        os._exit(STATUS_NOT_SYNCED)\n",
        new="        return\n",
        tests=(f"{_STORAGE}::test_sync_that_fails_ends_the_process_which_never_syncs_again",),
    ),
    Fault(
        name="checkpoint-fails-in-silence",
        property="R20",
        file="servicekit/database.py",
        old='        "wal_autocheckpoint=0",  # see `_write`\n',
        new='        "wal_autocheckpoint=1",\n',
        tests=(f"{_STORAGE}::test_sync_that_fails_ends_the_process_which_never_syncs_again",),
    ),
    Fault(
        name="answer-recorded-apart",
        property="R2",
        file="servicekit/once.py",
        old="            self._record(connection, request, _serialized(request, result))\n",
        new="""            connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            self._record(connection, request, _serialized(request, result))
""",
        tests=("tests/service/test_kill_points_of_secrets.py::test_change_that_is_cut_short_is_whole_or_not_at_all",),
    ),
    # --- what waits for whom ---
    Fault(
        name="clock-set-back-brings-tokens-back",
        property="R21",
        file="secrets_service/clock.py",
        old="        return self._latest\n",
        new="        return self._now()\n",
        tests=("tests/service/test_clock_jumps.py::test_jumps_stop_nothing_and_bring_nothing_back",),
    ),
    Fault(
        name="files-synced-in-the-event-loop",
        property="R24",
        file="servicekit/audit_export.py",
        old="            await asyncio.to_thread(self._sink.add, records)",
        new="            self._sink.add(records)",
        tests=("tests/service/test_event_loop.py::test_nothing_that_takes_its_time_happens_in_the_event_loop",),
    ),
    # --- what is said ---
    Fault(
        name="text-of-an-error-in-the-log",
        property="S20",
        file="servicekit/interceptors.py",
        old='log.error("call failed", extra=facts, exc_info=(type(error), error, error.__traceback__))',
        new='log.error("call failed", extra={**facts, "exception": f"{error}"})',
        tests=(
            "tests/unit/test_hygiene.py::test_log_events_are_fixed_texts_with_chosen_fields",
            "tests/service/test_grpc_server.py::test_exception_of_a_handler_stays_in_the_service",
        ),
    ),
    Fault(
        name="interpreter-led-by-variables",
        property="S21",
        file="servicekit/process.py",
        old="    if not sys.flags.isolated:\n",
        new="    if not sys.flags.safe_path:\n",
        tests=("tests/e2e/test_process.py::test_variables_that_the_interpreter_would_heed_are_dropped_and_named",),
    ),
    Fault(
        name="value-in-a-shape",
        property="S1",
        file="servicekit/safe_repr.py",
        old="    if field.GetOptions().debug_redact:\n",
        new="    if field.GetOptions().debug_redact and not field.is_repeated:\n",
        tests=("tests/unit/servicekit/test_safe_repr.py::test_redacted_field_never_shows_wherever_it_is",),
    ),
    Fault(
        name="debugged-in-production",
        property="S21",
        file="servicekit/process.py",
        old="    if aids := debugging_aids(os.environ):",
        new="    if aids := debugging_aids({}):",
        tests=("tests/e2e/test_process.py::test_debugging_aid_that_would_tell_is_refused",),
    ),
    # --- tokens and assertions ---
    Fault(
        name="any-secret-goes",
        property="S10",
        file="secrets_service/tokens.py",
        old="hmac.compare_digest(mine.mac, theirs.mac) and mine.version",
        new="mine.version",
        tests=(
            f"{_IDENTITY}::test_secret_of_one_token_does_not_go_with_the_id_of_another",
            "tests/unit/secrets_service/test_tokens.py::test_only_the_right_secret_under_the_right_id_matches",
        ),
    ),
    Fault(
        name="expiry-ignored",
        property="S10",
        file="secrets_service/authority.py",
        old="return stored.owner.profile.is_active and self._now() * 1000 < stored.info.expires_ms",
        new="return stored.owner.profile.is_active",
        tests=(f"{_IDENTITY}::test_expired_token_is_refused_at_once_and_no_longer_listed",),
    ),
    Fault(
        name="known-token-id-shows",
        property="S10",
        file="secrets_service/store.py",
        old="""    if not tokens.is_one_of(candidates, find_token_mac(connection, token_id)):
        return None
    return find_token(connection, token_id)
""",
        new="""    found = find_token(connection, token_id)
    return found if tokens.is_one_of(candidates, find_token_mac(connection, token_id)) else None
""",
        tests=(
            "tests/unit/secrets_service/test_authority.py"
            "::test_wrong_secret_is_looked_up_as_an_unknown_id_is_however_well_the_token_is_known",
        ),
    ),
    Fault(
        name="audience-not-checked",
        property="S13",
        file="servicekit/identity.py",
        old="""                audience=AUDIENCE,
                options={"require": [""",
        new="""                options={"verify_aud": False, "require": [""",
        tests=("tests/unit/servicekit/test_identity.py::test_forged_assertion_is_refused_with_a_fixed_text",),
    ),
    Fault(
        name="internal-rpc-in-public",
        property="S14",
        file="servicekit/grpc_server.py",
        old="            if row.peers and listener.peer not in row.peers:",
        new="            if row.peers and listener.peer is not None and listener.peer not in row.peers:",
        tests=(f"{_IDENTITY}::test_internal_rpc_exists_only_on_the_sockets_of_its_callers",),
    ),
    Fault(
        name="forwarded-for-believed",
        property="S14",
        file="servicekit/source.py",
        old="""    if address is None or not _is_in(address, trusted):
        return _immediate(""",
        new="""    if address is None:
        return _immediate(""",
        tests=("tests/unit/servicekit/test_source.py::test_stranger_is_not_believed",),
    ),
    # --- values at rest ---
    Fault(
        name="key-not-bound",
        property="S2",
        file="secrets_service/cipher.py",
        old="            place.key.encode(),\n",
        new="",
        tests=(
            f"{_SECRETS}::test_moved_or_changed_ciphertext_is_data_loss_and_others_still_open",
            "tests/unit/secrets_service/test_cipher.py::test_record_opens_at_no_other_place",
        ),
    ),
    Fault(
        name="version-not-bound",
        property="S2",
        file="secrets_service/cipher.py",
        old='            place.version.to_bytes(8, "big"),\n',
        new="",
        tests=(
            f"{_SECRETS}::test_old_ciphertext_of_a_key_does_not_open_again",
            "tests/unit/secrets_service/test_cipher.py::test_record_opens_at_no_other_place",
        ),
    ),
    Fault(
        name="key-version-not-bound",
        property="S2",
        file="secrets_service/cipher.py",
        old="            self._version,\n            place.field",
        new="            place.field",
        tests=(
            "tests/unit/secrets_service/test_cipher.py"
            "::test_record_that_states_another_version_does_not_open_under_that_one",
            "tests/unit/secrets_service/test_vectors.py::test_both_implementations_open_what_the_other_seals",
        ),
    ),
    Fault(
        name="key-made-over-data",
        property="S4",
        file="secrets_service/foundation.py",
        old="        if await database.read(store.holds_data):",
        new="        if False:",
        tests=(f"{_SECRETS}::test_store_that_lost_what_it_begins_with_is_not_founded_again",),
    ),
    Fault(
        name="refused-start-is-a-success",
        property="S4",
        file="servicekit/process.py",
        old="""        log.error("cannot start", extra={"cause": str(error)})
        return STATUS_FAILED
""",
        new="""        log.error("cannot start", extra={"cause": str(error)})
        return 0
""",
        tests=(f"{_SECRETS}::test_harmed_root_key_stops_the_start_and_changes_nothing",),
    ),
    Fault(
        name="old-token-mac-stays",
        property="S5",
        file="secrets_service/authority.py",
        old="        if stored.mac_version != self._macs.current:",
        new="        if stored.mac_version > self._macs.current:",
        tests=(
            "tests/unit/secrets_service/test_authority.py"
            "::test_mac_under_an_older_key_is_renewed_when_its_token_is_used",
            "tests/service/test_first_format.py::test_tokens_get_a_mac_under_the_new_key_when_they_are_used",
        ),
    ),
    Fault(
        name="migration-in-parts",
        property="R26",
        file="secrets_service/first_format.py",
        old="    for signing_key in store.signing_keys(connection):",
        new="    connection.execute('COMMIT')\n    connection.execute('BEGIN')\n"
        "    for signing_key in store.signing_keys(connection):",
        tests=("tests/service/test_first_format.py::test_start_that_is_killed_at_any_step_is_finished_by_the_next",),
    ),
    Fault(
        name="acl-set-not-authenticated",
        property="S3",
        file="secrets_service/store.py",
        old="""    integrity.of(connection).require(row[5], "scope", *found.content)
""",
        new="",
        tests=(
            f"{_INTEGRITY}::test_no_edit_gains_a_right_and_every_edit_of_what_decides_is_noticed",
            "tests/service/test_rights.py::test_scope_whose_acls_were_edited_is_closed_and_the_other_is_not",
        ),
    ),
    Fault(
        name="generation-alone-authenticated",
        property="S3",
        file="secrets_service/store.py",
        old="self.folded, self.generation, rows)",
        new="self.folded, self.generation)",
        tests=(f"{_INTEGRITY}::test_no_edit_gains_a_right_and_every_edit_of_what_decides_is_noticed",),
    ),
    Fault(
        name="edit-blessed-by-a-change",
        property="S3",
        file="secrets_service/directory_store.py",
        old="""    integrity.of(connection).require(row[5], "account", account_id, *row[:5], sorted(belongs))
""",
        new="",
        tests=(f"{_INTEGRITY}::test_later_change_does_not_bless_an_edit",),
    ),
    Fault(
        name="rights-believed-at-every-start",
        property="S3",
        file="secrets_service/foundation.py",
        old="    if not keyring.rights_are_authenticated:",
        new="    if keyring.current:",
        tests=("tests/service/test_rights.py::test_rights_are_made_authentic_once_in_the_life_of_a_store",),
    ),
    Fault(
        name="foreign-trigger-runs",
        property="S3",
        file="servicekit/database.py",
        old="    _refuse_foreign_code(connection, path, scripts)\n",
        new="",
        tests=("tests/service/test_rights.py::test_service_does_not_start_with_a_trigger_that_is_not_its_own",),
    ),
    Fault(
        name="store-key-used-before-it-is-stored",
        property="S5",
        file="secrets_service/rotation.py",
        old="""        await self._database.write(_recorded, root=root, keyring=keyring)
        self._base.keyring.use(keyring)
""",
        new="""        self._base.keyring.use(keyring)
        await self._database.write(_recorded, root=root, keyring=keyring)
""",
        tests=(f"{_ROTATION}::test_store_key_that_cannot_be_recorded_is_not_used",),
    ),
    Fault(
        name="rotation-blesses-edits",
        property="S3",
        file="secrets_service/rotation_store.py",
        old="_AUTHENTICATE[kind](connection, row_id, believed=False)",
        new="_AUTHENTICATE[kind](connection, row_id, believed=True)",
        tests=(f"{_ROTATION}::test_new_store_key_blesses_nothing_that_was_edited",),
    ),
    Fault(
        name="root-key-moved-too-early",
        property="S5",
        file="secrets_service/rotation.py",
        old="        fresh = await self._base.root.stage()\n",
        new="        fresh = await self._base.root.stage()\n        await self._base.root.finish()\n",
        tests=(f"{_ROTATION}::test_rotation_that_is_killed_at_any_step_loses_nothing",),
    ),
    Fault(
        name="old-key-of-a-scope-stays",
        property="S5",
        file="secrets_service/rotation.py",
        old="        made_before_ms = self._now_ms() - self._ages.scope * _DAY_MS if self._ages.scope else -1\n",
        new="        made_before_ms = -1\n",
        tests=(f"{_ROTATION}::test_keys_are_renewed_when_they_are_old",),
    ),
    Fault(
        name="key-service-not-asked-back",
        property="S4",
        file="secrets_service/kms.py",
        old="        if not hmac.compare_digest(root.key.reveal(), key):\n",
        new="        if False:\n",
        tests=(f"{_SOURCES}::test_plugin_that_would_lose_the_root_key_gets_none_of_a_store_that_runs",),
    ),
    Fault(
        name="sealed-and-ready",
        property="R28",
        file="servicekit/grpc_server.py",
        old="add_HealthServicer_to_server(Health(), server)",
        new="add_HealthServicer_to_server([each := Health(), each.ready(True)][0], server)",
        tests=(f"{_SOURCES}::test_restart_without_the_plugin_stays_sealed_and_goes_on_when_it_is_back",),
    ),
    Fault(
        name="nonce-reused",
        property="S6",
        file="secrets_service/cipher.py",
        old="salt, nonce = os.urandom(SALT_LENGTH), os.urandom(NONCE_LENGTH)",
        new="salt, nonce = bytes(SALT_LENGTH), bytes(NONCE_LENGTH)",
        tests=("tests/unit/secrets_service/test_cipher.py::test_no_two_records_share_salt_or_nonce",),
    ),
    Fault(
        name="deleted-value-stays",
        property="S1",
        file="secrets_service/values.py",
        old="""        store.delete_key(connection, key)
        return store.drop_versions(connection, key.id, keep=self._keep)
""",
        new="""        store.delete_key(connection, key)
        return 0
""",
        tests=(f"{_VERSIONS}::test_destroyed_value_is_not_on_disk_any_more",),
    ),
    Fault(
        name="log-not-emptied",
        property="S1",
        file="secrets_service/memory.py",
        old="            if destroyed:\n                await self._database.erase()\n",
        new="",
        tests=(f"{_VERSIONS}::test_destroyed_value_is_not_on_disk_any_more",),
    ),
    Fault(
        name="last-manage-not-warned-of",
        property="contract 4.5",
        file="secrets_service/scopes.py",
        old="""            store.delete_grant(connection, found, folded)
            _warn_if_abandoned(connection, found, before)""",
        new="""            store.delete_grant(connection, found, folded)""",
        tests=("tests/service/test_warnings.py::test_deleting_the_last_manage_is_warned_of", _MODEL),
    ),
    # --- backups ---
    Fault(
        name="forgotten-while-it-is-copied",
        property="R25",
        file="serving_service/settlement.py",
        old="        async with self._telling:\n            yield\n",
        new="        yield\n",
        tests=(
            f"{_SETTLEMENT}::test_ends_are_kept_back_while_they_are_held_and_told_afterwards",
            f"{_BACKUP}::test_what_happens_between_the_two_copies_leaves_nothing_that_cannot_be_launched",
        ),
    ),
    Fault(
        name="records-moved-while-it-is-copied",
        property="R25",
        file="servicekit/audit_export.py",
        old="                async with self._moving:\n                    await self.move()\n",
        new="                await self.move()\n",
        tests=("tests/unit/servicekit/test_backups.py::test_no_record_is_moved_while_the_two_are_copied",),
    ),
    Fault(
        name="changed-backup-believed",
        property="R25",
        file="tessera/cli/verify.py",
        old="    if not backups.is_authentic(keyring, backup.content, backup.mac):\n",
        new="    if not backup.mac:\n",
        tests=(f"{_BACKUP}::test_change_that_somebody_made_who_can_make_digests_is_found_with_the_root_key",),
    ),
    Fault(
        name="replicas-of-another-adopted",
        property="R25",
        file="serving_service/store.py",
        old='    connection.execute("DELETE FROM replicas")\n    connection.execute("UPDATE epochs',
        new='    connection.execute("UPDATE epochs',
        tests=(f"{_BACKUP}::test_restored_platform_starts_replicas_of_its_own_and_stops_those_of_the_other",),
    ),
    # --- one thing at a time ---
    Fault(
        name="memory-kept-across-writes",
        property="R4",
        file="secrets_service/memory.py",
        old="        self.changes += 1\n        self.results.clear()\n",
        new="        self.changes += 1\n",
        tests=(
            _HISTORIES,
            "tests/unit/secrets_service/test_memory.py::test_read_is_made_once_until_something_is_written",
        ),
    ),
    Fault(
        name="rights-kept-across-their-change",
        property="R4",
        file="secrets_service/memory.py",
        old="        return self._rights.are_unchanged(since.rights)\n",
        new="        return True\n",
        tests=(
            "tests/unit/secrets_service/test_memory.py"
            "::test_rights_are_not_used_in_a_transaction_behind_one_that_may_change_them",
        ),
    ),
    Fault(
        name="scope-deleted-and-its-rights-kept",
        property="S12",
        file="secrets_service/scopes.py",
        old="        await self._database.destroy(delete)\n",
        new="        await self._database.destroy(delete, leaves_rights=True)\n",
        tests=(
            "tests/service/test_remembered.py::test_what_leaves_rights_alone_writes_nothing_that_rights_are_read_from",
        ),
    ),
    Fault(
        name="condition-looked-at-too-early",
        property="R4",
        file="secrets_service/scopes.py",
        old="""        def put(connection: Connection) -> tuple[None, int]:
            found = rights.permitted(connection)
            known = store.find_key(connection, found, names.folded(key))
            current = known.current if known else 0
""",
        new="""        def look(connection: Connection) -> int:
            found = permitted(connection, scope, caller)
            known = store.find_key(connection, found, names.folded(key))
            return known.current if known else 0

        current = await self._database.read(look)

        def put(connection: Connection) -> tuple[None, int]:
            found = rights.permitted(connection)
""",
        tests=(_HISTORIES,),
    ),
    # --- what may be launched with secrets ---
    Fault(
        name="author-not-asked",
        property="S15",
        file="secrets_service/grants.py",
        old="readers = [creator] if reference in vouched or writer == creator else [creator, writer]",
        new="readers = [creator]",
        tests=(
            f"{_GRANTS}::test_a_author_without_read_cannot_add_a_reference",
            f"{_GRANTS}::test_b_author_without_read_cannot_change_what_runs_while_references_remain",
            f"{_ENDPOINTS}::test_whoever_manages_an_endpoint_may_scale_it_but_not_run_something_else_with_its_secrets",
        ),
    ),
    Fault(
        name="another-digest-launched",
        property="S3",
        file="secrets_service/grants.py",
        old="if (grant.version, grant.digest) == (version, digest):",
        new="if grant.version == version:",
        tests=(
            f"{_GRANTS}::test_e_only_what_was_granted_is_handed_out",
            f"{_ENDPOINTS}::test_what_was_changed_in_the_database_is_not_launched_with_secrets",
        ),
    ),
    Fault(
        name="variables-not-in-the-digest",
        property="S15",
        file="serving_service/environment.py",
        old='        "environment": dict(entity.environment),\n',
        new="",
        tests=(
            f"{_ENDPOINTS}::test_whoever_manages_an_endpoint_may_scale_it_but_not_run_something_else_with_its_secrets",
        ),
    ),
    Fault(
        name="deleted-endpoint-granted-again",
        property="S15",
        file="secrets_service/grants.py",
        old="    if grant_store.find_endpoint(connection, endpoint_id) not in (None, mine):",
        new="""    known = grant_store.find_endpoint(connection, endpoint_id)
    if known is not None and not known.is_deleted and known != mine:""",
        tests=(f"{_GRANTS}::test_g_a_deleted_endpoint_has_no_grant_and_never_gets_one_again",),
    ),
    Fault(
        name="new-endpoints-believed",
        property="S15",
        file="secrets_service/foundation.py",
        old="        store.older_endpoints_are_known(connection)  # there are none\n",
        new="",
        tests=(f"{_GRANTS}::test_a_new_database_takes_nobodys_word_for_endpoints",),
    ),
    Fault(
        name="reservation-kept",
        property="R5",
        file="serving_service/app.py",
        old="        await opened.write(store.clear_reservations)\n",
        new="",
        tests=(f"{_ENDPOINTS}::test_what_a_killed_process_had_begun_is_undone_by_the_next",),
    ),
    # --- permissions on endpoints, and the feed ---
    Fault(
        name="viewers-may-query",
        property="S7",
        file="tessera/policy.py",
        old='ServingEndpoints/Query": INFERENCE,',
        new='ServingEndpoints/Query": CAN_VIEW,',
        tests=(
            f"{_ENDPOINTS}::test_each_level_opens_what_it_is_for_and_nothing_else",
            "tests/service/test_policy.py::test_the_table_is_the_one_that_was_agreed_on",
        ),
    ),
    Fault(
        name="decision-forgotten",
        property="S7",
        file="servicekit/policy.py",
        old="        self.is_allowed = not row.subject\n",
        new="        self.is_allowed = True\n",
        tests=(
            "tests/service/test_grpc_server.py::test_answer_without_the_decision_that_its_row_asks_for_is_withheld",
        ),
    ),
    Fault(
        name="revocation-not-followed",
        property="S12",
        file="servicekit/access.py",
        old="            self._forget(changes.principal_ids, changes.token_ids)\n",
        new="",
        tests=(_REVOCATION, f"{_PERMISSIONS}::test_every_change_of_an_identity_is_told"),
    ),
    Fault(
        name="answered-before-it-is-followed",
        property="S12",
        file="secrets_service/memory.py",
        old="""self._rights, self._values)
        await self._feed.followed(revision)
""",
        new="""self._rights, self._values)
""",
        tests=(f"{_PERMISSIONS}::test_a_change_is_answered_when_it_is_followed",),
    ),
    Fault(
        name="table-used-for-ever",
        property="S12",
        file="servicekit/access.py",
        old="        if self._now() - self._heard_at > limit:\n            raise _unavailable()\n",
        new="",
        tests=("tests/service/test_gateway.py::test_without_a_window_permissions_that_nobody_confirms_are_not_used",),
    ),
    # --- OAuth and other issuers ---
    Fault(
        name="bound-token-goes-everywhere",
        property="S13",
        file="servicekit/context.py",
        old="return self.endpoint_id in (None, endpoint_id)",
        new="return True",
        tests=(
            f"{_OAUTH}::test_bound_token_queries_its_endpoint_over_grpc_and_does_nothing_else",
            f"{_OAUTH}::test_bound_token_invokes_its_endpoint_through_the_gateway_and_does_nothing_else",
        ),
    ),
    Fault(
        name="client-secret-is-a-token",
        property="S10",
        file="secrets_service/authority.py",
        old="if stored is None or stored.kind is not kind or not self._is_good(stored):",
        new="if stored is None or not self._is_good(stored):",
        tests=(f"{_OAUTH}::test_client_secret_is_no_token_and_a_token_no_client_secret",),
    ),
    Fault(
        name="any-audience-goes",
        property="S13",
        file="secrets_service/jwts.py",
        old='if claims.get("aud") not in (audience, [audience]):',
        new='if "aud" not in claims:',
        tests=(f"{_OAUTH}::test_forged_access_token_is_refused", f"{_OIDC}::test_forged_external_token_is_refused"),
    ),
    # --- retries ---
    Fault(
        name="retry-makes-it-twice",
        property="R3",
        file="servicekit/once.py",
        old="        self.look(connection)\n        result",
        new="        result",
        tests=(f"{_ONCE}::test_retry_of_every_change_gives_the_first_answer_and_changes_nothing",),
    ),
    Fault(
        name="answer-of-somebody-else",
        property="R3",
        file="servicekit/once.py",
        old="        if fingerprint != request.fingerprint:",
        new="        if not fingerprint:",
        tests=(
            f"{_ONCE}::test_permissions_are_changed_once",
            f"{_ENDPOINTS}::test_a_retry_of_a_change_gets_the_first_answer",
        ),
    ),
    # --- what a replica may and what becomes of it ---
    Fault(
        name="record-of-the-dead-kept",
        property="R5",
        file="serving_service/controllers.py",
        old="            await database.write(store.remove_replica, replica_id)\n            self._doors.launches",
        new="            self._doors.launches",
        tests=(_KILLED,),
    ),
    Fault(
        name="survivors-not-taken-over",
        property="R5",
        file="serving_service/controllers.py",
        old="        for replica_id in records.keys() & handles.keys():",
        new="        for replica_id in records.keys() - records.keys():",
        tests=(_KILLED,),
    ),
    # --- rate limits ---
    Fault(
        name="window-too-short",
        property="contract 5.11",
        file="servicekit/rate_limits.py",
        old="    return math.floor(now) - second <= WINDOW_SECONDS",
        new="    return math.floor(now) - second < WINDOW_SECONDS",
        tests=(
            "tests/unit/servicekit/test_rate_limits.py"
            "::test_no_minute_sees_more_calls_than_the_limit_and_none_is_refused_without_need",
        ),
    ),
    Fault(
        name="told-counts-added",
        property="contract 5.11",
        file="servicekit/rate_limits.py",
        old="{})[use.second] = use.amount",
        new="{})[use.second] = use.amount + self.amount(bucket, use.source, use.second)",
        tests=("tests/unit/servicekit/test_rate_limits.py::test_hearing_the_same_again_or_ones_own_changes_nothing",),
    ),
    Fault(
        name="given-up-streams-are-free",
        property="contract 5.11",
        file="servicekit/measures.py",
        old="        if self._usage is not None:\n            self._charge.tokens(",
        new="        if self._usage is not None and exception[0] is None:\n            self._charge.tokens(",
        tests=("tests/service/test_gateway.py::test_a_stream_that_its_caller_gives_up_counts_what_was_sent",),
    ),
    # --- descriptions of models ---
    Fault(
        name="time-with-an-offset-described",
        property="contract 5.16",
        file="serving_service/openapi.py",
        old="""    "pattern": r"^[0-9]{4}-""",
        new="""    "format": "date-time", "x-pattern": r"^[0-9]{4}-""",
        tests=("tests/unit/serving_service/test_openapi.py::test_a_time_has_no_offset",),
    ),
    Fault(
        name="signature-as-deep-as-it-likes",
        property="S26",
        file="serving_service/plain_yaml.py",
        old="            if depth > DEEPEST:",
        new="            if depth > MOST_EVENTS:",
        tests=("tests/unit/serving_service/test_mlmodel.py::test_yaml_as_deep_as_a_signature_may_be_is_the_deepest",),
    ),
    Fault(
        name="included-as-often-as-it-is-named",
        property="S26",
        file="serving_service/requirements.py",
        old="        if (path, is_constraint) in self._read:",
        new="        if depth > _DEEPEST:",
        tests=(
            "tests/unit/serving_service/test_requirements.py::test_each_file_is_read_once_however_often_it_is_included",
        ),
    ),
    # --- forked models ---
    Fault(
        name="forked-model-keeps-descriptors",
        property="S17",
        file="serving_service/warm/process.py",
        old="        if descriptor >= _OPENED:",
        new="        if descriptor >= 1_000:",
        tests=(_FORKED_GOLDEN,),
    ),
    Fault(
        name="forked-models-draw-alike",
        property="S17",
        file="serving_service/warm/process.py",
        old="        np.random.seed()",
        new="        np.random.get_state()",
        tests=("tests/e2e/test_warm.py::test_no_two_forked_models_draw_the_same_numbers",),
    ),
    Fault(
        name="variables-of-a-start-set-too-late",
        property="S17",
        file="serving_service/template.py",
        old="    return name in read | _READ_AT_START or name.startswith(_PREFIXES_READ_AT_START)",
        new="    return name in read",
        tests=(
            "tests/unit/serving_service/test_template.py::test_a_variable_that_is_read_at_the_start_needs_a_start",
            "tests/e2e/test_warm.py::test_a_variable_that_is_read_at_the_start_is_honoured_by_a_start",
        ),
    ),
    # --- logs ---
    Fault(
        name="follower-asked-for-once",
        property="S12",
        file="gateway/streams.py",
        old="await self._check(request, caller)",
        new="pass",
        tests=(f"{_FOLLOW}::test_who_may_not_read_any_more_is_told_nothing_more",),
    ),
    Fault(
        name="follower-of-grpc-asked-for-once",
        property="S12",
        file="servicekit/interceptors.py",
        old="""                            if self._is_judged_anew():
                                await self._authenticate()
""",
        new="",
        tests=(f"{_FOLLOW}::test_who_may_not_read_any_more_is_told_nothing_more",),
    ),
    Fault(
        name="last-words-lost",
        property="contract 5.14",
        file="serving_service/controller.py",
        old="LastEnded(replica_id, said.position)",
        new="LastEnded(replica_id, 0)",
        tests=(f"{_FOLLOW}::test_last_words_of_a_replica_are_told_and_then_those_of_its_successor",),
    ),
    Fault(
        name="left-out-in-silence",
        property="contract 5.14",
        file="serving_service/outputs.py",
        old='f"--- {said.missing} lines are left out\\n" if said.missing else ""',
        new='""',
        tests=(f"{_FOLLOW}::test_what_could_not_be_told_is_left_out_and_counted",),
    ),
    Fault(
        name="log-goes-with-its-replica",
        property="contract 5.14",
        file="serving_service/store.py",
        old="?3, ?4 FROM configs WHERE endpoint_id = ?1 AND version = ?2",
        new="?3, ?4 FROM configs WHERE endpoint_id = ?1 AND version = -?2",
        tests=(
            "tests/service/test_lifecycle.py"
            "::test_what_the_last_replica_printed_can_be_read_when_nothing_is_left_of_it",
        ),
    ),
    # --- notices ---
    Fault(
        name="end-without-notice",
        property="contract 5.1",
        file="serving_service/controller.py",
        old="            if is_ended:\n                self._doors.outbox.note(",
        new="            if is_ended and not failures:\n                self._doors.outbox.note(",
        tests=("tests/service/test_notifications.py::test_each_end_of_an_update_is_mailed_to_those_who_asked_for_it",),
    ),
    Fault(
        name="one-endpoint-fills-the-queue",
        property="contract 5.1",
        file="serving_service/store.py",
        old=" or of_one + len(notices) > most_of_one:",
        new=":",
        tests=("tests/unit/serving_service/test_notices.py::test_one_endpoint_leaves_room_for_the_others",),
    ),
    Fault(
        name="told-again-and-again",
        property="contract 5.1",
        file="serving_service/notices.py",
        old="            await self._write(store.remove_notice, notice.id)\n\n    def _after",
        new="            await self._write(store.delay_notice, notice.id, self._after(notice))\n\n    def _after",
        tests=("tests/unit/serving_service/test_notices.py::test_each_is_told_of_what_they_asked_for_and_once",),
    ),
    # --- traces ---
    Fault(
        name="traces-tell-texts-of-errors",
        property="S1",
        file="servicekit/otlp.py",
        old="            self.failed(kind.__name__)",
        new="            self.failed(str(error))",
        tests=("tests/service/test_tracing.py::test_an_exception_is_told_by_its_type_alone",),
    ),
    Fault(
        name="model-gets-the-callers-span",
        property="contract 6.2",
        file="gateway/invocations.py",
        old="    without = TRACE if own else ()",
        new="    own, without = [], ()",
        tests=(
            "tests/service/test_tracing.py::test_a_trace_goes_from_the_caller_through_the_gateway_to_the_model",
            "tests/service/test_tracing.py::test_what_is_no_trace_context_is_not_passed_on",
        ),
    ),
    Fault(
        name="old-replica-forgotten",
        property="R8",
        file="serving_service/reconcile.py",
        old="        if replica.version not in wanted and not replica.is_stopping",
        new="        if desired.is_deleted and not replica.is_stopping",
        tests=("tests/service/test_serving.py::test_an_update_takes_over_and_the_old_replica_ends", _KILLED),
    ),
    Fault(
        name="activated-before-it-is-ready",
        property="R9",
        file="serving_service/reconcile.py",
        old="    if observed.is_ready(wanted):\n        return [Activate",
        new="    if wanted.replicas:\n        return [Activate",
        tests=(
            "tests/unit/serving_service/test_reconcile.py::test_plan",
            "tests/service/test_bad_versions.py::test_a_version_that_cannot_run_leaves_the_one_that_does_and_says_why",
        ),
    ),
    Fault(
        name="drain-skipped",
        property="R8",
        file="serving_service/controller.py",
        old="await self._doors.routes.drained(replica_id, timeout=drain)",
        new="pass",
        tests=(
            "tests/service/test_lifecycle.py::test_requests_in_flight_are_answered_before_their_replica_is_stopped",
            "tests/service/test_outages.py::test_no_query_fails_while_versions_change_and_none_reaches_one_that_is_gone",
        ),
    ),
    Fault(
        name="number-believed",
        property="R12",
        file="serving_service/shim/processes.py",
        old="    if started(pid) == mark:",
        new="    if started(pid):",
        tests=("tests/e2e/test_launch.py::test_a_folder_whose_process_number_is_somebody_elses_now_harms_nobody",),
    ),
    Fault(
        name="sent-query-tried-again",
        property="R3",
        file="gateway/invocations.py",
        old="            except ConnectFailed:",
        new="            except HttpError:",
        tests=(
            "tests/service/test_gateway.py::test_a_model_that_dies_before_its_answer_is_a_500_that_names_the_entity",
        ),
    ),
    Fault(
        name="stale-route-held",
        property="R8",
        file="gateway/invocations.py",
        old="            endpoint = await self._permitted(name, caller)\n            await self._forward(",
        new="            await self._forward(",
        tests=("tests/service/test_gateway.py::test_a_body_that_comes_after_a_change_is_treated_by_what_holds_then",),
    ),
    Fault(
        name="core-of-a-service",
        property="S22",
        file="servicekit/process.py",
        old="    os.umask(0o077)\n    _leave_no_core()\n",
        new="    os.umask(0o077)\n",
        tests=("tests/e2e/test_core_dumps.py::test_the_kernel_is_told_so_of_services_and_models",),
    ),
    Fault(
        name="back-off-never-grows",
        property="R19",
        file="serving_service/reconcile.py",
        old="min(FIRST_BACKOFF * 2.0 ** min(failures - 2, 16), LONGEST_BACKOFF)",
        new="FIRST_BACKOFF",
        tests=(
            "tests/unit/serving_service/test_reconcile.py"
            "::test_restarts_come_at_once_then_later_and_later_and_at_once_again_after_good_minutes",
        ),
    ),
    # --- what is measured ---
    Fault(
        name="report-counted-twice",
        property="contract 5.15",
        file="serving_service/meters.py",
        old="        if report.sequence == expected:",
        new="        if report.sequence:",
        tests=("tests/service/test_metrics.py::test_report_is_counted_once_whatever_is_lost_or_killed",),
    ),
    Fault(
        name="means-of-what-never-came",
        property="contract 5.15",
        file="serving_service/messages.py",
        old="mean_prediction_ms=measured.prediction.mean,",
        new="mean_prediction_ms=measured.prediction.sum / (measured.latency.count or 1),",
        tests=("tests/service/test_metrics.py::test_history_and_use_can_be_read_page_by_page",),
    ),
    Fault(
        name="report-forgotten-too-early",
        property="contract 5.15",
        file="serving_service/meters.py",
        old="stored_sequence=gateway.stored)",
        new="stored_sequence=gateway.received)",
        tests=("tests/service/test_metrics.py::test_report_is_counted_once_whatever_is_lost_or_killed",),
    ),
    Fault(
        name="path-is-a-label",
        property="S1",
        file="gateway/app.py",
        old="self._calls.ended(request.route or NO_ROUTE,",
        new="self._calls.ended(request.route or request.path,",
        tests=("tests/service/test_own_metrics.py::test_gateway_tells_routes_and_no_paths",),
    ),
    # --- what models run in ---
    Fault(
        name="place-of-a-model-not-granted",
        property="S3",
        file="serving_service/environment.py",
        old="model.created_at, *place],",
        new="model.created_at],",
        tests=(
            "tests/unit/serving_service/test_references.py"
            "::test_whatever_is_run_and_with_which_variables_is_in_the_digest_that_a_grant_binds",
        ),
    ),
    Fault(
        name="model-fetched-from-another-place",
        property="S3",
        file="serving_service/registry.py",
        old='if model.location not in (None, answer["location"]):',
        new='if model.location not in (None, model.location, answer["location"]):',
        tests=(f"{_REGISTRY}::test_a_version_that_the_registry_has_at_another_place_by_now_is_not_fetched",),
    ),
    Fault(
        name="changed-model-launched",
        property="S3",
        file="serving_service/registry.py",
        old="        return digest == first\n",
        new="        return True\n",
        tests=(
            f"{_REGISTRY}::test_files_that_were_overwritten_since_they_were_first_fetched_are_not_launched",
            f"{_REGISTRY}::test_a_cached_version_that_was_changed_with_its_manifest_is_fetched_again",
        ),
    ),
    Fault(
        name="code-added-to-a-cached-model",
        property="S3",
        file="serving_service/caches.py",
        old="    _remove_strangers(content, files)\n",
        new="",
        tests=(
            "tests/unit/serving_service/test_caches.py::test_what_was_sealed_is_whole_and_what_came_later_is_removed",
        ),
    ),
    Fault(
        name="links-followed-out-of-a-model",
        property="S18",
        file="serving_service/registry_helper.py",
        old="if not file.readlink().is_relative_to(self._source):",
        new="if not file.exists():",
        tests=(f"{_REGISTRY}::test_a_link_of_a_registered_version_may_not_lead_out_of_its_folder",),
    ),
    Fault(
        name="refused-changes-counted-for-all",
        property="S25",
        file="serving_service/endpoints.py",
        old="        described = self._described(request)\n        self._often.check()\n",
        new="        described = self._described(request)\n        self._often.count()\n",
        tests=("tests/service/test_serving.py::test_changes_that_are_refused_keep_nobody_from_those_that_are_not",),
    ),
    Fault(
        name="damaged-model-served",
        property="cached is whole",
        file="serving_service/caches.py",
        old="(content / name).stat().st_size == size and",
        new="(content / name).stat().st_size >= 0 and",
        tests=(
            "tests/unit/serving_service/test_caches.py::test_what_is_shorter_or_gone_or_was_never_sealed_is_damaged",
        ),
    ),
    Fault(
        name="used-folder-dropped",
        property="used is kept",
        file="serving_service/caches.py",
        old="        if entry.name not in in_use:\n",
        new="        if entry.files is not in_use:\n",
        tests=(
            "tests/unit/serving_service/test_caches.py::test_least_recently_used_goes_and_what_is_used_stays",
            f"{_BUILDS}::test_what_was_not_used_for_longest_goes_first_and_never_what_is_used",
        ),
    ),
    Fault(
        name="sources-run-in-the-builder",
        property="S18",
        file="serving_service/buildenv.py",
        old=""""--generate-hashes", "--no-build"]""",
        new=""""--generate-hashes"]""",
        tests=(f"{_BUILDS}::test_what_cannot_be_installed_is_named_and_leaves_nothing",),
    ),
    Fault(
        name="build-outlives-who-waits",
        property="R11",
        file="serving_service/model_environments.py",
        old="                build.task.cancel()\n                await",
        new="                build.waiting = 0\n                await",
        tests=(f"{_BUILDS}::test_a_build_ends_whole_when_the_last_who_waits_gives_up",),
    ),
    # --- gpus ---
    Fault(
        name="gpu-of-somebody-else",
        property="contract 5.8",
        file="serving_service/gpus.py",
        old="for device in devices if device not in taken]",
        new="for device in devices if device is not taken]",
        tests=(
            "tests/unit/serving_service/test_gpus.py::test_what_is_chosen_was_free_and_is_enough",
            f"{_GPUS}::test_no_gpu_is_ever_two_replicas_own_and_none_is_lost",
            f"{_GPUS}::test_each_replica_sees_its_own_gpus_and_whoever_has_none_sees_none",
        ),
    ),
    Fault(
        name="gpus-not-hidden",
        property="S17",
        file="serving_service/launcher.py",
        old="**({} if gpus is None else {",
        new="**({} if not gpus else {",
        tests=(f"{_GPUS}::test_each_replica_sees_its_own_gpus_and_whoever_has_none_sees_none",),
    ),
    Fault(
        name="gpu-kept-by-the-dead",
        property="R11",
        file="serving_service/controller.py",
        old="        await self._doors.gpus.give_back(replica_id)\n        await self._keep_log",
        new="        await self._keep_log",
        tests=(f"{_GPUS}::test_a_launch_that_fails_keeps_no_gpu",),
    ),
    # --- hostile text ---
    Fault(
        name="filter-text-in-sql",
        property="S26",
        file="secrets_service/directory_store.py",
        old="""                    condition = f"{column.text} = ?\"""",
        new="""                    parameters.pop()
                    condition = f"{column.text} = '{value}'\"""",
        tests=(
            "tests/service/test_injection.py::test_hostile_text_is_text",
            "tests/unit/test_sql.py::test_statements_are_made_of_the_programs_own_text",
        ),
    ),
    Fault(
        name="comment-in-sql",
        property="S26",
        file="secrets_service/store.py",
        old="""        "UPDATE tokens SET comment = ?, mac_version = ?, mac = ?, row_mac = ? WHERE id = ?",
        (row[3], row[7],""",
        new="""        f"UPDATE tokens SET comment = '{row[3]}', mac_version = ?, mac = ?, row_mac = ? WHERE id = ?",
        (row[7],""",
        tests=("tests/service/test_injection.py::test_hostile_text_is_text",),
    ),
    # --- causes ---
    Fault(
        name="silence-not-noticed",
        property="R9",
        file="serving_service/shim/replica.py",
        old="if not is_over and not self._stopping:",
        new="if is_over and not self._stopping:",
        tests=(_CAUSES,),
    ),
    Fault(
        name="cause-without-its-phase",
        property="R9",
        file="serving_service/launches.py",
        old="super().__init__(phases.failed(phase, problem))",
        new="super().__init__(problem)",
        tests=(_CAUSES,),
    ),
    Fault(
        name="place-not-given-back",
        property="R10",
        file="servicekit/admission.py",
        old="if waiter.turn.done() and not waiter.turn.cancelled() and (server := waiter.turn.result()) is not None:",
        new="if waiter.turn.done() and waiter.turn.cancelled() and (server := waiter.turn.result()) is not None:",
        tests=(
            "tests/unit/servicekit/test_admission.py::test_a_place_is_not_lost_when_its_waiter_leaves_in_the_same_moment",
        ),
    ),
    Fault(
        name="answering-replicas-stopped-first",
        property="R8",
        file="serving_service/reconcile.py",
        old="return by_merit[count:][::-1]",
        new="return by_merit[: len(by_merit) - count]",
        tests=("tests/unit/serving_service/test_reconcile.py::test_plan",),
    ),
    Fault(
        name="woken-without-a-caller",
        property="R10",
        file="serving_service/scaling.py",
        old="known.wanted = 1 if known.need.now or live else 0",
        new="known.wanted = 1",
        tests=("tests/unit/serving_service/test_scaling.py::test_what_cannot_be_woken_is_not_tried_again_for_nobody",),
    ),
    # --- bad models, bad callers, strangers ---
    Fault(
        name="need-forgotten-at-a-restart",
        property="R5",
        file="serving_service/scaling.py",
        old="need = Need(0, (now,) * min(count, limits.upper))",
        new="need = Need()",
        tests=(
            "tests/service/test_kill_points_of_scaling.py::test_a_kill_at_any_point_of_scaling_comes_to_the_same_end",
        ),
    ),
    Fault(
        name="stranger-listened-to",
        property="R13",
        file="serving_service/shim/life.py",
        old="    listener.bind(str(path))\n    path.chmod(0o600)\n    listener.listen(512)\n",
        new="    with contextlib.suppress(OSError):\n        listener.bind(str(path))\n        listener.listen(512)\n",
        tests=(
            "tests/service/test_strangers.py::test_no_query_goes_to_a_stranger_that_listens_where_a_replica_was_to_be",
        ),
    ),
    Fault(
        name="stalled-body-waited-for",
        property="R14",
        file="gateway/invocations.py",
        old="            async with asyncio.timeout(self._deadline):\n                return await _first_part",
        new="            async with asyncio.timeout(None):\n                return await _first_part",
        tests=(
            "tests/service/test_gateway.py"
            "::test_a_body_that_does_not_come_whole_in_time_is_a_504_that_says_so_and_leaves_its_place",
        ),
    ),
    Fault(
        name="log-without-bound",
        property="contract 5.14",
        file="serving_service/shim/ring.py",
        old="while self._size > self._capacity:",
        new="while self._size < 0:",
        tests=("tests/e2e/test_bad_models.py::test_what_a_model_prints_without_end_is_kept_to_its_last_lines",),
    ),
    Fault(
        name="wrong-tokens-without-end",
        property="S11",
        file="servicekit/pace.py",
        old="        if on_time - now > self._tolerance:",
        new="        if on_time - now > self._tolerance and not key:",
        tests=("tests/unit/servicekit/test_failed_logins.py::test_twenty_at_once_and_then_ten_a_minute",),
    ),
    # --- the audit log ---
    Fault(
        name="value-before-its-record",
        property="S27",
        file="servicekit/audit.py",
        old="        if self.must_be_durable and not self.is_appended:",
        new="        if False:",
        tests=("tests/service/test_audit.py::test_a_value_waits_for_its_record",),
    ),
    Fault(
        name="change-without-its-record",
        property="S27",
        file="servicekit/once.py",
        old="            self._trail.append(connection)",
        new="            pass",
        tests=("tests/service/test_audit.py::test_a_change_that_cannot_be_recorded_is_not_made",),
    ),
    Fault(
        name="audit-that-fails-open",
        property="S27",
        file="servicekit/audit.py",
        old="        for cause in self._problems.values():\n            raise AuditUnavailable(cause)\n",
        new="",
        tests=(
            "tests/service/test_audit.py::test_where_the_files_cannot_be_written_values_and_changes_are_refused",
            "tests/service/test_audit.py::test_nothing_goes_without_the_syslog_server_that_is_to_have_the_records",
        ),
    ),
    Fault(
        name="new-admin-not-in-the-log",
        property="S27",
        file="secrets_service/directory.py",
        old="            audit.changed(principal=name, principal_id=str(member), now=now, group=profile.name)\n",
        new="            pass\n",
        tests=("tests/service/test_audit.py::test_who_becomes_an_admin_and_who_is_none_any_more_is_in_the_log",),
    ),
    Fault(
        name="record-not-handed-over",
        property="S27",
        file="servicekit/audit_export.py",
        old="            at = (await self._database.read(audit_store.progress)).forwarded\n",
        new="            at = (await self._database.read(audit_store.progress)).exported\n",
        tests=("tests/service/test_audit.py::test_nothing_goes_without_the_syslog_server_that_is_to_have_the_records",),
    ),
    Fault(
        name="chain-broken-between-files",
        property="S27",
        file="servicekit/audit_records.py",
        old='        elif (seq, record["prev"]) != (verdict.head.seq + 1, verdict.head.mac):',
        new="        elif seq <= verdict.head.seq:",
        tests=("tests/service/test_audit.py::test_rotation_and_retention_keep_the_chain",),
    ),
    # --- limits and failures ---
    Fault(
        name="audit-key-of-before-goes-on",
        property="S5",
        file="secrets_service/rotation.py",
        old="        self._renewed()\n",
        new="",
        tests=("tests/service/test_audit.py::test_a_new_store_key_brings_new_audit_keys_and_the_chains_go_on",),
    ),
    Fault(
        name="follower-follows-itself",
        property="S27",
        file="tessera/cli/audit.py",
        old='if json.loads(record).get("request_id") != follower:',
        new="if record:",
        tests=("tests/service/test_command_line.py::test_an_audit_log_is_followed_over_its_files_until_ctrl_c",),
    ),
    Fault(
        name="room-kept-by-what-is-given-up",
        property="R17",
        file="servicekit/shedding.py",
        old="        self.leave()\n",
        new="        if kind is not asyncio.CancelledError:\n            self.leave()\n",
        tests=("tests/service/test_cancelled.py::test_ten_thousand_calls_that_are_given_up_leave_nothing_behind",),
    ),
    Fault(
        name="room-kept-by-what-fails",
        property="R16",
        file="servicekit/shedding.py",
        old="        self._taken -= 1\n",
        new="        self._taken -= error is None\n",
        tests=("tests/unit/servicekit/test_shedding.py::test_a_place_is_given_back_whatever_happens",),
    ),
    Fault(
        name="place-kept-by-what-fails",
        property="R16",
        file="servicekit/shedding.py",
        old="        self.leave()\n",
        new="        if error is None:\n            self.leave()\n",
        tests=(f"{_LISTENERS}::test_calls_that_are_given_up_or_fail_give_their_room_back",),
    ),
    Fault(
        name="changes-retried",
        property="R3",
        file="gateway/app.py",
        old="if is_read(method) and not method.server_streaming",
        new="if not method.server_streaming",
        tests=("tests/service/test_peer_retries.py::test_a_read_is_asked_three_times_and_a_change_once",),
    ),
    Fault(
        name="retries-without-end",
        property="R15",
        file="servicekit/channels.py",
        old=', "retryThrottling": _THROTTLE',
        new="",
        tests=("tests/service/test_peer_retries.py::test_a_service_that_is_out_is_not_asked_three_times_as_much",),
    ),
    Fault(
        name="silence-of-a-peer-waited-for",
        property="R14",
        file="servicekit/channels.py",
        old='    ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT * 1000)),\n',
        new="",
        tests=(f"{_LISTENERS}::test_a_peer_that_says_nothing_more_is_given_up",),
    ),
    Fault(
        name="lists-without-end",
        property="S25",
        file="servicekit/interceptors.py",
        old="if field.is_repeated and len(content) > MOST_ELEMENTS:",
        new="if field.is_repeated and len(content) > MOST_ELEMENTS**2:",
        tests=(
            "tests/service/test_hostile_input.py::test_message_of_very_many_parts_is_refused_before_anybody_goes_through_them",
        ),
    ),
    Fault(
        name="half-a-request-waited-for",
        property="S25",
        file="servicekit/interceptors.py",
        old="async with asyncio.timeout(_time_left(rpc)) as limit:",
        new="async with asyncio.timeout(600 + _time_left(rpc)) as limit:",
        tests=(f"{_LISTENERS}::test_half_a_request_is_given_up_at_its_deadline",),
    ),
    Fault(
        name="one-address-takes-all-places",
        property="S25",
        file="servicekit/arrivals.py",
        old="        if self._awaited[sender] >= self._most:\n",
        new="        if self._awaited[sender] >= 1_000_000:\n",
        tests=(f"{_LISTENERS}::test_who_sends_half_of_many_requests_keeps_nobody_else_out",),
    ),
    Fault(
        name="message-of-a-stranger-waited-for",
        property="S25",
        file="servicekit/interceptors.py",
        old=(
            "                    await self._begin()\n"
            "                    is_arriving = True\n"
            "                    request = await self._received(rpc, place)\n"
        ),
        new=(
            "                    is_arriving = True\n"
            "                    request = await self._received(rpc, place)\n"
            "                    await self._begin()\n"
        ),
        tests=(f"{_LISTENERS}::test_of_whom_nobody_knows_no_message_is_waited_for",),
    ),
    Fault(
        name="half-a-body-keeps-a-place",
        property="S25",
        file="gateway/app.py",
        old="        body = await self._body(request, identity.principal)\n",
        new="        with self._room:\n            body = await self._body(request, identity.principal)\n",
        tests=("tests/service/test_overload.py::test_who_sends_half_of_many_requests_keeps_nobody_else_out",),
    ),
    Fault(
        name="half-a-body-keeps-a-replica",
        property="S25",
        file="gateway/invocations.py",
        old="FIRST_BYTES = 1024 * 1024\n",
        new="FIRST_BYTES = 1\n",
        tests=("tests/service/test_gateway.py::test_who_sends_half_of_a_short_body_takes_no_place",),
    ),
    Fault(
        name="one-caller-has-all-the-memory",
        property="S25",
        file="servicekit/arrivals.py",
        old="kept > self._most_bytes // PARTS or ",
        new="",
        tests=("tests/unit/servicekit/test_arrivals.py::test_no_sender_has_more_than_its_part_of_the_bytes",),
    ),
    Fault(
        name="idle-connections-kept",
        property="S25",
        file="gateway/http_protocol.py",
        old="elif len(self.all) > self._most:",
        new="elif len(self.all) > self._most**2:",
        tests=(
            "tests/service/test_http_server.py"
            "::test_of_too_many_connections_the_one_that_is_idle_for_longest_gives_way",
        ),
    ),
    Fault(
        name="looked-again-from-a-later-moment",
        property="R14",
        file="serving_service/controller.py",
        old="self._next_look = self._look_after(desired, now)",
        new="self._next_look = self._look_after(desired, time.monotonic())",
        tests=(
            "tests/service/test_scaling.py::test_what_is_not_needed_any_more_by_the_end_of_a_plan_goes_with_the_next_one",
        ),
    ),
    Fault(
        name="fields-without-end",
        property="S25",
        file="servicekit/interceptors.py",
        old="if len(metadata) > MOST_METADATA:",
        new="if len(metadata) > MOST_METADATA**2:",
        tests=(f"{_LISTENERS}::test_metadata_has_as_many_fields_as_it_may_and_no_more",),
    ),
    Fault(
        name="metadata-refused-at-random",
        property="S25",
        file="servicekit/grpc_server.py",
        old=', ("grpc.absolute_max_metadata_size", size)]',
        new="]",
        tests=(f"{_LISTENERS}::test_metadata_at_the_limit_is_taken_and_one_byte_more_is_refused",),
    ),
    Fault(
        name="ready-without-a-database",
        property="R28",
        file="servicekit/database.py",
        old="        if found.file != self._file:\n",
        new="        if found.file == (0, 0):\n",
        tests=("tests/service/test_health.py::test_a_service_whose_database_is_gone_is_live_and_not_ready",),
    ),
    Fault(
        name="answers-cut-off-at-the-end",
        property="R18",
        file="servicekit/grpc_server.py",
        old="server.stop(drain_seconds)",
        new="server.stop(None)",
        tests=("tests/e2e/test_drain.py::test_what_is_under_way_is_finished_when_a_service_is_told_to_end",),
    ),
    Fault(
        name="ready-without-room",
        property="R28",
        file="servicekit/database.py",
        old="        if found.free < LEAST_FREE:\n",
        new="        if found.free < 0:\n",
        tests=(
            "tests/e2e/test_full_disk.py::test_full_disk_is_told_and_stops_what_needs_room_alone",
            "tests/service/test_health.py::test_a_service_whose_disk_is_full_is_live_and_not_ready",
        ),
    ),
    Fault(
        name="overdue-work-begun",
        property="R14",
        file="servicekit/interceptors.py",
        old="    if remaining <= 0:\n",
        new="    if remaining <= -60:\n",
        tests=(f"{_LISTENERS}::test_call_whose_deadline_has_passed_is_not_begun",),
    ),
    Fault(
        name="changes-counted-per-credential",
        property="S25",
        file="servicekit/interceptors.py",
        old="self._changes.wait(caller.id)",
        new="self._changes.wait(f'{caller.token_id} {id(self)}')",
        tests=(f"{_LISTENERS}::test_changes_of_one_caller_are_counted_over_all_listeners_and_reads_are_not",),
    ),
)


def as_markdown() -> str:
    """The table as tests/README.md shows it."""
    lines = ["| Fault | Breaks | In |", "|---|---|---|"]
    lines += [f"| `{fault.name}` | {fault.property} | `{fault.file}` |" for fault in FAULTS]
    return "".join(f"{line}\n" for line in lines)
