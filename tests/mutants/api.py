"""Faults in the faces: what is understood of callers, and who gets in. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "token check left out",
        "api/http/auth.py",
        "        if found is None:\n            response, error",
        "        if found is None and not token:\n            response, error",
        "http/test_auth.py::test_every_route_refuses_whoever_has_no_valid_token",
    ),
    fault(
        "token in the query taken",
        "api/http/auth.py",
        "            told = QUERY_TOKEN\n",
        "            found = await self._tokens.verify_token(token)\n",
        "http/test_auth.py::test_every_route_refuses_whoever_has_no_valid_token",
    ),
    fault(
        "audience of tokens not looked at",
        "api/http/oauth.py",
        'options={"require": ["exp", "iss", "aud", "sub"]},',
        'options={"require": ["exp", "iss", "aud", "sub"], "verify_aud": False},',
        "http/test_oauth.py::test_every_other_token_lets_nobody_in",
    ),
    fault(
        "readers that do not read kept",
        "api/http/arrival.py",
        "        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)\n",
        "",
        "http/test_edges.py::test_an_answer_that_nobody_reads_does_not_keep_its_connection",
    ),
    fault(
        "callers over HTTP taken for one",
        "api/mcp/calls.py",
        'return "" if token is None else token.client_id',
        'return ""',
        "http/test_http.py::test_sessions_and_cached_prompts_are_their_callers_alone",
    ),
    fault(
        "body size check left out",
        "api/http/messages.py",
        "            if len(body) > self._max_bytes:\n",
        "            if False:\n",
        "http/test_arrival.py::test_a_long_body_is_refused_as_soon_as_it_is_too_long_and_the_connection_ends",
    ),
    fault(
        "Host check left out",
        "api/http/gate.py",
        "if len(hosts) != 1 or not self._is_ours(hosts[0].lower()):",
        "if len(hosts) != 1:",
        "http/test_http.py::test_a_page_that_rebinds_its_name_is_kept_out",
    ),
    fault(
        "Origin check left out",
        "api/http/gate.py",
        "            if not self._may_call(origin.lower()):\n",
        "            if False:\n",
        "http/test_http.py::test_a_page_that_rebinds_its_name_is_kept_out",
    ),
    fault(
        "sessions of others listed as resources",
        "api/mcp/resources.py",
        "for info in known_sessions(service).values() if info.tenant == tenant()",
        "for info in known_sessions(service).values()",
        "mcp/test_resources.py::test_the_list_has_the_callers_sessions_and_no_others",
    ),
    fault(
        "subscriptions to sessions of others taken",
        "api/mcp/changes.py",
        "                await self._service.engine.session(tenant(), handle)\n",
        "                pass\n",
        "mcp/test_resources.py::test_nobody_can_subscribe_to_what_is_not_there_or_anothers",
    ),
    fault(
        "consent taken that was not asked for",
        "api/mcp/consent.py",
        " or context.request_state != about",
        "",
        "mcp/test_consent.py::test_a_reply_counts_only_to_a_question_that_was_asked",
    ),
    fault(
        "call goes on after its client has cancelled it",
        "api/mcp/calls.py",
        "            jobs.cancel(job)\n            raise\n",
        "            raise\n",
        "mcp/test_long_calls.py::test_a_call_that_its_client_cancels_before_it_has_a_handle_is_ended",
    ),
    fault(
        "task given to a client that takes none",
        "api/mcp/tasks.py",
        " or not takes_tasks(ctx):",
        ":",
        "mcp/test_long_calls.py::test_unknown_tasks_and_clients_that_take_none_are_refused",
    ),
    fault(
        "persisted session deleted unasked",
        "api/mcp/session_tools.py",
        "        if not await may_remove(ctx, [info.name or info.session_id for info in kept], given.confirm):\n",
        "        if False:\n",
        "mcp/test_persisted.py::test_a_persisted_session_is_deleted_only_if_the_user_wants_it",
    ),
]
