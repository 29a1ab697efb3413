"""The operations of the API for sessions."""

from __future__ import annotations

from functools import partial

from mlx_mcp.api.sessions import handlers
from mlx_mcp.api.sessions.bodies import (
    BatchBody,
    CreateBody,
    DetailQuery,
    ForkBody,
    GenerateBody,
    KeyHeader,
    LongBody,
    PageQuery,
    PersistBody,
    Query,
    ResultQuery,
)
from mlx_mcp.api.sessions.problem import Problem, refuse
from mlx_mcp.api.sessions.shapes import CallState, GenerateEvent, RunningCall, SessionDetail, SessionPage
from mlx_mcp.api.web.endpoint import Api, Endpoint
from mlx_mcp.api.web.results import (
    Batch,
    CancelledCall,
    Closed,
    Forks,
    Generation,
    ModelEntry,
    NewSession,
    PersistedSession,
    ResultList,
    UnloadedModel,
)

LATER = {202: RunningCall}
ONE = partial(Endpoint, query=Query)  # an operation whose address says nothing after a question mark
SESSION = {"id": "Handle or name of the session."}
MODEL = {"name": "Name or alias of the model, with its slashes as they are."}
RESULT = {"id": "The result_id of the call."}

SESSIONS = Api(
    "Sessions",
    (
        ONE(
            "POST",
            "/v1/sessions",
            handlers.create,
            "Compute a context once, to go on from many times; nothing is generated.",
            CreateBody,
            NewSession,
            status=201,
            headers=KeyHeader,
            also=LATER,
        ),
        Endpoint(
            "GET",
            "/v1/sessions",
            handlers.show_all,
            "List your sessions in the order of their handles, a page at a time.",
            gives=SessionPage,
            query=PageQuery,
        ),
        Endpoint(
            "GET",
            "/v1/sessions/{id}",
            handlers.show,
            "Tell of a session, and what was said in it to the end of its latest finished turn.",
            gives=SessionDetail,
            query=DetailQuery,
            path_words=SESSION,
        ),
        ONE(
            "POST",
            "/v1/sessions/{id}/fork",
            handlers.fork,
            "Make sessions that go on from where another is, and then apart. Takes no time and no memory.",
            ForkBody,
            Forks,
            status=201,
            headers=KeyHeader,
            path_words=SESSION,
        ),
        ONE(
            "POST",
            "/v1/sessions/{id}/generate",
            handlers.go_on,
            "Have the next turn of a session answered.",
            GenerateBody,
            Generation,
            GenerateEvent,
            headers=KeyHeader,
            path_words=SESSION,
            also=LATER,
        ),
        ONE(
            "POST",
            "/v1/sessions/{id}/persist",
            handlers.persist,
            "Save a session to disk. The answer comes once it would survive a power cut.",
            PersistBody,
            PersistedSession,
            path_words=SESSION,
            also=LATER,
        ),
        ONE(
            "DELETE",
            "/v1/sessions/{id}",
            handlers.close,
            "End a session, and delete what is on disk of it. Its forks and its parent go on.",
            gives=Closed,
            path_words=SESSION,
        ),
        ONE(
            "POST",
            "/v1/batch",
            handlers.answer_many,
            "Answer many prompts at once over one context, which is computed once.",
            BatchBody,
            Batch,
            headers=KeyHeader,
            also=LATER,
        ),
        ONE(
            "POST",
            "/v1/models/{name:path}/load",
            handlers.load,
            "Load a model into memory before calls need it.",
            LongBody,
            ModelEntry,
            path_words=MODEL,
            also=LATER,
        ),
        ONE(
            "POST",
            "/v1/models/{name:path}/unload",
            handlers.unload,
            "Unload a model, to free its memory. Its sessions stay.",
            gives=UnloadedModel,
            path_words=MODEL,
        ),
        ONE(
            "GET",
            "/v1/results",
            handlers.show_results,
            "List the calls whose results can be fetched, the newest first.",
            gives=ResultList,
        ),
        Endpoint(
            "GET",
            "/v1/results/{id}",
            handlers.show_result,
            "Wait for a call that was answered with a result_id. Results are kept for an hour after their end.",
            gives=CallState,
            query=ResultQuery,
            path_words=RESULT,
        ),
        ONE(
            "DELETE",
            "/v1/results/{id}",
            handlers.drop_result,
            "End a call if it still runs, and forget its result. A turn that is cut off leaves its session as it was.",
            gives=CancelledCall,
            path_words=RESULT,
        ),
    ),
    refuse,
    Problem,
)
