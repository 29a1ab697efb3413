"""Answers at temperature 1 that must be JSON: every one obeys its schema."""

import asyncio
import json

import jsonschema

from tests.real.product import hosting
from tests.real.prompts import EFFORT

TEXT = {"type": "string", "maxLength": 20}
SCHEMAS = {
    "Describe a fruit.": {
        "type": "object",
        "properties": {"name": TEXT, "color": {"enum": ["red", "green", "yellow"]}, "sweet": {"type": "boolean"}},
        "required": ["name", "color", "sweet"],
        "additionalProperties": False,
    },
    "Which numbers are lucky?": {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": 99},
        "minItems": 1,
        "maxItems": 4,
    },
    "Introduce a person with an address.": {
        "type": "object",
        "properties": {
            "name": TEXT,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "address": {
                "type": "object",
                "properties": {"street": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["street", "zip"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "When is the party?": {"type": "string", "format": "date"},
    "Yes, no, or how many?": {
        "anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 1000}, {"type": "null"}]
    },
    "Order lunch. Write it in German.": {
        "$defs": {
            "dish": {
                "type": "object",
                "properties": {"gericht": TEXT},
                "required": ["gericht"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {"gerichte": {"type": "array", "items": {"$ref": "#/$defs/dish"}, "minItems": 1, "maxItems": 2}},
        "required": ["gerichte"],
        "additionalProperties": False,
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": TEXT, "age": {"type": "integer"}, "city": TEXT},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
SEEDS = round(100 * EFFORT) if EFFORT >= 1 else 5


async def test_at_temperature_1_every_answer_of_every_seed_obeys_its_schema(product):
    async with hosting(product) as host:

        async def draw(prompt, schema, seed):
            answer = await host.generate(prompt, json_schema=schema, temperature=1.0, seed=seed, max_tokens=300)
            assert answer["finish_reason"] == "stop", answer
            jsonschema.validate(json.loads(answer["text"]), schema, jsonschema.Draft202012Validator)
            return answer["text"]

        for first in range(0, SEEDS, 100):
            seeds = range(first, min(first + 100, SEEDS))
            calls = [draw(prompt, schema, seed) for prompt, schema in SCHEMAS.items() for seed in seeds]
            texts = await asyncio.gather(*calls)
            assert len(set(texts)) > len(texts) // 2


async def test_a_pattern_changes_no_token_that_the_model_would_have_written_anyway(product):
    question = "What is the capital of France?"
    async with hosting(product) as host:
        free = await host.generate(question, max_tokens=40)
        held = await host.generate(question, regex=r"[A-Z][A-Za-z ,']{1,80}\.", max_tokens=40)
    assert (held["text"], held["finish_reason"]) == (free["text"], "stop")
    assert "Paris" in held["text"]


async def test_what_a_text_says_is_found_in_the_json_that_is_made_of_it(product):
    note = "Maria Lopez, aged 34, moved to Madrid in May. She works as a nurse."
    async with hosting(product) as host:
        answer = await host.generate(f"Write as JSON with name, age and city: {note}", json_schema=PERSON)
    assert json.loads(answer["text"]) == {"name": "Maria Lopez", "age": 34, "city": "Madrid"}
