"""What all shapes have in common: how a body is read, and what of an answer is sent."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from starlette.responses import Response

from mlx_mcp.api.web.events import encoded


class Taken(BaseModel):
    """A part of a request. What is null counts as left out, and what nobody knows is ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """The members that are not null."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class Given(BaseModel):
    """A part of an answer.

    Sent are the members that were set, null among them, and those whose default is not null. A member that is null by
    default is left out unless it was set.
    """

    always: ClassVar[frozenset[str]] = frozenset()  # the members whose default is not null

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Note what is always sent: at each token of a stream there is no time to look."""
        cls.always = frozenset(name for name, field in cls.model_fields.items() if field.default is not None)

    def model_post_init(self, context: Any) -> None:
        """Count what is always sent as set."""
        self.model_fields_set.update(self.always)

    def sent(self) -> dict[str, Any]:
        """The members that are sent."""
        return self.model_dump(mode="json", exclude_unset=True)


def answer(given: Given, status: int = 200) -> Response:
    """A response with a shape as its body."""
    return Response(given.model_dump_json(exclude_unset=True), status, media_type="application/json")


def event(given: Given, name: str = "") -> bytes:
    """An event with a shape as its data, as it is sent."""
    return encoded(given.model_dump_json(exclude_unset=True), name)


MARK = "\0"  # the text of a template, which is filled in
AS_JSON = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder for each text


class Template:
    """Events that differ in one text: made anew at each token, they would cost several times as much."""

    def __init__(self, given: Given) -> None:
        """The shape has MARK wherever the text belongs."""
        self._parts = given.model_dump_json(exclude_unset=True).split('"\\u0000"')

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return encoded(AS_JSON(text).join(self._parts))
